//! Buffers that are used over and over: nothing is allocated in steady state.

use crate::flow::{Flow, Stopped};
use crate::sync::channel::{Receiver, Sender, bounded};

/// A fixed number of batches. Waiting for one is the back-pressure that reaches the first stage.
#[derive(Debug)]
pub(crate) struct Pool<T> {
    empty: Sender<T>,
    take: Receiver<T>,
}

impl<T: Default> Pool<T> {
    /// A pool of `count` batches. Their memory is taken as it is first used.
    pub(crate) fn new(count: usize) -> Pool<T> {
        let (empty, take) = bounded(count);
        for _ in 0..count {
            // Cannot fail: there is room for exactly this many and both ends are here.
            let _ = empty.try_send(T::default());
        }
        Pool { empty, take }
    }

    pub(crate) fn take(&self, flow: &Flow) -> Result<T, Stopped> {
        // The pool owns both ends, so the queue is never closed.
        flow.receive(&self.take)?.ok_or(Stopped)
    }

    pub(crate) fn give_back(&self, batch: T) {
        // There is room for every batch of the pool.
        let _ = self.empty.try_send(batch);
    }
}
