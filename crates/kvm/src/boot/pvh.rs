//! The PVH boot protocol: 32-bit entry without paging, EBX points to the start info.
//!
//! Source: Xen's `docs/misc/pvh.pandoc` and `public/arch-x86/hvm/start_info.h`.

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::registers::Entry;
use super::{Initrd, is_ram};
use crate::error::Error;
use crate::layout;

const MAGIC: u32 = 0x336e_c578;
const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// Writes the start info and returns the entry.
pub(super) fn prepare(
    entry: u64,
    initrd: Option<Initrd>,
    memory_bytes: u64,
    guest: &GuestMemoryMmap,
) -> Result<Entry, Error> {
    let entry = u32::try_from(entry).ok().filter(|&e| is_ram(guest, e.into(), 1)).ok_or_else(|| {
        Error::Kernel(format!("the PVH entry {entry:#x} is outside the VM's memory below 4 GiB"))
    })?;
    let memmap: Vec<_> = layout::memory_map(memory_bytes)
        .into_iter()
        .map(|(addr, size, ram)| hvm_memmap_table_entry {
            addr,
            size,
            type_: if ram { RAM } else { RESERVED },
            reserved: 0,
        })
        .collect();
    let modules: Vec<_> = initrd
        .map(|i| hvm_modlist_entry { paddr: i.start, size: i.bytes, ..Default::default() })
        .into_iter()
        .collect();
    let info = hvm_start_info {
        magic: MAGIC,
        version: 1,
        nr_modules: modules.len() as u32,
        modlist_paddr: if modules.is_empty() { 0 } else { layout::PVH_MODULES },
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: layout::ACPI_TABLES,
        memmap_paddr: layout::PVH_MEMMAP,
        memmap_entries: memmap.len() as u32,
        ..Default::default()
    };
    let mut params = BootParams::new(&info, GuestAddress(layout::PVH_START_INFO));
    params.set_sections(&memmap, GuestAddress(layout::PVH_MEMMAP));
    if !modules.is_empty() {
        params.set_modules(&modules, GuestAddress(layout::PVH_MODULES));
    }
    PvhBootConfigurator::write_bootparams(&params, guest).map_err(|e| Error::Kernel(e.to_string()))?;
    Ok(Entry::Pvh { rip: entry })
}
