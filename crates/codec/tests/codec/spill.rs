//! The backend that spills: what spills and when, and what becomes of it when the device is lost.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use crate::common::noise;
use crate::spill_model::{Destination, Guest, MAX_PAGES, Random, SLOTS, Sent};
use pagewarp_codec::{
    Backend, BackendError, CpuBackend, DecodeJob, Decoder, DecoderConfig, Done, EncodeJob, EncodedBatch,
    Encoder, EncoderConfig, Encoding, EncodingSet, FakeBackend, FakeConfig, Page, SlotUse, SpillBackend,
};

/// Jobs in flight besides those of the device.
const BESIDE: usize = 8;

fn spilling(config: FakeConfig) -> SpillBackend {
    SpillBackend::new(Arc::new(FakeBackend::new(config)), CpuBackend::new())
}

fn encoders(backend: &dyn Backend, workers: usize) -> Vec<Box<dyn Encoder>> {
    let config =
        EncoderConfig { allowed: EncodingSet::ALL, history_slots: SLOTS, max_batch_pages: MAX_PAGES };
    backend.encoders(config, workers).expect("encoders")
}

fn cpu_decoder() -> Box<dyn Decoder> {
    let config = DecoderConfig { allowed: EncodingSet::ALL, history_slots: 0, max_batch_pages: MAX_PAGES };
    CpuBackend::new().decoders(config, 1).expect("decoders").remove(0)
}

/// A thread: its encoder, and what it has in flight.
struct Worker {
    inner: Box<dyn Encoder>,
    in_flight: VecDeque<Sent>,
}

fn workers(inner: Vec<Box<dyn Encoder>>) -> Vec<Worker> {
    inner.into_iter().map(|inner| Worker { inner, in_flight: VecDeque::new() }).collect()
}

/// What came of the batches of one epoch, in the order of completion.
type Outcome = Vec<(Sent, Done<EncodeJob>)>;

/// Encodes the batches with a random schedule: random workers take them, submit or complete, and ask how it stands.
fn encode_epoch(workers: &mut [Worker], batches: Vec<Sent>, random: &mut Random) -> Outcome {
    let (mut todo, mut outcome) = (VecDeque::from(batches), Vec::new());
    while !todo.is_empty() || workers.iter().any(|worker| !worker.in_flight.is_empty()) {
        let index = random.below(workers.len());
        let worker = &mut workers[index];
        assert_eq!(worker.inner.in_flight(), worker.in_flight.len());
        assert!(worker.inner.in_flight() <= worker.inner.depth());
        match random.below(5) {
            0..3 if worker.inner.has_room() => {
                let Some(batch) = todo.pop_front() else { continue };
                worker.inner.submit(batch.job());
                worker.in_flight.push_back(batch);
            }
            3 => drop(worker.inner.is_ready()),
            _ => {
                let done = worker.inner.complete();
                assert_eq!(done.is_some(), !worker.in_flight.is_empty());
                let Some(done) = done else { continue };
                let batch = worker.in_flight.pop_front().expect("as many as jobs");
                assert_eq!(done.job.number, batch.number, "completion is in submission order");
                assert_eq!(done.job.slots, batch.slots, "the job comes back as it was");
                assert_eq!(done.job.pages, batch.plain);
                outcome.push((batch, done));
            }
        }
    }
    outcome
}

fn decode(decoder: &mut dyn Decoder, encoded: EncodedBatch, bases: Vec<Page>) -> Vec<Page> {
    decoder.submit(DecodeJob { encoded, bases, ..DecodeJob::default() });
    let done = decoder.complete().expect("in flight");
    assert_eq!(done.result, Ok(()));
    done.job.pages
}

fn restore(destination: &mut Destination, decoder: &mut dyn Decoder, batch: &Sent, encoded: EncodedBatch) {
    let bases = destination.bases(&batch.pages, |index| encoded.encodings[index].needs_base());
    assert!(decode(decoder, encoded, bases) == batch.plain, "batch {} decodes to other pages", batch.number);
    destination.restore(&batch.pages, &batch.plain);
}

