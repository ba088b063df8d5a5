//! The epoch barrier: no batch of an epoch is decoded before every batch of the epoch before has been restored.
//!
//! That is what makes guest memory the right base: a page is sent at most once per epoch, so within an epoch nobody
//! writes a page that somebody else reads.
//!
//! Nor is anything of an epoch let in before the control connection has announced it: what is said of its batches would make no sense to the
//! protocol before.

use crate::bitmap::PageBitmap;
use crate::flow::{Flow, Stopped, lock};
use crate::sync::{Condvar, Mutex};

/// Counts batches in and out and lets the connections pass together.
#[derive(Debug)]
pub(crate) struct Gate {
    connections: usize,
    state: Mutex<State>,
    changed: Condvar,
    /// Pages received in this epoch, one bitmap per region.
    seen: Mutex<Vec<PageBitmap>>,
}

#[derive(Debug, Default)]
struct State {
    /// Epochs that were announced.
    started: u32,
    /// The epoch that is being received.
    epoch: u32,
    /// Connections that have reached the end of this epoch.
    arrived: usize,
    /// Batches of this epoch that were received and not yet restored.
    outstanding: u64,
    /// One of the connections is about to open the gate.
    leader: bool,
    /// The last epoch is over: nothing more may come.
    closed: bool,
}

impl Gate {
    /// A gate for this many connections and regions of these sizes in pages.
    pub(crate) fn new(connections: usize, region_pages: impl Iterator<Item = u64>) -> Gate {
        let seen = Mutex::new(region_pages.map(PageBitmap::new).collect());
        Gate { connections, state: Mutex::default(), changed: Condvar::new(), seen }
    }

    /// The control connection has announced this epoch.
    pub(crate) fn announce(&self, epoch: u32) {
        lock(&self.state).started = epoch.saturating_add(1);
        self.changed.notify_all();
    }

    /// Waits until the epoch that is being received was announced, which is on another connection than its batches.
    pub(crate) fn wait_announced(&self, flow: &Flow) -> Result<(), Stopped> {
        flow.wait(&self.state, &self.changed, |state| state.closed || state.started > state.epoch).map(drop)
    }

    /// A batch was received. If the source must not have sent it, says why; then the batch is not counted.
    pub(crate) fn enter(&self, region: usize, pages: &[u64]) -> Result<(), String> {
        {
            let seen = &mut lock(&self.seen)[region];
            if let Some(page) = pages.iter().find(|&&page| !seen.insert(page)) {
                return Err(format!("page {page} was sent twice in an epoch"));
            }
        }
        let mut state = lock(&self.state);
        if state.closed {
            return Err("pages were sent after the last epoch".into());
        }
        state.outstanding += 1;
        Ok(())
    }

    /// A batch was restored.
    pub(crate) fn restored(&self) {
        let mut state = lock(&self.state);
        state.outstanding -= 1;
        if state.outstanding == 0 {
            self.changed.notify_all();
        }
    }

    /// A connection has reached the end of the epoch: waits for the others and until all batches are restored. `true` for exactly one of the
    /// connections, which has to [`open`](Gate::open) the gate for the others.
    pub(crate) fn pass(&self, flow: &Flow) -> Result<bool, Stopped> {
        let epoch = {
            let mut state = lock(&self.state);
            state.arrived += 1;
            if state.arrived == self.connections {
                self.changed.notify_all();
            }
            state.epoch
        };
        let mut state = flow.wait(&self.state, &self.changed, |state| {
            state.epoch != epoch
                || (!state.leader && state.arrived == self.connections && state.outstanding == 0)
        })?;
        if state.epoch != epoch {
            return Ok(false);
        }
        state.leader = true;
        Ok(true)
    }

    /// The next epoch begins.
    pub(crate) fn open(&self) {
        lock(&self.seen).iter_mut().for_each(PageBitmap::clear);
        let mut state = lock(&self.state);
        *state = State { epoch: state.epoch + 1, started: state.started, ..State::default() };
        self.changed.notify_all();
    }

    /// Waits until every batch of `epoch` and of those before has been restored.
    pub(crate) fn wait_done(&self, epoch: u32, flow: &Flow) -> Result<(), Stopped> {
        flow.wait(&self.state, &self.changed, |state| state.epoch > epoch).map(drop)
    }

    /// Waits until every batch of `last`, the last epoch, and of those before has been restored, and closes the gate for good. `false` if
    /// more has come.
    pub(crate) fn close(&self, last: u32, flow: &Flow) -> Result<bool, Stopped> {
        let mut state = flow.wait(&self.state, &self.changed, |state| state.epoch > last)?;
        state.closed = true;
        Ok(state.epoch == last + 1 && state.outstanding == 0 && state.arrived == 0)
    }

    /// Whether the last epoch is over.
    pub(crate) fn is_closed(&self) -> bool {
        lock(&self.state).closed
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::control::MigrationControl;

    #[test]
    fn connections_pass_together_and_only_when_everything_is_restored() {
        let (flow, gate, passed) =
            (Flow::new(MigrationControl::new()), Gate::new(2, [10].into_iter()), AtomicU32::new(0));
        gate.enter(0, &[1, 2]).unwrap();
        assert_eq!(gate.enter(0, &[3, 2]).unwrap_err(), "page 2 was sent twice in an epoch");
        std::thread::scope(|scope| {
            let pass = || {
                let leader = gate.pass(&flow).unwrap();
                if leader {
                    assert_eq!(passed.load(Ordering::SeqCst), 0, "nobody passes before the gate is opened");
                    gate.open();
                }
                passed.fetch_add(1, Ordering::SeqCst);
                leader
            };
            let threads = [scope.spawn(pass), scope.spawn(pass)];
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert_eq!(passed.load(Ordering::SeqCst), 0, "a batch is not restored yet");
            gate.restored();
            let leaders = threads.into_iter().map(|t| t.join().unwrap()).filter(|&l| l).count();
            assert_eq!(leaders, 1);
        });
        assert_eq!(gate.enter(0, &[2]), Ok(()), "in the next epoch it may be sent again");
        gate.restored();
        assert_eq!(gate.close(0, &flow), Ok(true));
        assert!(gate.is_closed());
        assert_eq!(gate.enter(0, &[5]).unwrap_err(), "pages were sent after the last epoch");
    }

    #[test]
    fn pages_after_the_last_epoch_are_noticed() {
        let (flow, gate) = (Flow::new(MigrationControl::new()), Gate::new(1, [10].into_iter()));
        assert_eq!(gate.pass(&flow), Ok(true));
        gate.open();
        gate.enter(0, &[1]).unwrap();
        assert_eq!(gate.close(0, &flow), Ok(false));
    }
}
