//! What happens when a device runs out of memory, is lost, stalls, or computes wrongly; and histories of several chunks.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use pagewarp_codec::{
    Backend, BackendError, CpuBackend, DecodeJob, Decoder, DecoderConfig, EncodeJob, EncodedBatch, Encoder,
    EncoderConfig, Encoding, EncodingSet, Page, SlotUse,
};
use pagewarp_testkit::image::{Mutation, mixed_image, mutate};
use pagewarp_testkit::rng::SplitMix64;
use wgpu::CommandEncoderDescriptor;

use crate::backend::{GpuBackend, GpuConfig};
use crate::device::Gpu;
use crate::faults::Faults;
use crate::test_support::{assert_no_complaints, software_adapter};

/// Pages in a batch.
const PAGES: usize = 16;
/// A busy machine is not a stalled device.
const PATIENCE: Duration = Duration::from_secs(120);

fn open(faults: Faults, stall_timeout: Duration, memory_bytes: Option<u64>) -> GpuBackend {
    let config = GpuConfig { stall_timeout, memory_bytes, faults, ..GpuConfig::default() };
    GpuBackend::open(&software_adapter(), config).expect("the software device opens")
}

fn encoder(backend: &dyn Backend, history_slots: u32) -> Box<dyn Encoder> {
    let config = EncoderConfig { allowed: EncodingSet::ALL, history_slots, max_batch_pages: PAGES };
    backend.encoders(config, 1).expect("an encoder").remove(0)
}

fn decoder(backend: &dyn Backend, history_slots: u32) -> Box<dyn Decoder> {
    let config = DecoderConfig { allowed: EncodingSet::ALL, history_slots, max_batch_pages: PAGES };
    backend.decoders(config, 1).expect("a decoder").remove(0)
}

fn job(pages: &[Page], slot: impl Fn(u32) -> SlotUse) -> EncodeJob {
    EncodeJob {
        pages: pages.to_vec(),
        slots: (0..pages.len() as u32).map(slot).collect(),
        ..EncodeJob::default()
    }
}

fn encode(encoder: &mut Box<dyn Encoder>, job: EncodeJob) -> EncodedBatch {
    encoder.submit(job);
    let done = encoder.complete().expect("a job in flight");
    done.result.expect("it encodes");
    done.job.encoded
}

fn decode(
    decoder: &mut Box<dyn Decoder>,
    encoded: &EncodedBatch,
    bases: &[Page],
) -> Result<Vec<Page>, BackendError> {
    let pages = encoded.encodings.iter().zip(bases);
    let bases = pages.filter(|(encoding, _)| encoding.needs_base()).map(|(_, base)| *base).collect();
    decoder.submit(DecodeJob { encoded: encoded.clone(), bases, ..DecodeJob::default() });
    let done = decoder.complete().expect("a job in flight");
    done.result.map(|()| done.job.pages)
}

/// Pages, and the same with a few bytes changed.
fn versions() -> (Vec<Page>, Vec<Page>) {
    let first = mixed_image(PAGES, 7);
    let mut second = first.clone();
    let mut rng = SplitMix64::new(8);
    second.iter_mut().for_each(|page| mutate(page, Mutation::Bytes(3), &mut rng));
    (first, second)
}

#[test]
fn a_history_may_have_several_chunks() {
    let backend = open(Faults::default(), PATIENCE, None);
    let slots: u32 = 50_000;
    let (first, second) = versions();
    // The ends of chunks of 16384 slots are among them.
    let places = |page: u32| [0, 16383, 16384, 32767, 32768, 49_999][page as usize % 6] ^ (page / 6 * 2);
    let mut encoder = encoder(&backend, slots);
    encode(&mut encoder, job(&first, |page| SlotUse::Store(places(page))));
    let encoded = encode(&mut encoder, job(&second, |page| SlotUse::Delta(places(page))));
    assert!(encoded.encodings.iter().all(|encoding| *encoding == Encoding::SparseXor), "{encoded:?}");
    let pages = decode(&mut decoder(&CpuBackend::new(), 0), &encoded, &first).expect("valid");
    assert!(pages == second);
    assert_no_complaints();
}

