//! What the conformance suite does not ask: memory, reasons in words, names, faults of the fake.

use std::num::NonZeroU64;
use std::time::Duration;

use crate::common::noise;
use pagewarp_codec::{
    Backend, BackendError, CpuBackend, DecodeError, DecodeJob, Decoder, DecoderConfig, EncodeJob,
    EncodedBatch, Encoder, EncoderConfig, Encoding, EncodingSet, FakeBackend, FakeConfig, PAGE_SIZE, Page,
    PageError, Simd, SlotUse,
};

const SLOTS: u32 = 700;
const MAX_PAGES: usize = 64;

fn encoder_config(allowed: EncodingSet) -> EncoderConfig {
    EncoderConfig { allowed, history_slots: SLOTS, max_batch_pages: MAX_PAGES }
}

fn encoder(backend: &dyn Backend, allowed: EncodingSet) -> Box<dyn Encoder> {
    backend.encoders(encoder_config(allowed), 1).expect("encoders").remove(0)
}

fn decoder(backend: &dyn Backend) -> Box<dyn Decoder> {
    let config = DecoderConfig { allowed: EncodingSet::ALL, max_batch_pages: MAX_PAGES, history_slots: 0 };
    backend.decoders(config, 1).expect("decoders").remove(0)
}

fn encode(encoder: &mut dyn Encoder, pages: &[Page], slots: &[SlotUse]) -> EncodedBatch {
    // What the buffers hold from before must not matter.
    let encoded =
        EncodedBatch { encodings: vec![Encoding::Raw; 3], lens: vec![9], payload: vec![1; 5], plain_hash: 7 };
    encoder.submit(EncodeJob {
        pages: pages.to_vec(),
        slots: slots.to_vec(),
        encoded,
        ..EncodeJob::default()
    });
    let done = encoder.complete().expect("one job in flight");
    assert_eq!(done.result, Ok(()));
    assert_eq!(done.job.pages, pages);
    done.job.encoded
}

fn decode(
    decoder: &mut dyn Decoder,
    encoded: EncodedBatch,
    bases: Vec<Page>,
) -> Result<Vec<Page>, BackendError> {
    decoder.submit(DecodeJob {
        encoded,
        bases,
        pages: vec![Page([3; PAGE_SIZE]); 2],
        ..DecodeJob::default()
    });
    let done = decoder.complete().expect("one job in flight");
    done.result.map(|()| done.job.pages)
}

#[test]
fn workers_share_one_history_and_sets_of_encoders_do_not() {
    let backend = CpuBackend::new();
    let mut workers = backend.encoders(encoder_config(EncodingSet::ALL), 2).expect("encoders");
    assert_eq!(workers.len(), 2);
    let pages = [noise(1), noise(2)];
    let first = encode(&mut *workers[0], &pages, &[SlotUse::Store(5), SlotUse::Store(699)]);
    assert_eq!(first.encodings, [Encoding::Raw, Encoding::Raw]);
    assert_eq!(backend.history_resident_bytes(), 2 * 512 * 4096);
    let second = encode(&mut *workers[1], &pages, &[SlotUse::Delta(5), SlotUse::Delta(699)]);
    assert_eq!(second.encodings, [Encoding::Same, Encoding::Same]);

    let mut other = encoder(&backend, EncodingSet::ALL);
    let third = encode(&mut *other, &pages[..1], &[SlotUse::Delta(5)]);
    assert_eq!(third.encodings, [Encoding::Raw]);
    drop((workers, other));
    assert_eq!(backend.history_resident_bytes(), 0);
}

#[test]
fn no_history_is_kept_that_nothing_would_read() {
    let backend = CpuBackend::new();
    let mut encoder = encoder(&backend, EncodingSet::of(&[Encoding::Zero, Encoding::Lz4]));
    encode(&mut *encoder, &[noise(1)], &[SlotUse::Store(0)]);
    assert_eq!(encode(&mut *encoder, &[noise(1)], &[SlotUse::Delta(0)]).encodings, [Encoding::Raw]);
    assert_eq!(backend.history_resident_bytes(), 0);
}

