//! What threads wait for each other with: of the standard library and crossbeam.
//!
//! Queues, barriers and the common fate of threads take it from here, so that `crates/interleave` can put a scheduler in its place that tries the orders in which
//! threads may run.

pub use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
pub use std::thread;

pub use crossbeam_channel as channel;

/// Atomics.
pub mod atomic {
    pub use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
}

/// The clock.
pub mod time {
    pub use std::time::{Duration, Instant};
}
