//! What can go wrong in a migration, by whose fault it is.

use std::io;

use pagewarp_codec::BackendError;
use thiserror::Error;

use crate::transport::{OutOfProtocol, Untrusted};
use crate::vm::VmError;

/// Why a migration ended without moving the VM, or without being sure.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MigrationError {
    /// The network, or a peer that went away.
    #[error("the connection to {peer} failed while {doing}: {source}")]
    Link {
        /// The peer's address.
        peer: String,
        /// What was being done.
        doing: String,
        /// What the system said.
        source: io::Error,
    },
    /// The peer is not trusted, or does not trust this host.
    #[error("no trusted connection to {peer}: {why}")]
    Untrusted {
        /// The peer's address.
        peer: String,
        /// What was seen, and what to do.
        why: Untrusted,
    },
    /// Batches do not decode, or their pages are not what they were on the source, and sending them again did not help, or cannot be done.
    #[error("batches arrive damaged: {0}; look for faults of the memory of both hosts and of the network")]
    Damaged(String),
    /// With `verify`: what is at the destination is not what is at the source. Which pages, and how many. Nothing was handed over.
    #[error(
        "the memory at the destination differs from that at the source: {0}. Look for faults of the memory of both hosts, and report this"
    )]
    Differs(String),
    /// The peer broke the protocol.
    #[error("the peer broke the protocol: {0}")]
    Peer(String),
    /// The peer said that it failed.
    #[error("the peer reports: {0}")]
    PeerReports(String),
    /// The peer does not want or cannot do what was offered.
    #[error("the peer refused: {0}")]
    Refused(String),
    /// The hypervisor on this host.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The backend on this host.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A value that cannot work.
    #[error("configuration: {0}")]
    Config(String),
    /// Somebody cancelled.
    #[error("the migration was cancelled")]
    Cancelled,
    /// The epoch or time limit was reached.
    #[error("the migration did not converge: {0}")]
    NotConverged(String),
    /// A bug or a dead thread on this host.
    #[error("internal error: {0}; please report this")]
    Internal(String),
    /// The right to run the VM was given away and the news that it runs never came.
    ///
    /// The VM stays paused on the source until an operator has looked at the destination.
    #[error(
        "the hand-over was committed but the destination never confirmed that the VM runs: {0}. The VM is kept paused here. \
         Look at the destination first: if the VM runs there, discard it here (`pagewarp resolve NAME --discard`); if it surely does not and \
         never will, run it here (`pagewarp resolve NAME --resume`)"
    )]
    InDoubt(String),
    /// The destination was given the VM and could not start it. Seen on the destination; the source is in doubt.
    #[error(
        "the hand-over was committed but the VM does not start here: {0}. It will not be tried again: run the VM on the source \
         (`pagewarp resolve NAME --resume` there)"
    )]
    StartFailed(String),
    /// The migration failed and the VM could not be resumed afterwards. It is whole, but paused, on the source.
    #[error(
        "{reason}; and the VM could not be resumed afterwards: {resume}. It is whole but paused here; resume it (`pagewarp resolve NAME --resume`)"
    )]
    StillPaused {
        /// Why the migration failed.
        reason: Box<MigrationError>,
        /// Why the VM could not be resumed.
        resume: VmError,
    },
}

impl MigrationError {
    /// A connection to `peer` failed while `doing` something. What TLS has against the peer, and what the peer has done that it must not, are no faults of the network, and
    /// so no [`MigrationError::Link`].
    pub fn of_connection(peer: &str, doing: &str, source: io::Error) -> MigrationError {
        let inner = source.get_ref();
        if let Some(why) = inner.and_then(|inner| inner.downcast_ref::<Untrusted>()) {
            return MigrationError::Untrusted { peer: peer.to_owned(), why: why.clone() };
        }
        if let Some(what) = inner.and_then(|inner| inner.downcast_ref::<OutOfProtocol>()) {
            return MigrationError::Peer(what.0.clone());
        }
        MigrationError::Link { peer: peer.to_owned(), doing: doing.to_owned(), source }
    }
}