#[test]
fn malformed_batches_are_rejected_with_the_reason() {
    let backend = CpuBackend::new();
    let pages = [noise(1), Page::ZERO, noise(2)];
    let good = encode(&mut *encoder(&backend, EncodingSet::ALL), &pages, &[SlotUse::None; 3]);
    let check = |change: &dyn Fn(&mut EncodedBatch), bases: usize, expected: DecodeError| {
        let mut encoded = good.clone();
        change(&mut encoded);
        let seen = decode(&mut *decoder(&backend), encoded, vec![Page::ZERO; bases]);
        assert_eq!(seen, Err(BackendError::Peer(expected)));
    };
    check(&|b| b.encodings.truncate(2), 0, DecodeError::Tables { encodings: 2, lens: 3 });
    check(&|b| b.lens.push(0), 0, DecodeError::Tables { encodings: 3, lens: 4 });
    check(&|b| b.payload.truncate(8000), 0, DecodeError::PayloadLength { seen: 8000, expected: 8192 });
    check(&|b| b.lens[1] = 65535, 0, DecodeError::PayloadLength { seen: 8192, expected: 8192 + 65535 });
    check(&|_| (), 1, DecodeError::Bases { seen: 1, expected: 0 });
    check(&|b| b.encodings[1] = Encoding::Same, 0, DecodeError::Bases { seen: 0, expected: 1 });
    check(
        &|b| (b.lens[0], b.lens[2]) = (4097, 4095),
        0,
        PageError::FixedLength { encoding: Encoding::Raw, seen: 4097, expected: 4096 }.at(0),
    );
    check(
        &|b| {
            *b = EncodedBatch {
                encodings: vec![Encoding::Zero; 65],
                lens: vec![0; 65],
                ..EncodedBatch::default()
            }
        },
        0,
        DecodeError::TooManyPages { seen: 65, max: 64 },
    );
    let wrong = good.plain_hash ^ 1;
    let error = DecodeError::HashMismatch { seen: good.plain_hash, expected: wrong };
    check(&|b| b.plain_hash = wrong, 0, error);

    let allowed = EncodingSet::of(&[Encoding::Lz4]);
    let mut strict = backend
        .decoders(DecoderConfig { allowed, max_batch_pages: 64, history_slots: 0 }, 1)
        .expect("decoders")
        .remove(0);
    let error = PageError::NotAllowed { encoding: Encoding::Zero, allowed }.at(1);
    assert_eq!(decode(&mut *strict, good.clone(), vec![]), Err(BackendError::Peer(error)));
    // The decoder goes on after an error.
    assert_eq!(decode(&mut *decoder(&backend), good, vec![]), Ok(pages.to_vec()));
}

#[test]
fn a_missing_simd_level_is_an_error_that_names_another() {
    for simd in Simd::ALL {
        match CpuBackend::with_simd(simd) {
            Ok(backend) => {
                assert!(simd.is_available());
                assert_eq!(backend.name(), format!("cpu ({simd})"));
                assert!(backend.is_cpu());
            }
            Err(BackendError::Unavailable { reason, .. }) => {
                assert!(!simd.is_available());
                assert!(reason.contains(Simd::detect().name()), "{reason}");
            }
            Err(other) => panic!("{other}"),
        }
    }
}

#[test]
#[should_panic(expected = "more jobs than the depth")]
fn submitting_more_than_the_depth_panics() {
    let mut encoder = encoder(&CpuBackend::new(), EncodingSet::ALL);
    encoder.submit(EncodeJob::default());
    encoder.submit(EncodeJob::default());
}

