//! The workloads. Safe code over a slice of words, so that the host's tests run exactly what the guest runs.

pub mod graph;
pub mod idle;
pub mod kv;
pub mod record;
pub mod sum;
pub mod uniform;
pub mod words;
pub mod zipf;

/// Words in a page.
pub const PAGE_WORDS: usize = 512;

/// What one step did.
#[derive(Clone, Copy, Default)]
pub struct Step {
    pub ops: u64,
    /// Page writes: a page written twice counts twice.
    pub pages: u64,
}

/// What one verification step did.
#[derive(Clone, Copy, Default)]
pub struct Verified {
    pub bytes: u64,
    /// It reached the end: everything has been verified once more.
    pub sweep_done: bool,
}

/// Memory that is not what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Corruption {
    /// Where: bytes from the start of the memory.
    pub at: usize,
    pub what: &'static str,
    pub expected: u64,
    pub found: u64,
}

/// How much memory, and how it is used. All in pages.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Pages that get contents.
    pub filled: usize,
    /// Of those, pages that are written in steady state.
    pub working_set: usize,
    pub seed: u64,
}

/// A workload in steady state. Both steps must be short (well under 100 µs): pauses are seen between them.
pub trait Workload {
    /// Writes a little. `now_ms` is the time since start. What it happens to find wrong goes to `found`.
    fn step(&mut self, now_ms: u64, found: &mut dyn FnMut(Corruption)) -> Step;

    /// Checks a little, and tells `found` about everything that is wrong.
    fn verify(&mut self, found: &mut dyn FnMut(Corruption)) -> Verified;

    /// Flips bits of a byte of the memory, as a faulty migration would, and returns the byte; for tests.
    #[cfg(test)]
    fn flip(&mut self, at: usize, bits: u8) -> u8;
}
