//! How the threads of a migration stop: the first failure wins, and everybody hears of it.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::control::MigrationControl;
use crate::error::MigrationError;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::channel::{Receiver, RecvTimeoutError, SendTimeoutError, Sender};
use crate::sync::thread::{self, Scope};
use crate::sync::time::{Duration, Instant};
use crate::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use crate::transport::Stream;

/// How often a waiting thread looks whether it should stop.
const LOOK: Duration = Duration::from_millis(50);

/// How long whoever could not use a connection waits for the control connection to tell why.
const GRACE: Duration = Duration::from_millis(500);

/// This thread should end: the reason is kept in the [`Flow`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped;

/// The common fate of the threads of one migration.
pub struct Flow {
    control: MigrationControl,
    /// Set once the migration can no longer be cancelled.
    committed: AtomicBool,
    stopped: AtomicBool,
    /// Whether the connections have been shut down.
    closed: AtomicBool,
    reason: Mutex<Option<MigrationError>>,
    streams: Mutex<Vec<Box<dyn Stream>>>,
}

impl Flow {
    /// The fate of a migration that `control` can cancel.
    pub fn new(control: MigrationControl) -> Flow {
        Flow {
            control,
            committed: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            reason: Mutex::new(None),
            streams: Mutex::new(Vec::new()),
        }
    }

    /// The handle that watches and cancels it.
    pub fn control(&self) -> &MigrationControl {
        &self.control
    }

    /// Registers a connection that must be shut down to wake its readers and writers: at once, if all the others have been.
    pub fn register(&self, stream: Box<dyn Stream>) {
        let mut streams = lock(&self.streams);
        if self.closed.load(Ordering::Acquire) {
            // A connection that is gone already needs no shutdown.
            let _ = stream.shutdown();
        }
        streams.push(stream);
    }

    /// Forgets the connections registered so far: nobody waits for them any more.
    pub fn forget_connections(&self) {
        lock(&self.streams).clear();
    }

    /// Stops everything for this reason, unless it stopped already.
    pub fn fail(&self, reason: MigrationError) -> Stopped {
        self.stop_threads(reason);
        self.stop();
        Stopped
    }

    /// The same, but if it stopped already, the connections stay up: whoever stopped it has a last word to say, and shuts them down.
    pub fn fail_if_first(&self, reason: MigrationError) -> Stopped {
        if self.set_reason(reason) {
            self.stop();
        }
        Stopped
    }

    /// A data connection broke. If the peer gave up it says why on the control connection, which is the better reason: waits a
    /// little for it.
    pub fn fail_unless_explained(&self, reason: MigrationError) -> Stopped {
        // If the VM changed hands meanwhile, no data is due any more.
        if self.sleep(GRACE).is_err() || self.is_committed() { Stopped } else { self.fail_if_first(reason) }
    }

    /// Something could not be said on the control connection. If the peer has gone and said why, it waits there to be read: waits a little for
    /// the reader.
    pub fn fail_unless_heard(&self, reason: MigrationError) -> Stopped {
        if self.sleep(GRACE).is_err() { Stopped } else { self.fail_if_first(reason) }
    }

