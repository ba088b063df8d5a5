//! What can be wrong with what a peer sent, or with what this end is about to send.

use std::fmt::Display;

use thiserror::Error;

use crate::kind::{Channel, Direction, Kind};

/// Why a frame, a message or a step of the protocol is not valid.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum WireError {
    /// The bytes do not start like a frame: the peer does not speak this protocol, or the stream lost its place.
    #[error(
        "bad magic: seen {seen:#010x}, expected {expected:#010x} (does the peer speak pagewarp, with the same TLS setting?)"
    )]
    BadMagic {
        /// The first four bytes, little-endian.
        seen: u32,
        /// The magic.
        expected: u32,
    },
    /// No version is spoken by both ends.
    #[error(
        "unsupported {what}: seen {seen}, expected {expected}; use builds whose versions overlap on both hosts"
    )]
    UnsupportedVersion {
        /// What has a version.
        what: &'static str,
        /// The peer's version or range.
        seen: String,
        /// What this build speaks.
        expected: String,
    },
    /// A frame kind that this version does not have.
    #[error("unknown frame kind: seen {seen}, expected 1 to {last}")]
    UnknownKind {
        /// The byte.
        seen: u8,
        /// The highest kind.
        last: u8,
    },
    /// Something is larger than agreed or allowed. Nothing was allocated for it.
    #[error("{what} is too large: seen {seen}, expected at most {limit}")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// Its size.
        seen: u64,
        /// The largest size.
        limit: u64,
    },
    /// Bytes end before what they announce.
    #[error("{what} is truncated: seen {seen} more bytes, expected {expected}")]
    Truncated {
        /// What is too short.
        what: &'static str,
        /// Bytes left.
        seen: u64,
        /// Bytes needed.
        expected: u64,
    },
    /// A frame was changed on its way, by the network, by memory or by a defect.
    #[error(
        "checksum of {what} differs: seen {seen:#018x}, expected {expected:#018x}; the stream was damaged"
    )]
    Checksum {
        /// What was hashed.
        what: &'static str,
        /// The hash of what arrived.
        seen: u64,
        /// The hash that came with it.
        expected: u64,
    },
    /// A frame was lost, repeated or swapped.
    #[error("frame out of sequence: seen {seen}, expected {expected}")]
    Sequence {
        /// The frame's number.
        seen: u64,
        /// The number that was due.
        expected: u64,
    },
    /// A frame kind that never travels on this kind of connection in this direction.
    #[error("{kind} does not travel {direction} on a {channel} connection")]
    WrongChannel {
        /// The kind.
        kind: Kind,
        /// Where it was seen.
        channel: Channel,
        /// In which direction.
        direction: Direction,
    },
    /// A message that does not fit the state.
    #[error("unexpected {message} while {state}: expected {expected}")]
    Unexpected {
        /// The state.
        state: &'static str,
        /// What was seen.
        message: Kind,
        /// What would have fitted.
        expected: &'static str,
    },
    /// A field that makes no sense.
    #[error("malformed {what}: seen {seen}, expected {expected}")]
    Malformed {
        /// The field.
        what: &'static str,
        /// Its value.
        seen: String,
        /// What it should have been.
        expected: String,
    },
}

/// A [`WireError::Malformed`].
pub fn malformed(what: &'static str, seen: impl Display, expected: impl Display) -> WireError {
    WireError::Malformed { what, seen: seen.to_string(), expected: expected.to_string() }
}

/// `Ok` if `seen` is at most `limit`.
pub fn at_most(what: &'static str, seen: u64, limit: u64) -> Result<(), WireError> {
    if seen <= limit { Ok(()) } else { Err(WireError::TooLarge { what, seen, limit }) }
}
