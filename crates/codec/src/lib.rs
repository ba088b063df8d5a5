//! Page encodings, backend traits and the CPU backend. No I/O, no threads.

mod backend;
mod bench;
pub mod container;
mod cpu;
mod decode;
mod encode;
mod encoding;
mod error;
mod fake;
#[doc(hidden)]
pub mod fuzzing;
mod history;
mod lz4;
mod page;
mod simd;
mod sparse;
mod spill;
mod trace;
mod validate;

pub use backend::{
    Backend, BackendError, DecodeJob, Decoder, DecoderConfig, Done, EncodeJob, EncodedBatch, Encoder,
    EncoderConfig, SharedBackend, SlotUse,
};
pub use bench::{BenchReport, EncodingCount, bench};
pub use cpu::CpuBackend;
pub use decode::decode_page;
pub use encode::{PageEncoder, encode_page};
pub use encoding::{Encoding, EncodingSet};
pub use error::{DecodeError, Lz4BlocksError, PageError};
pub use fake::{FakeBackend, FakeConfig};
pub use history::{History, Resident};
pub use lz4::{LZ4_BLOCK_SIZE, Lz4BlockEncoder, decode_lz4_blocks};
pub use page::{PAGE_SIZE, Page};
pub use simd::Simd;
pub use spill::SpillBackend;
pub use trace::{Span, Trace};
pub use validate::validate_batch;

/// xxh3-64 (seed 0) of the plain pages of a batch, one after another.
pub fn plain_hash(pages: &[Page]) -> u64 {
    let mut state = xxhash_rust::xxh3::Xxh3Default::new();
    for page in pages {
        state.update(&page.0);
    }
    state.digest()
}
