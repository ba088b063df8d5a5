//! The control socket of a VM process: what it says ([`types`]), who serves it and who asks.

pub mod types;

pub use types::{Event, MigrateOptions, Request, Status, VmState, codes};
