//! A guest without KVM: threads that write shared memory, with a real dirty log.

use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pagewarp_codec::{PAGE_SIZE, Page};
use pagewarp_engine::bitmap::PageBitmap;
use pagewarp_engine::vm::{DestinationVm, DirtyLog, GuestMemory, RegionInfo, SourceVm, VmError};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use serde::{Deserialize, Serialize};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use crate::memory::check_range;
use crate::workload::Share;
pub use crate::workload::SyntheticConfig;
use crate::write_log::WriteLog;
use crate::writers::Writers;

/// The most writes that a writer is believed to have done: years of work, and far from overflow.
const MAX_WRITES: u64 = 1 << 48;

/// Guest memory that other threads write: one memfd per region.
#[derive(Debug)]
pub(crate) struct MappedMemory {
    regions: Vec<(RegionInfo, MmapRegion<()>)>,
}

impl MappedMemory {
    /// Zeroed memory of these regions.
    fn new(regions: &[RegionInfo]) -> std::io::Result<MappedMemory> {
        let map = |info: &RegionInfo| {
            let bytes = info
                .pages
                .checked_mul(PAGE_SIZE as u64)
                .ok_or_else(|| std::io::Error::other("too many pages"))?;
            let memfd: OwnedFd = memfd_create("pagewarp-guest", MemfdFlags::CLOEXEC)?;
            ftruncate(&memfd, bytes)?;
            let mapping = MmapRegion::from_file(FileOffset::new(memfd.into(), 0), bytes as usize);
            Ok((info.clone(), mapping.map_err(std::io::Error::other)?))
        };
        Ok(MappedMemory { regions: regions.iter().map(map).collect::<std::io::Result<_>>()? })
    }

    fn find(&self, region: u32) -> Result<&(RegionInfo, MmapRegion<()>), VmError> {
        let found = self.regions.iter().find(|(info, _)| info.id == region);
        found.ok_or_else(|| VmError::new("guest memory", format!("there is no region {region}")))
    }

    /// The addresses of a region in this process.
    fn addresses(&self, region: u32) -> Result<Range<u64>, VmError> {
        let (_, mapping) = self.find(region)?;
        let start = mapping.as_ptr() as u64;
        Ok(start..start + mapping.size() as u64)
    }

    /// Writes bytes at the start of a page, as the guest does.
    pub(crate) fn poke(&self, region: u32, page: u64, bytes: &[u8]) {
        let (_, mapping) = self.find(region).expect("the workload names regions that exist");
        let slice = mapping.get_slice(page as usize * PAGE_SIZE, bytes.len()).expect("and pages that exist");
        slice.copy_from(bytes);
    }
}

impl GuestMemory for MappedMemory {
    fn regions(&self) -> Vec<RegionInfo> {
        self.regions.iter().map(|(info, _)| info.clone()).collect()
    }

    fn read(&self, region: u32, first_page: u64, out: &mut [Page]) -> Result<(), VmError> {
        let (info, mapping) = self.find(region)?;
        let first = check_range(region, info.pages, first_page, out.len())?;
        for (index, page) in out.iter_mut().enumerate() {
            let slice = mapping.get_slice((first + index) * PAGE_SIZE, PAGE_SIZE);
            slice.map_err(|error| VmError::new("read guest memory", error))?.copy_to(&mut page.0[..]);
        }
        Ok(())
    }

    fn write(&self, region: u32, first_page: u64, pages: &[Page]) -> Result<(), VmError> {
        let (info, mapping) = self.find(region)?;
        let first = check_range(region, info.pages, first_page, pages.len())?;
        for (index, page) in pages.iter().enumerate() {
            let slice = mapping.get_slice((first + index) * PAGE_SIZE, PAGE_SIZE);
            slice.map_err(|error| VmError::new("write guest memory", error))?.copy_from(&page.0[..]);
        }
        Ok(())
    }
}

/// A guest whose vCPUs are threads of this process.
///
/// Every byte of its memory follows from its configuration and how many writes each writer has done, so
/// [`self_check`](SyntheticGuest::self_check) finds any byte that was lost, torn or taken from an older version.
#[derive(Debug)]
pub struct SyntheticGuest {
    config: SyntheticConfig,
    memory: Arc<MappedMemory>,
    writers: Writers,
    log: Arc<LogShare>,
}

