//! The history in device memory: page versions sent before, in numbered slots, shared by the encoders of one migration.

use std::sync::Arc;

use pagewarp_codec::{PAGE_SIZE, SlotUse};
use wgpu::{Buffer, BufferUsages};

use crate::device::Gpu;

const PAGE_BYTES: u64 = PAGE_SIZE as u64;
/// Device memory that is taken together, at least: 64 MiB.
const MIN_CHUNK_SLOTS: u64 = (64 << 20) / PAGE_BYTES;
/// Chunks of a history, unless the device cannot bind such large ones: each chunk that a batch touches is a dispatch.
const MAX_CHUNKS: u64 = 64;

/// What is done with the memory: kernels use it, and at the end it is overwritten, which a test looks at.
const USAGE: BufferUsages = BufferUsages::STORAGE.union(BufferUsages::COPY_DST).union(BufferUsages::COPY_SRC);

/// Copies the slot into the batch.
pub(crate) const LOAD: u32 = 1 << 31;
/// Copies the page into the slot.
pub(crate) const STORE: u32 = 1 << 30;

/// Slots whose memory is taken together.
enum Chunk {
    Unused,
    Held(Buffer),
    /// There was no memory: the slots hold nothing.
    Missing,
}

/// Numbered slots, each with one page version or none.
///
/// Memory is taken in chunks when the first slot of a chunk is used, and given back, overwritten with zeros, when the history is dropped: what a driver does with
/// memory of a device before somebody else gets it is its own affair. Where there is
/// no memory the slots stay empty: their pages have no base, and the migration goes on.
///
/// Work on one queue runs in the order of submission. Whoever plans a batch holds the history until it is submitted, so that what
/// the history says of its slots is true when the device gets there.
pub(crate) struct History {
    gpu: Arc<Gpu>,
    slots: u32,
    chunk_slots: u32,
    chunks: Vec<Chunk>,
    /// Bit s % 64 of entry s / 64: slot s holds a version.
    present: Vec<u64>,
    taken_bytes: u64,
    warned: bool,
}

impl History {
    pub(crate) fn new(gpu: &Arc<Gpu>, slots: u32) -> History {
        let chunk_slots = chunk_slots(slots, gpu.max_binding_bytes());
        History {
            gpu: gpu.clone(),
            slots,
            chunk_slots,
            chunks: (0..slots.div_ceil(chunk_slots)).map(|_| Chunk::Unused).collect(),
            present: vec![0; (slots as usize).div_ceil(64)],
            taken_bytes: 0,
            warned: false,
        }
    }

    /// How many slots there are.
    pub(crate) fn slots(&self) -> u32 {
        self.slots
    }

    /// How many of the wanted slots a device has memory for.
    pub(crate) fn offer(wanted: u32, memory_bytes: Option<u64>) -> u32 {
        let limit = memory_bytes.map_or(u64::MAX, |bytes| bytes / PAGE_BYTES);
        wanted.min(u32::try_from(limit).unwrap_or(u32::MAX))
    }

    pub(crate) fn chunk_count(&self) -> usize {
        self.chunks.len()
    }

    /// The memory of a chunk, if it was used and there was memory.
    pub(crate) fn chunk(&self, chunk: usize) -> Option<&Buffer> {
        match self.chunks.get(chunk) {
            Some(Chunk::Held(buffer)) => Some(buffer),
            _ => None,
        }
    }

    /// Decides what is loaded and stored for a batch with these slots, and counts it as done.
    ///
    /// # Panics
    ///
    /// If there is no such slot: slots are numbered by the caller, never by the peer.
    pub(crate) fn plan(&mut self, slots: &[SlotUse], plan: &mut Plan) {
        plan.clear(slots.len());
        for (page, &slot_use) in slots.iter().enumerate() {
            let Some(slot) = slot_use.slot() else { continue };
            assert!(slot < self.slots, "history slot {slot}, but there are {} slots", self.slots);
            let (chunk, in_chunk) = (slot / self.chunk_slots, slot % self.chunk_slots);
            if !self.hold(chunk) {
                continue;
            }
            let (word, bit) = (slot as usize / 64, 1_u64 << (slot % 64));
            let mut flags = STORE;
            if matches!(slot_use, SlotUse::Delta(_)) && self.present[word] & bit != 0 {
                flags |= LOAD;
                plan.has_base[page / 32] |= 1 << (page % 32);
            }
            self.present[word] |= bit;
            plan.moves.push(Move { chunk, entry: [page as u32 | flags, in_chunk] });
        }
        plan.arrange();
    }

    /// Takes the memory of a chunk if that has not been tried yet. Returns whether there is memory.
    fn hold(&mut self, chunk: u32) -> bool {
        let index = chunk as usize;
        if matches!(self.chunks[index], Chunk::Unused) {
            let slots = self.chunk_slots.min(self.slots - chunk * self.chunk_slots);
            self.chunks[index] = self.allocate(u64::from(slots) * PAGE_BYTES);
        }
        matches!(self.chunks[index], Chunk::Held(_))
    }

