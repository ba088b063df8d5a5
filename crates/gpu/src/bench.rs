//! How fast a device is with an image, and with what: the measurement behind `pagewarp codec bench --backend gpu`.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use pagewarp_codec::{
    Backend, BackendError, DecodeJob, DecoderConfig, EncodeJob, Encoder, EncoderConfig, EncodingCount,
    EncodingSet, PAGE_SIZE, Page, SlotUse, Trace,
};
use wgpu::{BufferUsages, CommandEncoderDescriptor};

use crate::adapter::Adapter;
use crate::backend::{GpuBackend, GpuConfig};
use crate::device::Gpu;
use crate::drive::{first, work};
use crate::timing::Phase;

/// Pages in a batch, as migrations have them.
const BATCH_PAGES: usize = 256;
/// Pages that are measured together, 64 MiB: more than caches hold.
const SEGMENT_PAGES: usize = 64 * BATCH_PAGES;
/// Copies of 64 MiB that are timed together, so that the time of a submission does not matter.
const COPIES: u32 = 16;

/// Time that an image took on its way through the device, and what the device did meanwhile. Milliseconds are of the device's own clock, added
/// up over all batches; phases of different batches overlap on devices that can do both at once.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PassReport {
    /// Plain bytes a second, in 10^9, with several batches in flight: staging, uploads, kernels, readbacks, hash and all.
    pub gb_per_s: f64,
    /// Uploads; `None` if the device has no clock.
    pub upload_ms: Option<f64>,
    /// Kernels; `None` if the device has no clock.
    pub kernel_ms: Option<f64>,
    /// Readbacks; `None` if the device has no clock.
    pub readback_ms: Option<f64>,
}

/// What [`bench()`] measured, the best round of each 64 MiB.
#[derive(Clone, Debug)]
pub struct BenchReport {
    /// Pages of the image.
    pub pages: u64,
    /// One entry per encoding, in tag order, also where no page got it.
    pub encodings: Vec<EncodingCount>,
    /// Plain bytes divided by encoded bytes (payloads, one tag byte and two length bytes per page).
    pub ratio: f64,
    /// Encoding.
    pub encode: PassReport,
    /// Decoding; bases are uploaded.
    pub decode: PassReport,
    /// Copying bytes from one place in device memory to another: bytes copied a second, in 10^9.
    pub device_copy_gb_per_s: f64,
    /// Whether every page came back as it was.
    pub verified: bool,
}

impl BenchReport {
    /// How long the device needs to copy the image once, in milliseconds.
    pub fn device_copy_ms(&self) -> f64 {
        (self.pages * PAGE_SIZE as u64) as f64 / self.device_copy_gb_per_s.max(1e-9) / 1e6
    }
}

