//! The restore stage: plain pages into guest memory.

use std::sync::{Arc, Mutex};

use pagewarp_codec::{DecodeJob, Page};

use crate::bitmap::PageBitmap;
use crate::flow::lock;
use crate::vm::{GuestMemory, RegionInfo, VmError};

/// A batch on its way through the destination's stages.
#[derive(Debug, Default)]
pub(crate) struct Incoming {
    /// Index of the region, which is not its id.
    pub(crate) region: usize,
    pub(crate) pages: Vec<u64>,
    /// Bytes it took on the wire, frame included.
    pub(crate) wire_bytes: u64,
    /// The epoch it was sent in.
    pub(crate) epoch: u32,
    pub(crate) job: DecodeJob,
    /// What is wrong with it, if it does not decode.
    pub(crate) damage: Option<String>,
    /// Which pages have to be written; filled by the restorer.
    write: Vec<bool>,
}

/// Writes pages into guest memory.
pub(crate) struct Restorer {
    memory: Arc<dyn GuestMemory>,
    regions: Vec<RegionInfo>,
    /// Pages that may hold something else than zeros. Fresh memory is zero and stays unallocated until it is written.
    touched: Vec<Mutex<PageBitmap>>,
}

impl Restorer {
    /// A restorer of this memory.
    pub(crate) fn new(memory: Arc<dyn GuestMemory>) -> Restorer {
        let regions = memory.regions();
        Restorer {
            touched: regions.iter().map(|region| Mutex::new(PageBitmap::new(region.pages))).collect(),
            memory,
            regions,
        }
    }

    /// The memory.
    pub(crate) fn memory(&self) -> &dyn GuestMemory {
        &*self.memory
    }

    /// Writes the pages of a decoded batch.
    pub(crate) fn restore(&self, batch: &mut Incoming) -> Result<(), VmError> {
        let region = self.regions[batch.region].id;
        let Incoming { pages, write, .. } = batch;
        let plain = &batch.job.pages;
        {
            let mut touched = lock(&self.touched[batch.region]);
            write.clear();
            write.extend(pages.iter().zip(plain).map(|(&page, bytes)| {
                if *bytes == Page::ZERO {
                    touched.contains(page)
                } else {
                    touched.insert(page);
                    true
                }
            }));
        }
        let mut at = 0;
        while at < plain.len() {
            let run = (at + 1..plain.len())
                .take_while(|&i| write[i] == write[at] && pages[i] == pages[i - 1] + 1)
                .count()
                + 1;
            if write[at] {
                self.memory.write(region, pages[at], &plain[at..at + run])?;
            }
            at += run;
        }
        Ok(())
    }
}