/// What outlives one dirty log.
#[derive(Debug)]
struct LogShare {
    taken: AtomicBool,
    given_back: Mutex<Vec<PageBitmap>>,
}

impl LogShare {
    fn given_back(&self) -> MutexGuard<'_, Vec<PageBitmap>> {
        self.given_back.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What travels as the device state.
#[derive(Debug, Serialize, Deserialize)]
struct SavedState {
    /// The seed of the configuration that it belongs to.
    seed: u64,
    /// Writes done by each writer.
    writes: Vec<u64>,
    /// When the guest last did something, in nanoseconds of `CLOCK_MONOTONIC`: good between processes of one host.
    last_active_ns: u64,
}

impl SyntheticGuest {
    /// Builds the guest, fills its memory and lets it run.
    pub fn start(config: SyntheticConfig) -> Result<SyntheticGuest, VmError> {
        let guest = SyntheticGuest::paused(config)?;
        let mut number = 0;
        for region in guest.memory.regions() {
            for page in 0..region.pages {
                let content = guest.config.initial(number);
                number += 1;
                // Zero pages stay untouched: they cost no memory.
                if content != Page::ZERO {
                    guest.memory.write(region.id, page, &[content])?;
                }
            }
        }
        guest.writers.resume();
        Ok(guest)
    }

    /// Builds the guest with zeroed memory and parked writers.
    fn paused(config: SyntheticConfig) -> Result<SyntheticGuest, VmError> {
        config.check().map_err(|reason| VmError::new("synthetic guest", reason))?;
        let regions = regions_of(&config);
        let memory = MappedMemory::new(&regions).map_err(|error| VmError::new("map guest memory", error))?;
        let memory = Arc::new(memory);
        let writers =
            Writers::start(&config, &memory).map_err(|error| VmError::new("start the writers", error))?;
        let given_back = regions.iter().map(|region| PageBitmap::new(region.pages)).collect();
        let log = Arc::new(LogShare { taken: AtomicBool::new(false), given_back: Mutex::new(given_back) });
        Ok(SyntheticGuest { config, memory, writers, log })
    }

    /// What it is.
    pub fn config(&self) -> &SyntheticConfig {
        &self.config
    }

    /// Whether its writers run.
    pub fn is_running(&self) -> bool {
        self.writers.is_running()
    }

    /// Writes done so far, those on other hosts included.
    pub fn writes(&self) -> u64 {
        self.writers.done().iter().sum()
    }

    /// Changes the write rate from now on (not part of what migrates).
    pub fn set_writes_per_s(&self, writes_per_s: u64) {
        self.writers.set_rate(writes_per_s);
    }

    /// The longest time that the guest did nothing although it wanted to, as the guest saw it, the pause of a migration within one host
    /// included.
    pub fn longest_pause(&self) -> Duration {
        self.writers.longest_pause()
    }

    /// Starts measuring the longest pause anew.
    pub fn reset_longest_pause(&self) {
        self.writers.reset_longest_pause();
    }

    /// Compares every byte of memory with what it must be; the error names the first page that is not so. The guest has to be paused.
    pub fn self_check(&self) -> Result<(), VmError> {
        if self.is_running() {
            return Err(VmError::new("self-check", "the guest runs; pause it first"));
        }
        let done = self.writers.done();
        let mut written = HashMap::new();
        for (writer, &writes) in (0..).zip(&done) {
            written.extend(Share::new(&self.config, writer).expected(&self.config, writes));
        }
        let mut number = 0;
        let mut seen = [Page::ZERO];
        for region in self.memory.regions() {
            for page in 0..region.pages {
                let touched = written.get(&number).copied();
                let expected = touched.unwrap_or_else(|| self.config.initial(number));
                number += 1;
                self.memory.read(region.id, page, &mut seen)?;
                // Comparing whole pages first keeps this fast.
                if seen[0] != expected
                    && let Some(offset) =
                        (0..PAGE_SIZE).find(|&offset| seen[0].0[offset] != expected.0[offset])
                {
                    let word = |page: &Page, at: usize| {
                        page.0[at..at + 8].iter().rev().fold(0u64, |w, &b| w << 8 | u64::from(b))
                    };
                    let reason = format!(
                        "page {page} of region {} ({}) differs at byte {offset}: {:#04x} instead of {:#04x}; it tells of write {}, expected {}",
                        region.id,
                        if touched.is_some() { "in the working set" } else { "never written" },
                        seen[0].0[offset],
                        expected.0[offset],
                        word(&seen[0], 8),
                        word(&expected, 8),
                    );
                    return Err(VmError::new("self-check", reason));
                }
            }
        }
        Ok(())
    }
}

fn regions_of(config: &SyntheticConfig) -> Vec<RegionInfo> {
    let region = |(id, &pages)| RegionInfo { id, name: format!("ram{id}"), pages };
    (0..).zip(&config.region_pages).map(region).collect()
}

impl SourceVm for SyntheticGuest {
    fn name(&self) -> String {
        self.config.name.clone()
    }

