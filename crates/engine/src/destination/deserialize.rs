//! The deserialize stage: encoded batches into plain pages, with bases out of guest memory.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use pagewarp_codec::{Backend, BackendError, CpuBackend, Decoder, DecoderConfig, Page};
use tracing::warn;

use crate::compute::Compute;
use crate::destination::restore::Incoming;
use crate::error::MigrationError;
use crate::vm::{GuestMemory, RegionInfo, VmError};

/// Decodes batches on one thread, with as many in flight as its decoder likes.
pub(crate) struct Deserializer {
    memory: Arc<dyn GuestMemory>,
    regions: Vec<RegionInfo>,
    config: DecoderConfig,
    decoder: Box<dyn Decoder>,
    in_flight: VecDeque<Incoming>,
    ready: VecDeque<Incoming>,
    wanted: Vec<u64>,
    /// What a decoder that was replaced has waited for its device.
    device_wait: Duration,
}

impl Compute for Deserializer {
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
        self.fetch_bases(&mut batch)?;
        self.decoder.submit(std::mem::take(&mut batch.job));
        self.in_flight.push_back(batch);
        Ok(())
    }

    fn complete(&mut self) -> Result<Option<Incoming>, MigrationError> {
        if self.ready.is_empty() {
            match self.collect() {
                Ok(()) => {}
                Err(BackendError::Peer(error)) => {
                    return Err(MigrationError::Damaged(error));
                }
                Err(error) => self.fall_back(&error)?,
            }
        }
        Ok(self.ready.pop_front())
    }
}

impl Deserializer {
    pub(crate) fn new(
        memory: Arc<dyn GuestMemory>,
        decoder: Box<dyn Decoder>,
        config: DecoderConfig,
    ) -> Deserializer {
        Deserializer {
            regions: memory.regions(),
            memory,
            config,
            decoder,
            in_flight: VecDeque::new(),
            ready: VecDeque::new(),
            wanted: Vec::new(),
            device_wait: Duration::ZERO,
        }
    }

    /// How many batches may be in flight.
    pub(crate) fn depth(&self) -> usize {
        self.decoder.depth()
    }

    /// Moves the oldest batch in flight to the ready ones, or back to the front of those in flight if it failed.
    fn collect(&mut self) -> Result<(), BackendError> {
        let Some(done) = self.decoder.complete() else { return Ok(()) };
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

    /// The backend is lost: the CPU decodes what it left and all that follows.
    fn fall_back(&mut self, error: &BackendError) -> Result<(), MigrationError> {
        warn!(%error, "going on with the CPU backend");
        // The batch that failed has its job back already.
        let mut failed: Vec<_> = self.in_flight.pop_front().into_iter().collect();
        while !self.in_flight.is_empty() {
            if self.collect().is_err() {
                failed.extend(self.in_flight.pop_front());
            }
        }
        self.device_wait += self.decoder.take_device_wait();
        let decoders = CpuBackend::new().decoders(self.config, 1)?;
        self.decoder = decoders
            .into_iter()
            .next()
            .ok_or_else(|| MigrationError::Internal("the CPU backend made no decoder".into()))?;
        for mut batch in failed {
            self.decoder.submit(std::mem::take(&mut batch.job));
            self.in_flight.push_back(batch);
            self.collect().map_err(|e| match e {
                BackendError::Peer(error) => MigrationError::Damaged(error),
                other => other.into(),
            })?;
        }
        Ok(())
    }

    fn fetch_bases(&mut self, batch: &mut Incoming) -> Result<(), VmError> {
        let region = self.regions[batch.region].id;
        self.wanted.clear();
        for (&page, encoding) in batch.pages.iter().zip(&batch.job.encoded.encodings) {
            if encoding.needs_base() {
                self.wanted.push(page);
            }
        }
        batch.job.bases.resize(self.wanted.len(), Page::ZERO);
        let mut at = 0;
        for run in self.wanted.chunk_by(|a, b| a + 1 == *b) {
            self.memory.read(region, run[0], &mut batch.job.bases[at..at + run.len()])?;
            at += run.len();
        }
        Ok(())
    }
}
