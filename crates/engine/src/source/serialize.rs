//! The serialize stage: batches of plain pages into encoded batches, through a backend, with the history's help.
//!
//! Losing the backend in the middle of a migration does not end it: what was in flight is encoded again by the CPU backend, without bases,
//! because the versions that the lost device kept are gone.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use pagewarp_codec::{Backend, BackendError, CpuBackend, Encoder, EncoderConfig, SharedBackend};
use tracing::warn;

use crate::backends::{self, Encoders};
use crate::compute::Compute;
use crate::error::MigrationError;
use crate::flow::lock;
use crate::history::SlotTable;
use crate::source::batch::Batch;
use crate::stage_trace::Track;

/// So often may batches arrive damaged, each time from a backend that had started over, before the migration fails: a device that computes
/// wrongly takes one of them, the others are for faults of the network or of memory that pass.
const MAX_STRIKES: u32 = 3;

/// What the serializers of one migration have in common.
pub(crate) struct Serializing {
    config: EncoderConfig,
    workers: usize,
    table: Mutex<Versions>,
    /// Encoders of this generation that nobody has work for. Locked after the table.
    spare: Mutex<Vec<Box<dyn Encoder>>>,
    fallback_batches: AtomicU64,
    /// The backend is the CPU's own: starting over with the CPU is no fallback.
    is_cpu: bool,
    /// Why the CPU backend had to take over.
    fallback: Mutex<Option<String>>,
}

/// The slot table and the backend it belongs to: a lost backend starts a new generation.
struct Versions {
    generation: u64,
    slots: SlotTable,
    /// The first epoch that this generation alone has encoded.
    since_epoch: u32,
    /// Times that what one generation alone had encoded arrived damaged.
    strikes: u32,
}

impl Serializing {
    /// Sets up encoders for up to `workers` threads; [`workers`](Self::workers) tells how many it became. The backend says how many of the
    /// history slots in `wanted` it can have. If it cannot be set up at all, the CPU does its work.
    pub(crate) fn new(
        backend: &SharedBackend,
        wanted: EncoderConfig,
        workers: usize,
        region_pages: &[u64],
    ) -> Result<Serializing, BackendError> {
        let Encoders { config, encoders, fallback } = backends::encoders(backend, wanted, workers)?;
        Ok(Serializing {
            is_cpu: backend.is_cpu(),
            fallback: Mutex::new(fallback),
            config,
            workers: encoders.len(),
            table: Mutex::new(Versions {
                generation: 0,
                slots: SlotTable::new(region_pages, config.history_slots),
                since_epoch: 0,
                strikes: 0,
            }),
            spare: Mutex::new(encoders),
            fallback_batches: AtomicU64::new(0),
        })
    }

    pub(crate) fn workers(&self) -> usize {
        self.workers
    }

    /// Batches that the CPU backend had to take over.
    pub(crate) fn fallback_batches(&self) -> u64 {
        self.fallback_batches.load(Relaxed)
    }

    /// Why the CPU backend had to take over, if it had to.
    pub(crate) fn fallback(&self) -> Option<String> {
        lock(&self.fallback).clone()
    }

    /// Slots that hold a version.
    pub(crate) fn slots_in_use(&self) -> u64 {
        lock(&self.table).slots.in_use()
    }

