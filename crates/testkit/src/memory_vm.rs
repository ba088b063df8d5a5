//! VMs in pure memory, without threads and clocks: what the guest writes and what fails is scripted.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pagewarp_codec::Page;
use pagewarp_engine::bitmap::PageBitmap;
use pagewarp_engine::vm::{DestinationVm, DirtyLog, GuestMemory, RegionInfo, SourceVm, VmError};

use crate::image::{Mutation, mixed_page, mutate};
use crate::memory::{PageStore, check_range};
use crate::probe::{Probe, RunLedger, Step};
use crate::rng::SplitMix64;

/// When a script is asked what the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Just before the dirty log of this region is fetched.
    Fetch {
        /// The region.
        region: u32,
    },
    /// Just after these pages were copied out: what the guest writes now, the copy misses.
    Copied {
        /// The region.
        region: u32,
        /// The first page.
        first_page: u64,
        /// How many.
        count: usize,
    },
    /// Just before the VM pauses: the guest's last chance.
    Pause,
}

/// What the guest does at each moment.
pub type Script = Box<dyn FnMut(Moment, &GuestHand) + Send>;

/// The guest's hand on its memory: what it writes is logged.
#[derive(Clone, Debug)]
pub struct GuestHand {
    core: Arc<Core>,
}

impl GuestHand {
    /// Writes one page, as the guest would. Says whether it did: a paused guest writes nothing. Panics if there is no such page.
    pub fn write(&self, region: u32, page: u64, content: &Page) -> bool {
        self.change(region, page, |old| *old = *content)
    }

    /// Changes one page. Says whether it did: a paused guest writes nothing. Panics if there is no such page.
    pub fn mutate(&self, region: u32, page: u64, mutation: Mutation, rng: &mut SplitMix64) -> bool {
        self.change(region, page, |old| mutate(old, mutation, rng))
    }

    /// Changes one page and leaves no trace of it in the dirty log, as a hypervisor that does not see every write. Says whether it did, as
    /// [`write`](Self::write).
    pub fn write_unseen(&self, region: u32, page: u64, content: &Page) -> bool {
        let log = self.core.log();
        if !self.core.probe.is_running() {
            return false;
        }
        let written = self.core.memory.write(region, page, std::slice::from_ref(content));
        written.expect("the script names pages that exist");
        drop(log);
        true
    }

    /// The regions it can write to.
    pub fn regions(&self) -> Vec<RegionInfo> {
        self.core.memory.regions()
    }

    fn change(&self, region: u32, page: u64, change: impl FnOnce(&mut Page)) -> bool {
        // The log's lock is held from before the write until the bit is set, so that neither pause nor clear comes between.
        let mut log = self.core.log();
        if !self.core.probe.is_running() {
            return false;
        }
        let mut content = [Page::ZERO];
        let memory = &self.core.memory;
        memory.read(region, page, &mut content).expect("the script names pages that exist");
        change(&mut content[0]);
        memory.write(region, page, &content).expect("the page was read just now");
        if log.logging {
            log.find(region).expect("the page was read just now").written.insert(page);
        }
        true
    }
}

/// The memory of a [`MemoryVm`], its log and its script.
struct Core {
    memory: Arc<PageStore>,
    log: Mutex<Log>,
    log_taken: AtomicBool,
    script: Mutex<Option<Script>>,
    probe: Probe,
}

impl std::fmt::Debug for Core {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Core").field("probe", &self.probe).finish_non_exhaustive()
    }
}

struct Log {
    logging: bool,
    /// Whether `fetch` clears, as in a hypervisor without manual protect.
    clears_on_fetch: bool,
    regions: Vec<RegionLog>,
}

struct RegionLog {
    id: u32,
    /// Written while the log was on.
    written: PageBitmap,
    /// Given back by the engine: outlives `stop`.
    given_back: PageBitmap,
}

impl Log {
    fn find(&mut self, region: u32) -> Result<&mut RegionLog, VmError> {
        let found = self.regions.iter_mut().find(|log| log.id == region);
        found.ok_or_else(|| VmError::new("dirty log", format!("there is no region {region}")))
    }
}

impl Core {
    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn play(self: &Arc<Self>, moment: Moment) {
        let mut script = self.script.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(script) = script.as_mut() {
            script(moment, &GuestHand { core: Arc::clone(self) });
        }
    }
}

/// A source VM that does what its script says.
#[derive(Debug)]
pub struct MemoryVm {
    name: String,
    machine: Vec<u8>,
    state: Vec<u8>,
    core: Arc<Core>,
}

