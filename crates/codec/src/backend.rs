//! The backend interface: asynchronous by construction.
//!
//! A backend turns batches of plain pages into encoded batches and back. Work is *submitted* and later *completed*,
//! in submission order, with several jobs in flight, so that a GPU can work while the CPU copies and sends. A job owns
//! all its buffers and comes back with them, also when it failed: nothing is allocated per batch, and a failed batch can
//! be given to another backend.

use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use crate::encoding::{Encoding, EncodingSet};
use crate::page::Page;

/// Where a page version is kept in the history.
///
/// Slots are numbered from 0 and allocated by the source. One slot holds the version of one page that was sent last:
/// encoding a page with a slot stores the new version there, after having used the old one as the base.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SlotUse {
    /// The page is not kept and has no base.
    #[default]
    None,
    /// Store the new version in this slot. What it holds now belongs to another page: no base.
    Store(u32),
    /// The slot holds the version sent before: use it as the base, then store the new version.
    Delta(u32),
}

impl SlotUse {
    /// The slot, if there is one.
    pub fn slot(self) -> Option<u32> {
        match self {
            SlotUse::None => None,
            SlotUse::Store(slot) | SlotUse::Delta(slot) => Some(slot),
        }
    }
}

/// The encoded form of a batch: one tag and one payload length per page, and all payloads one after another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EncodedBatch {
    /// One encoding per page.
    pub encodings: Vec<Encoding>,
    /// One payload length in bytes per page, at most 4096.
    pub lens: Vec<u16>,
    /// The payloads, in page order, without gaps.
    pub payload: Vec<u8>,
    /// [`plain_hash`](crate::plain_hash) of the plain pages.
    pub plain_hash: u64,
}

impl EncodedBatch {
    /// Empties the batch and keeps its buffers.
    pub fn clear(&mut self) {
        self.encodings.clear();
        self.lens.clear();
        self.payload.clear();
        self.plain_hash = 0;
    }
}

/// A batch to encode.
#[derive(Debug, Default)]
pub struct EncodeJob {
    /// The number of the batch, for traces.
    pub number: u64,
    /// The plain pages.
    pub pages: Vec<Page>,
    /// One entry per page. A slot appears at most once in a batch.
    pub slots: Vec<SlotUse>,
    /// The encodings that this batch may use, of those that the encoder was made for; `None`: all of these. For callers who weigh time
    /// against bytes batch by batch.
    pub allowed: Option<EncodingSet>,
    /// Filled by the backend; what it held before is overwritten.
    pub encoded: EncodedBatch,
}

/// A batch to decode.
#[derive(Debug, Default)]
pub struct DecodeJob {
    /// What came from the peer. Nothing in it is trusted.
    pub encoded: EncodedBatch,
    /// The number of the batch, for traces.
    pub number: u64,
    /// The bases of those pages whose encoding needs one, in page order, without gaps.
    pub bases: Vec<Page>,
    /// Where a decoder with a history of its own keeps the pages: one entry per page, or none at all. What is in the history
    /// equals what is in `bases`, so that a decoder may use either, and one without a history ignores the slots.
    pub slots: Vec<SlotUse>,
    /// Filled by the backend with one plain page per entry.
    pub pages: Vec<Page>,
}

/// A finished job, with its buffers, and how it went.
#[derive(Debug)]
pub struct Done<J> {
    /// The job as submitted, with its output filled in if `result` is `Ok`.
    pub job: J,
    /// How it went.
    pub result: Result<(), BackendError>,
}

/// Encodes batches. Completion is in submission order.
pub trait Encoder: Send {
    /// How many jobs may be in flight. Submitting more is an error of the caller and panics.
    fn depth(&self) -> usize;
    /// Jobs submitted and not completed.
    fn in_flight(&self) -> usize;
    /// Starts a job. Never waits for its completion.
    fn submit(&mut self, job: EncodeJob);
    /// Waits for the oldest job in flight. `None` if there is none.
    fn complete(&mut self) -> Option<Done<EncodeJob>>;
    /// Whether another job can be submitted now.
    fn has_room(&mut self) -> bool {
        self.in_flight() < self.depth()
    }
    /// Whether the oldest job in flight is finished, so that [`complete`](Self::complete) would not wait for a device.
    fn is_ready(&mut self) -> bool {
        true
    }
    /// Time that calls have spent waiting for a device since this was last asked.
    fn take_device_wait(&mut self) -> Duration {
        Duration::ZERO
    }
}

