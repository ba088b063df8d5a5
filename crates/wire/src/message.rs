//! The messages: what every frame but a batch says.

use crate::kind::Kind;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The control connection.
    Control,
    /// A data connection.
    Data {
        /// Its number, from 0.
        index: u16,
    },
}

/// The first frame of every connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Hello {
    /// The oldest protocol version the source speaks.
    pub min_version: u16,
    /// The newest protocol version the source speaks.
    pub max_version: u16,
    /// What the connection is for.
    pub role: Role,
    /// Chosen at random by the source, the same on all connections of a migration.
    pub session: [u8; 16],
}

impl Hello {
    /// A hello with the versions of this build.
    pub fn new(role: Role, session: [u8; 16]) -> Hello {
        Hello { min_version: crate::MIN_VERSION, max_version: crate::MAX_VERSION, role, session }
    }
}

/// One contiguous piece of guest memory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Region {
    /// Names the region in batches.
    pub id: u32,
    /// For people: 1 to 64 printable ASCII characters without spaces.
    pub name: String,
    /// Its size in pages of 4096 bytes, at least 1.
    pub pages: u64,
}

/// What the source wants to migrate and can do.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Offer {
    /// 1 to 64 of `A-Z a-z 0-9 . _ -`, not starting with `.` or `-`.
    pub vm_name: String,
    /// Always 4096 in version 1.
    pub page_size: u32,
    /// Guest memory, 1 to 64 regions with ascending ids and different names.
    pub regions: Vec<Region>,
    /// The encodings the source may use: bit i stands for tag i. Bit 2 (raw) is always set.
    pub encodings: u16,
    /// Page versions the source can refer to; 0 if the bases are the pages in the destination's guest memory.
    pub history_slots: u32,
    /// Pages of the largest batch, 1 to 4096.
    pub max_batch_pages: u32,
    /// Data connections, 1 to 64.
    pub connections: u16,
    /// Whether the source runs its stages at once; the destination should do the same.
    pub pipeline: bool,
    /// Whether the destination sends a digest of every page before `Ready`, which the source compares before `Commit`.
    pub verify: bool,
    /// The downtime in milliseconds that the source aims at; information only.
    pub downtime_limit_ms: u32,
    /// What the hypervisor needs to build the VM, opaque here; at most 1 MiB.
    pub machine: Vec<u8>,
}

/// What the destination takes of an offer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Accept {
    /// A subset of the encodings offered, with raw.
    pub encodings: u16,
    /// At most the slots offered.
    pub history_slots: u32,
    /// At most the batch size offered, at least 1.
    pub max_batch_pages: u32,
}

/// What the destination has restored since the beginning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Ack {
    /// Batches.
    pub batches: u64,
    /// Bytes of the frames of these batches, headers included.
    pub wire_bytes: u64,
    /// Pages.
    pub pages: u64,
}

/// Why an end gives up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorCode {
    /// No common protocol version.
    Version,
    /// The offer asks for something that the destination does not have or allow.
    Refused,
    /// The destination is occupied with another migration.
    Busy,
    /// The peer broke the protocol.
    Protocol,
    /// A batch did not decode, or its pages differ from their hash.
    Damaged,
    /// The hypervisor failed.
    Vm,
    /// A backend or a device failed.
    Backend,
    /// The peer was silent for too long.
    Timeout,
    /// A defect of the program.
    Internal,
    /// The digests were compared: guest memory at the destination is not what it is at the source.
    Differs,
    /// A code that this version does not know.
    Other(u16),
}

impl ErrorCode {
    /// The code with this number.
    pub fn from_number(number: u16) -> ErrorCode {
        match number {
            1 => ErrorCode::Version,
            2 => ErrorCode::Refused,
            3 => ErrorCode::Busy,
            4 => ErrorCode::Protocol,
            5 => ErrorCode::Damaged,
            6 => ErrorCode::Vm,
            7 => ErrorCode::Backend,
            8 => ErrorCode::Timeout,
            9 => ErrorCode::Internal,
            10 => ErrorCode::Differs,
            other => ErrorCode::Other(other),
        }
    }

    /// The number of this code.
    pub fn number(self) -> u16 {
        match self {
            ErrorCode::Version => 1,
            ErrorCode::Refused => 2,
            ErrorCode::Busy => 3,
            ErrorCode::Protocol => 4,
            ErrorCode::Damaged => 5,
            ErrorCode::Vm => 6,
            ErrorCode::Backend => 7,
            ErrorCode::Timeout => 8,
            ErrorCode::Internal => 9,
            ErrorCode::Differs => 10,
            ErrorCode::Other(number) => number,
        }
    }
}