    fn allocate(&mut self, bytes: u64) -> Chunk {
        let reason = if self.gpu.take_history_bytes(bytes) {
            match self.gpu.buffer("history", bytes, USAGE) {
                Ok(buffer) => {
                    self.taken_bytes += bytes;
                    return Chunk::Held(buffer);
                }
                Err(error) => {
                    self.gpu.give_back_history_bytes(bytes);
                    error.to_string()
                }
            }
        } else {
            format!("the limit of device memory for histories is reached, {bytes} bytes more are wanted")
        };
        if !std::mem::replace(&mut self.warned, true) {
            tracing::warn!(
                held_bytes = self.taken_bytes,
                slots = self.slots,
                "no device memory for a part of the history, its pages are sent without deltas: {reason}"
            );
        }
        Chunk::Missing
    }
}

impl Drop for History {
    fn drop(&mut self) {
        self.gpu.wipe((0..self.chunk_count()).filter_map(|chunk| self.chunk(chunk)));
        self.gpu.give_back_history_bytes(self.taken_bytes);
    }
}

/// Slots in a chunk: few chunks, as large as the device can bind, but no more memory at a time than needed.
fn chunk_slots(slots: u32, max_binding_bytes: u64) -> u32 {
    let wanted = u64::from(slots).div_ceil(MAX_CHUNKS).max(MIN_CHUNK_SLOTS);
    let slots = wanted.min(max_binding_bytes / PAGE_BYTES).min(u64::from(slots)).max(1);
    u32::try_from(slots).unwrap_or(u32::MAX)
}

struct Move {
    chunk: u32,
    entry: [u32; 2],
}

/// What a batch moves from and to the history. Keeps its buffers.
#[derive(Default)]
pub(crate) struct Plan {
    moves: Vec<Move>,
    /// Bit p % 32 of entry p / 32: page p has a base.
    has_base: Vec<u32>,
    runs: Vec<Run>,
}

/// The moves of one chunk: `first .. first + count`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) chunk: usize,
    pub(crate) first: u32,
    pub(crate) count: u32,
}

impl Plan {
    fn clear(&mut self, pages: usize) {
        self.moves.clear();
        self.runs.clear();
        self.has_base.clear();
        self.has_base.resize(pages.div_ceil(32), 0);
    }

    /// Brings moves of the same chunk together.
    fn arrange(&mut self) {
        self.moves.sort_unstable_by_key(|a_move| (a_move.chunk, a_move.entry[1]));
        for (index, a_move) in self.moves.iter().enumerate() {
            match self.runs.last_mut() {
                Some(run) if run.chunk == a_move.chunk as usize => run.count += 1,
                _ => self.runs.push(Run { chunk: a_move.chunk as usize, first: index as u32, count: 1 }),
            }
        }
    }

    /// The moves, for the device: page and flags, slot in its chunk.
    pub(crate) fn moves(&self) -> impl ExactSizeIterator<Item = [u32; 2]> {
        self.moves.iter().map(|a_move| a_move.entry)
    }

    /// The moves by chunk.
    pub(crate) fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// One bit per page, for the device.
    pub(crate) fn has_base_words(&self) -> &[u32] {
        &self.has_base
    }

    /// Whether the history has the base of this page.
    pub(crate) fn has_base(&self, page: usize) -> bool {
        self.has_base.get(page / 32).is_some_and(|word| word >> (page % 32) & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use wgpu::CommandEncoderDescriptor;

    use super::*;
    use crate::backend::GpuConfig;
    use crate::test_support::{assert_no_complaints, software_adapter};
    use crate::transfer::Readback;

    #[test]
    fn chunks_are_few_but_no_larger_than_needed_or_bindable() {
        assert_eq!(chunk_slots(100, 128 << 20), 100);
        assert_eq!(chunk_slots(1 << 20, 1 << 32), MIN_CHUNK_SLOTS as u32);
        assert_eq!(chunk_slots(1 << 24, 1 << 32), 1 << 18);
        assert_eq!(chunk_slots(1 << 24, 128 << 20), 1 << 15);
        assert_eq!(chunk_slots(u32::MAX, 4096), 1);
    }

    /// The bytes of a buffer, after all that was submitted.
    fn read(gpu: &Arc<Gpu>, buffer: &Buffer) -> Vec<u8> {
        let mut back = Readback::new(gpu, "look", buffer.size()).unwrap();
        let mut commands = gpu.device.create_command_encoder(&CommandEncoderDescriptor::default());
        back.record(&mut commands, buffer, 0, buffer.size());
        gpu.submit(commands.finish(), vec![back.request(buffer.size())]);
        gpu.wait_for(|| back.is_ready()).unwrap();
        back.read(<[u8]>::to_vec).unwrap()
    }

    #[test]
    fn what_is_given_back_is_overwritten() {
        let gpu = Gpu::open(&software_adapter(), GpuConfig::default()).unwrap();
        let mut history = History::new(&gpu, 3);
        history.plan(&[SlotUse::Store(1)], &mut Plan::default());
        let memory = history.chunk(0).unwrap().clone();
        let content = [0xa5; 3 * PAGE_SIZE];
        gpu.queue.write_buffer(&memory, 0, &content);
        assert!(read(&gpu, &memory) == content);
        drop(history);
        assert!(read(&gpu, &memory) == [0; 3 * PAGE_SIZE]);
        gpu.check().unwrap();
        assert_no_complaints();
    }

    #[test]
    fn a_device_offers_what_its_memory_holds() {
        assert_eq!(History::offer(10, None), 10);
        assert_eq!(History::offer(10, Some(5 * 4096 + 4095)), 5);
        assert_eq!(History::offer(10, Some(u64::MAX)), 10);
    }
}
