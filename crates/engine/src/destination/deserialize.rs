//! The deserialize stage: encoded batches into plain pages, with bases out of guest memory.
//!
//! A backend that is lost, or decodes wrongly, does not end the migration: the CPU does its work. A batch that the CPU cannot decode either was
//! damaged before it came, and the source sends its pages again.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pagewarp_codec::{Backend, BackendError, CpuBackend, Decoder, DecoderConfig, Page, SharedBackend};
use tracing::warn;

use crate::backends::{self, Decoders};
use crate::compute::Compute;
use crate::destination::restore::Incoming;
use crate::error::MigrationError;
use crate::flow::lock;
use crate::history::SlotTable;
use crate::stage_trace::Track;
use crate::vm::{GuestMemory, RegionInfo, VmError};

/// What the deserializers of one migration have in common.
pub(crate) struct Deserializing {
    memory: Arc<dyn GuestMemory>,
    regions: Vec<RegionInfo>,
    config: DecoderConfig,
    /// Which versions the decoders keep. What is in a slot is what guest memory holds: both get the pages of a batch once it is decoded, and no
    /// batch of an epoch is decoded before all of the one before are restored. `None` once the CPU has taken over anywhere: what it
    /// decodes is not kept, so that slots would hold old versions.
    table: Mutex<Option<SlotTable>>,
    spare: Mutex<Vec<Box<dyn Decoder>>>,
    workers: usize,
    /// The decoders are the CPU's from the beginning.
    is_cpu: bool,
    fallback_batches: AtomicU64,
    /// Why the CPU backend had to take over.
    fallback: Mutex<Option<String>>,
}

impl Deserializing {
    /// Sets up decoders for up to `workers` threads; [`workers`](Self::workers) tells how many it became. With `exactly`, the CPU makes up
    /// for those that the backend does not make. `history_slots` in `wanted` is what they may keep; the backend says how many of them it can
    /// have. If it cannot be set up at all, the CPU does its work.
    pub(crate) fn new(
        backend: &SharedBackend,
        wanted: DecoderConfig,
        workers: usize,
        exactly: bool,
        memory: Arc<dyn GuestMemory>,
    ) -> Result<Deserializing, BackendError> {
        let Decoders { mut config, mut decoders, fallback } = backends::decoders(backend, wanted, workers)?;
        if exactly && decoders.len() < workers {
            config.history_slots = 0;
            decoders.extend(CpuBackend::new().decoders(config, workers - decoders.len())?);
        }
        let regions = memory.regions();
        let region_pages: Vec<u64> = regions.iter().map(|region| region.pages).collect();
        Ok(Deserializing {
            memory,
            regions,
            config,
            table: Mutex::new(
                (config.history_slots > 0).then(|| SlotTable::new(&region_pages, config.history_slots)),
            ),
            workers: decoders.len(),
            is_cpu: backend.is_cpu() || fallback.is_some(),
            spare: Mutex::new(decoders),
            fallback_batches: AtomicU64::new(0),
            fallback: Mutex::new(fallback),
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

    /// A deserializer for one thread; at most [`workers`](Self::workers) of them.
    pub(crate) fn deserializer(&self, track: Track) -> Result<Deserializer<'_>, MigrationError> {
        let decoder = lock(&self.spare).pop();
        let decoder =
            decoder.ok_or_else(|| MigrationError::Internal("more deserializers than decoders".into()))?;
        Ok(Deserializer {
            shared: self,
            decoder,
            on_cpu: self.is_cpu,
            in_flight: VecDeque::new(),
            ready: VecDeque::new(),
            wanted: Vec::new(),
            device_wait: Duration::ZERO,
            track,
        })
    }

    /// Gives each page of the batch its slot.
    fn plan(&self, batch: &mut Incoming) {
        batch.job.slots.clear();
        if let Some(table) = &mut *lock(&self.table) {
            let plan = |&page| table.plan(batch.region, page, batch.epoch);
            batch.job.slots.extend(batch.pages.iter().map(plan));
        }
    }

    /// The batch was decoded.
    fn settle(&self, batch: &Incoming) {
        if let Some(table) = &mut *lock(&self.table) {
            for (&slot, &encoding) in batch.job.slots.iter().zip(&batch.job.encoded.encodings) {
                table.settle(slot, encoding);
            }
        }
    }

    /// The batch was damaged: what its slots hold now is unknown.
    fn forget(&self, batch: &Incoming) {
        if let Some(table) = &mut *lock(&self.table) {
            batch.pages.iter().for_each(|&page| table.forget(batch.region, page));
        }
    }

    /// The CPU takes over from a backend, for this reason.
    fn fall_back(&self, reason: &str) -> Result<Box<dyn Decoder>, MigrationError> {
        warn!(reason, "going on with the CPU backend");
        lock(&self.fallback).get_or_insert_with(|| reason.to_owned());
        *lock(&self.table) = None;
        Ok(backends::cpu_decoder(self.config)?)
    }
}

/// Decodes batches on one thread, with as many in flight as its decoder likes.
pub(crate) struct Deserializer<'a> {
    shared: &'a Deserializing,
    decoder: Box<dyn Decoder>,
    /// The decoder is the CPU's: there is no better one to ask.
    on_cpu: bool,
    in_flight: VecDeque<Incoming>,
    ready: VecDeque<Incoming>,
    wanted: Vec<u64>,
    /// What a decoder that was replaced has waited for its device.
    device_wait: Duration,
    track: Track,
}

impl Compute for Deserializer<'_> {
    type Batch = Incoming;

