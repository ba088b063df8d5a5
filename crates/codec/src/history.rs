//! The history: page versions sent before, in numbered slots, shared by the encoders of one migration.

use std::alloc::{Layout, handle_alloc_error};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use memmap2::{Advice, MmapMut, MmapOptions};
use zerocopy::FromBytes;
use zeroize::Zeroize;

use crate::page::{PAGE_SIZE, Page};

/// Slots whose memory is taken together and that share a lock: a huge page of 2 MiB.
const CHUNK: usize = 512;
const CHUNK_BYTES: usize = CHUNK * PAGE_SIZE;

/// Memory in use by histories, in bytes. Shared with whoever wants to know.
pub type Resident = Arc<AtomicU64>;

/// The memory of a chunk, in one huge page if the system has them: 512 page faults would cost more than encoding what goes into them.
///
/// It holds pages of a guest. Therefore it is in no core dump, and is overwritten before it is given back: the kernel clears memory only when it hands it
/// out again, which may be long after.
struct Memory {
    map: MmapMut,
    /// Where the huge page begins.
    start: usize,
    /// Bit i % 64 of entry i / 64: slot i was used.
    used: [u64; CHUNK / 64],
}

impl Memory {
    fn take() -> Memory {
        // Twice as much of the address space, so that there is a whole huge page in it; the rest is never touched.
        let map = MmapOptions::new().len(2 * CHUNK_BYTES).map_anon();
        let map = map.unwrap_or_else(|_| handle_alloc_error(Layout::new::<[Page; CHUNK]>()));
        let start = map.as_ptr().align_offset(CHUNK_BYTES);
        // Small pages do as well. All of it, so that the system can merge it with its neighbours: a process may have no more than some ten thousand mappings.
        let _ = map.advise(Advice::HugePage);
        // Only a kernel without core dumps does not know it.
        let _ = map.advise(Advice::DontDump);
        Memory { map, start, used: [0; CHUNK / 64] }
    }

    fn page(&mut self, index: usize) -> &mut Page {
        self.used[index / 64] |= 1 << (index % 64);
        Page::mut_from_bytes(self.bytes(index)).expect("a slot is as long and as aligned as a page")
    }

    fn bytes(&mut self, index: usize) -> &mut [u8] {
        &mut self.map[self.start + index * PAGE_SIZE..][..PAGE_SIZE]
    }

    /// Overwrites what was used, and touches nothing else: that would take memory.
    fn wipe(&mut self) {
        for index in 0..CHUNK {
            if self.used[index / 64] >> (index % 64) & 1 != 0 {
                // Eight bytes at a time: `zeroize` writes each item by itself.
                let words = <[u64]>::mut_from_bytes(self.bytes(index));
                words.expect("a page is aligned to more than a word").zeroize();
            }
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.wipe();
    }
}

/// 512 slots, once one of them was used.
type Chunk = Option<Memory>;

/// Numbered slots, each with one page version; zero until first stored.
///
/// Memory is taken in chunks of 512 slots when the first slot of a chunk is used, and given back, overwritten with zeros, when the history is
/// dropped. It is left out of core dumps. Each chunk has its own lock, held while one page is encoded.
pub struct History {
    chunks: Box<[Mutex<Chunk>]>,
    slots: u32,
    resident: Resident,
}

impl History {
    /// A history of so many slots, which counts the memory it takes in `resident`.
    pub fn new(slots: u32, resident: Resident) -> History {
        let chunks = (slots as usize).div_ceil(CHUNK);
        History { chunks: (0..chunks).map(|_| Mutex::new(None)).collect(), slots, resident }
    }

    /// Calls `f` with the version in the slot, which it may overwrite. Nobody else sees the slot meanwhile.
    ///
    /// # Panics
    ///
    /// If there is no such slot: slots are numbered by the caller, never by the peer.
    pub fn with_slot<R>(&self, slot: u32, f: impl FnOnce(&mut Page) -> R) -> R {
        assert!(slot < self.slots, "history slot {slot}, but there are {} slots", self.slots);
        let (chunk, index) = (slot as usize / CHUNK, slot as usize % CHUNK);
        // A page that a panic left half written is a wrong base at worst, which the plain hash reveals.
        let mut chunk = self.chunks[chunk].lock().unwrap_or_else(PoisonError::into_inner);
        let memory = chunk.get_or_insert_with(|| {
            self.resident.fetch_add(CHUNK_BYTES as u64, Ordering::Relaxed);
            Memory::take()
        });
        f(memory.page(index))
    }
}

impl Drop for History {
    fn drop(&mut self) {
        let used = self.chunks.iter_mut().filter_map(|c| c.get_mut().ok()).filter(|c| c.is_some()).count();
        self.resident.fetch_sub((used * CHUNK_BYTES) as u64, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_taken_by_chunk_on_first_use_and_given_back() {
        let resident = Resident::default();
        let history = History::new(1000, resident.clone());
        assert_eq!(resident.load(Ordering::Relaxed), 0);
        history.with_slot(0, |page| page.0[7] = 1);
        history.with_slot(511, |page| page.0[7] = 2);
        assert_eq!(resident.load(Ordering::Relaxed), 512 * 4096);
        history.with_slot(999, |page| assert_eq!(*page, Page::ZERO));
        assert_eq!(resident.load(Ordering::Relaxed), 2 * 512 * 4096);
        assert_eq!(history.with_slot(0, |page| page.0[7]), 1);
        assert_eq!(history.with_slot(511, |page| page.0[7]), 2);
        drop(history);
        assert_eq!(resident.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn what_was_used_is_overwritten_and_the_rest_never_touched() {
        let mut memory = Memory::take();
        for index in [0, 1, 63, 64, 511] {
            memory.page(index).0.fill(0xa5);
        }
        memory.bytes(2).fill(0x5a);
        memory.wipe();
        for index in [0, 1, 63, 64, 511] {
            assert_eq!(*memory.page(index), Page::ZERO, "slot {index}");
        }
        assert!(memory.bytes(2).iter().all(|&byte| byte == 0x5a), "nobody has used it");
    }

    #[test]
    fn core_dumps_leave_it_out() {
        let history = History::new(1, Resident::default());
        let address = history.with_slot(0, |page| page.0.as_ptr() as usize);
        let flags = pagewarp_testkit::mapping::mapping_flags(address);
        assert!(flags.iter().any(|flag| flag == "dd"), "{flags:?}");
    }

    #[test]
    #[should_panic(expected = "history slot 10, but there are 10 slots")]
    fn a_slot_out_of_range_panics() {
        History::new(10, Resident::default()).with_slot(10, |_| ());
    }
}
