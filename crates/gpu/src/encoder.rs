//! The encoder: several batches in flight, each in a lane with buffers of its own.

mod lane;
mod table;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pagewarp_codec::{BackendError, Done, EncodeJob, Encoder, EncoderConfig};

use crate::device::Gpu;
use crate::encoder::lane::Lane;
use crate::history::History;
use crate::kernels::EncodeKernels;

/// Encodes batches on the device. Lanes are taken in turn, so that jobs come back in the order of submission.
pub(crate) struct GpuEncoder {
    gpu: Arc<Gpu>,
    history: Option<Arc<Mutex<History>>>,
    max_batch_pages: usize,
    idle: VecDeque<Lane>,
    /// Oldest first.
    busy: VecDeque<Lane>,
    waited: Duration,
}

impl GpuEncoder {
    /// An encoder with buffers for `depth` batches.
    ///
    /// # Errors
    ///
    /// [`BackendError::Unavailable`] if there is no memory for them.
    pub(crate) fn new(
        gpu: &Arc<Gpu>,
        kernels: &EncodeKernels,
        config: EncoderConfig,
        history: Option<&Arc<Mutex<History>>>,
    ) -> Result<GpuEncoder, BackendError> {
        let lanes = (0..gpu.config().depth.max(1)).map(|_| {
            Lane::new(gpu, kernels, config.allowed, config.max_batch_pages, history.map(|history| &**history))
        });
        Ok(GpuEncoder {
            gpu: gpu.clone(),
            history: history.cloned(),
            max_batch_pages: config.max_batch_pages,
            idle: lanes.collect::<Result<_, _>>()?,
            busy: VecDeque::new(),
            waited: Duration::ZERO,
        })
    }

    /// Takes what the device has finished and starts what follows from it, in all lanes.
    fn advance(&mut self) {
        self.busy.iter_mut().for_each(Lane::step);
    }
}

impl Encoder for GpuEncoder {
    fn depth(&self) -> usize {
        self.idle.len() + self.busy.len()
    }

    fn in_flight(&self) -> usize {
        self.busy.len()
    }

    fn submit(&mut self, job: EncodeJob) {
        assert_eq!(job.pages.len(), job.slots.len(), "a job needs one slot entry per page");
        assert!(job.pages.len() <= self.max_batch_pages, "a batch of more pages than configured");
        let Some(mut lane) = self.idle.pop_front() else {
            panic!("submitted more jobs than the depth of {}", self.busy.len());
        };
        self.advance();
        lane.start(job, self.history.as_deref());
        self.busy.push_back(lane);
    }

    fn complete(&mut self) -> Option<Done<EncodeJob>> {
        if self.busy.is_empty() {
            return None;
        }
        let GpuEncoder { gpu, busy, .. } = self;
        let waited = gpu.wait_for(|| {
            busy.iter_mut().for_each(Lane::step);
            Ok(busy.front().is_none_or(Lane::is_done))
        });
        let mut lane = self.busy.pop_front()?;
        match waited {
            Ok(waited) => self.waited += waited,
            Err(error) => lane.fail(error),
        }
        let done = lane.finish();
        self.idle.push_back(lane);
        Some(done)
    }

    fn has_room(&mut self) -> bool {
        if self.gpu.check().is_ok() {
            self.advance();
        }
        self.idle.front().is_some_and(Lane::is_free)
    }

    fn is_ready(&mut self) -> bool {
        self.advance();
        self.busy.front().is_none_or(Lane::is_done)
    }

    fn take_device_wait(&mut self) -> Duration {
        std::mem::take(&mut self.waited)
    }
}
