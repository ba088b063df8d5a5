//! How long connections may be broken at present.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

/// A patience that can be shortened for a while.
pub(super) struct Limit {
    most: Duration,
    /// In milliseconds.
    now: AtomicU64,
}

impl Limit {
    pub(super) fn new(most: Duration) -> Limit {
        Limit { most, now: AtomicU64::new(most.as_millis() as u64) }
    }

    /// `None`: all of it again.
    pub(super) fn set(&self, limit: Option<Duration>) {
        let now = limit.map_or(self.most, |limit| limit.min(self.most));
        self.now.store(now.as_millis() as u64, SeqCst);
    }

    /// What it is without a limit.
    pub(super) fn most(&self) -> Duration {
        self.most
    }

    pub(super) fn get(&self) -> Duration {
        Duration::from_millis(self.now.load(SeqCst))
    }
}