    fn has_room(&mut self) -> bool {
        self.decoder.has_room()
    }

    fn is_ready(&mut self) -> bool {
        !self.ready.is_empty() || self.decoder.is_ready()
    }

    fn take_device_wait(&mut self) -> Duration {
        std::mem::take(&mut self.device_wait) + self.decoder.take_device_wait()
    }

    fn is_idle(&self) -> bool {
        self.ready.is_empty() && self.in_flight.is_empty()
    }

    fn submit(&mut self, mut batch: Incoming) -> Result<(), MigrationError> {
        let (begin, number) = (self.track.begin(), batch.job.number);
        self.fetch_bases(&mut batch)?;
        self.shared.plan(&mut batch);
        self.decoder.submit(std::mem::take(&mut batch.job));
        self.track.end("submit", number, begin);
        self.in_flight.push_back(batch);
        Ok(())
    }

    /// A batch that was damaged says so: see [`Incoming::damage`].
    fn complete(&mut self) -> Result<Option<Incoming>, MigrationError> {
        let begin = self.track.begin();
        if self.ready.is_empty() {
            self.collect()?;
        }
        let Some(batch) = self.ready.pop_front() else { return Ok(None) };
        self.track.end("complete", batch.job.number, begin);
        match &batch.damage {
            None => self.shared.settle(&batch),
            Some(_) => self.shared.forget(&batch),
        }
        Ok(Some(batch))
    }
}

impl Deserializer<'_> {
    /// How many batches may be in flight.
    pub(crate) fn depth(&self) -> usize {
        self.decoder.depth()
    }

    /// Waits for the oldest batch in flight, and deals with what may be wrong with it. It is ready then, and so may be others.
    fn collect(&mut self) -> Result<(), MigrationError> {
        let Some((mut batch, result)) = self.next_done() else { return Ok(()) };
        match result {
            Ok(()) => self.ready.push_back(batch),
            Err(BackendError::Peer(error)) if self.on_cpu => {
                batch.damage = Some(error.to_string());
                self.ready.push_back(batch);
            }
            // Either the batch is damaged or the device is. The CPU tells.
            Err(BackendError::Peer(error)) => {
                batch = self.decode_on_cpu(batch)?;
                let is_damaged = batch.damage.is_some();
                self.ready.push_back(batch);
                if !is_damaged {
                    self.shared.fallback_batches.fetch_add(1, Relaxed);
                    self.fall_back(&format!("it decodes wrongly, the CPU does not: {error}"))?;
                }
            }
            Err(error) => {
                self.shared.fallback_batches.fetch_add(1, Relaxed);
                batch = self.decode_on_cpu(batch)?;
                self.ready.push_back(batch);
                self.fall_back(&error.to_string())?;
            }
        }
        Ok(())
    }

    /// The oldest batch in flight, and how it went.
    fn next_done(&mut self) -> Option<(Incoming, Result<(), BackendError>)> {
        let done = self.decoder.complete()?;
        // As many batches as jobs are in flight, in the same order.
        let mut batch = self.in_flight.pop_front()?;
        batch.job = done.job;
        Some((batch, done.result))
    }

    /// The CPU decodes a batch that the backend has given back.
    fn decode_on_cpu(&self, mut batch: Incoming) -> Result<Incoming, MigrationError> {
        let mut decoder = backends::cpu_decoder(self.shared.config)?;
        decoder.submit(std::mem::take(&mut batch.job));
        let done = decoder
            .complete()
            .ok_or_else(|| MigrationError::Internal("the CPU backend lost a batch".into()))?;
        batch.job = done.job;
        match done.result {
            Ok(()) => Ok(batch),
            Err(BackendError::Peer(error)) => {
                batch.damage = Some(error.to_string());
                Ok(batch)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The backend is of no use any more: the CPU decodes what it has in flight and all that follows.
    fn fall_back(&mut self, reason: &str) -> Result<(), MigrationError> {
        while let Some((mut batch, result)) = self.next_done() {
            if result.is_err() {
                self.shared.fallback_batches.fetch_add(1, Relaxed);
                batch = self.decode_on_cpu(batch)?;
            }
            self.ready.push_back(batch);
        }
        self.device_wait += self.decoder.take_device_wait();
        self.decoder = self.shared.fall_back(reason)?;
        self.on_cpu = true;
        Ok(())
    }

    fn fetch_bases(&mut self, batch: &mut Incoming) -> Result<(), VmError> {
        let region = self.shared.regions[batch.region].id;
        self.wanted.clear();
        for (&page, encoding) in batch.pages.iter().zip(&batch.job.encoded.encodings) {
            if encoding.needs_base() {
                self.wanted.push(page);
            }
        }
        batch.job.bases.resize(self.wanted.len(), Page::ZERO);
        let mut at = 0;
        for run in self.wanted.chunk_by(|a, b| a + 1 == *b) {
            self.shared.memory.read(region, run[0], &mut batch.job.bases[at..at + run.len()])?;
            at += run.len();
        }
        Ok(())
    }
}
