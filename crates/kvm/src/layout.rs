//! Where things are in guest physical memory.
//!
//! ```text
//! 0            0x500  0x6000   0x7000  0x9000  0x20000        0x9fc00  0xe0000  1 MiB              3 GiB            4 GiB
//! | (unused)   | GDT  | start  | zero  | page  | command line |        | ACPI   | kernel ... initrd | devices       | ram-high
//! |            |      | info   | page  | tables|              |        | tables |                   | APICs, TSS    |
//! ```
//!
//! RAM is one memory slot below 3 GiB (`ram-low`) and, if there is more, one from 4 GiB on (`ram-high`).

use pagewarp_codec::PAGE_SIZE;
use pagewarp_engine::vm::RegionInfo;

/// Guest memory comes in multiples of this, so that every region can be backed by huge pages.
pub(crate) const MEMORY_GRANULE: u64 = 2 << 20;

/// Where RAM below 4 GiB ends at the latest; above are the devices.
pub(crate) const LOW_RAM_END: u64 = 3 << 30;
/// Where RAM goes on.
pub(crate) const HIGH_RAM_START: u64 = 4 << 30;

/// The GDT that the 64-bit Linux boot protocol asks for.
pub(crate) const GDT: u64 = 0x500;
/// PVH: `hvm_start_info`, with its module list 0x100 and its memory map 0x200 further on.
pub(crate) const PVH_START_INFO: u64 = 0x6000;
pub(crate) const PVH_MODULES: u64 = 0x6100;
pub(crate) const PVH_MEMMAP: u64 = 0x6200;
/// Linux: `boot_params`.
pub(crate) const ZERO_PAGE: u64 = 0x7000;
/// Linux: top of the stack that the boot protocol asks for.
pub(crate) const BOOT_STACK: u64 = 0x8ff0;
/// Linux: a PML4, a PDPT and four page directories.
pub(crate) const PAGE_TABLES: u64 = 0x9000;
/// The command line, ended by a zero.
pub(crate) const CMDLINE: u64 = 0x2_0000;
/// End of the conventional memory that a kernel may use, as on a PC with an extended BIOS data area.
pub(crate) const CONVENTIONAL_END: u64 = 0x9_fc00;
/// The ACPI tables, where a kernel without better advice looks for a BIOS's.
pub(crate) const ACPI_TABLES: u64 = 0xe_0000;
/// Where a processor in real mode goes to reset: 0xffff:0.
pub(crate) const RESET_VECTOR: u64 = 0xf_fff0;
/// Start of the memory above the legacy hole.
pub(crate) const HIMEM: u64 = 0x10_0000;
/// The end of an initrd: Linux's boot protocol promises `initrd_addr_max` to be at least this, less one.
pub(crate) const INITRD_END_MAX: u64 = 0x3800_0000;

/// The I/O APIC and the local APICs, as on every PC.
pub(crate) const IO_APIC: u32 = 0xfec0_0000;
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;
/// One page and, right above, three pages that KVM needs on some Intel processors.
pub(crate) const IDENTITY_MAP: u64 = 0xfffb_c000;
pub(crate) const TSS: usize = 0xfffb_d000;

/// One memory slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    /// The id of the region and the number of KVM's slot.
    pub id: u32,
    pub name: &'static str,
    /// Guest physical address.
    pub start: u64,
    pub bytes: u64,
}

/// The slots of a machine with this much memory.
pub(crate) fn slots(memory_bytes: u64) -> Vec<Slot> {
    let low = memory_bytes.min(LOW_RAM_END);
    let mut slots = vec![Slot { id: 0, name: "ram-low", start: 0, bytes: low }];
    if memory_bytes > low {
        slots.push(Slot { id: 1, name: "ram-high", start: HIGH_RAM_START, bytes: memory_bytes - low });
    }
    slots
}

/// The same for the engine.
pub(crate) fn regions(memory_bytes: u64) -> Vec<RegionInfo> {
    let region =
        |s: Slot| RegionInfo { id: s.id, name: s.name.to_owned(), pages: s.bytes / PAGE_SIZE as u64 };
    slots(memory_bytes).into_iter().map(region).collect()
}

/// One range of the memory map that the guest is told about: start, bytes, whether it is RAM (else reserved).
pub(crate) fn memory_map(memory_bytes: u64) -> Vec<(u64, u64, bool)> {
    let mut map = Vec::new();
    for slot in slots(memory_bytes) {
        if slot.start == 0 {
            map.push((0, CONVENTIONAL_END, true));
            map.push((CONVENTIONAL_END, HIMEM - CONVENTIONAL_END, false));
            map.push((HIMEM, slot.bytes - HIMEM, true));
        } else {
            map.push((slot.start, slot.bytes, true));
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_beyond_3_gib_continues_at_4_gib() {
        assert_eq!(slots(LOW_RAM_END).len(), 1);
        let two = slots(LOW_RAM_END + MEMORY_GRANULE);
        assert_eq!((two[1].start, two[1].bytes), (HIGH_RAM_START, MEMORY_GRANULE));
        let ram: u64 = memory_map(5 << 30).iter().filter(|r| r.2).map(|r| r.1).sum();
        assert_eq!(ram, (5 << 30) - (HIMEM - CONVENTIONAL_END));
        assert_eq!(regions(5 << 30).iter().map(|r| r.pages).sum::<u64>(), (5 << 30) / 4096);
    }
}
