//! A batch on its way through the source's stages, with all the buffers it needs: nothing is allocated in steady state.

use pagewarp_codec::EncodeJob;

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
