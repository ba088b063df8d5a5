//! The bridge: threads and sockets around the pure parts of this crate.
//!
//! ```text
//! source       per QEMU connection: copy (read, take apart) ─▶ shared: serialize ─▶ per connection: send, and the way back
//! destination  per connection: receive ─▶ shared: deserialize ─▶ per connection: restore (rebuild, write), and the way back
//! ```

mod config;
pub(crate) mod destination;
mod history;
pub(crate) mod link;
mod order;
mod outbox;
mod packing;
mod report;
mod running;
mod socket;
pub(crate) mod source;
mod spare;

pub use config::{BridgeConfig, Compression};
pub use destination::{Awaited, DestinationBridge};
pub use history::{Guest, default_history_bytes};
pub use report::{DestinationBridgeReport, LevelReport, SourceBridgeReport};
pub use socket::Endpoint;
pub use source::SourceBridge;