impl MemoryVm {
    /// A running VM with regions of these sizes in pages, filled with a mixed image.
    pub fn new(region_pages: &[u64], seed: u64) -> MemoryVm {
        let info =
            |(id, &pages): (usize, &u64)| RegionInfo { id: id as u32, name: format!("ram{id}"), pages };
        let regions: Vec<RegionInfo> = region_pages.iter().enumerate().map(info).collect();
        let memory = PageStore::new(&regions);
        for region in &regions {
            for page in 0..region.pages {
                let content = [mixed_page(page, seed ^ u64::from(region.id))];
                memory.write(region.id, page, &content).expect("the regions were made above");
            }
        }
        let (machine, state) = (b"a machine".to_vec(), b"a state".to_vec());
        MemoryVm::build("memory-vm".into(), Arc::new(memory), machine, state, Probe::new(&RunLedger::new()))
    }

    fn build(
        name: String,
        memory: Arc<PageStore>,
        machine: Vec<u8>,
        state: Vec<u8>,
        probe: Probe,
    ) -> MemoryVm {
        let log = |region: RegionInfo| RegionLog {
            id: region.id,
            written: PageBitmap::new(region.pages),
            given_back: PageBitmap::new(region.pages),
        };
        let regions = memory.regions().into_iter().map(log).collect();
        probe.set_running(true);
        let core = Core {
            memory,
            log: Mutex::new(Log { logging: false, clears_on_fetch: false, regions }),
            log_taken: AtomicBool::new(false),
            script: Mutex::new(None),
            probe,
        };
        MemoryVm { name, machine, state, core: Arc::new(core) }
    }

    /// The name, machine description and device state that it will give.
    pub fn identity(mut self, name: &str, machine: &[u8], state: &[u8]) -> MemoryVm {
        self.name = name.into();
        self.machine = machine.to_vec();
        self.state = state.to_vec();
        self
    }

    /// Makes `fetch` clear the log, as in a hypervisor without manual protect.
    pub fn clear_on_fetch(self) -> MemoryVm {
        self.core.log().clears_on_fetch = true;
        self
    }

    /// What the guest does from now on.
    pub fn script(self, script: impl FnMut(Moment, &GuestHand) + Send + 'static) -> MemoryVm {
        *self.core.script.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(script));
        self
    }

    /// A script for the common case: at the n-th fetch of the first region the guest changes the pages of the n-th round, given as
    /// (region, page). It does nothing after the last round.
    pub fn rounds(self, rounds: Vec<Vec<(u32, u64)>>, mutation: Mutation, seed: u64) -> MemoryVm {
        let mut rounds = rounds.into_iter();
        let mut rng = SplitMix64::new(seed);
        self.at_each_fetch(move |guest| {
            for (region, page) in rounds.next().into_iter().flatten() {
                guest.mutate(region, page, mutation, &mut rng);
            }
        })
    }

    /// A script for a guest that never rests: at each fetch of the first region it changes `pages` pages drawn from the whole memory.
    pub fn restless(self, pages: usize, mutation: Mutation, seed: u64) -> MemoryVm {
        let mut rng = SplitMix64::new(seed);
        let regions = self.core.memory.regions();
        self.at_each_fetch(move |guest| {
            for _ in 0..pages {
                let region = &regions[rng.index(regions.len())];
                guest.mutate(region.id, rng.below(region.pages), mutation, &mut rng);
            }
        })
    }

    fn at_each_fetch(self, mut act: impl FnMut(&GuestHand) + Send + 'static) -> MemoryVm {
        let first = self.core.memory.regions().first().map(|region| region.id);
        self.script(move |moment, guest| {
            if matches!(moment, Moment::Fetch { region } if Some(region) == first) {
                act(guest);
            }
        })
    }

    /// The handle that injects failures and tells what happened.
    pub fn probe(&self) -> Probe {
        self.core.probe.clone()
    }

    /// The guest's hand, for writes from other threads.
    pub fn guest(&self) -> GuestHand {
        GuestHand { core: Arc::clone(&self.core) }
    }

    /// Whether its dirty log is on. It must be off once a migration has ended.
    pub fn is_logging(&self) -> bool {
        self.core.log().logging
    }
}

/// The memory of a [`MemoryVm`] as the engine sees it.
struct SourceMemory(Arc<Core>);

impl GuestMemory for SourceMemory {
    fn regions(&self) -> Vec<RegionInfo> {
        self.0.memory.regions()
    }

    fn read(&self, region: u32, first_page: u64, out: &mut [Page]) -> Result<(), VmError> {
        self.0.probe.step(Step::Read)?;
        self.0.memory.read(region, first_page, out)?;
        self.0.play(Moment::Copied { region, first_page, count: out.len() });
        Ok(())
    }

