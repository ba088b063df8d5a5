//! The thread that gives work to the device and hears of its end.
//!
//! Drivers may take their time in a submission, and wgpu holds locks meanwhile (lavapipe waits for the work before). Only this thread
//! calls either, so that encoders and decoders never wait for a device unless they say so.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use wgpu::{Buffer, CommandBuffer, Device, MapMode, PollError, PollType, Queue, SubmissionIndex};

use crate::loss::Loss;

/// How long new work may wait behind the wait for work that the device has.
const LOOK: Duration = Duration::from_micros(100);
/// How long to wait for the thread when it is not needed any more.
const GOODBYE: Duration = Duration::from_secs(1);

/// The state of a buffer that is mapped from time to time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// The device has the buffer, or is to get it.
    Unmapped,
    /// The CPU may use it.
    Mapped,
    /// The device refused.
    Failed,
}

/// A [`Mapping`] that the device changes.
#[derive(Clone, Debug)]
pub(crate) struct SharedMapping(Arc<AtomicU8>);

impl SharedMapping {
    pub(crate) fn new(mapping: Mapping) -> SharedMapping {
        SharedMapping(Arc::new(AtomicU8::new(mapping as u8)))
    }

    pub(crate) fn get(&self) -> Mapping {
        let states = [Mapping::Unmapped, Mapping::Mapped, Mapping::Failed];
        states[usize::from(self.0.load(Ordering::Acquire))]
    }

    pub(crate) fn set(&self, mapping: Mapping) {
        self.0.store(mapping as u8, Ordering::Release);
    }
}

/// The first bytes of a buffer are to be mapped when the device has done what was submitted before.
pub(crate) struct MapRequest {
    pub(crate) buffer: Buffer,
    pub(crate) mapping: SharedMapping,
    pub(crate) mode: MapMode,
    pub(crate) bytes: u64,
}

/// What is submitted together, and which buffers are wanted back.
struct Work {
    commands: CommandBuffer,
    maps: Vec<MapRequest>,
}

/// Counts what the device has finished.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    finished: Mutex<Finished>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Finished {
    count: u64,
    /// When that was last more.
    latest: Option<Instant>,
}

impl Progress {
    /// What has been finished so far.
    pub(crate) fn count(&self) -> u64 {
        self.lock().count
    }

    /// How long the device has finished nothing, as somebody sees it who waits since `start`.
    pub(crate) fn quiet_since(&self, start: Instant) -> Duration {
        self.lock().latest.map_or(start, |latest| latest.max(start)).elapsed()
    }

    /// Waits until the count is not `seen` any more, or for this time.
    pub(crate) fn wait(&self, seen: u64, timeout: Duration) {
        let is_old = |finished: &mut Finished| finished.count == seen;
        // Poisoned or not, whoever waits looks again.
        let _ = self.changed.wait_timeout_while(self.lock(), timeout, is_old);
    }

    fn more(&self) {
        let mut finished = self.lock();
        *finished = Finished { count: finished.count + 1, latest: Some(Instant::now()) };
        drop(finished);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Finished> {
        self.finished.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The way to the thread. Dropping it ends the thread once everything is submitted.
pub(crate) struct WorkQueue {
    work: Option<Sender<Work>>,
    thread: Option<JoinHandle<()>>,
    pub(crate) progress: Arc<Progress>,
}

impl WorkQueue {
    /// Starts the thread. A driver that loses its device ends it, and is noted in `lost`.
    ///
    /// # Errors
    ///
    /// If there cannot be another thread.
    pub(crate) fn start(device: Device, queue: Queue, lost: Loss) -> std::io::Result<WorkQueue> {
        let (work, todo) = channel();
        let progress = Arc::new(Progress::default());
        let finished = progress.clone();
        let thread = std::thread::Builder::new().name("gpu queue".into()).spawn(move || {
            if lost.catch(|| run(&device, &queue, &todo, &finished)).is_none() {
                // Nothing will be finished any more: whoever waits looks at the device's state.
                finished.more();
            }
        })?;
        Ok(WorkQueue { work: Some(work), thread: Some(thread), progress })
    }

    /// Gives work to the thread; `false` if the thread is gone.
    pub(crate) fn submit(&self, commands: CommandBuffer, maps: Vec<MapRequest>) -> bool {
        self.work.as_ref().is_some_and(|queue| queue.send(Work { commands, maps }).is_ok())
    }
}

impl Drop for WorkQueue {
    fn drop(&mut self) {
        drop(self.work.take());
        let Some(thread) = self.thread.take() else { return };
        let start = Instant::now();
        while !thread.is_finished() && start.elapsed() < GOODBYE {
            std::thread::sleep(Duration::from_millis(1));
        }
        // One that a driver does not let go is left alone.
        if thread.is_finished() {
            let _ = thread.join();
        }
    }
}

fn run(device: &Device, queue: &Queue, todo: &Receiver<Work>, progress: &Arc<Progress>) {
    let mut in_flight: VecDeque<SubmissionIndex> = VecDeque::new();
    loop {
        let next = match in_flight.front() {
            None => todo.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(_) => todo.try_recv().map_err(|error| match error {
                TryRecvError::Empty => RecvTimeoutError::Timeout,
                TryRecvError::Disconnected => RecvTimeoutError::Disconnected,
            }),
        };
        match next {
            Ok(Work { commands, maps }) => {
                in_flight.push_back(queue.submit([commands]));
                for request in maps {
                    map(request, progress);
                }
                // A driver that took its time may have finished what came before.
                let _ = device.poll(PollType::Poll);
            }
            Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => {
                let oldest = in_flight.front().cloned();
                // That the work is not done is all that can go wrong here: a device that is lost makes wgpu panic, which ends this thread. What
                // is done, or was not submitted at all, is not waited for again.
                if !matches!(
                    device.poll(PollType::Wait { submission_index: oldest, timeout: Some(LOOK) }),
                    Err(PollError::Timeout)
                ) {
                    in_flight.pop_front();
                }
            }
        }
    }
}

fn map(request: MapRequest, progress: &Arc<Progress>) {
    let MapRequest { buffer, mapping, mode, bytes } = request;
    let progress = progress.clone();
    buffer.map_async(mode, ..bytes, move |result| {
        mapping.set(if result.is_ok() { Mapping::Mapped } else { Mapping::Failed });
        progress.more();
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_waits_hears_of_progress() {
        let progress = Arc::new(Progress::default());
        let seen = progress.count();
        let from_elsewhere = progress.clone();
        let thread = std::thread::spawn(move || from_elsewhere.more());
        let start = Instant::now();
        progress.wait(seen, Duration::from_secs(600));
        assert!(progress.count() > seen && start.elapsed() < Duration::from_secs(300));
        thread.join().unwrap();
        progress.wait(seen, Duration::from_secs(600));
        progress.wait(progress.count(), Duration::ZERO);
    }

    #[test]
    fn a_device_that_finishes_anything_is_not_quiet() {
        let (progress, long) = (Progress::default(), Duration::from_secs(60));
        let long_ago = Instant::now().checked_sub(long).expect("the machine is up longer than that");
        assert!(progress.quiet_since(long_ago) >= long);
        progress.more();
        assert!(progress.quiet_since(long_ago) < long, "it has just finished something");
        // What was finished before somebody waits is nothing to him.
        let latest = progress.lock().latest.unwrap();
        assert!(progress.quiet_since(Instant::now()) <= latest.elapsed());
    }
}
