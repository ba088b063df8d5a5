//! The copy stage: dirty pages out of guest memory into batches.

use std::sync::Arc;

use pagewarp_codec::Page;

use crate::bitmap::PageBitmap;
use crate::source::batch::Batch;
use crate::vm::{DirtyLog, GuestMemory, RegionInfo, VmError};

/// Clean words between dirty ones that are not worth a second call to the dirty log.
const MAX_GAP_WORDS: u64 = 16;

/// Walks the dirty pages of one epoch.
pub(crate) struct Walk {
    epoch: u32,
    dirty: Vec<PageBitmap>,
    region: usize,
    next_word: usize,
}

impl Walk {
    /// A walk over these pages, one bitmap per region.
    pub(crate) fn new(epoch: u32, dirty: Vec<PageBitmap>) -> Walk {
        Walk { epoch, dirty, region: 0, next_word: 0 }
    }

    /// Pages left.
    pub(crate) fn remaining(&self) -> u64 {
        self.dirty.iter().map(PageBitmap::count).sum()
    }

    /// Moves up to `most` pages of one region into `batch`; `false` at the end.
    pub(crate) fn next(&mut self, most: usize, batch: &mut Batch) -> bool {
        batch.pages.clear();
        batch.epoch = self.epoch;
        while let Some(dirty) = self.dirty.get_mut(self.region) {
            batch.region = self.region;
            while self.next_word < dirty.words().len() {
                let mut word = dirty.words()[self.next_word];
                while word != 0 {
                    if batch.pages.len() == most {
                        return true;
                    }
                    let page = self.next_word as u64 * 64 + u64::from(word.trailing_zeros());
                    batch.pages.push(page);
                    dirty.remove(page);
                    word &= word - 1;
                }
                self.next_word += 1;
            }
            (self.region, self.next_word) = (self.region + 1, 0);
            if !batch.pages.is_empty() {
                return true;
            }
        }
        false
    }
}

/// Copies pages out of guest memory. What it clears in the dirty log is remembered by its owner (see [`super::owned`]).
pub(crate) struct Copier {
    memory: Arc<dyn GuestMemory>,
    regions: Vec<RegionInfo>,
    words: Vec<u64>,
}

impl Copier {
    pub(crate) fn new(memory: Arc<dyn GuestMemory>) -> Copier {
        let regions = memory.regions();
        Copier { memory, regions, words: Vec::new() }
    }

    /// Fills `batch` with the pages it names. Clears them in the log, if there is one, *before* it copies, so that a write that comes later
    /// is logged again.
    pub(crate) fn fill(&mut self, batch: &mut Batch, log: Option<&mut dyn DirtyLog>) -> Result<(), VmError> {
        let region = self.regions[batch.region].id;
        if let Some(log) = log {
            self.clear(region, &batch.pages, log)?;
        }
        batch.job.pages.resize(batch.pages.len(), Page::ZERO);
        let mut at = 0;
        for run in batch.pages.chunk_by(|a, b| a + 1 == *b) {
            self.memory.read(region, run[0], &mut batch.job.pages[at..at + run.len()])?;
            at += run.len();
        }
        Ok(())
    }

    fn clear(&mut self, region: u32, pages: &[u64], log: &mut dyn DirtyLog) -> Result<(), VmError> {
        for near in pages.chunk_by(|a, b| b / 64 - a / 64 <= MAX_GAP_WORDS) {
            let first = near[0] / 64;
            self.words.clear();
            self.words.resize((near[near.len() - 1] / 64 - first) as usize + 1, 0);
            for page in near {
                self.words[(page / 64 - first) as usize] |= 1 << (page % 64);
            }
            log.clear(region, first * 64, &self.words)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_walk_visits_every_page_once_in_batches_of_one_region() {
        let mut low = PageBitmap::new(200);
        (0..200).step_by(3).for_each(|page| {
            low.insert(page);
        });
        let mut high = PageBitmap::new(70);
        high.insert(69);
        let mut walk = Walk::new(7, vec![low.clone(), PageBitmap::new(5), high]);
        assert_eq!(walk.remaining(), 68);
        let (mut batch, mut seen) = (Batch::default(), Vec::new());
        while walk.next(10, &mut batch) {
            assert!(batch.pages.len() <= 10 && batch.epoch == 7);
            seen.extend(batch.pages.iter().map(|&page| (batch.region, page)));
        }
        let expected: Vec<_> = low.iter().map(|page| (0, page)).chain([(2, 69)]).collect();
        assert_eq!(seen, expected);
    }
}