#[test]
fn a_lost_device_fails_its_own_batches_only() {
    let mut cpu_decoder = cpu_decoder();
    let (mut failures, mut spilled_late) = (0, 0);
    for seed in 0..40 {
        let lose_after = Some(10 + seed * 3);
        let backend = spilling(FakeConfig { seed, max_polls: 6, lose_after, ..FakeConfig::default() });
        let mut workers = workers(encoders(&backend, 2));
        let (mut guest, mut destination) = (Guest::new(seed), Destination::default());
        let mut random = Random::new(!seed);
        let mut lost = false;
        while !lost {
            for (batch, done) in encode_epoch(&mut workers, guest.epoch(), &mut random) {
                match done.result {
                    Ok(()) => {
                        spilled_late += u64::from(lost);
                        restore(&mut destination, &mut *cpu_decoder, &batch, done.job.encoded);
                    }
                    Err(BackendError::Lost { device, .. }) => {
                        assert_eq!(device, "fake");
                        (lost, failures) = (true, failures + 1);
                        destination.restore(&batch.pages, &batch.plain);
                    }
                    Err(other) => panic!("{other}"),
                }
            }
        }
    }
    assert!(
        failures >= 40 && spilled_late > 40,
        "{failures} failed, {spilled_late} good ones came after a bad one"
    );
}

/// A device with one lane that is never ready by itself.
fn stuck() -> SpillBackend {
    spilling(FakeConfig { depth: 1, max_polls: u64::MAX, ..FakeConfig::default() })
}

fn job(number: u64, pages: &[u64], slots: &[SlotUse]) -> EncodeJob {
    EncodeJob {
        number,
        pages: pages.iter().map(|&page| noise(page)).collect(),
        slots: slots.to_vec(),
        ..EncodeJob::default()
    }
}

fn complete(encoder: &mut dyn Encoder) -> (u64, Vec<Encoding>) {
    let done = encoder.complete().expect("in flight");
    assert_eq!(done.result, Ok(()));
    (done.job.number, done.job.encoded.encodings)
}

/// Batches keep spilling while the device works on its first one, up to a limit, and all come back in their order.
#[test]
fn several_batches_spill_past_one_that_takes_its_time() {
    let backend = stuck();
    let mut encoder = encoders(&backend, 1).remove(0);
    let mut submitted = 0;
    while encoder.has_room() {
        encoder.submit(job(submitted, &[submitted], &[SlotUse::None]));
        submitted += 1;
    }
    assert_eq!((submitted, backend.spilled_batches()), (1 + BESIDE as u64, BESIDE as u64));
    for number in 0..submitted {
        assert_eq!(complete(&mut *encoder), (number, vec![Encoding::Raw]));
    }
    assert!(encoder.complete().is_none());
}

#[test]
fn the_order_of_events_with_one_lane() {
    use Encoding::{Raw, Same};
    use SlotUse::{Delta, Store};
    let cpu = CpuBackend::new();
    let device = FakeBackend::new(FakeConfig { depth: 1, max_polls: u64::MAX, ..FakeConfig::default() });
    let backend = SpillBackend::new(Arc::new(device), cpu.clone());
    assert_eq!(backend.name(), format!("fake (seed 0) + {}", cpu.name()));
    assert!(cpu.is_cpu() && !backend.is_cpu());
    let mut encoder = encoders(&backend, 1).remove(0);
    assert_eq!(encoder.depth(), 1 + BESIDE);
    encoder.submit(job(0, &[1, 2], &[Store(1), Store(2)]));
    assert_eq!((backend.spilled_batches(), cpu.history_resident_bytes()), (0, 0));
    assert!(encoder.has_room() && !encoder.is_ready());
    encoder.submit(job(1, &[3, 4], &[Store(3), Store(4)]));
    assert_eq!((backend.spilled_batches(), encoder.in_flight()), (1, 2));
    assert_eq!(cpu.history_resident_bytes(), 0, "the CPU has not begun");
    assert_eq!(complete(&mut *encoder), (0, vec![Raw; 2]));
    assert!(cpu.history_resident_bytes() > 0, "the CPU has done its batch while it would have waited");
    assert!(encoder.is_ready() && encoder.has_room(), "the spilled batch is next, and the device is idle");
    // Each side knows its own versions, and takes over the other's without a base.
    encoder.submit(job(2, &[1, 3], &[Delta(1), Delta(3)]));
    assert_eq!(complete(&mut *encoder), (1, vec![Raw; 2]));
    assert!(encoder.has_room());
    encoder.submit(job(3, &[2, 4], &[Delta(2), Delta(4)]));
    assert_eq!(backend.spilled_batches(), 2, "half of its versions are at the device");
    assert_eq!(complete(&mut *encoder), (2, vec![Same, Raw]));
    assert_eq!(complete(&mut *encoder), (3, vec![Raw, Same]));
    assert!(encoder.complete().is_none());
    encoder.submit(job(4, &[1, 2, 3, 4], &[Delta(1), Delta(2), Delta(3), Delta(4)]));
    assert_eq!(complete(&mut *encoder), (4, vec![Same, Raw, Same, Raw]));
    drop(encoder);
    assert_eq!(cpu.history_resident_bytes(), 0);
}