    /// Stops everything without a failure: the work is done.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        let streams = lock(&self.streams);
        self.closed.store(true, Ordering::Release);
        for stream in streams.iter() {
            // A connection that is gone already needs no shutdown.
            let _ = stream.shutdown();
        }
    }

    /// Runs a thread's work, whose result nobody needs. A panic in it is a failure of the migration, of which everybody hears.
    pub fn guard<T>(&self, work: impl FnOnce() -> T) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(work)) {
            let what = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
            let what = what.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
            self.fail(MigrationError::Internal(format!("a thread panicked: {what}")));
        }
    }

    /// Stops everything, but keeps the connections up for a last word to the peer.
    pub fn stop_threads(&self, reason: MigrationError) -> Stopped {
        self.set_reason(reason);
        Stopped
    }

    /// `false` if it stopped already.
    fn set_reason(&self, reason: MigrationError) -> bool {
        let mut first = lock(&self.reason);
        if self.stopped.swap(true, Ordering::AcqRel) {
            return false;
        }
        first.get_or_insert(reason);
        true
    }

    /// From here on a cancel comes too late. Fails if there has been one, or a failure: then the commit comes too late.
    pub fn commit(&self) -> Result<(), Stopped> {
        let mut reason = lock(&self.reason);
        if self.stopped.load(Ordering::Acquire) {
            return Err(Stopped);
        }
        if self.control.is_cancelled() {
            *reason = Some(MigrationError::Cancelled);
            self.stopped.store(true, Ordering::Release);
            return Err(Stopped);
        }
        self.committed.store(true, Ordering::Release);
        Ok(())
    }

    /// The peer has committed, whatever happened here.
    pub fn committed_by_peer(&self) {
        let _reason = lock(&self.reason);
        self.committed.store(true, Ordering::Release);
    }

    /// Whether a cancel would come too late.
    pub fn is_committed(&self) -> bool {
        self.committed.load(Ordering::Acquire)
    }

    /// Whether to go on.
    pub fn check(&self) -> Result<(), Stopped> {
        if self.stopped.load(Ordering::Acquire) {
            return Err(Stopped);
        }
        if self.control.is_cancelled() {
            // Under the lock, so that it is either cancelled or committed.
            let mut reason = lock(&self.reason);
            if !self.is_committed() {
                reason.get_or_insert(MigrationError::Cancelled);
                self.stopped.store(true, Ordering::Release);
                return Err(Stopped);
            }
        }
        Ok(())
    }

    /// Looks at why it stopped; `None` if it did without a failure.
    pub fn look_at_reason<T>(&self, look: impl FnOnce(&MigrationError) -> T) -> Option<T> {
        lock(&self.reason).as_ref().map(look)
    }

    /// Stops everything, for this reason unless there is one already, and returns the reason.
    pub fn end(&self, reason: MigrationError) -> MigrationError {
        let mut first = lock(&self.reason);
        self.stopped.store(true, Ordering::Release);
        first.take().unwrap_or(reason)
    }

    /// Why it stopped.
    pub fn take_reason(&self) -> MigrationError {
        lock(&self.reason)
            .take()
            .unwrap_or_else(|| MigrationError::Internal("stopped without a reason".into()))
    }

    /// Sends `item`, or finds out that it should stop.
    pub fn send<T>(&self, queue: &Sender<T>, mut item: T) -> Result<(), Stopped> {
        loop {
            self.check()?;
            match queue.send_timeout(item, LOOK) {
                Ok(()) => return Ok(()),
                Err(SendTimeoutError::Timeout(back)) => item = back,
                Err(SendTimeoutError::Disconnected(_)) => {
                    return Err(self.stop_threads(MigrationError::Internal("a stage ended too early".into())));
                }
            }
        }
    }

    /// Receives the next item; `None` when the queue has been closed and is empty.
    pub fn receive<T>(&self, queue: &Receiver<T>) -> Result<Option<T>, Stopped> {
        loop {
            self.check()?;
            match queue.recv_timeout(LOOK) {
                Ok(item) => return Ok(Some(item)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
            }
        }
    }

    /// Waits on `condvar` until `ready` holds of what `mutex` guards, or finds out that it should stop.
    pub fn wait<'a, T>(
        &self,
        mutex: &'a Mutex<T>,
        condvar: &Condvar,
        mut ready: impl FnMut(&mut T) -> bool,
    ) -> Result<MutexGuard<'a, T>, Stopped> {
        let mut guard = lock(mutex);
        loop {
            if ready(&mut guard) {
                return Ok(guard);
            }
            self.check()?;
            guard = condvar.wait_timeout(guard, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Sleeps, or finds out that it should stop.
    pub fn sleep(&self, time: Duration) -> Result<(), Stopped> {
        let end = Instant::now() + time;
        loop {
            self.check()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            thread::sleep(left.min(LOOK));
        }
    }
}

/// Held by the thread that owns a migration: if it panics, in the VM's implementation say, the other threads must not wait for ever.
pub struct StopOnPanic<'a>(pub &'a Flow);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail(MigrationError::Internal("the thread that migrates panicked".into()));
        }
    }
}

