//! A backend for tests: right by default, and wrong or slow or gone as configured, always in the same way.

use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::backend::{
    Backend, BackendError, DecodeJob, Decoder, DecoderConfig, Done, EncodeJob, EncodedBatch, Encoder,
    EncoderConfig,
};
use crate::cpu::CpuBackend;

/// What goes wrong in a [`FakeBackend`]. Jobs are numbered from 0 in the order they are submitted, over all its encoders
/// and decoders; every decision depends on the seed and the number of the job only.
#[derive(Clone, Copy, Debug)]
pub struct FakeConfig {
    /// Seed of all decisions.
    pub seed: u64,
    /// Jobs each encoder and decoder keeps in flight; at least 1.
    pub depth: usize,
    /// Completion of a job takes up to this much longer.
    pub max_delay: Duration,
    /// One in so many jobs gives a wrong output: the encoder flips a bit of the payload (of the hash, if there is no payload);
    /// the decoder's pages do not match their hash.
    pub corrupt_one_in: Option<NonZeroU64>,
    /// The device is lost when so many jobs have been submitted: all later ones fail.
    pub lose_after: Option<u64>,
}

impl Default for FakeConfig {
    /// Three jobs in flight, nothing goes wrong.
    fn default() -> Self {
        FakeConfig { seed: 0, depth: 3, max_delay: Duration::ZERO, corrupt_one_in: None, lose_after: None }
    }
}

/// The CPU backend, with the faults of a device.
#[derive(Clone, Debug, Default)]
pub struct FakeBackend {
    cpu: CpuBackend,
    faults: Faults,
}

impl FakeBackend {
    /// A backend with these faults.
    pub fn new(config: FakeConfig) -> FakeBackend {
        FakeBackend { cpu: CpuBackend::new(), faults: Faults { config, ..Faults::default() } }
    }

    /// Jobs submitted so far.
    pub fn submitted(&self) -> u64 {
        self.faults.submitted.load(Ordering::Relaxed)
    }

    /// Jobs whose output was made wrong so far.
    pub fn corrupted(&self) -> u64 {
        self.faults.corrupted.load(Ordering::Relaxed)
    }
}

impl Backend for FakeBackend {
    fn name(&self) -> String {
        format!("fake (seed {})", self.faults.config.seed)
    }

    fn encoders(&self, config: EncoderConfig, workers: usize) -> Result<Vec<Box<dyn Encoder>>, BackendError> {
        let inner = self.cpu.encoders(config, workers)?;
        Ok(inner
            .into_iter()
            .map(|inner| Box::new(Fake::new(inner, &self.faults)) as Box<dyn Encoder>)
            .collect())
    }

    fn decoders(&self, config: DecoderConfig, workers: usize) -> Result<Vec<Box<dyn Decoder>>, BackendError> {
        let inner = self.cpu.decoders(config, workers)?;
        Ok(inner
            .into_iter()
            .map(|inner| Box::new(Fake::new(inner, &self.faults)) as Box<dyn Decoder>)
            .collect())
    }
}

/// The faults, shared by all encoders and decoders of a backend.
#[derive(Clone, Debug, Default)]
struct Faults {
    config: FakeConfig,
    submitted: Arc<AtomicU64>,
    corrupted: Arc<AtomicU64>,
}

impl Faults {
    /// A number that is different for each job and each `purpose`, and always the same for one seed.
    fn draw(&self, job: u64, purpose: u64) -> u64 {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&job.to_le_bytes());
        bytes[8..].copy_from_slice(&purpose.to_le_bytes());
        xxhash_rust::xxh3::xxh3_64_with_seed(&bytes, self.config.seed)
    }

    /// Waits as long as this job takes longer, and says whether the device is still there.
    fn delay(&self, job: u64) -> Result<(), BackendError> {
        let max = self.config.max_delay.as_nanos() as u64;
        if max > 0 {
            std::thread::sleep(Duration::from_nanos(self.draw(job, 0) % (max + 1)));
        }
        match self.config.lose_after {
            Some(limit) if job >= limit => Err(BackendError::Lost {
                device: "fake".into(),
                reason: format!("configured to be lost after {limit} jobs"),
            }),
            _ => Ok(()),
        }
    }

    /// Whether this job's output becomes wrong.
    fn corrupts(&self, job: u64) -> bool {
        let corrupts = self.config.corrupt_one_in.is_some_and(|n| self.draw(job, 1).is_multiple_of(n.get()));
        self.corrupted.fetch_add(u64::from(corrupts), Ordering::Relaxed);
        corrupts
    }

    /// Flips one bit of what the batch says.
    fn corrupt(&self, job: u64, encoded: &mut EncodedBatch) {
        let bit = self.draw(job, 2);
        let len = encoded.payload.len() as u64;
        if len == 0 {
            encoded.plain_hash ^= 1 << (bit % 64);
        } else {
            encoded.payload[(bit / 8 % len) as usize] ^= 1 << (bit % 8);
        }
    }
}

/// An encoder or decoder of the CPU backend, with faults.
struct Fake<W, J> {
    inner: W,
    faults: Faults,
    waiting: VecDeque<(u64, J)>,
}

impl<W, J> Fake<W, J> {
    fn new(inner: W, faults: &Faults) -> Self {
        Fake { inner, faults: faults.clone(), waiting: VecDeque::new() }
    }

    fn depth(&self) -> usize {
        self.faults.config.depth.max(1)
    }

    fn enqueue(&mut self, job: J) {
        assert!(self.waiting.len() < self.depth(), "submitted more jobs than the depth of {}", self.depth());
        self.waiting.push_back((self.faults.submitted.fetch_add(1, Ordering::Relaxed), job));
    }
}

impl Encoder for Fake<Box<dyn Encoder>, EncodeJob> {
    fn depth(&self) -> usize {
        self.depth()
    }

    fn in_flight(&self) -> usize {
        self.waiting.len()
    }

    fn submit(&mut self, job: EncodeJob) {
        self.enqueue(job);
    }

    fn complete(&mut self) -> Option<Done<EncodeJob>> {
        let (number, job) = self.waiting.pop_front()?;
        if let Err(lost) = self.faults.delay(number) {
            return Some(Done { job, result: Err(lost) });
        }
        self.inner.submit(job);
        let mut done = self.inner.complete()?;
        if self.faults.corrupts(number) {
            self.faults.corrupt(number, &mut done.job.encoded);
        }
        Some(done)
    }
}

impl Decoder for Fake<Box<dyn Decoder>, DecodeJob> {
    fn depth(&self) -> usize {
        self.depth()
    }

    fn in_flight(&self) -> usize {
        self.waiting.len()
    }

    fn submit(&mut self, job: DecodeJob) {
        self.enqueue(job);
    }

    fn complete(&mut self) -> Option<Done<DecodeJob>> {
        let (number, mut job) = self.waiting.pop_front()?;
        if let Err(lost) = self.faults.delay(number) {
            return Some(Done { job, result: Err(lost) });
        }
        let flip = u64::from(self.faults.corrupts(number)) << (self.faults.draw(number, 2) % 64);
        job.encoded.plain_hash ^= flip;
        self.inner.submit(job);
        let mut done = self.inner.complete()?;
        done.job.encoded.plain_hash ^= flip;
        Some(done)
    }
}
