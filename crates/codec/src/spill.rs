//! A device with the CPU's help: a batch that the device has no time for spills to the CPU.
//!
//! An encoder or decoder of this backend drives one of the device and one of the CPU in the thread that calls it. The device gets all it has
//! room for. Only when it is full, and has not finished even its oldest batch, further batches go to the CPU, which works on them
//! instead of waiting for the device. They come back in their turn, so that a few of them may be waiting. A thread that was held up by
//! something else, such as the link, finds finished batches at the device and spills nothing.
//!
//! **History.** Slot numbers are those of the caller; for each slot one of the two histories holds the version sent last (`owners`). A page
//! whose version the other side holds is encoded without a base and moves over. That costs bytes, so a batch with most of
//! its versions on the device is not spilled: it waits here, and is the next that the device gets.

mod owners;
mod queue;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::backend::{
    Backend, BackendError, DecodeJob, Decoder, DecoderConfig, Done, EncodeJob, Encoder, EncoderConfig,
    SharedBackend,
};
use crate::cpu::CpuBackend;
use owners::Owners;
use queue::{Spill, Worker};

/// A device backend, with the CPU backend for what the device is too busy for.
pub struct SpillBackend {
    device: SharedBackend,
    cpu: CpuBackend,
    spilled: Arc<AtomicU64>,
}

impl SpillBackend {
    /// `device`, and `cpu` when it is busy.
    pub fn new(device: SharedBackend, cpu: CpuBackend) -> SpillBackend {
        SpillBackend { device, cpu, spilled: Arc::default() }
    }
}

impl std::fmt::Debug for SpillBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("SpillBackend").field(&self.name()).finish()
    }
}

impl Backend for SpillBackend {
    fn name(&self) -> String {
        format!("{} + {}", self.device.name(), self.cpu.name())
    }

    fn history_slots(&self, wanted: u32) -> u32 {
        self.device.history_slots(wanted)
    }

    fn decode_history_slots(&self, wanted: u32) -> u32 {
        self.device.decode_history_slots(wanted)
    }

    fn spilled_batches(&self) -> u64 {
        self.spilled.load(Ordering::Relaxed)
    }

    fn encoders(&self, config: EncoderConfig, workers: usize) -> Result<Vec<Box<dyn Encoder>>, BackendError> {
        let device = self.device.encoders(config, workers)?;
        let cpu = self.cpu.encoders(config, device.len())?;
        // Without an encoding that needs a base, where a version is makes no difference.
        let slots = if config.allowed.needs_base() { config.history_slots } else { 0 };
        let owners = Arc::new(Owners::new(slots));
        let both = device.into_iter().zip(cpu);
        Ok(both
            .map(|(device, cpu)| {
                Box::new(Spill::new(device, cpu, owners.clone(), self.spilled.clone())) as Box<dyn Encoder>
            })
            .collect())
    }

    fn decoders(&self, config: DecoderConfig, workers: usize) -> Result<Vec<Box<dyn Decoder>>, BackendError> {
        let device = self.device.decoders(config, workers)?;
        let cpu = self.cpu.decoders(config, device.len())?;
        let owners = Arc::new(Owners::new(config.history_slots));
        let both = device.into_iter().zip(cpu);
        Ok(both
            .map(|(device, cpu)| {
                Box::new(Spill::new(device, cpu, owners.clone(), self.spilled.clone())) as Box<dyn Decoder>
            })
            .collect())
    }
}

/// Implements the worker's trait for one of the two kinds, and the kind for the pair.
macro_rules! worker {
    ($kind:ident, $job:ident, bases_come_with_jobs: $bases_come_with_jobs:literal) => {
        impl Worker for Box<dyn $kind> {
            type Job = $job;
            const BASES_COME_WITH_JOBS: bool = $bases_come_with_jobs;

            fn slots(job: &mut $job) -> &mut [crate::backend::SlotUse] {
                &mut job.slots
            }

            fn depth(&self) -> usize {
                $kind::depth(&**self)
            }

            fn in_flight(&self) -> usize {
                $kind::in_flight(&**self)
            }

            fn submit(&mut self, job: $job) {
                $kind::submit(&mut **self, job);
            }

            fn complete(&mut self) -> Option<Done<$job>> {
                $kind::complete(&mut **self)
            }

            fn has_room(&mut self) -> bool {
                $kind::has_room(&mut **self)
            }

            fn is_ready(&mut self) -> bool {
                $kind::is_ready(&mut **self)
            }
        }

        impl $kind for Spill<Box<dyn $kind>> {
            fn depth(&self) -> usize {
                self.depth()
            }

            fn in_flight(&self) -> usize {
                self.in_flight()
            }

            fn submit(&mut self, job: $job) {
                self.submit(job);
            }

            fn complete(&mut self) -> Option<Done<$job>> {
                self.complete()
            }

            fn has_room(&mut self) -> bool {
                self.has_room()
            }

            fn is_ready(&mut self) -> bool {
                self.is_ready()
            }

            fn take_device_wait(&mut self) -> Duration {
                self.device.take_device_wait()
            }
        }
    };
}

worker!(Encoder, EncodeJob, bases_come_with_jobs: false);
worker!(Decoder, DecodeJob, bases_come_with_jobs: true);