/// Starts a thread of a migration, whose result nobody needs. If it panics, or the system has no more threads, the migration fails.
pub fn spawn<'scope, T>(
    scope: &'scope Scope<'scope, '_>,
    flow: &'scope Flow,
    work: impl FnOnce() -> T + Send + 'scope,
) -> Result<(), Stopped> {
    let spawned = thread::Builder::new().spawn_scoped(scope, move || flow.guard(work));
    spawned.map(drop).map_err(|error| {
        flow.fail(MigrationError::Internal(format!(
            "cannot start a thread: {error}; raise the limit (ulimit -u, or that of the container), or use fewer threads and connections"
        )))
    })
}

/// Locks. A thread that panicked while holding a lock has failed the migration anyway.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts work that is under way, for those who wait until there is none.
#[derive(Debug, Default)]
pub struct Outstanding {
    count: Mutex<u64>,
    none: Condvar,
}

impl Outstanding {
    /// One more piece of work is under way.
    pub fn add(&self) {
        *lock(&self.count) += 1;
    }

    /// One piece of work is done.
    pub fn done(&self) {
        let mut count = lock(&self.count);
        *count -= 1;
        if *count == 0 {
            self.none.notify_all();
        }
    }

    /// Waits until no work is under way, or finds out that it should stop.
    pub fn wait_for_none(&self, flow: &Flow) -> Result<(), Stopped> {
        flow.wait(&self.count, &self.none, |count| *count == 0).map(drop)
    }
}

/// A point that a number of threads must all reach before any goes on. Unlike `std::sync::Barrier` nobody waits for a dead thread.
#[derive(Debug)]
pub struct MeetingPoint {
    parties: usize,
    state: Mutex<(usize, u64)>,
    met: Condvar,
}

impl MeetingPoint {
    /// A point that so many threads must reach.
    pub fn new(parties: usize) -> MeetingPoint {
        MeetingPoint { parties, state: Mutex::new((0, 0)), met: Condvar::new() }
    }

