//! The control socket of a VM process: what it says ([`types`]), who serves it and who asks.

mod client;
pub mod run_dir;
pub(crate) mod server;
pub mod types;

pub use client::Client;
pub use run_dir::{list, run_dir, socket_path};
pub use types::{Event, MigrateOptions, Request, Status, VmState, codes};