/// Decodes batches. Completion is in submission order.
pub trait Decoder: Send {
    /// How many jobs may be in flight. Submitting more is an error of the caller and panics.
    fn depth(&self) -> usize;
    /// Jobs submitted and not completed.
    fn in_flight(&self) -> usize;
    /// Starts a job. Never waits for its completion.
    fn submit(&mut self, job: DecodeJob);
    /// Waits for the oldest job in flight. `None` if there is none.
    fn complete(&mut self) -> Option<Done<DecodeJob>>;
    /// Whether another job can be submitted now.
    fn has_room(&mut self) -> bool {
        self.in_flight() < self.depth()
    }
    /// Whether the oldest job in flight is finished, so that [`complete`](Self::complete) would not wait for a device.
    fn is_ready(&mut self) -> bool {
        true
    }
    /// Time that calls have spent waiting for a device since this was last asked.
    fn take_device_wait(&mut self) -> Duration {
        Duration::ZERO
    }
}

/// What encoders of one migration need to know.
#[derive(Clone, Copy, Debug)]
pub struct EncoderConfig {
    /// The encodings both sides agreed on.
    pub allowed: EncodingSet,
    /// Number of history slots; memory for a slot is taken when it is first used.
    pub history_slots: u32,
    /// The largest batch that will be submitted, in pages.
    pub max_batch_pages: usize,
}

/// What decoders of one migration need to know.
#[derive(Clone, Copy, Debug)]
pub struct DecoderConfig {
    /// The encodings both sides agreed on; any other is rejected.
    pub allowed: EncodingSet,
    /// The largest batch that will be submitted, in pages.
    pub max_batch_pages: usize,
    /// Number of history slots, of those that [`Backend::decode_history_slots`] grants; 0: bases come from the jobs alone.
    pub history_slots: u32,
}

/// A provider of encoders and decoders.
pub trait Backend: Send + Sync {
    /// `cpu`, `gpu` or `fake`, with a detail in brackets where it helps: `cpu (avx512)`.
    fn name(&self) -> String;
    /// Whether it is the CPU alone, so that there is nothing to fall back to.
    fn is_cpu(&self) -> bool {
        false
    }
    /// How many of the wanted history slots its encoders can have.
    fn history_slots(&self, wanted: u32) -> u32 {
        wanted
    }
    /// How many of the wanted history slots its decoders can have. 0: a history would spare them nothing.
    fn decode_history_slots(&self, _wanted: u32) -> u32 {
        0
    }
    /// Batches that another backend took over because this one's device was busy.
    fn spilled_batches(&self) -> u64 {
        0
    }
    /// Makes encoders for up to `workers` threads that share one history. May return fewer, never none.
    fn encoders(&self, config: EncoderConfig, workers: usize) -> Result<Vec<Box<dyn Encoder>>, BackendError>;
    /// Makes decoders for up to `workers` threads. May return fewer, never none.
    fn decoders(&self, config: DecoderConfig, workers: usize) -> Result<Vec<Box<dyn Decoder>>, BackendError>;
}

/// A shared backend.
pub type SharedBackend = Arc<dyn Backend>;

/// Why a job failed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum BackendError {
    /// The peer sent bytes that do not decode. Not retried: another backend would reject them as well.
    #[error(transparent)]
    Peer(#[from] crate::DecodeError),
    /// The device went away or stopped answering. The caller goes on with another backend.
    #[error("the {device} backend was lost: {reason}")]
    Lost {
        /// Which device.
        device: String,
        /// What was seen.
        reason: String,
    },
    /// The backend could not be set up or ran out of something.
    #[error("the {device} backend cannot work: {reason}")]
    Unavailable {
        /// Which device.
        device: String,
        /// What was seen, and what to do.
        reason: String,
    },
}
