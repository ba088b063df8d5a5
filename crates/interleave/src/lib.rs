//! The code by which the threads of a migration wait for each other, compiled a second time, with the locks, queues and clock of a scheduler that tries the orders in
//! which the threads may run ([`sync`]). The tests of this crate run it; nothing else uses it.
//!
//! The modules below are the files of the product, not copies. What they need beside `sync` is the product's too, but for the stages themselves, which do what a test
//! tells them to ([`source`]).

// The tests inside the modules below are for the product's locks.
#![cfg(not(test))]
#![forbid(unsafe_code)]
#![allow(dead_code, unreachable_pub, reason = "the product uses all of it, and says who may see it")]

// The modules of the bridge find `sync` and `flow` under this name.
extern crate self as pagewarp_engine;

pub use engine::{bitmap, error, metrics, report, transport};

pub mod check;
pub mod sync;

#[path = "../../engine/src/compute.rs"]
mod compute;
#[path = "../../engine/src/control.rs"]
pub mod control;
#[path = "../../engine/src/flow.rs"]
pub mod flow;
#[path = "../../engine/src/pool.rs"]
mod pool;

/// The source's stages, with workers and connections that do as they are told.
pub mod source;

/// The destination's barrier.
pub mod destination;

/// What the bridge's stages wait with.
pub mod bridge;

/// What `order` takes of the bridge's protocol.
mod protocol {
    pub(crate) mod meta {
        /// A segment that must be done before another.
        #[derive(Clone, Copy, Debug)]
        pub(crate) struct After {
            pub(crate) connection: u16,
            pub(crate) segment: u64,
        }
    }
}