    /// Waits for the others. `true` for the one that came last.
    pub fn meet(&self, flow: &Flow) -> Result<bool, Stopped> {
        let round = {
            let mut state = lock(&self.state);
            state.0 += 1;
            if state.0 == self.parties {
                *state = (0, state.1 + 1);
                self.met.notify_all();
                return Ok(true);
            }
            state.1
        };
        flow.wait(&self.state, &self.met, |state| state.1 != round).map(|_| false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_wins() {
        let flow = Flow::new(MigrationControl::new());
        assert_eq!(flow.check(), Ok(()));
        flow.fail(MigrationError::Peer("first".into()));
        flow.fail(MigrationError::Peer("second".into()));
        assert_eq!(flow.check(), Err(Stopped));
        assert!(matches!(flow.take_reason(), MigrationError::Peer(why) if why == "first"));
    }

    #[test]
    fn a_cancel_stops_until_the_commit() {
        let control = MigrationControl::new();
        let flow = Flow::new(control.clone());
        flow.commit().unwrap();
        control.cancel();
        assert_eq!(flow.check(), Ok(()));
        let flow = Flow::new(control);
        assert_eq!(flow.check(), Err(Stopped));
        assert!(matches!(flow.take_reason(), MigrationError::Cancelled));
    }

    #[test]
    fn a_commit_comes_too_late_after_a_cancel() {
        let control = MigrationControl::new();
        let flow = Flow::new(control.clone());
        control.cancel();
        assert_eq!(flow.commit(), Err(Stopped));
        assert!(matches!(flow.take_reason(), MigrationError::Cancelled));
    }

    #[test]
    fn a_panic_stops_the_others() {
        let flow = Flow::new(MigrationControl::new());
        flow.guard(|| panic!("on purpose"));
        assert_eq!(flow.check(), Err(Stopped));
        assert!(matches!(flow.take_reason(), MigrationError::Internal(why) if why.contains("on purpose")));
    }

    #[test]
    fn a_connection_that_comes_too_late_is_shut_down() {
        use std::io::Read;
        use std::os::unix::net::UnixStream;

        let flow = Flow::new(MigrationControl::new());
        let (here, mut there) = UnixStream::pair().unwrap();
        flow.stop_threads(MigrationError::Peer("gone".into()));
        flow.register(Box::new(here));
        there.set_nonblocking(true).unwrap();
        assert!(there.read(&mut [0]).is_err(), "there may be a last word to say");
        flow.stop();
        assert_eq!(there.read(&mut [0]).unwrap(), 0);
        let (here, mut there) = UnixStream::pair().unwrap();
        flow.register(Box::new(here));
        assert_eq!(there.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn a_second_failure_leaves_the_connections_to_the_last_word_of_the_first() {
        use std::io::Read;
        use std::os::unix::net::UnixStream;

        for first in [true, false] {
            let flow = Flow::new(MigrationControl::new());
            let (here, mut there) = UnixStream::pair().unwrap();
            there.set_nonblocking(true).unwrap();
            flow.register(Box::new(here));
            if !first {
                flow.stop_threads(MigrationError::Differs("first".into()));
            }
            flow.fail_if_first(MigrationError::Peer("refused".into()));
            assert_eq!(there.read(&mut [0]).is_ok(), first);
            assert_eq!(matches!(flow.take_reason(), MigrationError::Peer(_)), first);
        }
    }

    #[test]
    fn what_the_peer_said_before_it_went_is_the_reason() {
        let flow = Flow::new(MigrationControl::new());
        std::thread::scope(|scope| {
            scope.spawn(|| flow.fail_unless_heard(MigrationError::Internal("broken pipe".into())));
            std::thread::sleep(LOOK);
            flow.fail(MigrationError::PeerReports("no room".into()));
        });
        assert!(matches!(flow.take_reason(), MigrationError::PeerReports(_)));
        let flow = Flow::new(MigrationControl::new());
        flow.committed_by_peer();
        flow.fail_unless_heard(MigrationError::Internal("broken pipe".into()));
        assert!(flow.check().is_err(), "after the commit it is to be known too");
    }

    #[test]
    fn nobody_waits_for_a_queue_that_is_stopped() {
        let flow = Flow::new(MigrationControl::new());
        let (sender, receiver) = crossbeam_channel::bounded::<u8>(1);
        flow.send(&sender, 1).unwrap();
        flow.fail(MigrationError::Peer("gone".into()));
        assert_eq!(flow.send(&sender, 2), Err(Stopped));
        assert_eq!(flow.receive(&receiver), Err(Stopped));
    }

    #[test]
    fn threads_meet_again_and_again() {
        let (flow, point) = (Flow::new(MigrationControl::new()), MeetingPoint::new(3));
        let last: usize = std::thread::scope(|scope| {
            let run = || (0..100).filter(|_| point.meet(&flow).unwrap()).count();
            let threads: Vec<_> = (0..3).map(|_| scope.spawn(run)).collect();
            threads.into_iter().map(|t| t.join().unwrap()).sum()
        });
        assert_eq!(last, 100);
    }

    #[test]
    fn a_meeting_ends_when_somebody_fails() {
        let (flow, point) = (Flow::new(MigrationControl::new()), MeetingPoint::new(2));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| point.meet(&flow));
            flow.fail(MigrationError::Peer("gone".into()));
            assert_eq!(waiting.join().unwrap(), Err(Stopped));
        });
    }
}
