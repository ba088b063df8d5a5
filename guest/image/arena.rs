//! The arena: all usable RAM, mapped contiguously, as one slice.

use crate::pvh::{MAP_MAX, RamRange};

const CHUNK: u64 = 2 << 20;
const ENTRIES: usize = 64 * 512;
/// Where the boot code's page tables put the arena (PML4 entry 1).
pub const BASE: u64 = 512 << 30;
/// Present, writable, user, accessed, dirty, 2 MiB.
const PDE_FLAGS: u64 = 0xe7;

unsafe extern "C" {
    static mut pd_arena: [u64; ENTRIES];
    static image_end: u8;
}

/// Maps the RAM above the image and returns it. Must be called once.
///
/// RAM is used in aligned chunks of 2 MiB; what is left over at the edges stays untouched, as does everything
/// below the image.
pub fn map(ram: &[RamRange; MAP_MAX], limit_mib: Option<u64>) -> &'static mut [u64] {
    let reserved_end = (&raw const image_end) as u64;
    let limit = limit_mib.map_or(ENTRIES as u64, |mib| (mib << 20) / CHUNK).min(ENTRIES as u64) as usize;
    let mut used = 0;
    for range in ram {
        let start = range.start.max(reserved_end).next_multiple_of(CHUNK);
        let mut chunk = start;
        while used < limit && chunk + CHUNK <= range.end {
            // SAFETY: `used` is below ENTRIES. The page directories belong to this function alone; their
            // entries go from not present to present before anything uses the addresses, so no stale
            // translation can exist.
            unsafe { (&raw mut pd_arena).cast::<u64>().add(used).write_volatile(chunk | PDE_FLAGS) };
            used += 1;
            chunk += CHUNK;
        }
    }
    let words = used * (CHUNK as usize / 8);
    // SAFETY: the `used` chunks at BASE were just mapped to RAM that the loader says is RAM, that holds
    // neither the image nor anything read later, and that nothing else refers to. Any bytes are valid u64s.
    unsafe { core::slice::from_raw_parts_mut(BASE as *mut u64, words) }
}

/// The arena as bytes.
pub fn bytes(mem: &'static mut [u64]) -> &'static mut [u8] {
    // SAFETY: bytes need no alignment, any bytes are valid on both sides, and the words are given up.
    unsafe { core::slice::from_raw_parts_mut(mem.as_mut_ptr().cast(), mem.len() * 8) }
}

/// The guest-physical address of a byte of the arena.
pub fn physical(at: usize) -> u64 {
    let chunk = at / CHUNK as usize;
    if chunk >= ENTRIES {
        return 0;
    }
    // SAFETY: `chunk` is below ENTRIES, and the directories are only written by `map`, which has returned.
    let entry = unsafe { (&raw const pd_arena).cast::<u64>().add(chunk).read_volatile() };
    (entry & !(CHUNK - 1)) + at as u64 % CHUNK
}
