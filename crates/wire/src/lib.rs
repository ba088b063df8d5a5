//! The pagewarp wire protocol, free of I/O: bytes in, bytes out.
//!
//! `docs/wire-protocol.md` is the normative description; this crate is one implementation of it. It knows frames,
//! messages, negotiation and the hand-over, and nothing of sockets, threads, codecs or hypervisors.
//!
//! * [`FrameWriter`] and [`FrameReader`] turn messages and batches into frames and back, one pair per connection.
//!   A reader checks a header, and with it the length of what follows, before anyone allocates for it.
//! * [`Session`] is what both ends agreed on; batches are checked against it.
//! * [`DataSender`] and [`DataReceiver`] keep the epochs of one data connection apart.
//! * [`SourceState`] and [`DestinationState`] say what may be sent and received when, and who may run the VM; [`SourceDuty`] and
//!   [`DestinationDuty`], what becomes of the VM when a migration ends.

#![forbid(unsafe_code)]

mod batch;
pub mod cursor;
mod damage;
mod data;
mod destination;
mod device_state;
mod digests;
mod duty;
mod error;
mod frame;
#[doc(hidden)]
pub mod fuzzing;
mod header;
mod kind;
mod limits;
mod message;
mod message_codec;
mod session;
mod source;
mod text;

pub use batch::{BatchMeta, BatchView, NO_SLOT, batch_meta_max, fixed_payload_len};
pub use data::{DataReceiver, DataSender};
pub use destination::{DestinationPhase, DestinationState};
pub use device_state::{StateAssembler, state_hash, state_messages};
pub use duty::{DestinationDuty, SourceDuty};
pub use error::{WireError, at_most, malformed};
pub use frame::{FrameReader, FrameWriter};
pub use header::{HEADER_LEN, Header};
pub use kind::{Channel, Direction, Kind};
pub use limits::{
    Limits, MAX_BATCH_PAGES, MAX_CONNECTIONS, MAX_DIGESTS, MAX_MACHINE_LEN, MAX_NAME_LEN, MAX_REGIONS,
    MAX_REPORT_LEN, MAX_STATE_CHUNK, MAX_STATE_LEN, MAX_TEXT_LEN,
};
pub use message::{Accept, Ack, ErrorCode, Hello, Message, Offer, Region, Role};
pub use session::{ConnectionSet, Session, choose_version};
pub use source::{SourcePhase, SourceState};
pub use text::misleads;

/// The bytes of a page. The only page size of version 1.
pub const PAGE_SIZE: u32 = 4096;

/// The oldest protocol version this build speaks.
pub const MIN_VERSION: u16 = 1;
/// The newest protocol version this build speaks.
pub const MAX_VERSION: u16 = 1;

/// Where the VM is, or who has to decide that, once a migration is over or its connection is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// *Commit* was never sent. The source goes on running the VM; the destination discards what it has.
    VmStaysOnSource,
    /// Seen by the destination: it said *ready* and *commit* never came. It discards what it has and never runs the VM.
    /// The source may have sent a *commit* that was lost, and is then in doubt.
    NeverCommitted,
    /// Seen by the source: *commit* was sent and *running* did not come. The VM stays paused on the source until an
    /// operator has looked at the destination.
    InDoubt,
    /// Seen by the destination: it holds the right to run the VM, and has to run it although the source is gone.
    RunOnDestination,
    /// Seen by the destination: it got the right to run the VM and could not start it. The source is in doubt.
    FailedAfterCommit,
    /// The VM runs on the destination; the source discards its copy.
    VmRunsOnDestination,
}
