//! ACPI tables: how a guest finds its processors, the interrupt of the serial port, and the registers to reset and to power off.
//!
//! The machine is *hardware-reduced* in ACPI's sense: no SCI, no power management timer, no legacy PIC that a guest would have to use; it
//! takes its time from its local APICs and its TSC or KVM clock. MP tables would say less, and kernels made for virtual machines are
//! often built without them. Source: the ACPI specification 6.5, chapters 4.1, 5.2 and 6.4.

use acpi_tables::Aml;
use acpi_tables::aml::{Device, EISAName, IO, Interrupt, Name, ONE, Package, ResourceTemplate, Scope, ZERO};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use crate::devices::{
    I8042_COMMAND, I8042_RESET, SERIAL_BASE, SERIAL_IRQ, SERIAL_PORTS, SLEEP_CONTROL, SLEEP_STATUS,
};
use crate::layout;

const OEM_ID: [u8; 6] = *b"PAGEWP";
const OEM_TABLE_ID: [u8; 8] = *b"PAGEWARP";
const OEM_REVISION: u32 = 1;

/// Boot architecture flags of the FADT: there is no VGA, no MSI (for want of PCI) and no CMOS clock. Not set are those that would promise
/// legacy devices and a keyboard controller: of that there is only the reset line.
const NO_VGA: u16 = 1 << 2;
const NO_MSI: u16 = 1 << 3;
const NO_CMOS_RTC: u16 = 1 << 5;

const DSDT_HEADER_BYTES: u32 = 36;
/// The second revision introduced 64-bit integers.
const DSDT_REVISION: u8 = 2;
/// Tables start at multiples of this; the RSDP must at multiples of 16.
const ALIGN: usize = 16;

/// All tables, to be written at [`layout::ACPI_TABLES`]; the RSDP comes first.
pub(super) fn build(vcpus: u32) -> Vec<u8> {
    let mut tables = Tables { bytes: vec![0; Rsdp::len()] };
    let dsdt = tables.push(&dsdt());
    let fadt = tables.push(&fadt(dsdt));
    let madt = tables.push(&madt(vcpus));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = tables.push(&xsdt);

    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    tables.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    tables.bytes
}

/// Tables one after another.
struct Tables {
    bytes: Vec<u8>,
}

impl Tables {
    /// Appends a table and returns its guest physical address.
    fn push(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGN), 0);
        let address = layout::ACPI_TABLES + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        address
    }
}

/// What there is beside processors and APICs: the serial port, and that the machine can be switched off (sleep state 5).
fn dsdt() -> Sdt {
    let mut body = Vec::new();
    let io = IO::new(SERIAL_BASE, SERIAL_BASE, 1, SERIAL_PORTS as u8);
    let interrupt = Interrupt::new(true, true, false, false, SERIAL_IRQ);
    Scope::new(
        "\\_SB_".into(),
        vec![&Device::new(
            "COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &ONE),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&io, &interrupt])),
            ],
        )],
    )
    .to_aml_bytes(&mut body);
    Name::new("\\_S5_".into(), &Package::new(vec![&ZERO])).to_aml_bytes(&mut body);

    let mut dsdt = Sdt::new(*b"DSDT", DSDT_HEADER_BYTES, DSDT_REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&body);
    dsdt
}

fn fadt(dsdt: u64) -> impl Aml {
    let port = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        // Without these two a guest expects fixed power and sleep buttons.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (NO_VGA | NO_MSI | NO_CMOS_RTC).into();
    fadt.reset_reg = port(I8042_COMMAND);
    fadt.reset_value = I8042_RESET;
    fadt.sleep_control_reg = port(SLEEP_CONTROL);
    fadt.sleep_status_reg = port(SLEEP_STATUS);
    fadt.finalize()
}

fn madt(vcpus: u32) -> MADT {
    let apics = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, apics);
    for id in 0..vcpus as u8 {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IO_APIC, 0));
    madt
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte))
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// The table at a guest physical address, with its length and checksum checked.
    fn table(bytes: &[u8], address: u64) -> &[u8] {
        let bytes = &bytes[(address - layout::ACPI_TABLES) as usize..];
        let table = &bytes[..u32_at(bytes, 4) as usize];
        assert_eq!(sum(table), 0, "checksum of {:?}", std::str::from_utf8(&table[..4]));
        table
    }

    #[test]
    fn every_table_is_found_from_the_root_with_a_good_checksum() {
        for vcpus in [1, 4, crate::config::MAX_VCPUS] {
            let bytes = build(vcpus);
            assert!(layout::ACPI_TABLES + bytes.len() as u64 <= layout::RESET_VECTOR);
            assert_eq!(&bytes[..8], b"RSD PTR ");
            assert_eq!((sum(&bytes[..20]), sum(&bytes[..36])), (0, 0));

            let xsdt = table(&bytes, u64_at(&bytes, 24));
            assert_eq!((&xsdt[..4], xsdt.len()), (&b"XSDT"[..], 36 + 2 * 8));
            let fadt = table(&bytes, u64_at(xsdt, 36));
            assert_eq!(&fadt[..4], b"FACP");
            assert_eq!(&table(&bytes, u64_at(fadt, 140))[..4], b"DSDT");
            let madt = table(&bytes, u64_at(xsdt, 44));
            assert_eq!(&madt[..4], b"APIC");
            let processors = (0..vcpus as usize).map(|n| madt[44 + 8 * n + 3]);
            assert!(processors.eq(0..vcpus as u8), "one entry a vCPU, with its APIC id");
            assert_eq!(madt.len(), 44 + 8 * vcpus as usize + 12);
        }
    }

    #[test]
    fn a_guest_learns_how_to_reset_and_to_power_off() {
        let mut fadt = Vec::new();
        super::fadt(0).to_aml_bytes(&mut fadt);
        // Address space, then the address in the last eight of twelve bytes.
        assert_eq!((fadt[116], u64_at(&fadt, 120)), (1, I8042_COMMAND.into()));
        assert_eq!(fadt[128], I8042_RESET);
        assert_eq!((fadt[244], u64_at(&fadt, 248)), (1, SLEEP_CONTROL.into()));
        assert_eq!((fadt[256], u64_at(&fadt, 260)), (1, SLEEP_STATUS.into()));
        assert_ne!(u32_at(&fadt, 112) & Flags::HwReducedAcpi as u32, 0);
    }
}