/// Encodes and decodes the image on the device, each 64 MiB of it `rounds` times, and verifies the round trip.
///
/// The base of page k is `base[k]`, and is in the encoder's history on the device before it is measured; pages beyond the end of the
/// base have none.
///
/// # Errors
///
/// What the device says.
pub fn bench(
    adapter: &Adapter,
    image: &[Page],
    base: Option<&[Page]>,
    allowed: EncodingSet,
    rounds: usize,
) -> Result<BenchReport, BackendError> {
    let trace = Trace::new();
    let gpu = Gpu::open(adapter, GpuConfig { trace: Some(trace.clone()), ..GpuConfig::default() })?;
    let device_copy_gb_per_s = device_copy(&gpu)?;
    let has_clock = gpu.timing().is_some_and(|timing| timing.has_clock());
    let backend = GpuBackend::on(gpu);
    let history_slots = if base.is_some() { SEGMENT_PAGES as u32 } else { 0 };
    let config = EncoderConfig { allowed, history_slots, max_batch_pages: BATCH_PAGES };
    let mut encoder = first(backend.encoders(config, 1)?, &backend)?;
    let config = DecoderConfig { allowed, history_slots: 0, max_batch_pages: BATCH_PAGES };
    let mut decoder = first(backend.decoders(config, 1)?, &backend)?;

    let (mut encode, mut decode) = (Pass::default(), Pass::default());
    let mut encodings = EncodingCount::none();
    let mut verified = true;
    for (number, plain) in image.chunks(SEGMENT_PAGES).enumerate() {
        let bases = base.and_then(|base| base.get(number * SEGMENT_PAGES..)).unwrap_or_default();
        let segment = Segment { plain, bases: &bases[..bases.len().min(plain.len())] };
        let (mut best_encode, mut best_decode) = (None, None);
        for round in 0..rounds.max(1) {
            segment.store_bases(&mut encoder)?;
            let mut jobs = segment.encode_jobs();
            best_encode = better(best_encode, Pass::run(&trace, || run_all(&mut encoder, &mut jobs))?);
            let mut jobs = segment.decode_jobs(jobs);
            best_decode = better(best_decode, Pass::run(&trace, || run_all(&mut decoder, &mut jobs))?);
            verified &= plain.chunks(BATCH_PAGES).eq(jobs.iter().map(|job| &job.pages[..]));
            if round == 0 {
                jobs.iter().for_each(|job| EncodingCount::add(&mut encodings, &job.encoded));
            }
        }
        encode.add(best_encode);
        decode.add(best_decode);
    }
    let plain_bytes = size_of_val(image) as u64;
    Ok(BenchReport {
        pages: image.len() as u64,
        ratio: match EncodingCount::wire_bytes(&encodings) {
            0 => 1.0,
            wire_bytes => plain_bytes as f64 / wire_bytes as f64,
        },
        encodings: encodings.to_vec(),
        encode: encode.report(plain_bytes, has_clock),
        decode: decode.report(plain_bytes, has_clock),
        device_copy_gb_per_s,
        verified,
    })
}

/// A part of the image, and the bases of its first pages.
struct Segment<'a> {
    plain: &'a [Page],
    bases: &'a [Page],
}

impl Segment<'_> {
    /// Puts the bases into the encoder's history.
    fn store_bases(&self, encoder: &mut Box<dyn Encoder>) -> Result<(), BackendError> {
        let job = |(batch, pages): (usize, &[Page])| EncodeJob {
            pages: pages.to_vec(),
            slots: (0..pages.len()).map(|page| SlotUse::Store((batch * BATCH_PAGES + page) as u32)).collect(),
            ..EncodeJob::default()
        };
        run_all(encoder, &mut self.bases.chunks(BATCH_PAGES).enumerate().map(job).collect())
    }

    fn encode_jobs(&self) -> VecDeque<EncodeJob> {
        let slot = |page| if page < self.bases.len() { SlotUse::Delta(page as u32) } else { SlotUse::None };
        let job = |(batch, pages): (usize, &[Page])| EncodeJob {
            number: batch as u64,
            pages: pages.to_vec(),
            slots: (0..pages.len()).map(|page| slot(batch * BATCH_PAGES + page)).collect(),
            ..EncodeJob::default()
        };
        self.plain.chunks(BATCH_PAGES).enumerate().map(job).collect()
    }

    fn decode_jobs(&self, encoded: VecDeque<EncodeJob>) -> VecDeque<DecodeJob> {
        let job = |(batch, job): (usize, EncodeJob)| {
            let pages = job.encoded.encodings.iter().enumerate();
            let needed = pages.filter(|(_, encoding)| encoding.needs_base());
            DecodeJob {
                number: job.number,
                bases: needed.map(|(page, _)| self.bases[batch * BATCH_PAGES + page]).collect(),
                encoded: job.encoded,
                ..DecodeJob::default()
            }
        };
        encoded.into_iter().enumerate().map(job).collect()
    }
}

/// Does all jobs once; they come back in their order.
fn run_all<W: crate::drive::Worker>(worker: &mut W, jobs: &mut VecDeque<W::Job>) -> Result<(), BackendError> {
    let count = jobs.len();
    work(worker, jobs, |submitted| submitted < count).map(drop)
}

/// Once through the device.
#[derive(Clone, Copy, Default)]
struct Pass {
    took: Duration,
    upload: Duration,
    kernel: Duration,
    readback: Duration,
}