#[test]
fn a_batch_with_its_bases_at_the_device_is_held_for_it() {
    use Encoding::{Raw, Same};
    use SlotUse::{Delta, Store};
    let backend = stuck();
    let mut encoder = encoders(&backend, 1).remove(0);
    encoder.submit(job(0, &[1, 2, 3], &[Store(1), Store(2), Store(3)]));
    complete(&mut *encoder);
    encoder.submit(job(1, &[9], &[Store(9)]));
    assert!(encoder.has_room());
    encoder.submit(job(2, &[1, 2, 3], &[Delta(1), Delta(2), SlotUse::None]));
    assert!(!encoder.has_room(), "one batch is held");
    assert_eq!((encoder.in_flight(), backend.spilled_batches()), (2, 0));
    assert_eq!(complete(&mut *encoder), (1, vec![Raw]));
    assert!(encoder.has_room(), "the held batch is at the device");
    encoder.submit(job(3, &[5], &[SlotUse::None]));
    assert_eq!(backend.spilled_batches(), 1);
    assert_eq!(complete(&mut *encoder), (2, vec![Same, Same, Raw]));
    assert_eq!(complete(&mut *encoder), (3, vec![Raw]));
}

#[test]
fn a_caller_that_looks_at_the_depth_alone_spills_nothing_while_the_device_keeps_up() {
    let backend = spilling(FakeConfig { depth: 2, ..FakeConfig::default() });
    let mut encoder = encoders(&backend, 1).remove(0);
    for number in 0..100 {
        if encoder.in_flight() == encoder.depth() {
            assert_eq!(complete(&mut *encoder).0, number - 2 - BESIDE as u64);
        }
        encoder.submit(job(number, &[number], &[SlotUse::None]));
    }
    assert_eq!(backend.spilled_batches(), 0);
}

#[test]
#[should_panic(expected = "submitted more jobs than the depth of 9")]
fn submitting_more_than_the_depth_panics() {
    let mut encoder = encoders(&stuck(), 1).remove(0);
    for number in 0..10 {
        encoder.submit(job(number, &[number], &[SlotUse::None]));
    }
}

#[test]
fn after_a_failure_the_device_has_no_version_any_more() {
    use SlotUse::{Delta, Store};
    let backend =
        spilling(FakeConfig { depth: 1, max_polls: u64::MAX, lose_after: Some(1), ..FakeConfig::default() });
    let mut encoder = encoders(&backend, 1).remove(0);
    encoder.submit(job(0, &[1], &[Store(1)]));
    complete(&mut *encoder);
    encoder.submit(job(1, &[1], &[Delta(1)]));
    encoder.submit(job(2, &[2], &[Store(2)]));
    let failed = encoder.complete().expect("in flight");
    assert!(matches!(failed.result, Err(BackendError::Lost { .. })), "{:?}", failed.result);
    assert_eq!(failed.job.slots, [Delta(1)]);
    assert_eq!(complete(&mut *encoder), (2, vec![Encoding::Raw]), "what had spilled is done all the same");
    encoder.submit(job(3, &[9], &[SlotUse::None]));
    encoder.submit(job(4, &[1], &[Delta(1)]));
    assert_eq!(backend.spilled_batches(), 2, "nothing keeps the batch at the device");
    assert!(encoder.complete().expect("in flight").result.is_err());
    assert_eq!(complete(&mut *encoder), (4, vec![Encoding::Raw]));
}

#[test]
fn only_the_device_is_waited_for() {
    let max_delay = Duration::from_millis(2);
    let backend = spilling(FakeConfig { depth: 1, max_polls: u64::MAX, max_delay, ..FakeConfig::default() });
    let mut encoder = encoders(&backend, 1).remove(0);
    encoder.submit(job(0, &[1], &[SlotUse::None]));
    encoder.submit(job(1, &[2], &[SlotUse::None]));
    assert_eq!(encoder.take_device_wait(), Duration::ZERO);
    complete(&mut *encoder);
    let waited = encoder.take_device_wait();
    assert!(waited > Duration::ZERO && waited <= max_delay, "{waited:?}");
    complete(&mut *encoder);
    assert_eq!(encoder.take_device_wait(), Duration::ZERO, "the CPU's work is no waiting");
}
