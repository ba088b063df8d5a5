//! The restore stage: plain pages into guest memory.

use std::sync::{Arc, Mutex};

use pagewarp_codec::{DecodeJob, Page};

use crate::bitmap::PageBitmap;
use crate::digest::page_digest;
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
    digests: Option<Digests>,
}

impl Restorer {
    /// A restorer; with `verify` it remembers a digest of every page.
    pub(crate) fn new(memory: Arc<dyn GuestMemory>, verify: bool) -> Restorer {
        let regions = memory.regions();
        Restorer {
            touched: regions.iter().map(|region| Mutex::new(PageBitmap::new(region.pages))).collect(),
            digests: verify.then(|| Digests::new(&regions)),
            memory,
            regions,
        }
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
        match &self.digests {
            None => Ok(()),
            Some(digests) => self.note(digests, batch),
        }
    }

    /// Takes the digests of the pages of a batch as they now are in guest memory, so that a mistake in writing them shows as well.
    fn note(&self, digests: &Digests, batch: &mut Incoming) -> Result<(), VmError> {
        let region = self.regions[batch.region].id;
        // The bases have done their duty: their buffer takes the pages that are read back.
        let Incoming { pages, job: DecodeJob { bases: read, .. }, region: index, .. } = batch;
        read.resize(pages.len(), Page::ZERO);
        let mut at = 0;
        for run in pages.chunk_by(|a, b| a + 1 == *b) {
            self.memory.read(region, run[0], &mut read[at..at + run.len()])?;
            at += run.len();
        }
        digests.note(*index, pages, read);
        Ok(())
    }

    /// The digests of a region, by its index, if they were asked for.
    pub(crate) fn digests(&self, region: usize) -> Option<Vec<u64>> {
        self.digests.as_ref().map(|digests| lock(&digests.0[region]).clone())
    }
}

/// xxh3-64 of every page as it was restored last.
struct Digests(Vec<Mutex<Vec<u64>>>);

impl Digests {
    fn new(regions: &[RegionInfo]) -> Digests {
        Digests(regions.iter().map(|region| Mutex::new(vec![0; region.pages as usize])).collect())
    }

    fn note(&self, region: usize, pages: &[u64], plain: &[Page]) {
        let mut digests = lock(&self.0[region]);
        for (&page, bytes) in pages.iter().zip(plain) {
            digests[page as usize] = page_digest(bytes);
        }
    }
}
