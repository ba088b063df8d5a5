//! The gate that all vCPU threads of a VM pass: it lets them run, parks them, or ends them.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Why a VM does not run any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest reset the machine through its keyboard controller: for most guests, the way to end.
    Reset,
    /// The guest shut down or ran into a triple fault, which a processor can't tell apart.
    Shutdown,
    /// Somebody asked for it.
    Stopped,
    /// A vCPU could not go on; the text says what KVM said.
    Failed(String),
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ExitReason::Reset => f.write_str("the guest reset the machine"),
            ExitReason::Shutdown => f.write_str("the guest shut down (or a triple fault)"),
            ExitReason::Stopped => f.write_str("the VM was stopped"),
            ExitReason::Failed(why) => write!(f, "the VM failed: {why}"),
        }
    }
}

/// What the vCPU threads are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Run,
    Park,
    End,
}

pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    /// Whether the target is other than `Run`; a vCPU looks at this after each exit.
    closed: AtomicBool,
}

struct State {
    target: Target,
    /// Threads that are inside, i.e. neither parked nor ended.
    inside: u32,
    exit: Option<ExitReason>,
}

impl Gate {
    /// A closed gate with nobody inside.
    pub(crate) fn new() -> Gate {
        Gate {
            state: Mutex::new(State { target: Target::Park, inside: 0, exit: None }),
            changed: Condvar::new(),
            closed: AtomicBool::new(true),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, state: &mut State, target: Target) {
        // The end is final.
        if state.target != Target::End {
            state.target = target;
            self.closed.store(target != Target::Run, Ordering::Release);
            self.changed.notify_all();
        }
    }

    /// Whether a vCPU must come out.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Waits until the gate is open and goes in; `false`: it never will be, the thread must end.
    pub(crate) fn enter(&self) -> bool {
        let mut state = self.state();
        loop {
            match state.target {
                Target::Run => {
                    state.inside += 1;
                    return true;
                }
                Target::Park => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Target::End => return false,
            }
        }
    }

    /// Comes out.
    pub(crate) fn leave(&self) {
        self.state().inside -= 1;
        self.changed.notify_all();
    }

    pub(crate) fn open(&self) {
        self.set(&mut self.state(), Target::Run);
    }

    pub(crate) fn close(&self) {
        self.set(&mut self.state(), Target::Park);
    }

    /// Ends the VM; the first reason counts.
    pub(crate) fn exit(&self, reason: ExitReason) {
        let mut state = self.state();
        state.exit.get_or_insert(reason);
        self.set(&mut state, Target::End);
    }

    pub(crate) fn exit_reason(&self) -> Option<ExitReason> {
        self.state().exit.clone()
    }

    /// Waits at most this long until nobody is inside, and says whether that came true.
    pub(crate) fn wait_empty(&self, timeout: Duration) -> bool {
        self.wait(timeout, |state| state.inside == 0)
    }

    /// Waits at most this long for the end.
    pub(crate) fn wait_exit(&self, timeout: Duration) -> Option<ExitReason> {
        self.wait(timeout, |state| state.exit.is_some());
        self.exit_reason()
    }

    fn wait(&self, timeout: Duration, mut done: impl FnMut(&State) -> bool) -> bool {
        let deadline = Instant::now() + timeout;
        let mut state = self.state();
        while !done(&state) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}