/// A budget for one chunk of three.
#[test]
fn slots_without_memory_have_no_bases() {
    let backend = open(Faults::default(), PATIENCE, Some(64 << 20));
    assert_eq!(backend.history_slots(50_000), 16384, "what the budget holds");
    let (first, second) = versions();
    // Somebody who does not ask gets what there is.
    let place = |page: u32| if page.is_multiple_of(2) { page } else { 16384 + page };
    let mut encoder = encoder(&backend, 50_000);
    encode(&mut encoder, job(&first, |page| SlotUse::Store(place(page))));
    let encoded = encode(&mut encoder, job(&second, |page| SlotUse::Delta(place(page))));
    for (page, encoding) in encoded.encodings.iter().enumerate() {
        assert_eq!(encoding.needs_base(), page.is_multiple_of(2), "page {page}: {encoding}");
    }
    let pages = decode(&mut decoder(&CpuBackend::new(), 0), &encoded, &first).expect("valid");
    assert!(pages == second);
    assert_no_complaints();
}

#[test]
fn allocations_that_fail_cost_deltas_and_not_batches() {
    let faults = Faults { no_memory_after: Some(0), ..Faults::default() };
    let backend = open(faults, PATIENCE, None);
    let config = EncoderConfig { allowed: EncodingSet::ALL, history_slots: 100, max_batch_pages: PAGES };
    let error = backend.encoders(config, 1).err().expect("no memory for buffers");
    assert!(matches!(&error, BackendError::Unavailable { .. }), "{error}");

    let faults = Faults { no_memory_after: Some(1), ..Faults::default() };
    let backend = open(faults, PATIENCE, None);
    let (first, second) = versions();
    let mut encoder = encoder(&backend, 50_000);
    encode(&mut encoder, job(&first, SlotUse::Store));
    let elsewhere = |page| if page < 8 { SlotUse::Delta(page) } else { SlotUse::Store(40_000 + page) };
    encode(&mut encoder, job(&second, elsewhere));
    let encoded = encode(
        &mut encoder,
        job(&second, |page| match elsewhere(page) {
            SlotUse::Store(slot) => SlotUse::Delta(slot),
            other => other,
        }),
    );
    for (page, encoding) in encoded.encodings.iter().enumerate() {
        assert_eq!(*encoding == Encoding::Same, page < 8, "page {page}: {encoding}");
    }
    let pages = decode(&mut decoder(&CpuBackend::new(), 0), &encoded, &second).expect("valid");
    assert!(pages == second);
}

/// Every job comes back, those in flight too, with the reason.
#[test]
fn a_lost_device_gives_back_every_job() {
    let (first, _) = versions();
    for lose_after in 0..5 {
        let backend = open(Faults { lose_after: Some(lose_after), ..Faults::default() }, PATIENCE, None);
        let mut encoder = encoder(&backend, 100);
        let (mut good, mut bad) = (0, 0);
        for _ in 0..4 {
            while encoder.has_room() && encoder.in_flight() < encoder.depth() {
                encoder.submit(job(&first, SlotUse::Store));
            }
            while let Some(done) = encoder.complete() {
                assert!(done.job.pages == first, "the pages come back");
                match done.result {
                    Ok(()) => good += 1,
                    Err(BackendError::Lost { .. }) => bad += 1,
                    Err(other) => panic!("{other}"),
                }
            }
        }
        assert_eq!(good + bad, 4 * encoder.depth());
        assert!(good <= lose_after as usize, "{good} good after a loss after {lose_after}");
        assert!(
            backend
                .encoders(
                    EncoderConfig { allowed: EncodingSet::ALL, history_slots: 0, max_batch_pages: 1 },
                    1
                )
                .is_err()
        );
    }
}

