//! The loop of a stage that computes through an asynchronous backend: keep it fed, hand on what it finished.

use crate::error::MigrationError;
use crate::flow::{Flow, Stopped};
use crate::metrics::StageMeter;
use crate::sync::channel::{Receiver, RecvTimeoutError};
use crate::sync::time::{Duration, Instant};

/// How often a thread whose device is at work, and could do more, looks whether the device has finished something.
const POLL: Duration = Duration::from_micros(500);
/// How long it prefers new work to waiting for the device alone.
const PATIENCE: Duration = Duration::from_millis(50);

/// One thread's worker, with several batches in flight.
pub(crate) trait Compute {
    /// What it works on.
    type Batch;
    /// Whether another batch can be submitted.
    fn has_room(&mut self) -> bool;
    /// Whether there is nothing to complete.
    fn is_idle(&self) -> bool;
    /// Whether `complete` would not wait for a device.
    fn is_ready(&mut self) -> bool;
    /// Time spent waiting for a device since this was last asked.
    fn take_device_wait(&mut self) -> Duration;
    /// Starts work on a batch. There must be room.
    fn submit(&mut self, batch: Self::Batch) -> Result<(), MigrationError>;
    /// Waits for a batch to be finished; `None` if none is in flight.
    fn complete(&mut self) -> Result<Option<Self::Batch>, MigrationError>;
}

/// Works until `queue` is closed and everything is finished. `hand_on` gets the finished batches.
pub(crate) fn run<W: Compute>(
    worker: &mut W,
    queue: &Receiver<W::Batch>,
    meter: &StageMeter,
    flow: &Flow,
    mut hand_on: impl FnMut(W::Batch) -> Result<(), Stopped>,
) -> Result<(), Stopped> {
    let mut open = true;
    while open || !worker.is_idle() {
        while open && worker.has_room() {
            match next(worker, queue, meter, flow)? {
                Next::Batch(batch) => submit(worker, batch, meter).map_err(|e| flow.stop_threads(e))?,
                Next::Closed => open = false,
                Next::Finished => break,
            }
        }
        if let Some(batch) = complete(worker, meter).map_err(|e| flow.stop_threads(e))? {
            hand_on(batch)?;
        }
    }
    Ok(())
}

/// Starts work on a batch and counts the time.
pub(crate) fn submit<W: Compute>(
    worker: &mut W,
    batch: W::Batch,
    meter: &StageMeter,
) -> Result<(), MigrationError> {
    meter.busy_on_device(|| {
        let result = worker.submit(batch);
        (result, worker.take_device_wait())
    })
}

/// Waits for a batch to be finished and counts the time.
pub(crate) fn complete<W: Compute>(
    worker: &mut W,
    meter: &StageMeter,
) -> Result<Option<W::Batch>, MigrationError> {
    meter.busy_on_device(|| {
        let result = worker.complete();
        (result, worker.take_device_wait())
    })
}

/// What a worker that could take another batch does next.
enum Next<B> {
    Batch(B),
    /// There are no more batches.
    Closed,
    /// There is no batch to submit, but one to complete.
    Finished,
}

/// Takes what there is. With a device at work and nothing in the queue, waits for either; with neither, for the queue.
fn next<W: Compute>(
    worker: &mut W,
    queue: &Receiver<W::Batch>,
    meter: &StageMeter,
    flow: &Flow,
) -> Result<Next<W::Batch>, Stopped> {
    if worker.is_idle() {
        let batch = meter.blocked_in(|| flow.receive(queue))?;
        return Ok(batch.map_or(Next::Closed, Next::Batch));
    }
    let until = Instant::now() + PATIENCE;
    loop {
        let patience = if worker.is_ready() || Instant::now() >= until { Duration::ZERO } else { POLL };
        match meter.blocked_in(|| queue.recv_timeout(patience)) {
            Ok(batch) => return Ok(Next::Batch(batch)),
            Err(RecvTimeoutError::Disconnected) => return Ok(Next::Closed),
            Err(RecvTimeoutError::Timeout) if patience.is_zero() => return Ok(Next::Finished),
            Err(RecvTimeoutError::Timeout) => flow.check()?,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;
    use crate::control::MigrationControl;

    /// A device with room for three batches whose oldest is finished once it was asked so many times.
    #[derive(Default)]
    struct Device {
        in_flight: VecDeque<u32>,
        polls_left: u32,
        most_in_flight: usize,
        waited: Duration,
    }

    impl Compute for Device {
        type Batch = u32;

        fn has_room(&mut self) -> bool {
            self.in_flight.len() < 3
        }

        fn is_idle(&self) -> bool {
            self.in_flight.is_empty()
        }

        fn is_ready(&mut self) -> bool {
            self.polls_left = self.polls_left.saturating_sub(1);
            self.polls_left == 0
        }

        fn take_device_wait(&mut self) -> Duration {
            std::mem::take(&mut self.waited)
        }

        fn submit(&mut self, batch: u32) -> Result<(), MigrationError> {
            self.in_flight.push_back(batch);
            self.most_in_flight = self.most_in_flight.max(self.in_flight.len());
            Ok(())
        }

        fn complete(&mut self) -> Result<Option<u32>, MigrationError> {
            let started = Instant::now();
            std::thread::sleep(Duration::from_millis(1));
            self.waited += started.elapsed();
            Ok(self.in_flight.pop_front())
        }
    }

    /// What comes while the device is at work is submitted as long as there is room, and everything comes out in order.
    #[test]
    fn a_device_at_work_gets_more() {
        let (flow, meter) = (Flow::new(MigrationControl::new()), StageMeter::new(1));
        // Never ready by itself within the patience.
        let mut device = Device { polls_left: u32::MAX, ..Device::default() };
        let (sender, queue) = crossbeam_channel::bounded(10);
        let mut done = Vec::new();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for batch in 0..8 {
                    sender.send(batch).unwrap();
                    std::thread::sleep(Duration::from_millis(2));
                }
            });
            run(&mut device, &queue, &meter, &flow, |batch| {
                done.push(batch);
                Ok(())
            })
            .unwrap();
        });
        assert_eq!(done, (0..8).collect::<Vec<_>>());
        assert_eq!(device.most_in_flight, 3);
        let report = meter.report();
        assert!(report.device_wait_ms >= 8.0, "{report:?}");
    }

    #[test]
    fn a_device_that_is_ready_is_not_kept_waiting_for_input() {
        let (flow, meter) = (Flow::new(MigrationControl::new()), StageMeter::new(1));
        let mut device = Device { polls_left: 3, ..Device::default() };
        let (sender, queue) = crossbeam_channel::bounded(10);
        let (out, finished) = crossbeam_channel::bounded(10);
        std::thread::scope(|scope| {
            let (device, meter, flow) = (&mut device, &meter, &flow);
            scope.spawn(move || {
                run(device, &queue, meter, flow, |batch| out.send(batch).map_err(|_| Stopped))
            });
            sender.send(7).unwrap();
            // The queue stays open and empty.
            assert_eq!(finished.recv_timeout(Duration::from_secs(60)), Ok(7));
            drop(sender);
        });
    }
}
