//! What a test VM is told to fail at, what it was asked to do, and whether it runs.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pagewarp_engine::vm::VmError;

/// A call that a test VM can count, delay or fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// `SourceVm::machine`.
    Machine,
    /// `SourceVm::dirty_log`.
    DirtyLog,
    /// `DirtyLog::start`.
    LogStart,
    /// `DirtyLog::fetch`.
    LogFetch,
    /// `DirtyLog::clear`.
    LogClear,
    /// `DirtyLog::stop`.
    LogStop,
    /// `GuestMemory::read`.
    Read,
    /// `GuestMemory::write`.
    Write,
    /// `SourceVm::pause`.
    Pause,
    /// `SourceVm::resume`.
    Resume,
    /// `SourceVm::save_state`.
    SaveState,
    /// `DestinationVm::prepare`.
    Prepare,
    /// `DestinationVm::load_state`.
    LoadState,
    /// `DestinationVm::run`.
    Run,
}

/// Counts the VMs that run, so that a test can tell whether two ever ran at once.
///
/// Give the same ledger to the source and the destination of one migration.
#[derive(Clone, Debug, Default)]
pub struct RunLedger {
    counts: Arc<Mutex<RunCounts>>,
}

#[derive(Debug, Default)]
struct RunCounts {
    running: usize,
    most: usize,
}

impl RunLedger {
    /// A ledger with nobody running.
    pub fn new() -> RunLedger {
        RunLedger::default()
    }

    /// How many run now; 1 is the only good answer once a migration has ended and is not in doubt.
    pub fn running(&self) -> usize {
        self.lock().running
    }

    /// The most that ever ran at once; 2 or more is the worst thing that can happen.
    pub fn most_running(&self) -> usize {
        self.lock().most
    }

    fn lock(&self) -> MutexGuard<'_, RunCounts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A handle on a test VM that stays with the test while the engine holds the VM. Clones share it.
#[derive(Clone, Debug)]
pub struct Probe {
    ledger: RunLedger,
    shared: Arc<Mutex<Shared>>,
}

#[derive(Debug, Default)]
struct Shared {
    running: bool,
    calls: HashMap<Step, u64>,
    /// The n-th call (from 0) fails, and all after it if the flag is set.
    failures: HashMap<Step, (u64, bool)>,
    delays: HashMap<Step, Duration>,
    history: Vec<Step>,
}

impl Probe {
    /// A probe of a VM that does not run and fails at nothing.
    pub fn new(ledger: &RunLedger) -> Probe {
        Probe { ledger: ledger.clone(), shared: Arc::default() }
    }

    /// Every call of `step` fails.
    pub fn fail(&self, step: Step) {
        self.lock().failures.insert(step, (0, true));
    }

    /// Only the n-th call of `step`, counted from 0 since the VM was made, fails.
    pub fn fail_nth(&self, step: Step, n: u64) {
        self.lock().failures.insert(step, (n, false));
    }

    /// `step` works again.
    pub fn mend(&self, step: Step) {
        self.lock().failures.remove(&step);
    }

    /// Every call of `step` takes this much longer.
    pub fn delay(&self, step: Step, duration: Duration) {
        self.lock().delays.insert(step, duration);
    }

    /// How often `step` was called, failed calls included.
    pub fn calls(&self, step: Step) -> u64 {
        self.lock().calls.get(&step).copied().unwrap_or(0)
    }

    /// The calls in order, failed ones included, without reads and writes of memory and fetches and clears of the log.
    pub fn history(&self) -> Vec<Step> {
        self.lock().history.clone()
    }

    /// Whether the VM runs.
    pub fn is_running(&self) -> bool {
        self.lock().running
    }

    /// The ledger that this VM is entered in.
    pub fn ledger(&self) -> &RunLedger {
        &self.ledger
    }

    /// Records the call, waits its delay out and fails if that was asked for.
    pub(crate) fn step(&self, step: Step) -> Result<(), VmError> {
        let (delay, fails, call) = {
            let mut shared = self.lock();
            let calls = shared.calls.entry(step).or_default();
            let call = *calls;
            *calls += 1;
            if !matches!(step, Step::Read | Step::Write | Step::LogFetch | Step::LogClear) {
                shared.history.push(step);
            }
            let fails = shared.failures.get(&step).is_some_and(|&(n, on)| call == n || (on && call > n));
            (shared.delays.get(&step).copied(), fails, call)
        };
        if let Some(delay) = delay {
            std::thread::sleep(delay);
        }
        if fails {
            return Err(VmError::new(
                format!("{step:?}"),
                format!("call {call} failed because the test asked for it"),
            ));
        }
        Ok(())
    }

    /// Notes that the VM runs, or does not.
    pub(crate) fn set_running(&self, running: bool) {
        let mut shared = self.lock();
        if shared.running == running {
            return;
        }
        shared.running = running;
        let mut counts = self.ledger.lock();
        if running {
            counts.running += 1;
            counts.most = counts.most.max(counts.running);
        } else {
            counts.running -= 1;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fails_the_calls_it_was_told_to() {
        let probe = Probe::new(&RunLedger::new());
        probe.fail_nth(Step::Pause, 1);
        probe.fail(Step::Run);
        let pauses: Vec<bool> = (0..3).map(|_| probe.step(Step::Pause).is_ok()).collect();
        assert_eq!(pauses, [true, false, true]);
        assert!(probe.step(Step::Run).is_err());
        assert!(probe.step(Step::Run).unwrap_err().to_string().contains("call 1"));
        probe.mend(Step::Run);
        assert!(probe.step(Step::Run).is_ok());
        assert_eq!(probe.calls(Step::Run), 3);
        assert_eq!(probe.history()[..4], [Step::Pause, Step::Pause, Step::Pause, Step::Run]);
    }

    #[test]
    fn the_ledger_remembers_that_two_ran() {
        let ledger = RunLedger::new();
        let (one, two) = (Probe::new(&ledger), Probe::new(&ledger));
        one.set_running(true);
        one.set_running(true);
        assert_eq!((ledger.running(), ledger.most_running()), (1, 1));
        two.set_running(true);
        one.set_running(false);
        assert_eq!((ledger.running(), ledger.most_running()), (1, 2));
        assert!(two.is_running() && !one.is_running());
    }
}
