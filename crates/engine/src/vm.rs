//! What the engine needs of a virtual machine. A VMM implements these traits; the engine knows no hypervisor.

use std::sync::Arc;

use pagewarp_codec::Page;
use thiserror::Error;

use crate::bitmap::PageBitmap;

/// One contiguous piece of guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// Unique within the VM; the same on both hosts.
    pub id: u32,
    /// For people and for checking that both sides mean the same thing, at most 64 bytes.
    pub name: String,
    /// Size in pages of 4096 bytes.
    pub pages: u64,
}

/// Memory that a guest may be writing while it is read.
///
/// Copies are not atomic: a page that the guest writes meanwhile may come out torn. That is harmless, because such a page
/// is dirty again and will be sent again.
pub trait GuestMemory: Send + Sync {
    /// The regions, in ascending order of id.
    fn regions(&self) -> Vec<RegionInfo>;
    /// Copies `out.len()` pages out of `region`, from `first_page` on.
    fn read(&self, region: u32, first_page: u64, out: &mut [Page]) -> Result<(), VmError>;
    /// Copies `pages` into `region`, from `first_page` on.
    fn write(&self, region: u32, first_page: u64, pages: &[Page]) -> Result<(), VmError>;
}

/// The log of pages that the guest (vCPUs and devices) has written.
///
/// Between [`start`](DirtyLog::start) and [`stop`](DirtyLog::stop) a write to guest memory is reported by a later `fetch`, unless `clear` has
/// been called for its page after the write.
pub trait DirtyLog: Send {
    /// Starts logging. What is dirty in the log after this call is up to the implementation: the engine sends everything once anyhow.
    fn start(&mut self) -> Result<(), VmError>;
    /// ORs the dirty pages of `region` into `dirty`, without clearing them in the log where it can tell the two apart
    /// (manual protect); a log that cannot clears them here and makes `clear` do nothing.
    fn fetch(&mut self, region: u32, dirty: &mut PageBitmap) -> Result<(), VmError>;
    /// Clears the pages whose bits are set in `words` (64 pages a word, the first one starting at `first_page`, a multiple of 64) and
    /// watches them again. Called before the pages are copied, so that no later write is missed.
    fn clear(&mut self, region: u32, first_page: u64, words: &[u64]) -> Result<(), VmError>;
    /// Takes pages back that were fetched or cleared and whose content did not safely reach the destination: they are dirty
    /// again for the next `fetch`, also after `stop` and a later `start`.
    fn give_back(&mut self, region: u32, dirty: &PageBitmap);
    /// Stops logging.
    fn stop(&mut self) -> Result<(), VmError>;
}

/// A running VM that can be sent.
pub trait SourceVm: Send {
    /// Its name, at most 64 bytes.
    fn name(&self) -> String;
    /// The configuration that the destination needs to build an equal machine, opaque to the engine, at most 1 MiB.
    fn machine(&self) -> Result<Vec<u8>, VmError>;
    /// Its memory.
    fn memory(&self) -> Arc<dyn GuestMemory>;
    /// Its dirty log; at most one is in use at a time.
    fn dirty_log(&self) -> Result<Box<dyn DirtyLog>, VmError>;
    /// Stops the vCPUs and devices. Afterwards nothing writes to guest memory.
    fn pause(&mut self) -> Result<(), VmError>;
    /// Lets them go on. Must work after `pause`, whatever happened in between.
    fn resume(&mut self) -> Result<(), VmError>;
    /// The state of vCPUs and devices while paused, opaque to the engine, at most 64 MiB.
    fn save_state(&mut self) -> Result<Vec<u8>, VmError>;
}

/// A VM that is being received.
pub trait DestinationVm: Send {
    /// Builds the machine that `machine` describes, paused, with zeroed memory of exactly these regions.
    /// Everything here came from the peer: the implementation checks it against its own limits.
    fn prepare(
        &mut self,
        name: &str,
        regions: &[RegionInfo],
        machine: &[u8],
    ) -> Result<Arc<dyn GuestMemory>, VmError>;
    /// Loads what `save_state` returned on the source.
    fn load_state(&mut self, state: &[u8]) -> Result<(), VmError>;
    /// Starts the vCPUs. The VM is ours from here on.
    fn run(&mut self) -> Result<(), VmError>;
}

/// What went wrong inside a VM, as its implementation tells it.
#[derive(Debug, Error)]
#[error("{context}: {reason}")]
pub struct VmError {
    /// What was being done.
    pub context: String,
    /// What was seen, and what to do about it.
    pub reason: String,
}

impl VmError {
    /// An error with this context and reason.
    pub fn new(context: impl Into<String>, reason: impl ToString) -> VmError {
        VmError { context: context.into(), reason: reason.to_string() }
    }
}