    fn write(&self, region: u32, first_page: u64, pages: &[Page]) -> Result<(), VmError> {
        self.0.probe.step(Step::Write)?;
        self.0.memory.write(region, first_page, pages)
    }
}

impl SourceVm for MemoryVm {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn machine(&self) -> Result<Vec<u8>, VmError> {
        self.core.probe.step(Step::Machine)?;
        Ok(self.machine.clone())
    }

    fn memory(&self) -> Arc<dyn GuestMemory> {
        Arc::new(SourceMemory(Arc::clone(&self.core)))
    }

    fn dirty_log(&self) -> Result<Box<dyn DirtyLog>, VmError> {
        self.core.probe.step(Step::DirtyLog)?;
        if self.core.log_taken.swap(true, Ordering::AcqRel) {
            return Err(VmError::new("dirty log", "another one is in use; drop it first"));
        }
        Ok(Box::new(MemoryLog(Arc::clone(&self.core))))
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.core.probe.step(Step::Pause)?;
        self.core.play(Moment::Pause);
        // Under the log's lock, so that no write of another thread is half done.
        let _log = self.core.log();
        self.core.probe.set_running(false);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.core.probe.step(Step::Resume)?;
        self.core.probe.set_running(true);
        Ok(())
    }

    fn save_state(&mut self) -> Result<Vec<u8>, VmError> {
        self.core.probe.step(Step::SaveState)?;
        if self.core.probe.is_running() {
            return Err(VmError::new("save state", "the VM runs; pause it first"));
        }
        Ok(self.state.clone())
    }
}

/// The dirty log of a [`MemoryVm`].
struct MemoryLog(Arc<Core>);

impl Drop for MemoryLog {
    fn drop(&mut self) {
        self.0.log_taken.store(false, Ordering::Release);
    }
}

impl DirtyLog for MemoryLog {
    fn start(&mut self) -> Result<(), VmError> {
        self.0.probe.step(Step::LogStart)?;
        self.0.log().logging = true;
        Ok(())
    }

    fn fetch(&mut self, region: u32, dirty: &mut PageBitmap) -> Result<(), VmError> {
        self.0.probe.step(Step::LogFetch)?;
        self.0.play(Moment::Fetch { region });
        let mut log = self.0.log();
        if !log.logging {
            return Err(VmError::new("fetch the dirty log", "it was not started"));
        }
        let clears = log.clears_on_fetch;
        let region = log.find(region)?;
        if dirty.pages() != region.written.pages() {
            let reason =
                format!("a bitmap of {} pages for a region of {}", dirty.pages(), region.written.pages());
            return Err(VmError::new("fetch the dirty log", reason));
        }
        dirty.union(&region.written);
        dirty.union(&region.given_back);
        if clears {
            region.written.clear();
            region.given_back.clear();
        }
        Ok(())
    }

    fn clear(&mut self, region: u32, first_page: u64, words: &[u64]) -> Result<(), VmError> {
        self.0.probe.step(Step::LogClear)?;
        let mut log = self.0.log();
        if !log.logging || !first_page.is_multiple_of(64) {
            let reason = format!("from page {first_page} on, logging: {}", log.logging);
            return Err(VmError::new("clear the dirty log", reason));
        }
        let clears_on_fetch = log.clears_on_fetch;
        let region = log.find(region)?;
        check_range(region.id, region.written.pages().next_multiple_of(64), first_page, words.len() * 64)?;
        if clears_on_fetch {
            return Ok(());
        }
        let pages = region.written.pages();
        for page in set_bits(words).map(|bit| first_page + bit).filter(|&page| page < pages) {
            region.written.remove(page);
            region.given_back.remove(page);
        }
        Ok(())
    }

    fn give_back(&mut self, region: u32, dirty: &PageBitmap) {
        if let Ok(region) = self.0.log().find(region) {
            region.given_back.union(dirty);
        }
    }

    fn stop(&mut self) -> Result<(), VmError> {
        self.0.probe.step(Step::LogStop)?;
        let mut log = self.0.log();
        log.logging = false;
        log.regions.iter_mut().for_each(|region| region.written.clear());
        Ok(())
    }
}

/// The positions of the set bits.
fn set_bits(words: &[u64]) -> impl Iterator<Item = u64> + '_ {
    (0..words.len() as u64 * 64).filter(|&bit| words[(bit / 64) as usize] >> (bit % 64) & 1 != 0)
}