    /// A serializer for one thread; at most [`workers`](Self::workers) of them.
    pub(crate) fn serializer(&self, track: Track) -> Serializer<'_> {
        Serializer {
            shared: self,
            encoder: None,
            generation: 0,
            // All encoders that a backend makes are alike.
            depth: lock(&self.spare).last().map_or(1, |encoder| encoder.depth()),
            in_flight: VecDeque::new(),
            ready: VecDeque::new(),
            device_wait: Duration::ZERO,
            track,
        }
    }

    /// An encoder, and its generation.
    fn take_encoder(&self) -> Result<(u64, Box<dyn Encoder>), MigrationError> {
        let versions = lock(&self.table);
        let encoder = lock(&self.spare).pop();
        let encoder =
            encoder.ok_or_else(|| MigrationError::Internal("more serializers than encoders".into()))?;
        Ok((versions.generation, encoder))
    }

    /// Takes back an encoder that is not needed for now. One of an older generation is dropped.
    fn give_back(&self, generation: u64, encoder: Box<dyn Encoder>) {
        let versions = lock(&self.table);
        if versions.generation == generation {
            lock(&self.spare).push(encoder);
        }
    }

    /// The backend of `generation` is lost. The first to say so starts the next generation, on the CPU.
    fn lose(&self, generation: u64, error: &BackendError) -> Result<(), MigrationError> {
        let mut versions = lock(&self.table);
        if versions.generation == generation {
            self.start_over(&mut versions, &error.to_string())?;
        }
        Ok(())
    }

    /// A batch of `epoch` arrived damaged; `next_epoch` is the next to be encoded, and nothing is being encoded now.
    ///
    /// Who encoded it is not trusted any more: the CPU backend goes on, from the beginning. Its pages never arrived, so that all versions that
    /// the history holds are in doubt. Batches that were on their way by then, deltas against such versions, may be
    /// damaged as well, and prove nothing against the new backend.
    ///
    /// # Errors
    ///
    /// [`MigrationError::Damaged`] if that did not help often enough: then it is not the backend.
    pub(crate) fn distrust(&self, epoch: u32, next_epoch: u32, reason: &str) -> Result<(), MigrationError> {
        let mut versions = lock(&self.table);
        if epoch < versions.since_epoch {
            return Ok(());
        }
        versions.strikes += 1;
        if versions.strikes > MAX_STRIKES {
            return Err(MigrationError::Damaged(format!("{reason}, again and again")));
        }
        self.start_over(&mut versions, &format!("a batch arrived damaged: {reason}"))?;
        versions.since_epoch = next_epoch;
        Ok(())
    }

    /// Starts the next generation, on the CPU. With the encoders of the one before goes its history, as soon as the last of them has nothing
    /// in flight.
    fn start_over(&self, versions: &mut Versions, reason: &str) -> Result<(), MigrationError> {
        if self.is_cpu {
            warn!(reason, "starting over without the versions that were sent before");
        } else {
            warn!(reason, "going on with the CPU backend");
            lock(&self.fallback).get_or_insert_with(|| reason.to_owned());
        }
        *lock(&self.spare) = CpuBackend::new().encoders(self.config, self.workers)?;
        versions.slots.invalidate();
        versions.generation += 1;
        Ok(())
    }
}

/// Encodes batches on one thread, with as many in flight as its encoder likes.
pub(crate) struct Serializer<'a> {
    shared: &'a Serializing,
    /// `None` while there is nothing to do: one that nobody uses must not keep a history alive that nobody needs any more.
    encoder: Option<Box<dyn Encoder>>,
    /// That of the encoder at hand.
    generation: u64,
    depth: usize,
    in_flight: VecDeque<Batch>,
    ready: VecDeque<Batch>,
    /// What an encoder that was replaced has waited for its device.
    device_wait: Duration,
    track: Track,
}

impl Compute for Serializer<'_> {
    type Batch = Batch;

    fn has_room(&mut self) -> bool {
        // One with nothing in flight has room.
        self.encoder.as_mut().is_none_or(|encoder| encoder.has_room())
    }

    fn is_ready(&mut self) -> bool {
        !self.ready.is_empty() || self.encoder.as_mut().is_none_or(|encoder| encoder.is_ready())
    }

    fn take_device_wait(&mut self) -> Duration {
        self.note_device_wait();
        std::mem::take(&mut self.device_wait)
    }

    fn is_idle(&self) -> bool {
        self.ready.is_empty() && self.in_flight.is_empty()
    }

    fn submit(&mut self, mut batch: Batch) -> Result<(), MigrationError> {
        if self.encoder.is_none() || !self.plan(&mut batch) {
            self.replace_encoder()?;
            if !self.plan(&mut batch) {
                return Err(MigrationError::Internal("the CPU backend was lost as well".into()));
            }
        }
        let (begin, number) = (self.track.begin(), batch.job.number);
        self.start(batch);
        self.track.end("submit", number, begin);
        Ok(())
    }

    fn complete(&mut self) -> Result<Option<Batch>, MigrationError> {
        let begin = self.track.begin();
        if self.ready.is_empty()
            && let Err(error) = self.collect()
        {
            self.shared.lose(self.generation, &error)?;
            self.replace_encoder()?;
        }
        let Some(batch) = self.ready.pop_front() else { return Ok(None) };
        self.track.end("complete", batch.job.number, begin);
        self.settle(&batch);
        if self.is_idle() {
            self.note_device_wait();
            if let Some(encoder) = self.encoder.take() {
                self.shared.give_back(self.generation, encoder);
            }
        }
        Ok(Some(batch))
    }
}

