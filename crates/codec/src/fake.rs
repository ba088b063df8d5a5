//! A backend for tests: right by default, and wrong or slow or gone as configured, always in the same way.

use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::backend::{
    Backend, BackendError, DecodeJob, Decoder, DecoderConfig, Done, EncodeJob, EncodedBatch, Encoder,
    EncoderConfig, SlotUse,
};
use crate::cpu::CpuBackend;
use crate::history::{History, Resident};
use crate::page::Page;

/// What goes wrong in a [`FakeBackend`]. Jobs are numbered from 0 in the order they are submitted, over all its encoders
/// and decoders; every decision depends on the seed and the number of the job only.
#[derive(Clone, Copy, Debug)]
pub struct FakeConfig {
    /// Seed of all decisions.
    pub seed: u64,
    /// Jobs each encoder and decoder keeps in flight; at least 1.
    pub depth: usize,
    /// Completion of a job takes up to this much longer, which counts as waiting for the device.
    pub max_delay: Duration,
    /// A job is not ready until it has been asked up to so many times whether it is, while it was the oldest in flight.
    /// Completing it does not ask.
    pub max_polls: u64,
    /// Decoders keep a history of their own, and take the bases of pages with [`SlotUse::Delta`] from it and from nowhere else.
    pub decode_history: bool,
    /// One in so many jobs gives a wrong output: the encoder flips a bit of the payload (of the hash, if there is no payload);
    /// the decoder's pages do not match their hash.
    pub corrupt_one_in: Option<NonZeroU64>,
    /// The device is lost when so many jobs have been submitted: all later ones fail.
    pub lose_after: Option<u64>,
}

