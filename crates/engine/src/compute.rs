//! The loop of a stage that computes through an asynchronous backend: keep it fed, hand on what it finished.

use crossbeam_channel::{Receiver, TryRecvError};

use crate::error::MigrationError;
use crate::flow::{Flow, Stopped};
use crate::metrics::StageMeter;

/// One thread's worker, with several batches in flight.
pub(crate) trait Compute {
    /// What it works on.
    type Batch;
    /// Whether another batch can be submitted.
    fn has_room(&self) -> bool;
    /// Whether there is nothing to complete.
    fn is_idle(&self) -> bool;
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
        // Take what there is; wait only with nothing else to do.
        while open && worker.has_room() {
            let batch = if worker.is_idle() {
                meter.blocked_in(|| flow.receive(queue))?
            } else {
                match queue.try_recv() {
                    Ok(batch) => Some(batch),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => None,
                }
            };
            match batch {
                Some(batch) => meter.busy(|| worker.submit(batch)).map_err(|e| flow.stop_threads(e))?,
                None => open = false,
            }
        }
        if let Some(batch) = meter.busy(|| worker.complete()).map_err(|e| flow.stop_threads(e))? {
            hand_on(batch)?;
        }
    }
    Ok(())
}