/// Everything that is not a batch of pages.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Message {
    /// Opens a connection. Source to destination.
    Hello(Hello),
    /// Takes a connection. Destination to source.
    HelloAck {
        /// The version that both ends speak from now on.
        version: u16,
    },
    /// What is to be migrated. Source to destination.
    Offer(Offer),
    /// Takes the offer. Destination to source.
    Accept(Accept),
    /// An epoch begins. Source to destination, before its first batch.
    EpochStart {
        /// The epoch; the first is 0.
        epoch: u32,
        /// Pages that it is going to send.
        pages: u64,
    },
    /// The last frame of an epoch on each data connection.
    Barrier {
        /// The epoch.
        epoch: u32,
        /// Batches of this epoch on this connection.
        batches: u64,
        /// Pages of this epoch on this connection.
        pages: u64,
    },
    /// All batches of an epoch are in guest memory. Destination to source.
    EpochDone {
        /// The epoch.
        epoch: u32,
    },
    /// Progress. Destination to source.
    Ack(Ack),
    /// A piece of the device state. Source to destination.
    DeviceState {
        /// Bytes of all pieces.
        total_len: u64,
        /// Where this piece belongs: the sum of the lengths of the earlier ones.
        offset: u64,
        /// 1 byte to 1 MiB.
        bytes: Vec<u8>,
    },
    /// The device state is complete. Source to destination.
    StateEnd {
        /// Bytes of all pieces.
        len: u64,
        /// [`state_hash`](crate::state_hash) of them.
        xxh3: u64,
    },
    /// Everything was sent and the VM is paused: verify, load, say ready. Source to destination.
    Prepare {
        /// The last epoch.
        epoch: u32,
        /// As in `StateEnd`.
        state_len: u64,
        /// As in `StateEnd`.
        state_hash: u64,
    },
    /// Everything is verified and loaded; the VM can run. Destination to source.
    Ready,
    /// The right to run the VM passes to the destination. Source to destination.
    Commit,
    /// The VM runs. Destination to source.
    Running {
        /// The destination's report as JSON, at most 1 MiB.
        report: Vec<u8>,
    },
    /// Digests of the pages in guest memory, all epochs being done. Destination to source, before `Ready`.
    Digests {
        /// The region.
        region: u32,
        /// The page of the first digest.
        first_page: u64,
        /// XXH3-64 of each page, 1 to 65536.
        digests: Vec<u64>,
    },
    /// All digests were sent. Destination to source.
    DigestsEnd,
    /// The migration is over. Source to destination.
    Bye,
    /// The source wants to keep the VM. Source to destination.
    Cancel {
        /// Why, at most 1024 bytes; longer texts are cut and characters that [mislead](crate::misleads) become spaces.
        reason: String,
    },
    /// An end gives up.
    Error {
        /// Why.
        code: ErrorCode,
        /// What happened, at most 1024 bytes; longer texts are cut and characters that [mislead](crate::misleads) become spaces.
        message: String,
    },
    /// A batch did not decode, or its pages differ from their hash, and was dropped: the pages must be sent again. Destination to
    /// source, before the `EpochDone` of the batch's epoch.
    Damaged {
        /// The epoch of the batch.
        epoch: u32,
        /// Its region.
        region: u32,
        /// Its pages, ascending, 1 to 4096.
        pages: Vec<u64>,
        /// What was seen, at most 1024 bytes; longer texts are cut and characters that [mislead](crate::misleads) become spaces.
        reason: String,
    },
    /// Asks for a `Pong`.
    Ping {
        /// Comes back in the answer.
        id: u64,
    },
    /// Answers a `Ping`.
    Pong {
        /// The id of the question.
        id: u64,
    },
}

impl Message {
    /// The kind of frame that carries this message.
    pub fn kind(&self) -> Kind {
        match self {
            Message::Hello(_) => Kind::Hello,
            Message::HelloAck { .. } => Kind::HelloAck,
            Message::Offer(_) => Kind::Offer,
            Message::Accept(_) => Kind::Accept,
            Message::EpochStart { .. } => Kind::EpochStart,
            Message::Barrier { .. } => Kind::Barrier,
            Message::EpochDone { .. } => Kind::EpochDone,
            Message::Ack(_) => Kind::Ack,
            Message::DeviceState { .. } => Kind::DeviceState,
            Message::StateEnd { .. } => Kind::StateEnd,
            Message::Prepare { .. } => Kind::Prepare,
            Message::Ready => Kind::Ready,
            Message::Commit => Kind::Commit,
            Message::Running { .. } => Kind::Running,
            Message::Digests { .. } => Kind::Digests,
            Message::DigestsEnd => Kind::DigestsEnd,
            Message::Bye => Kind::Bye,
            Message::Cancel { .. } => Kind::Cancel,
            Message::Error { .. } => Kind::Error,
            Message::Ping { .. } => Kind::Ping,
            Message::Pong { .. } => Kind::Pong,
            Message::Damaged { .. } => Kind::Damaged,
        }
    }
}
