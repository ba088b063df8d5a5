//! Frame kinds, where they travel, and how long they may be.

use std::fmt;

use crate::batch::{BATCH_FIXED_LEN, batch_meta_max};
use crate::limits::{
    Limits, MAX_BATCH_PAGES, MAX_DIGESTS, MAX_MACHINE_LEN, MAX_NAME_LEN, MAX_REGIONS, MAX_REPORT_LEN,
    MAX_STATE_CHUNK, MAX_TEXT_LEN,
};

/// What a connection carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Channel {
    /// Everything but pages. One per migration.
    Control,
    /// Batches and barriers. One to 64 per migration.
    Data,
}

impl fmt::Display for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Channel::Control => "control",
            Channel::Data => "data",
        })
    }
}

/// Which way a frame travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the source to the destination.
    ToDestination,
    /// From the destination to the source.
    ToSource,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Direction::ToDestination => "to the destination",
            Direction::ToSource => "to the source",
        })
    }
}

/// What a frame is. The discriminant is the kind byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
#[expect(
    missing_docs,
    reason = "each is documented at the variant of the same name of `Message`, or at `BatchMeta`"
)]
pub enum Kind {
    Hello = 1,
    HelloAck = 2,
    Offer = 3,
    Accept = 4,
    EpochStart = 5,
    Batch = 6,
    Barrier = 7,
    EpochDone = 8,
    Ack = 9,
    DeviceState = 10,
    StateEnd = 11,
    Prepare = 12,
    Ready = 13,
    Commit = 14,
    Running = 15,
    Digests = 16,
    DigestsEnd = 17,
    Bye = 18,
    Cancel = 19,
    Error = 20,
    Ping = 21,
    Pong = 22,
    Damaged = 23,
}

impl Kind {
    /// Every kind, in order of the kind byte, which starts at 1.
    pub const ALL: [Kind; 23] = [
        Kind::Hello,
        Kind::HelloAck,
        Kind::Offer,
        Kind::Accept,
        Kind::EpochStart,
        Kind::Batch,
        Kind::Barrier,
        Kind::EpochDone,
        Kind::Ack,
        Kind::DeviceState,
        Kind::StateEnd,
        Kind::Prepare,
        Kind::Ready,
        Kind::Commit,
        Kind::Running,
        Kind::Digests,
        Kind::DigestsEnd,
        Kind::Bye,
        Kind::Cancel,
        Kind::Error,
        Kind::Ping,
        Kind::Pong,
        Kind::Damaged,
    ];

    /// The kind with this byte, if there is one.
    pub fn from_byte(byte: u8) -> Option<Kind> {
        Kind::ALL.get(usize::from(byte).checked_sub(1)?).copied()
    }

    /// The kind byte.
    pub fn byte(self) -> u8 {
        self as u8
    }

    /// Whether frames of this kind travel on `channel` in `direction`.
    pub fn travels(self, channel: Channel, direction: Direction) -> bool {
        use {Channel::*, Direction::*};
        match self {
            Kind::Hello => direction == ToDestination,
            Kind::HelloAck => direction == ToSource,
            Kind::Batch | Kind::Barrier => (channel, direction) == (Data, ToDestination),
            Kind::Error => channel == Control || direction == ToSource,
            Kind::Ping | Kind::Pong => channel == Control,
            Kind::Offer
            | Kind::EpochStart
            | Kind::DeviceState
            | Kind::StateEnd
            | Kind::Prepare
            | Kind::Commit
            | Kind::Bye
            | Kind::Cancel => (channel, direction) == (Control, ToDestination),
            Kind::Accept
            | Kind::EpochDone
            | Kind::Ack
            | Kind::Ready
            | Kind::Running
            | Kind::Digests
            | Kind::DigestsEnd
            | Kind::Damaged => (channel, direction) == (Control, ToSource),
        }
    }

    /// The shortest and the longest *meta* (for all kinds but `Batch`: the body) in bytes.
    pub(crate) fn meta_bounds(self, limits: &Limits) -> (usize, usize) {
        let exactly = |len| (len, len);
        match self {
            Kind::Hello => exactly(24),
            Kind::HelloAck => exactly(2),
            Kind::Offer => {
                (28 + 1 + 14, 28 + MAX_NAME_LEN + MAX_REGIONS * (13 + MAX_NAME_LEN) + MAX_MACHINE_LEN)
            }
            Kind::Accept => exactly(12),
            Kind::EpochStart => exactly(12),
            Kind::Batch => (BATCH_FIXED_LEN, batch_meta_max(limits.max_batch_pages)),
            Kind::Barrier => exactly(20),
            Kind::EpochDone => exactly(4),
            Kind::Ack => exactly(24),
            Kind::DeviceState => (17, 16 + MAX_STATE_CHUNK),
            Kind::StateEnd => exactly(16),
            Kind::Prepare => exactly(20),
            Kind::Ready | Kind::Commit | Kind::DigestsEnd | Kind::Bye => exactly(0),
            Kind::Running => (0, MAX_REPORT_LEN),
            Kind::Digests => (20, 12 + 8 * MAX_DIGESTS),
            Kind::Cancel => (0, MAX_TEXT_LEN),
            Kind::Error => (2, 2 + MAX_TEXT_LEN),
            Kind::Ping | Kind::Pong => exactly(8),
            Kind::Damaged => (12 + 8, 12 + 8 * MAX_BATCH_PAGES as usize + MAX_TEXT_LEN),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
