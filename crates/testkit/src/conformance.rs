//! What every backend has to do, as tests over the [`Backend`] interface: `docs/backends.md` says what is checked and why.
//!
//! The reference is the CPU backend without SIMD. Everything is decided by a seed; a broken promise is a panic that says which
//! it is, and where.

mod check;
mod cross;
mod guest;
mod history;
mod jobs;
mod lz4_block;
mod malformed;
mod pages;
#[cfg(test)]
mod tests;

use std::fmt;

use pagewarp_codec::{
    Backend, CpuBackend, Decoder, DecoderConfig, Encoder, EncoderConfig, Encoding, EncodingSet, Simd,
};

pub use cross::cross;
pub use history::histories;
pub use lz4_block::{check_end_of_block, check_end_of_block_of};
pub use malformed::malformed;
pub use pages::{determinism, pages};

/// Pages of the largest batch.
const MAX_PAGES: usize = 16;
/// History slots. No power of two, so that the last is not where blocks of slots end.
const SLOTS: u32 = 200;
/// Threads that encode or decode, where there are several.
const WORKERS: usize = 3;

/// The backend under test.
#[derive(Clone, Copy)]
pub struct Subject<'a> {
    backend: &'a dyn Backend,
    /// With several batches in flight it may encode a page without its base.
    drops_bases: bool,
}

impl<'a> Subject<'a> {
    /// A backend that uses every base it has.
    pub fn new(backend: &'a dyn Backend) -> Subject<'a> {
        Subject { backend, drops_bases: false }
    }

    /// A backend of several, with histories of their own: with several batches in flight it may encode a page without
    /// its base, and says so by choosing an encoding that needs none.
    pub fn spilling(backend: &'a dyn Backend) -> Subject<'a> {
        Subject { backend, drops_bases: true }
    }

    fn encoders(&self, allowed: EncodingSet, workers: usize) -> Vec<Box<dyn Encoder>> {
        let slots = self.backend.history_slots(SLOTS);
        assert_eq!(slots, SLOTS, "{self} grants {slots} history slots, too few for these tests");
        let config = EncoderConfig { allowed, history_slots: SLOTS, max_batch_pages: MAX_PAGES };
        let encoders = self
            .backend
            .encoders(config, workers)
            .unwrap_or_else(|error| panic!("{self} makes no encoders for {allowed}: {error}"));
        let seen = encoders.len();
        assert!((1..=workers).contains(&seen), "{self} makes {seen} encoders for {workers} threads");
        encoders
    }

    fn encoder(&self, allowed: EncodingSet) -> Box<dyn Encoder> {
        self.encoders(allowed, 1).remove(0)
    }

    fn decoder(&self, allowed: EncodingSet) -> Box<dyn Decoder> {
        self.decoders(allowed, 1).remove(0)
    }

    /// Decoders, with a history if the backend likes to have one.
    fn decoders(&self, allowed: EncodingSet, workers: usize) -> Vec<Box<dyn Decoder>> {
        let history_slots = self.backend.decode_history_slots(SLOTS);
        let all_or_nothing = history_slots == SLOTS || history_slots == 0;
        assert!(all_or_nothing, "{self} grants {history_slots} slots to decoders, {SLOTS} were wanted");
        self.decoders_with(allowed, workers, history_slots)
    }

    fn decoders_with(
        &self,
        allowed: EncodingSet,
        workers: usize,
        history_slots: u32,
    ) -> Vec<Box<dyn Decoder>> {
        let config = DecoderConfig { allowed, history_slots, max_batch_pages: MAX_PAGES };
        let decoders = self
            .backend
            .decoders(config, workers)
            .unwrap_or_else(|error| panic!("{self} makes no decoders for {allowed}: {error}"));
        let seen = decoders.len();
        assert!((1..=workers).contains(&seen), "{self} makes {seen} decoders for {workers} threads");
        decoders
    }

    /// Whether slots mean anything to its decoders.
    fn decodes_with_history(&self) -> bool {
        self.backend.decode_history_slots(SLOTS) > 0
    }
}

impl fmt::Display for Subject<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.backend.name())
    }
}

/// The backend that is right by definition.
fn reference() -> CpuBackend {
    CpuBackend::with_simd(Simd::Scalar).expect("every machine can do without SIMD")
}

/// Everything but [`cross`](cross()), which takes as long as it is told to.
///
/// # Panics
///
/// If the backend breaks a promise.
pub fn all(subject: Subject<'_>, seed: u64) {
    pages(subject, seed);
    histories(subject, seed);
    malformed(subject, 400, seed);
    determinism(subject, seed);
}

/// The sets of encodings that differ in what an encoder has to decide.
fn sets() -> Vec<EncodingSet> {
    use Encoding::{Lz4, Lz4Xor, Same, Sparse, SparseXor, Zero};
    let alone = Encoding::ALL.into_iter().map(|encoding| EncodingSet::of(&[encoding]));
    let together = [
        EncodingSet::ALL,
        EncodingSet::of(&[Zero, Sparse, Lz4]),
        EncodingSet::of(&[Zero, Same, Sparse, SparseXor]),
        EncodingSet::of(&[Zero, Same, Lz4, Lz4Xor]),
        EncodingSet::of(&[Sparse, SparseXor, Lz4, Lz4Xor]),
        EncodingSet::of(&[Same, SparseXor, Lz4]),
        EncodingSet::of(&[Zero, Lz4Xor]),
    ];
    alone.chain(together).collect()
}

/// Where in a test something happened.
struct At<'a> {
    subject: Subject<'a>,
    seed: u64,
    allowed: EncodingSet,
    batch: u64,
}

impl fmt::Display for At<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let At { subject, seed, allowed, batch } = self;
        write!(f, "{subject}, seed {seed}, encodings {allowed}, batch {batch}")
    }
}
