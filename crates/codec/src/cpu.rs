//! The CPU backend: does the work in the calling thread, when a job is completed.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::backend::{
    Backend, BackendError, DecodeJob, Decoder, DecoderConfig, Done, EncodeJob, Encoder, EncoderConfig,
    SlotUse,
};
use crate::decode::decode_batch;
use crate::encode::{Change, PageEncoder};
use crate::encoding::EncodingSet;
use crate::history::{History, Resident};
use crate::page::Page;
use crate::simd::{Kernels, Simd};
use crate::sparse::{LINE, set_bits};

/// Encodes and decodes on the CPU, with the instruction set the machine has.
///
/// Its encoders and decoders work in the thread that calls `complete`; one job at a time each.
#[derive(Clone, Debug)]
pub struct CpuBackend {
    kernels: Kernels,
    resident: Resident,
}

impl CpuBackend {
    /// The fastest this machine can do.
    pub fn new() -> CpuBackend {
        CpuBackend::with_simd(Simd::detect()).expect("detected levels are available")
    }

    /// A backend that uses exactly this SIMD level.
    ///
    /// # Errors
    ///
    /// [`BackendError::Unavailable`] if the machine lacks it.
    pub fn with_simd(simd: Simd) -> Result<CpuBackend, BackendError> {
        match Kernels::new(simd) {
            Some(kernels) => Ok(CpuBackend { kernels, resident: Resident::default() }),
            None => Err(BackendError::Unavailable {
                device: format!("cpu ({simd})"),
                reason: format!("this machine has no {simd}; use {}", Simd::detect()),
            }),
        }
    }

    /// The SIMD level in use.
    pub fn simd(&self) -> Simd {
        self.kernels.simd()
    }

    /// Memory that the histories of this backend's encoders take now, in bytes.
    ///
    /// At most 4096 × history slots of all living encoder sets, rounded up to 2 MiB each.
    pub fn history_resident_bytes(&self) -> u64 {
        self.resident.load(Ordering::Relaxed)
    }
}

impl Default for CpuBackend {
    fn default() -> Self {
        CpuBackend::new()
    }
}

impl Backend for CpuBackend {
    fn name(&self) -> String {
        format!("cpu ({})", self.simd())
    }

    fn is_cpu(&self) -> bool {
        true
    }

    fn encoders(&self, config: EncoderConfig, workers: usize) -> Result<Vec<Box<dyn Encoder>>, BackendError> {
        // Without an encoding that needs a base the history would never be read.
        let keeps_history = config.allowed.needs_base() && config.history_slots > 0;
        let history =
            keeps_history.then(|| Arc::new(History::new(config.history_slots, self.resident.clone())));
        Ok((0..workers.max(1))
            .map(|_| {
                Box::new(CpuEncoder {
                    pages: PageEncoder::with_kernels(self.kernels, config.allowed),
                    allowed: config.allowed,
                    history: history.clone(),
                    max_batch_pages: config.max_batch_pages,
                    waiting: None,
                }) as Box<dyn Encoder>
            })
            .collect())
    }

    fn decoders(&self, config: DecoderConfig, workers: usize) -> Result<Vec<Box<dyn Decoder>>, BackendError> {
        Ok((0..workers.max(1))
            .map(|_| {
                Box::new(CpuDecoder { kernels: self.kernels, config, waiting: None }) as Box<dyn Decoder>
            })
            .collect())
    }
}

struct CpuEncoder {
    pages: PageEncoder,
    allowed: EncodingSet,
    history: Option<Arc<History>>,
    max_batch_pages: usize,
    waiting: Option<EncodeJob>,
}

impl CpuEncoder {
    fn encode(&mut self, job: &mut EncodeJob) {
        let EncodeJob { pages, slots, encoded, allowed, .. } = job;
        encoded.clear();
        self.pages.allow(allowed.map_or(self.allowed, |allowed| allowed.intersection(self.allowed)));
        let mut hash = xxhash_rust::xxh3::Xxh3Default::new();
        for (page, &slot) in pages.iter().zip(slots.iter()) {
            let start = encoded.payload.len();
            let out = &mut encoded.payload;
            let encoding = match (&self.history, slot) {
                (None, _) | (_, SlotUse::None) => self.pages.encode_alone(page, out),
                (Some(history), SlotUse::Store(slot)) => {
                    let encoding = self.pages.encode_alone(page, out);
                    history.with_slot(slot, |version| version.0.copy_from_slice(&page.0));
                    encoding
                }
                (Some(history), SlotUse::Delta(slot)) => history.with_slot(slot, |version| {
                    let (encoding, change) = self.pages.encode_delta(page, version, out);
                    update(version, page, change);
                    encoding
                }),
            };
            encoded.encodings.push(encoding);
            encoded.lens.push((encoded.payload.len() - start) as u16);
            hash.update(&page.0);
        }
        encoded.plain_hash = hash.digest();
    }
}

/// Makes `version` the new page. Lines that did not change are not written, which spares memory bandwidth.
fn update(version: &mut Page, page: &Page, change: Change) {
    match change {
        Change::Unknown => version.0.copy_from_slice(&page.0),
        Change::Lines(lines) => {
            let (from, _) = page.0.as_chunks::<LINE>();
            let (to, _) = version.0.as_chunks_mut::<LINE>();
            for line in set_bits(lines) {
                to[line] = from[line];
            }
        }
    }
}

impl Encoder for CpuEncoder {
    fn depth(&self) -> usize {
        1
    }

    fn in_flight(&self) -> usize {
        usize::from(self.waiting.is_some())
    }

    fn submit(&mut self, job: EncodeJob) {
        assert!(self.waiting.is_none(), "submitted more jobs than the depth of 1");
        assert_eq!(job.pages.len(), job.slots.len(), "a job needs one slot entry per page");
        assert!(job.pages.len() <= self.max_batch_pages, "a batch of more pages than configured");
        self.waiting = Some(job);
    }

    fn complete(&mut self) -> Option<Done<EncodeJob>> {
        let mut job = self.waiting.take()?;
        self.encode(&mut job);
        Some(Done { job, result: Ok(()) })
    }
}

struct CpuDecoder {
    kernels: Kernels,
    config: DecoderConfig,
    waiting: Option<DecodeJob>,
}

impl Decoder for CpuDecoder {
    fn depth(&self) -> usize {
        1
    }

    fn in_flight(&self) -> usize {
        usize::from(self.waiting.is_some())
    }

    fn submit(&mut self, job: DecodeJob) {
        assert!(self.waiting.is_none(), "submitted more jobs than the depth of 1");
        self.waiting = Some(job);
    }

    fn complete(&mut self) -> Option<Done<DecodeJob>> {
        let mut job = self.waiting.take()?;
        let DecoderConfig { allowed, max_batch_pages, .. } = self.config;
        let DecodeJob { encoded, bases, pages, .. } = &mut job;
        let result = decode_batch(self.kernels, allowed, max_batch_pages, encoded, bases.iter(), pages);
        Some(Done { job, result: result.map_err(BackendError::from) })
    }
}