    fn machine(&self) -> Result<Vec<u8>, VmError> {
        serde_json::to_vec(&self.config).map_err(|error| VmError::new("describe the machine", error))
    }

    fn memory(&self) -> Arc<dyn GuestMemory> {
        Arc::clone(&self.memory) as Arc<dyn GuestMemory>
    }

    fn dirty_log(&self) -> Result<Box<dyn DirtyLog>, VmError> {
        let log = WriteLog::open().map_err(|error| {
            VmError::new(
                "open a dirty log",
                format!(
                    "{error}; it takes Linux 6.7 with userfaultfd and its asynchronous write-protect mode"
                ),
            )
        })?;
        if self.log.taken.swap(true, Ordering::AcqRel) {
            return Err(VmError::new("open a dirty log", "another one is in use; drop it first"));
        }
        let share = Arc::clone(&self.log);
        Ok(Box::new(SyntheticLog { log, logging: false, memory: Arc::clone(&self.memory), share }))
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.writers.pause();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.writers.resume();
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<u8>, VmError> {
        if self.is_running() {
            return Err(VmError::new("save state", "the guest runs; pause it first"));
        }
        let (writes, last_active_ns) = (self.writers.done(), self.writers.last_active_ns());
        let state = SavedState { seed: self.config.seed, writes, last_active_ns };
        serde_json::to_vec(&state).map_err(|error| VmError::new("save state", error))
    }
}

/// The dirty log of a [`SyntheticGuest`].
struct SyntheticLog {
    log: WriteLog,
    logging: bool,
    /// Keeps the watched addresses mapped.
    memory: Arc<MappedMemory>,
    share: Arc<LogShare>,
}

impl Drop for SyntheticLog {
    fn drop(&mut self) {
        self.share.taken.store(false, Ordering::Release);
    }
}

impl SyntheticLog {
    fn addresses(&self, doing: &str, region: u32) -> Result<Range<u64>, VmError> {
        if !self.logging {
            return Err(VmError::new(doing, "the log was not started"));
        }
        self.memory.addresses(region)
    }
}

impl DirtyLog for SyntheticLog {
    fn start(&mut self) -> Result<(), VmError> {
        if self.logging {
            return Ok(());
        }
        for region in self.memory.regions() {
            let watched = self.log.watch(self.memory.addresses(region.id)?);
            watched.map_err(|error| VmError::new(format!("watch region {}", region.id), error))?;
        }
        self.logging = true;
        Ok(())
    }

    fn fetch(&mut self, region: u32, dirty: &mut PageBitmap) -> Result<(), VmError> {
        let addresses = self.addresses("fetch the dirty log", region)?;
        let pages = (addresses.end - addresses.start) / PAGE_SIZE as u64;
        if dirty.pages() != pages {
            let reason = format!("a bitmap of {} pages for a region of {pages}", dirty.pages());
            return Err(VmError::new("fetch the dirty log", reason));
        }
        let page = |address: u64| (address - addresses.start) / PAGE_SIZE as u64;
        let insert = |written: Range<u64>| {
            (page(written.start)..page(written.end)).for_each(|page| {
                dirty.insert(page);
            });
        };
        self.log
            .written(addresses.clone(), insert)
            .map_err(|error| VmError::new("fetch the dirty log", error))?;
        dirty.union(&self.share.given_back()[region as usize]);
        Ok(())
    }