impl Default for FakeConfig {
    /// Three jobs in flight, always ready, no history for decoders; nothing goes wrong.
    fn default() -> Self {
        FakeConfig {
            seed: 0,
            depth: 3,
            max_delay: Duration::ZERO,
            max_polls: 0,
            decode_history: false,
            corrupt_one_in: None,
            lose_after: None,
        }
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

    fn decode_history_slots(&self, wanted: u32) -> u32 {
        if self.faults.config.decode_history { wanted } else { 0 }
    }

    fn encoders(&self, config: EncoderConfig, workers: usize) -> Result<Vec<Box<dyn Encoder>>, BackendError> {
        let inner = self.cpu.encoders(config, workers)?;
        Ok(inner
            .into_iter()
            .map(|inner| Box::new(Fake::new(inner, None, &self.faults)) as Box<dyn Encoder>)
            .collect())
    }

    fn decoders(&self, config: DecoderConfig, workers: usize) -> Result<Vec<Box<dyn Decoder>>, BackendError> {
        let inner = self.cpu.decoders(config, workers)?;
        let history = (self.faults.config.decode_history && config.history_slots > 0)
            .then(|| Arc::new(History::new(config.history_slots, Resident::default())));
        Ok(inner
            .into_iter()
            .map(|inner| Box::new(Fake::new(inner, history.clone(), &self.faults)) as Box<dyn Decoder>)
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

    /// Waits as long as this job takes longer, and returns how long that was.
    fn delay(&self, job: u64) -> Duration {
        let max = self.config.max_delay.as_nanos() as u64;
        let delay = Duration::from_nanos(self.draw(job, 0) % max.saturating_add(1));
        std::thread::sleep(delay);
        delay
    }

    /// How often this job has to be asked before it is ready.
    fn polls(&self, job: u64) -> u64 {
        self.draw(job, 3) % self.config.max_polls.saturating_add(1)
    }

    /// Whether the device is still there for this job.
    fn check(&self, job: u64) -> Result<(), BackendError> {
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
    /// What the decoders of one migration keep, if they keep anything.
    history: Option<Arc<History>>,
    faults: Faults,
    waiting: VecDeque<Waiting<J>>,
    waited: Duration,
}

struct Waiting<J> {
    number: u64,
    polls: u64,
    job: J,
}

impl<W, J> Fake<W, J> {
    fn new(inner: W, history: Option<Arc<History>>, faults: &Faults) -> Self {
        Fake { inner, history, faults: faults.clone(), waiting: VecDeque::new(), waited: Duration::ZERO }
    }

    fn depth(&self) -> usize {
        self.faults.config.depth.max(1)
    }

    fn enqueue(&mut self, job: J) {
        assert!(self.waiting.len() < self.depth(), "submitted more jobs than the depth of {}", self.depth());
        let number = self.faults.submitted.fetch_add(1, Ordering::Relaxed);
        self.waiting.push_back(Waiting { number, polls: self.faults.polls(number), job });
    }

    fn poll(&mut self) -> bool {
        let Some(oldest) = self.waiting.front_mut() else { return true };
        let ready = oldest.polls == 0;
        oldest.polls = oldest.polls.saturating_sub(1);
        ready
    }

    /// The oldest job and its number, once it is due; it failed if there is an error.
    fn due(&mut self) -> Option<(u64, J, Result<(), BackendError>)> {
        let Waiting { number, job, .. } = self.waiting.pop_front()?;
        self.waited += self.faults.delay(number);
        Some((number, job, self.faults.check(number)))
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
        let (number, job, here) = self.due()?;
        if here.is_err() {
            return Some(Done { job, result: here });
        }
        self.inner.submit(job);
        let mut done = self.inner.complete()?;
        if self.faults.corrupts(number) {
            self.faults.corrupt(number, &mut done.job.encoded);
        }
        Some(done)
    }

    fn is_ready(&mut self) -> bool {
        self.poll()
    }

    fn take_device_wait(&mut self) -> Duration {
        std::mem::take(&mut self.waited)
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
        let (number, mut job, here) = self.due()?;
        if here.is_err() {
            return Some(Done { job, result: here });
        }
        let flip = u64::from(self.faults.corrupts(number)) << (self.faults.draw(number, 2) % 64);
        job.encoded.plain_hash ^= flip;
        let own = self.history.as_deref().and_then(|history| bases_kept(history, &job));
        let given = own.map(|own| std::mem::replace(&mut job.bases, own));
        self.inner.submit(job);
        let mut done = self.inner.complete()?;
        done.job.encoded.plain_hash ^= flip;
        if let Some(given) = given {
            done.job.bases = given;
        }
        if let (Some(history), Ok(())) = (&self.history, &done.result) {
            keep(history, &done.job);
        }
        Some(done)
    }

    fn is_ready(&mut self) -> bool {
        self.poll()
    }

    fn take_device_wait(&mut self) -> Duration {
        std::mem::take(&mut self.waited)
    }
}

/// The bases of the job, those of pages with [`SlotUse::Delta`] out of the history. `None` if what came with the job does not fit
/// together, which is for the decoder to reject.
fn bases_kept(history: &History, job: &DecodeJob) -> Option<Vec<Page>> {
    let mut given = job.bases.iter();
    if job.slots.len() != job.encoded.encodings.len() {
        return None;
    }
    let needed = job.encoded.encodings.iter().zip(&job.slots).filter(|(encoding, _)| encoding.needs_base());
    let bases = needed.map(|(_, &slot)| {
        let given = given.next()?;
        Some(match slot {
            SlotUse::Delta(slot) => history.with_slot(slot, |version| *version),
            _ => *given,
        })
    });
    let bases = bases.collect::<Option<Vec<_>>>()?;
    given.next().is_none().then_some(bases)
}

/// Stores the decoded pages in their slots.
fn keep(history: &History, job: &DecodeJob) {
    for (page, slot) in job.pages.iter().zip(&job.slots) {
        if let Some(slot) = slot.slot() {
            history.with_slot(slot, |version| version.0.copy_from_slice(&page.0));
        }
    }
}
