//! What is to be done for one batch: a table for the kernels, and which bases to upload where.

use pagewarp_codec::{DecodeJob, EncodedBatch, Encoding, PAGE_SIZE, SlotUse};

/// A row of the table of the kernels: tag, length of the payload, where it begins, and the place of the base in pages.
pub(crate) type Entry = [u32; 4];
/// The place of a base that a page does not need.
pub(crate) const NO_BASE: u32 = u32::MAX;

/// What is to be done for one batch. Its buffers are used again and again.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// One row per page.
    pub(crate) entries: Vec<Entry>,
    /// The bases to upload, as indices into those of the job. In the staging buffer they come one after another.
    pub(crate) uploads: Vec<usize>,
    /// Their way from the staging buffer to the device.
    pub(crate) copies: Vec<Copied>,
}

/// Neighbouring bytes that are copied to neighbouring places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Copied {
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) bytes: u64,
}

impl Plan {
    /// Plans a batch that was validated.
    ///
    /// With a history, `loaded` tells whether it has the base of a page, and loads it; then every base is at the place of its page.
    pub(crate) fn make(&mut self, encoded: &EncodedBatch, loaded: Option<&dyn Fn(usize) -> bool>) {
        self.entries.clear();
        self.uploads.clear();
        self.copies.clear();
        let (mut offset, mut base) = (0, 0);
        for (page, (&encoding, &len)) in encoded.encodings.iter().zip(&encoded.lens).enumerate() {
            let mut place = NO_BASE;
            if encoding.needs_base() {
                let is_loaded = loaded.is_some_and(|loaded| loaded(page));
                place = if loaded.is_some() { page } else { self.uploads.len() } as u32;
                if !is_loaded {
                    self.upload(base, place);
                }
                base += 1;
            }
            self.entries.push([u32::from(encoding.tag()), u32::from(len), offset, place]);
            offset += u32::from(len);
        }
    }

    fn upload(&mut self, base: usize, place: u32) {
        let bytes = PAGE_SIZE as u64;
        let (from, to) = (self.uploads.len() as u64 * bytes, u64::from(place) * bytes);
        self.uploads.push(base);
        match self.copies.last_mut() {
            Some(last) if last.to + last.bytes == to => last.bytes += bytes,
            _ => self.copies.push(Copied { from, to, bytes }),
        }
    }

    /// Whether some page is no LZ4 block, and whether some page is one.
    pub(crate) fn kinds(&self) -> (bool, bool) {
        let lz4 = [u32::from(Encoding::Lz4.tag()), u32::from(Encoding::Lz4Xor.tag())];
        let is_lz4 = |entry: &Entry| lz4.contains(&entry[0]);
        (!self.entries.iter().all(is_lz4), self.entries.iter().any(is_lz4))
    }
}

/// The slots of a job, for a history of so many: what it does not have is not kept, and what needs no base is not loaded.
pub(crate) fn kept_slots(job: &DecodeJob, history_slots: u32, slots: &mut Vec<SlotUse>) {
    slots.clear();
    slots.extend(job.encoded.encodings.iter().enumerate().map(|(page, encoding)| {
        let slot_use = job.slots.get(page).copied().unwrap_or_default();
        match slot_use.slot().filter(|&slot| slot < history_slots) {
            None => SlotUse::None,
            Some(_) if encoding.needs_base() => slot_use,
            Some(slot) => SlotUse::Store(slot),
        }
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(pages: &[(Encoding, u16)]) -> EncodedBatch {
        EncodedBatch {
            encodings: pages.iter().map(|page| page.0).collect(),
            lens: pages.iter().map(|page| page.1).collect(),
            ..EncodedBatch::default()
        }
    }

    #[test]
    fn without_a_history_all_bases_are_uploaded_at_once() {
        let batch = batch(&[
            (Encoding::SparseXor, 20),
            (Encoding::Raw, 4096),
            (Encoding::Lz4Xor, 30),
            (Encoding::Zero, 0),
            (Encoding::Same, 0),
        ]);
        let mut plan = Plan::default();
        // Twice, to see that nothing is left of the first time.
        for _ in 0..2 {
            plan.make(&batch, None);
            let expected = [
                [4, 20, 0, 0],
                [2, 4096, 20, NO_BASE],
                [6, 30, 4116, 1],
                [0, 0, 4146, NO_BASE],
                [1, 0, 4146, 2],
            ];
            assert_eq!(plan.entries, expected);
            assert_eq!(plan.uploads, [0, 1, 2]);
            assert_eq!(plan.copies, [Copied { from: 0, to: 0, bytes: 3 * 4096 }]);
            assert_eq!(plan.kinds(), (true, true));
        }
    }

    #[test]
    fn with_a_history_what_it_lacks_is_uploaded_to_the_places_of_its_pages() {
        let batch = batch(&[
            (Encoding::Lz4Xor, 20),
            (Encoding::Lz4Xor, 20),
            (Encoding::Lz4Xor, 20),
            (Encoding::Lz4, 30),
            (Encoding::Lz4Xor, 20),
        ]);
        let mut plan = Plan::default();
        plan.make(&batch, Some(&|page| page == 0));
        assert_eq!(plan.uploads, [1, 2, 3]);
        let places: Vec<_> = plan.entries.iter().map(|entry| entry[3]).collect();
        assert_eq!(places, [0, 1, 2, NO_BASE, 4]);
        let copies = [
            Copied { from: 0, to: 4096, bytes: 2 * 4096 },
            Copied { from: 2 * 4096, to: 4 * 4096, bytes: 4096 },
        ];
        assert_eq!(plan.copies, copies);
        assert_eq!(plan.kinds(), (false, true));
    }

    #[test]
    fn slots_are_kept_as_far_as_the_history_has_them() {
        let uses =
            [SlotUse::Delta(1), SlotUse::Delta(2), SlotUse::Store(3), SlotUse::Delta(10), SlotUse::None];
        let mut encoded = batch(&[(Encoding::Same, 0); 5]);
        encoded.encodings[1] = Encoding::Zero;
        let mut job = DecodeJob { encoded, slots: uses.to_vec(), ..DecodeJob::default() };
        let mut slots = vec![SlotUse::Store(7)];
        kept_slots(&job, 10, &mut slots);
        let kept = [SlotUse::Delta(1), SlotUse::Store(2), SlotUse::Store(3), SlotUse::None, SlotUse::None];
        assert_eq!(slots, kept);
        job.slots.clear();
        kept_slots(&job, 10, &mut slots);
        assert_eq!(slots, [SlotUse::None; 5]);
    }
}