/// A driver that loses its device makes wgpu panic in whichever thread polls: here the next poll does, in the thread of the queue, and every
/// job comes back long before anybody could believe in a stall.
#[test]
fn a_driver_that_panics_is_a_lost_device() {
    let (first, _) = versions();
    let encoded = encode(&mut encoder(&CpuBackend::new(), 0), job(&first, |_| SlotUse::None));
    let gpu = Gpu::open(&software_adapter(), GpuConfig { stall_timeout: PATIENCE, ..GpuConfig::default() });
    let gpu = gpu.expect("the software device opens");
    let backend = GpuBackend::on(gpu.clone());
    let (mut encoder, mut decoder) = (encoder(&backend, 100), decoder(&backend, 0));
    let start = Instant::now();
    gpu.queue.on_submitted_work_done(|| panic!("the driver is gone (on purpose)"));
    for _ in 0..2 {
        encoder.submit(job(&first, SlotUse::Store));
        decoder.submit(DecodeJob { encoded: encoded.clone(), ..DecodeJob::default() });
    }
    let is_lost = |result: Result<(), BackendError>| match result {
        Err(BackendError::Lost { reason, .. }) => assert!(reason.contains("the driver is gone"), "{reason}"),
        other => panic!("{other:?}"),
    };
    for _ in 0..2 {
        is_lost(encoder.complete().expect("a job in flight").result);
        is_lost(decoder.complete().expect("a job in flight").result);
    }
    is_lost(gpu.check());
    assert!(start.elapsed() < PATIENCE / 2, "{:?}", start.elapsed());

    // In the thread that measures it is no different.
    let gpu = Gpu::open(&software_adapter(), GpuConfig::default()).expect("the software device opens");
    gpu.queue.on_submitted_work_done(|| panic!("the driver is gone (on purpose)"));
    let commands = gpu.device.create_command_encoder(&CommandEncoderDescriptor::default());
    is_lost(gpu.run(commands.finish()));
}

#[test]
fn a_lost_device_gives_back_what_was_to_be_decoded() {
    let (first, _) = versions();
    let encoded = encode(&mut encoder(&CpuBackend::new(), 0), job(&first, |_| SlotUse::None));
    for lose_after in 0..4 {
        let backend = open(Faults { lose_after: Some(lose_after), ..Faults::default() }, PATIENCE, None);
        let mut decoder = decoder(&backend, 0);
        for _ in 0..decoder.depth() {
            decoder.submit(DecodeJob { encoded: encoded.clone(), ..DecodeJob::default() });
        }
        let mut jobs = 0;
        while let Some(done) = decoder.complete() {
            assert!(done.job.encoded == encoded, "the job comes back");
            match done.result {
                Ok(()) => assert!(done.job.pages == first),
                Err(error) => assert!(matches!(error, BackendError::Lost { .. }), "{error}"),
            }
            jobs += 1;
        }
        assert_eq!(jobs, decoder.depth());
    }
}

#[test]
fn a_device_that_finishes_nothing_is_lost() {
    let (first, _) = versions();
    let stalled =
        || open(Faults { stall_after: Some(0), ..Faults::default() }, Duration::from_millis(200), None);
    let backend = stalled();
    let mut encoder = encoder(&backend, 0);
    encoder.submit(job(&first, |_| SlotUse::None));
    assert!(!encoder.is_ready());
    let done = encoder.complete().expect("a job in flight");
    assert!(matches!(done.result, Err(BackendError::Lost { .. })), "{:?}", done.result);

    // Those who only ask hear of it as well.
    let backend = stalled();
    let mut encoder = self::encoder(&backend, 0);
    encoder.submit(job(&first, |_| SlotUse::None));
    while !encoder.is_ready() {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(encoder.complete().is_some_and(|done| done.result.is_err()));

    let encoded = encode(&mut self::encoder(&CpuBackend::new(), 0), job(&first, |_| SlotUse::None));
    let backend = stalled();
    let lost = decode(&mut decoder(&backend, 0), &encoded, &[]);
    assert!(matches!(lost, Err(BackendError::Lost { .. })), "{lost:?}");
}

#[test]
fn a_flipped_bit_does_not_pass_the_hash() {
    let (first, _) = versions();
    let faults = Faults { corrupt_one_in: NonZeroU64::new(1), ..Faults::default() };
    let backend = open(faults, PATIENCE, None);
    let encoded = encode(&mut encoder(&backend, 0), job(&first, |_| SlotUse::None));
    let seen = decode(&mut decoder(&CpuBackend::new(), 0), &encoded, &[]);
    assert!(matches!(seen, Err(BackendError::Peer(_))), "the CPU rejects what the GPU got wrong: {seen:?}");
    let encoded = encode(&mut encoder(&CpuBackend::new(), 0), job(&first, |_| SlotUse::None));
    let seen = decode(&mut decoder(&backend, 0), &encoded, &[]);
    assert!(matches!(seen, Err(BackendError::Peer(_))), "the GPU's own hash check: {seen:?}");
}