impl Pass {
    fn run(trace: &Trace, f: impl FnOnce() -> Result<(), BackendError>) -> Result<Pass, BackendError> {
        // The bases on their way into the history, and what else came before.
        drop(trace.take());
        let start = Instant::now();
        f()?;
        let took = start.elapsed();
        // Far fewer than a trace keeps: 64 batches have a few each.
        let (spans, _) = trace.take();
        let sum = |phase: Phase| {
            let spans = spans.iter().filter(|span| span.name == phase.name());
            spans.map(|span| span.end - span.start).sum()
        };
        Ok(Pass {
            took,
            upload: sum(Phase::Upload),
            kernel: sum(Phase::Kernel),
            readback: sum(Phase::Readback),
        })
    }

    fn add(&mut self, other: Option<Pass>) {
        let Pass { took, upload, kernel, readback } = other.unwrap_or_default();
        self.took += took;
        self.upload += upload;
        self.kernel += kernel;
        self.readback += readback;
    }

    fn report(&self, plain_bytes: u64, has_clock: bool) -> PassReport {
        let ms = |time: Duration| has_clock.then_some(time.as_secs_f64() * 1e3);
        PassReport {
            gb_per_s: plain_bytes as f64 / self.took.as_secs_f64().max(1e-9) / 1e9,
            upload_ms: ms(self.upload),
            kernel_ms: ms(self.kernel),
            readback_ms: ms(self.readback),
        }
    }
}

/// The quicker of two.
fn better(best: Option<Pass>, pass: Pass) -> Option<Pass> {
    Some(best.filter(|best| best.took <= pass.took).unwrap_or(pass))
}

/// Measures a plain copy in device memory: bytes a second, in 10^9.
fn device_copy(gpu: &Gpu) -> Result<f64, BackendError> {
    let bytes = ((SEGMENT_PAGES * PAGE_SIZE) as u64).min(gpu.max_binding_bytes());
    let buffer = |label| gpu.buffer(label, bytes, BufferUsages::COPY_SRC | BufferUsages::COPY_DST);
    let (from, to) = (buffer("copy from")?, buffer("copy to")?);
    let mut best = Duration::MAX;
    // The first round brings the memory into being.
    for _ in 0..4 {
        let mut commands = gpu.device.create_command_encoder(&CommandEncoderDescriptor::default());
        for _ in 0..COPIES {
            commands.copy_buffer_to_buffer(&from, 0, &to, 0, bytes);
        }
        let start = Instant::now();
        gpu.run(commands.finish())?;
        best = best.min(start.elapsed());
    }
    Ok((bytes * u64::from(COPIES)) as f64 / best.as_secs_f64().max(1e-9) / 1e9)
}

#[cfg(test)]
mod tests {
    use pagewarp_codec::Encoding;

    use super::*;
    use crate::test_support::{assert_no_complaints, software_adapter};

    #[test]
    fn a_bench_counts_pages_and_verifies_them() {
        let base = vec![Page([7; PAGE_SIZE]); 500];
        let mut image = vec![Page([7; PAGE_SIZE]); 600];
        image[..100].fill(Page::ZERO);
        image[100..200].iter_mut().for_each(|page| page.0[9] = 1);
        let report = bench(&software_adapter(), &image, Some(&base), EncodingSet::ALL, 2).unwrap();
        assert!(report.verified);
        let pages = |encoding: Encoding| report.encodings[usize::from(encoding.tag())].pages;
        let seen = [Encoding::Zero, Encoding::SparseXor, Encoding::Same, Encoding::Lz4].map(pages);
        assert_eq!((report.pages, seen), (600, [100, 100, 300, 100]));
        for pass in [report.encode, report.decode] {
            assert!(pass.gb_per_s > 0.0, "{report:?}");
            // The software device has a clock.
            assert!(pass.kernel_ms > Some(0.0) && pass.upload_ms.is_some(), "{report:?}");
        }
        assert!(report.device_copy_ms() > 0.0);
        assert_no_complaints();
    }

    #[test]
    fn a_bench_of_nothing_is_fine() {
        let report = bench(&software_adapter(), &[], None, EncodingSet::ALL, 1).unwrap();
        assert_eq!((report.pages, report.ratio, report.verified), (0, 1.0, true));
        assert_no_complaints();
    }
}