#[test]
fn a_fake_without_faults_gives_what_the_cpu_gives_in_order() {
    let config = FakeConfig { max_delay: Duration::from_millis(2), ..FakeConfig::default() };
    let backend = FakeBackend::new(config);
    let mut fake = encoder(&backend, EncodingSet::ALL);
    let mut cpu = encoder(&CpuBackend::new(), EncodingSet::ALL);
    assert_eq!(fake.depth(), 3);
    assert!(fake.complete().is_none());
    let job = |i: u64| EncodeJob {
        pages: vec![noise(i % 2), Page::ZERO],
        slots: vec![SlotUse::Delta(1), SlotUse::None],
        ..EncodeJob::default()
    };
    for i in 0..3 {
        fake.submit(job(i));
    }
    assert_eq!(fake.in_flight(), 3);
    for i in 0..3 {
        cpu.submit(job(i));
        let expected = cpu.complete().expect("in flight").job.encoded;
        let done = fake.complete().expect("in flight");
        assert_eq!((done.result, done.job.encoded), (Ok(()), expected));
    }
    assert_eq!((fake.in_flight(), backend.submitted(), backend.corrupted()), (0, 3, 0));
}

#[test]
fn a_lost_fake_gives_every_job_back_untouched() {
    let backend = FakeBackend::new(FakeConfig { lose_after: Some(2), ..FakeConfig::default() });
    let mut encoder = encoder(&backend, EncodingSet::ALL);
    let mut decoder = decoder(&backend);
    for i in 0..3 {
        encoder.submit(EncodeJob {
            pages: vec![noise(i)],
            slots: vec![SlotUse::Store(3)],
            ..EncodeJob::default()
        });
    }
    for i in 0..3 {
        let done = encoder.complete().expect("in flight");
        assert_eq!((&done.job.pages[..], &done.job.slots[..]), (&[noise(i)][..], &[SlotUse::Store(3)][..]));
        assert_eq!(matches!(done.result, Err(BackendError::Lost { .. })), i == 2, "{:?}", done.result);
    }
    let encoded = EncodedBatch { encodings: vec![Encoding::Same], lens: vec![0], ..EncodedBatch::default() };
    decoder.submit(DecodeJob { encoded: encoded.clone(), bases: vec![noise(9)], ..DecodeJob::default() });
    let done = decoder.complete().expect("in flight");
    assert!(matches!(done.result, Err(BackendError::Lost { .. })), "{:?}", done.result);
    assert_eq!((done.job.encoded, done.job.bases), (encoded, vec![noise(9)]));
}

#[test]
fn a_corrupting_fake_is_caught_by_the_decoder_and_repeatable() {
    let run = |seed, decoder_faulty: bool| {
        let faulty = FakeBackend::new(FakeConfig {
            seed,
            corrupt_one_in: NonZeroU64::new(3),
            ..FakeConfig::default()
        });
        let sane = CpuBackend::new();
        let (source, destination): (&dyn Backend, &dyn Backend) =
            if decoder_faulty { (&sane, &faulty) } else { (&faulty, &sane) };
        let (mut encoder, mut decoder) = (encoder(source, EncodingSet::ALL), decoder(destination));
        let outcomes: Vec<bool> = (0..40)
            .map(|i| {
                let pages = if i % 2 == 0 { [noise(i), Page::ZERO] } else { [Page::ZERO; 2] };
                let encoded = encode(&mut *encoder, &pages, &[SlotUse::None; 2]);
                match decode(&mut *decoder, encoded, vec![]) {
                    Ok(decoded) => decoded == pages,
                    Err(BackendError::Peer(_)) => false,
                    Err(other) => panic!("{other}"),
                }
            })
            .collect();
        let failed = outcomes.iter().filter(|&&ok| !ok).count() as u64;
        assert_eq!(failed, faulty.corrupted());
        assert!((3..30).contains(&failed), "{failed} of 40");
        outcomes
    };
    for decoder_faulty in [false, true] {
        assert_eq!(run(1, decoder_faulty), run(1, decoder_faulty));
        assert_ne!(run(1, decoder_faulty), run(2, decoder_faulty));
    }
}
