//! The 64-bit Linux boot protocol: long mode with paging on, RSI points to `boot_params`.
//!
//! Source: the kernel's `Documentation/arch/x86/boot.rst`.

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::registers::{self, Entry};
use super::{Initrd, is_ram};
use crate::error::Error;
use crate::layout;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// "Undefined": a loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// Since this version the header has everything used here.
const PROTOCOL_MIN: u16 = 0x20c;
const XLOADFLAGS_KERNEL_64: u16 = 1;
/// The 64-bit entry is this far into the loaded image.
const ENTRY_64: u64 = 0x200;

/// Where the memory ends that the kernel needs before it has read its memory map: above what was loaded, it unpacks itself.
pub(super) fn end(header: &setup_header, loaded_end: u64) -> u64 {
    let (preferred, unpacked) = (header.pref_address, u64::from(header.init_size));
    loaded_end.max(preferred.saturating_add(unpacked))
}

/// Writes `boot_params` and the page tables, and returns the entry.
pub(super) fn prepare(
    header: setup_header,
    kernel: u64,
    cmdline_bytes: usize,
    initrd: Option<Initrd>,
    memory_bytes: u64,
    guest: &GuestMemoryMmap,
) -> Result<Entry, Error> {
    let (version, flags) = (header.version, header.xloadflags);
    if version < PROTOCOL_MIN || flags & XLOADFLAGS_KERNEL_64 == 0 {
        return Err(Error::Kernel(format!(
            "the bzImage has no 64-bit entry (boot protocol {version:#x}, load flags {flags:#x}); use a 64-bit kernel of version 3.8 or newer"
        )));
    }
    let (preferred, unpacked) = (header.pref_address, u64::from(header.init_size));
    if !is_ram(guest, preferred, unpacked) {
        return Err(Error::Kernel(format!(
            "the kernel unpacks itself to {preferred:#x}, {} MiB; give the VM more memory",
            unpacked >> 20
        )));
    }
    let limit = header.cmdline_size as usize;
    if cmdline_bytes > limit + 1 {
        return Err(Error::Config(format!(
            "command line: {} bytes; this kernel takes at most {limit}",
            cmdline_bytes - 1
        )));
    }

    let mut params = boot_params { hdr: header, ..Default::default() };
    params.acpi_rsdp_addr = layout::ACPI_TABLES;
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = initrd.start as u32;
        params.hdr.ramdisk_size = initrd.bytes as u32;
    }
    let map = layout::memory_map(memory_bytes);
    params.e820_entries = map.len() as u8;
    for (entry, (addr, size, ram)) in params.e820_table.iter_mut().zip(map) {
        *entry = boot_e820_entry { addr, size, r#type: if ram { E820_RAM } else { E820_RESERVED } };
    }
    LinuxBootConfigurator::write_bootparams(
        &BootParams::new(&params, GuestAddress(layout::ZERO_PAGE)),
        guest,
    )
    .map_err(|e| Error::Kernel(e.to_string()))?;
    registers::write_long_mode_tables(guest)?;
    Ok(Entry::Linux64 { rip: kernel + ENTRY_64 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_ends_where_it_has_unpacked_itself() {
        let header = |pref_address, init_size| setup_header { pref_address, init_size, ..Default::default() };
        assert_eq!(end(&header(0x100_0000, 0x200_0000), 0x80_0000), 0x300_0000);
        assert_eq!(end(&header(0x100_0000, 0x1000), 0x400_0000), 0x400_0000);
        assert_eq!(end(&header(u64::MAX, 1), 0), u64::MAX);
    }
}
