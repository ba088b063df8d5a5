//! MP tables: how a guest without ACPI finds its processors and its interrupts.
//!
//! Source: Intel's MultiProcessor Specification 1.4.

use crate::layout;

const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

/// Interrupt types.
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;

const ENABLED: u8 = 1;
const BOOT_PROCESSOR: u8 = 2;
const APIC_VERSION: u8 = 0x14;
const ISA_BUS: u8 = 0;
const ISA_INTERRUPTS: u8 = 16;
const ALL_LOCAL_APICS: u8 = 0xff;

const POINTER_BYTES: usize = 16;
const HEADER_BYTES: usize = 44;

/// The floating pointer and right after it the configuration table, to be written at [`layout::MP_TABLES`].
pub(super) fn build(vcpus: u32) -> Vec<u8> {
    // The I/O APIC's id must differ from every processor's.
    let io_apic_id = vcpus as u8;
    let mut entries: Vec<Vec<u8>> = Vec::new();
    for id in 0..vcpus as u8 {
        let flags = ENABLED | if id == 0 { BOOT_PROCESSOR } else { 0 };
        let mut entry = vec![PROCESSOR, id, APIC_VERSION, flags];
        entry.extend_from_slice(&0x600u32.to_le_bytes()); // signature: family 6
        entry.extend_from_slice(&0x201u32.to_le_bytes()); // features: FPU and APIC on the chip
        entry.extend_from_slice(&[0; 8]);
        entries.push(entry);
    }
    let mut bus = vec![BUS, ISA_BUS];
    bus.extend_from_slice(b"ISA   ");
    entries.push(bus);
    let mut io_apic = vec![IO_APIC, io_apic_id, 0x11, ENABLED];
    io_apic.extend_from_slice(&layout::IO_APIC.to_le_bytes());
    entries.push(io_apic);
    // Interrupts come edge-triggered and active high, as the bus has it (flags 0). KVM's timer is on pin 0 as well as on pin 2; pin 2 is
    // what operating systems expect of a PC.
    for irq in (0..ISA_INTERRUPTS).filter(|&irq| irq != 2) {
        let pin = if irq == 0 { 2 } else { irq };
        entries.push(vec![IO_INTERRUPT, INT, 0, 0, ISA_BUS, irq, io_apic_id, pin]);
    }
    entries.push(vec![LOCAL_INTERRUPT, EXT_INT, 0, 0, ISA_BUS, 0, 0, 0]);
    entries.push(vec![LOCAL_INTERRUPT, NMI, 0, 0, ISA_BUS, 0, ALL_LOCAL_APICS, 1]);

    let body = entries.concat();
    let mut table = b"PCMP".to_vec();
    table.extend_from_slice(&((HEADER_BYTES + body.len()) as u16).to_le_bytes());
    table.extend_from_slice(&[4, 0]); // specification 1.4; the checksum goes to the second byte
    table.extend_from_slice(b"PAGEWARPREFERENCEVMM");
    table.extend_from_slice(&[0; 6]); // no OEM table
    table.extend_from_slice(&(entries.len() as u16).to_le_bytes());
    table.extend_from_slice(&layout::LOCAL_APIC.to_le_bytes());
    table.extend_from_slice(&[0; 4]);
    table.extend_from_slice(&body);
    table[7] = checksum(&table);

    let mut tables = b"_MP_".to_vec();
    tables.extend_from_slice(&(layout::MP_TABLES as u32 + POINTER_BYTES as u32).to_le_bytes());
    tables.extend_from_slice(&[1, 4, 0, 0, 0, 0, 0, 0]); // one paragraph long, specification 1.4
    tables[10] = checksum(&tables);
    tables.extend_from_slice(&table);
    tables
}

/// What makes the sum of the bytes 0.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_counts_and_checksums_agree() {
        for vcpus in [1, 4, crate::config::MAX_VCPUS] {
            let tables = build(vcpus);
            let (pointer, table) = tables.split_at(POINTER_BYTES);
            assert_eq!(checksum(pointer), 0);
            assert_eq!(checksum(table), 0);
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            let mut at = HEADER_BYTES;
            let mut count = 0;
            while at < table.len() {
                at += if table[at] == PROCESSOR { 20 } else { 8 };
                count += 1;
            }
            assert_eq!((at, count), (table.len(), u16::from_le_bytes([table[34], table[35]])));
            assert!(layout::MP_TABLES + tables.len() as u64 <= layout::HIMEM);
        }
    }
}
