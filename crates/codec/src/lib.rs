//! Page encodings, backend traits and the CPU backend. No I/O, no threads.

mod backend;
mod encoding;
mod page;

pub use backend::{
    Backend, BackendError, DecodeJob, Decoder, DecoderConfig, Done, EncodeJob, EncodedBatch, Encoder, EncoderConfig,
    SharedBackend, SlotUse,
};
pub use encoding::{Encoding, EncodingSet};
pub use page::{PAGE_SIZE, Page};

use thiserror::Error;

/// Why bytes from the peer are not the encoding of a page.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// Placeholder.
    #[error("page {page}: {reason}")]
    Malformed {
        /// Index of the page in its batch.
        page: usize,
        /// What was seen and what was expected.
        reason: String,
    },
}

/// xxh3-64 (seed 0) of the plain pages of a batch, one after another.
pub fn plain_hash(pages: &[Page]) -> u64 {
    let mut state = xxhash_rust::xxh3::Xxh3Default::new();
    for page in pages {
        state.update(&page.0);
    }
    state.digest()
}
