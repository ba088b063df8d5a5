//! A batch on its way through the source's stages, with all the buffers it needs: nothing is allocated in steady state.

use crossbeam_channel::{Receiver, Sender, bounded};
use pagewarp_codec::EncodeJob;

use crate::flow::{Flow, Stopped};

/// Up to a fixed number of pages of one region and one epoch.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) epoch: u32,
    /// Index of the region, which is not its id.
    pub(crate) region: usize,
    /// Page numbers within the region, ascending; as many as `job.pages`.
    pub(crate) pages: Vec<u64>,
    pub(crate) job: EncodeJob,
    /// Which generation of the history the slots in `job` belong to.
    pub(crate) generation: u64,
}

/// A fixed number of batches that are used over and over. Waiting for one is the back-pressure that reaches the copy stage.
#[derive(Debug)]
pub(crate) struct Pool {
    empty: Sender<Batch>,
    take: Receiver<Batch>,
}

impl Pool {
    /// A pool of `count` batches. Their memory is taken as it is first used.
    pub(crate) fn new(count: usize) -> Pool {
        let (empty, take) = bounded(count);
        for _ in 0..count {
            // Cannot fail: there is room for exactly this many and both ends are here.
            let _ = empty.try_send(Batch::default());
        }
        Pool { empty, take }
    }

    pub(crate) fn take(&self, flow: &Flow) -> Result<Batch, Stopped> {
        // The pool owns both ends, so the queue is never closed.
        flow.receive(&self.take)?.ok_or(Stopped)
    }

    pub(crate) fn give_back(&self, batch: Batch) {
        let _ = self.empty.try_send(batch);
    }
}
