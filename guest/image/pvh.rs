//! What the loader hands over: the PVH start info (Xen's `hvm_start_info`), its command line and memory map.

const MAGIC: u32 = 0x336e_c578;
const RAM: u32 = 1;
/// Longest command line taken, in bytes.
pub const CMDLINE_MAX: usize = 1024;
/// Most ranges of RAM taken.
pub const MAP_MAX: usize = 32;

#[repr(C)]
#[derive(Clone, Copy)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    nr_modules: u32,
    modlist_paddr: u64,
    cmdline_paddr: u64,
    rsdp_paddr: u64,
    // From version 1 on.
    memmap_paddr: u64,
    memmap_entries: u32,
    reserved: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MapEntry {
    addr: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

/// A range of RAM: guest-physical addresses, `end` excluded.
#[derive(Clone, Copy, Default)]
pub struct RamRange {
    pub start: u64,
    pub end: u64,
}

/// A copy of everything the loader said, so that its own copy may be overwritten.
pub struct Handover {
    cmdline: [u8; CMDLINE_MAX],
    cmdline_len: usize,
    pub ram: [RamRange; MAP_MAX],
}

impl Handover {
    /// Reads the start info at guest-physical address `start_info`.
    pub fn read(start_info: u64) -> Result<Handover, &'static str> {
        if start_info == 0 || start_info >= 4 << 30 {
            return Err("the loader passed no start info below 4 GiB in EBX; boot the image through PVH");
        }
        // SAFETY: below 4 GiB everything is mapped, and the PVH contract puts an hvm_start_info there. Any
        // bytes are a valid StartInfo; the magic number tells whether they are one.
        let info = unsafe { (start_info as *const StartInfo).read_unaligned() };
        if info.magic != MAGIC {
            return Err("the start info has the wrong magic number; boot the image through PVH");
        }
        if info.version < 1 || info.memmap_paddr == 0 {
            return Err("the start info has no memory map; the loader must pass version 1 or newer");
        }
        let mut h =
            Handover { cmdline: [0; CMDLINE_MAX], cmdline_len: 0, ram: [RamRange::default(); MAP_MAX] };
        if info.cmdline_paddr != 0 {
            while h.cmdline_len < CMDLINE_MAX {
                let at = info.cmdline_paddr + h.cmdline_len as u64;
                // SAFETY: the contract puts a NUL-terminated string there; below 4 GiB everything is mapped.
                let byte = if at < 4 << 30 { unsafe { (at as *const u8).read() } } else { 0 };
                if byte == 0 {
                    break;
                }
                h.cmdline[h.cmdline_len] = byte;
                h.cmdline_len += 1;
            }
        }
        let mut n = 0;
        for i in 0..info.memmap_entries.min(128) as u64 {
            let at = info.memmap_paddr + i * size_of::<MapEntry>() as u64;
            if at + size_of::<MapEntry>() as u64 > 4 << 30 || n == MAP_MAX {
                break;
            }
            // SAFETY: as above: mapped, and any bytes are a valid MapEntry.
            let entry = unsafe { (at as *const MapEntry).read_unaligned() };
            if entry.kind == RAM {
                h.ram[n] = RamRange { start: entry.addr, end: entry.addr.saturating_add(entry.size) };
                n += 1;
            }
        }
        if n == 0 {
            return Err("the memory map lists no RAM");
        }
        Ok(h)
    }

    /// The command line; what is not UTF-8 is cut off.
    pub fn cmdline(&self) -> &str {
        let bytes = &self.cmdline[..self.cmdline_len];
        match core::str::from_utf8(bytes) {
            Ok(s) => s,
            Err(e) => core::str::from_utf8(&bytes[..e.valid_up_to()]).unwrap_or(""),
        }
    }
}
