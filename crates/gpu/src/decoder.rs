//! Decoding on the device. What the peer sent is validated on the CPU before a byte of it gets there.

mod lane;
pub(crate) mod plan;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pagewarp_codec::{
    BackendError, DecodeError, DecodeJob, Decoder, DecoderConfig, Done, Page, plain_hash, validate_batch,
};

use crate::decoder::lane::Lane;
use crate::device::Gpu;
use crate::history::History;
use crate::kernels::DecodeKernels;

/// Decodes batches on a device, several at a time.
pub(crate) struct GpuDecoder {
    gpu: Arc<Gpu>,
    config: DecoderConfig,
    history: Option<Arc<Mutex<History>>>,
    depth: usize,
    /// The lanes without a batch.
    free: VecDeque<Box<Lane>>,
    queue: VecDeque<InFlight>,
    waited: Duration,
}

/// A job that was submitted.
struct InFlight {
    job: DecodeJob,
    /// The number of the job among those of the device.
    number: u64,
    state: State,
}

enum State {
    /// There is nothing to wait for.
    Finished(Result<(), BackendError>),
    /// The device works on it.
    Running(Box<Lane>),
}

impl GpuDecoder {
    /// A decoder with buffers for `depth` batches.
    ///
    /// # Errors
    ///
    /// [`BackendError::Unavailable`] if there is no memory for them.
    pub(crate) fn new(
        gpu: &Arc<Gpu>,
        kernels: &Arc<DecodeKernels>,
        config: DecoderConfig,
        history: Option<&Arc<Mutex<History>>>,
    ) -> Result<GpuDecoder, BackendError> {
        let depth = gpu.config().depth.max(1);
        let max_bases = if config.allowed.needs_base() { config.max_batch_pages } else { 0 };
        let lane = |_| {
            let history = history.map(|history| history.lock().unwrap_or_else(PoisonError::into_inner));
            Lane::new(gpu, kernels, config.max_batch_pages, max_bases, history.as_deref()).map(Box::new)
        };
        let free = (0..depth).map(lane).collect::<Result<VecDeque<_>, _>>()?;
        Ok(GpuDecoder {
            gpu: gpu.clone(),
            config,
            history: history.cloned(),
            depth,
            free,
            queue: VecDeque::with_capacity(depth),
            waited: Duration::ZERO,
        })
    }

    /// Checks the batch and gives it to the device.
    fn start(&mut self, job: &DecodeJob, number: u64) -> State {
        let DecoderConfig { allowed, max_batch_pages, .. } = self.config;
        let checked = validate_batch(allowed, max_batch_pages, &job.encoded, job.bases.len())
            .map_err(BackendError::from)
            .and_then(|()| self.gpu.check());
        if let Err(error) = checked {
            return State::Finished(Err(error));
        }
        if job.encoded.encodings.is_empty() {
            return State::Finished(check_hash(job.encoded.plain_hash, &[]));
        }
        let Some(mut lane) = self.free.pop_front() else {
            // A lane gets lost only together with the device.
            return State::Finished(Err(self.gpu.give_up("no buffers are left")));
        };
        let payload = &job.encoded.payload;
        if let Err(error) = lane.write_payload(payload) {
            return State::Finished(Err(error));
        }
        // Held until the batch is submitted: the plan counts on the batches before, and those after count on it.
        let mut history =
            self.history.as_ref().map(|history| history.lock().unwrap_or_else(PoisonError::into_inner));
        let started = lane
            .prepare(job, history.as_deref_mut())
            .and_then(|()| lane.start(payload.len(), &job.bases, !self.gpu.stalls(number)));
        match started {
            Ok(()) => State::Running(lane),
            Err(error) => State::Finished(Err(error)),
        }
    }

    /// Waits for the pages, takes and checks them.
    fn finish(&mut self, mut lane: Box<Lane>, job: &mut DecodeJob, number: u64) -> Result<(), BackendError> {
        self.waited += self.gpu.wait_for(|| lane.is_ready())?;
        let undecoded = lane.take(job.number, &mut job.pages)?;
        self.free.push_back(lane);
        if let Some(page) = undecoded {
            let reason =
                format!("page {page} of a batch of {} was not decoded, but is valid", job.pages.len());
            return Err(self.gpu.give_up(reason));
        }
        if self.gpu.corrupts(number) {
            job.pages[number as usize % job.encoded.encodings.len()].0[0] ^= 1;
        }
        check_hash(job.encoded.plain_hash, &job.pages)
    }
}

fn check_hash(expected: u64, pages: &[Page]) -> Result<(), BackendError> {
    let seen = plain_hash(pages);
    if seen != expected {
        return Err(BackendError::Peer(DecodeError::HashMismatch { seen, expected }));
    }
    Ok(())
}

impl Decoder for GpuDecoder {
    fn depth(&self) -> usize {
        self.depth
    }

    fn in_flight(&self) -> usize {
        self.queue.len()
    }

    fn submit(&mut self, job: DecodeJob) {
        assert!(self.queue.len() < self.depth, "submitted more jobs than the depth of {}", self.depth);
        let number = self.gpu.next_job();
        let state = self.start(&job, number);
        self.queue.push_back(InFlight { job, number, state });
    }

    fn complete(&mut self) -> Option<Done<DecodeJob>> {
        let InFlight { mut job, number, state } = self.queue.pop_front()?;
        let result = match state {
            State::Finished(result) => {
                job.pages.clear();
                result
            }
            State::Running(lane) => self.finish(lane, &mut job, number),
        };
        Some(Done { job, result })
    }

    fn is_ready(&mut self) -> bool {
        match self.queue.front() {
            Some(InFlight { state: State::Running(lane), .. }) => {
                // What is lost needs no waiting for.
                self.gpu.check().and_then(|()| lane.is_ready()).unwrap_or(true)
            }
            _ => true,
        }
    }

    fn take_device_wait(&mut self) -> Duration {
        std::mem::take(&mut self.waited)
    }
}