impl Serializer<'_> {
    /// How many batches may be in flight.
    pub(crate) fn depth(&self) -> usize {
        self.depth
    }

    fn note_device_wait(&mut self) {
        self.device_wait +=
            self.encoder.as_mut().map_or(Duration::ZERO, |encoder| encoder.take_device_wait());
    }

    /// Gives the batch to the encoder at hand.
    fn start(&mut self, mut batch: Batch) {
        if let Some(encoder) = &mut self.encoder {
            encoder.submit(std::mem::take(&mut batch.job));
        }
        self.in_flight.push_back(batch);
    }

    /// Gives each page its slot; `false` if the encoder at hand belongs to an older generation.
    fn plan(&self, batch: &mut Batch) -> bool {
        let mut versions = lock(&self.shared.table);
        if versions.generation != self.generation {
            return false;
        }
        batch.generation = self.generation;
        batch.job.slots.clear();
        for &page in &batch.pages {
            batch.job.slots.push(versions.slots.plan(batch.region, page, batch.epoch));
        }
        true
    }

    fn settle(&self, batch: &Batch) {
        let mut versions = lock(&self.shared.table);
        if versions.generation == batch.generation {
            for (&slot, &encoding) in batch.job.slots.iter().zip(&batch.job.encoded.encodings) {
                versions.slots.settle(slot, encoding);
            }
        }
    }

    /// Moves the oldest batch in flight to the ready ones, or to the front of those in flight if the backend failed.
    fn collect(&mut self) -> Result<(), BackendError> {
        let Some(done) = self.encoder.as_mut().and_then(|encoder| encoder.complete()) else { return Ok(()) };
        // As many batches as jobs are in flight, in the same order.
        let Some(mut batch) = self.in_flight.pop_front() else { return Ok(()) };
        batch.job = done.job;
        match done.result {
            Ok(()) => self.ready.push_back(batch),
            Err(error) => {
                self.in_flight.push_front(batch);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Takes an encoder of the current generation and gives it what the old one did not finish, if there is one.
    fn replace_encoder(&mut self) -> Result<(), MigrationError> {
        let mut failed: Vec<Batch> = Vec::new();
        // A batch that failed has its job back already; the encoder knows nothing of it any more.
        if self.in_flight.len() > self.encoder.as_ref().map_or(0, |encoder| encoder.in_flight()) {
            failed.extend(self.in_flight.pop_front());
        }
        while !self.in_flight.is_empty() {
            if self.collect().is_err() {
                failed.extend(self.in_flight.pop_front());
            }
        }
        self.note_device_wait();
        let (generation, encoder) = self.shared.take_encoder()?;
        (self.generation, self.encoder) = (generation, Some(encoder));
        for mut batch in failed {
            self.shared.fallback_batches.fetch_add(1, Relaxed);
            if !self.plan(&mut batch) {
                return Err(MigrationError::Internal("the CPU backend was lost as well".into()));
            }
            self.start(batch);
            self.collect()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use pagewarp_codec::{EncodingSet, Page};

    use super::*;

    fn encode(serializer: &mut Serializer<'_>, page: u64) {
        let mut batch = Batch { pages: vec![page], ..Batch::default() };
        batch.job.pages = vec![Page([page as u8 + 1; 4096])];
        serializer.submit(batch).unwrap();
        assert!(serializer.complete().unwrap().is_some() && serializer.is_idle());
    }

    #[test]
    fn the_history_of_those_who_are_not_trusted_goes_at_once() {
        let backend = Arc::new(CpuBackend::new());
        let wanted = EncoderConfig { allowed: EncodingSet::ALL, history_slots: 10, max_batch_pages: 1 };
        let shared: SharedBackend = backend.clone();
        let serializing = Serializing::new(&shared, wanted, 2, &[10]).unwrap();
        let mut serializers: Vec<_> = (0..2).map(|_| serializing.serializer(Track::default())).collect();
        // The other has had nothing to do yet.
        encode(&mut serializers[0], 7);
        assert!(backend.history_resident_bytes() > 0);
        serializing.distrust(0, 1, "for a test").unwrap();
        assert_eq!(backend.history_resident_bytes(), 0);
        (0..2).for_each(|index| encode(&mut serializers[index], index as u64));
        assert_eq!(backend.history_resident_bytes(), 0);
    }
}