    fn clear(&mut self, region: u32, first_page: u64, words: &[u64]) -> Result<(), VmError> {
        let addresses = self.addresses("clear the dirty log", region)?;
        let pages = (addresses.end - addresses.start) / PAGE_SIZE as u64;
        if !first_page.is_multiple_of(64) {
            return Err(VmError::new(
                "clear the dirty log",
                format!("page {first_page} is no multiple of 64"),
            ));
        }
        check_range(region, pages.next_multiple_of(64), first_page, words.len() * 64)?;
        let mut given_back = self.share.given_back();
        for run in runs(words) {
            let run = first_page + run.start..(first_page + run.end).min(pages);
            run.clone().for_each(|page| given_back[region as usize].remove(page));
            let address = |page: u64| addresses.start + page * PAGE_SIZE as u64;
            let cleared = self.log.clear(address(run.start)..address(run.end));
            cleared.map_err(|error| VmError::new("clear the dirty log", error))?;
        }
        Ok(())
    }

    fn give_back(&mut self, region: u32, dirty: &PageBitmap) {
        if let Some(given_back) = self.share.given_back().get_mut(region as usize) {
            given_back.union(dirty);
        }
    }

    fn stop(&mut self) -> Result<(), VmError> {
        self.logging = false;
        self.log.unwatch_all().map_err(|error| VmError::new("stop the dirty log", error))
    }
}

/// The runs of set bits.
fn runs(words: &[u64]) -> impl Iterator<Item = Range<u64>> + '_ {
    let end = words.len() as u64 * 64;
    let is_set = |bit: u64| words[(bit / 64) as usize] >> (bit % 64) & 1 != 0;
    let mut next = 0;
    std::iter::from_fn(move || {
        let start = (next..end).find(|&bit| is_set(bit))?;
        next = (start..end).find(|&bit| !is_set(bit)).unwrap_or(end);
        Some(start..next)
    })
}

/// Receives a [`SyntheticGuest`].
#[derive(Debug)]
pub struct SyntheticDestination {
    max_memory_bytes: u64,
    guest: Option<SyntheticGuest>,
    loaded: bool,
}

impl SyntheticDestination {
    /// A destination for guests with at most so much memory.
    pub fn new(max_memory_bytes: u64) -> SyntheticDestination {
        SyntheticDestination { max_memory_bytes, guest: None, loaded: false }
    }

    /// The guest, once prepared.
    pub fn guest(&self) -> Option<&SyntheticGuest> {
        self.guest.as_ref()
    }

    /// The guest, for pausing, checking and sending on.
    pub fn into_guest(self) -> Option<SyntheticGuest> {
        self.guest
    }
}

impl DestinationVm for SyntheticDestination {
    fn prepare(
        &mut self,
        name: &str,
        regions: &[RegionInfo],
        machine: &[u8],
    ) -> Result<Arc<dyn GuestMemory>, VmError> {
        let refuse = |reason: String| VmError::new("prepare a synthetic guest", reason);
        let config: SyntheticConfig =
            serde_json::from_slice(machine).map_err(|error| refuse(error.to_string()))?;
        let pages = config.check().map_err(refuse)?;
        if pages > self.max_memory_bytes / PAGE_SIZE as u64 {
            return Err(refuse(format!(
                "{pages} pages of memory, at most {} bytes fit here",
                self.max_memory_bytes
            )));
        }
        if config.name != name || regions != regions_of(&config) {
            return Err(refuse(format!(
                "the name {name:?} or the regions {regions:?} do not match the machine {config:?}"
            )));
        }
        self.loaded = false;
        let guest = self.guest.insert(SyntheticGuest::paused(config)?);
        Ok(guest.memory())
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), VmError> {
        let guest =
            self.guest.as_ref().ok_or_else(|| VmError::new("load state", "no machine was prepared"))?;
        let state: SavedState =
            serde_json::from_slice(state).map_err(|error| VmError::new("load state", error))?;
        if state.seed != guest.config.seed || state.writes.len() != guest.config.writers as usize {
            let reason = format!("it is of seed {} and {} writers", state.seed, state.writes.len());
            return Err(VmError::new("load state", reason));
        }
        if let Some(writes) = state.writes.iter().find(|&&writes| writes > MAX_WRITES) {
            return Err(VmError::new(
                "load state",
                format!("a writer did {writes} writes, at most {MAX_WRITES} are believable"),
            ));
        }
        guest.writers.load(&state.writes, state.last_active_ns);
        self.loaded = true;
        Ok(())
    }

    fn run(&mut self) -> Result<(), VmError> {
        let guest = self.guest.as_ref().filter(|_| self.loaded);
        guest.ok_or_else(|| VmError::new("run", "no state was loaded"))?.writers.resume();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