/// A destination that keeps what it was given.
#[derive(Debug)]
pub struct MemoryDestination {
    probe: Probe,
    max_pages: u64,
    name: String,
    machine: Vec<u8>,
    state: Option<Vec<u8>>,
    memory: Option<Arc<PageStore>>,
    /// The region and the page that come out wrong.
    flips: Option<(u32, u64)>,
}

/// The memory of a [`MemoryDestination`] as the engine sees it.
struct DestinationMemory {
    store: Arc<PageStore>,
    probe: Probe,
    flips: Option<(u32, u64)>,
}

impl GuestMemory for DestinationMemory {
    fn regions(&self) -> Vec<RegionInfo> {
        self.store.regions()
    }

    fn read(&self, region: u32, first_page: u64, out: &mut [Page]) -> Result<(), VmError> {
        self.probe.step(Step::Read)?;
        self.store.read(region, first_page, out)
    }

    fn write(&self, region: u32, first_page: u64, pages: &[Page]) -> Result<(), VmError> {
        self.probe.step(Step::Write)?;
        self.store.write(region, first_page, pages)?;
        let flipped = self.flips.filter(|&(of, _)| of == region).and_then(|(_, page)| {
            let index = page.checked_sub(first_page)?;
            pages.get(usize::try_from(index).ok()?).map(|content| (page, *content))
        });
        if let Some((page, mut content)) = flipped {
            content.0[1234] ^= 0x10;
            self.store.write(region, page, &[content])?;
        }
        Ok(())
    }
}

impl MemoryDestination {
    /// A destination that takes VMs of up to 1 GiB, entered in the ledger of the source whose probe this is.
    pub fn new(source: &Probe) -> MemoryDestination {
        let (name, machine, max_pages) = (String::new(), Vec::new(), 1 << 18);
        MemoryDestination {
            probe: Probe::new(source.ledger()),
            max_pages,
            name,
            machine,
            state: None,
            memory: None,
            flips: None,
        }
    }

    /// Memory in which a bit of this page flips whenever the page is written. Nobody is told.
    pub fn flip(mut self, region: u32, page: u64) -> MemoryDestination {
        self.flips = Some((region, page));
        self
    }

    /// The handle that injects failures and tells what happened.
    pub fn probe(&self) -> Probe {
        self.probe.clone()
    }

    /// The memory, once prepared.
    pub fn memory(&self) -> Option<Arc<dyn GuestMemory>> {
        self.memory.clone().map(|memory| memory as Arc<dyn GuestMemory>)
    }

    /// The VM's name, as the source told it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The machine description, as the source told it.
    pub fn machine(&self) -> &[u8] {
        &self.machine
    }

    /// The device state, once loaded.
    pub fn state(&self) -> Option<&[u8]> {
        self.state.as_deref()
    }

    /// The VM as a source, to migrate on. Panics unless it runs.
    pub fn into_source(self) -> MemoryVm {
        assert!(self.probe.is_running(), "a VM that does not run here cannot be sent on");
        let memory = self.memory.expect("a VM that runs has memory");
        MemoryVm::build(self.name, memory, self.machine, self.state.unwrap_or_default(), self.probe)
    }
}

impl DestinationVm for MemoryDestination {
    fn prepare(
        &mut self,
        name: &str,
        regions: &[RegionInfo],
        machine: &[u8],
    ) -> Result<Arc<dyn GuestMemory>, VmError> {
        self.probe.step(Step::Prepare)?;
        let pages = regions.iter().try_fold(0u64, |sum, region| sum.checked_add(region.pages));
        if pages.is_none_or(|pages| pages > self.max_pages) {
            let reason = format!("the regions have {pages:?} pages, at most {} fit", self.max_pages);
            return Err(VmError::new("prepare", reason));
        }
        self.name = name.into();
        self.machine = machine.to_vec();
        self.state = None;
        let store = Arc::new(PageStore::new(regions));
        self.memory = Some(Arc::clone(&store));
        Ok(Arc::new(DestinationMemory { store, probe: self.probe.clone(), flips: self.flips }))
    }

    fn load_state(&mut self, state: &[u8]) -> Result<(), VmError> {
        self.probe.step(Step::LoadState)?;
        if self.memory.is_none() {
            return Err(VmError::new("load state", "the machine was not prepared"));
        }
        self.state = Some(state.to_vec());
        Ok(())
    }

    fn run(&mut self) -> Result<(), VmError> {
        self.probe.step(Step::Run)?;
        if self.state.is_none() {
            return Err(VmError::new("run", "no state was loaded"));
        }
        self.probe.set_running(true);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
