//! Versions sent before as bases, over many epochs and at both ends.

use pagewarp_codec::{Encoding, EncodingSet, SlotUse};

use super::check::Checker;
use super::cross::Route;
use super::guest::Guest;
use super::jobs::{decode, decode_all, encode_all};
use super::pages::expect_pages;
use super::{At, Subject, WORKERS, reference};
use crate::rng::SplitMix64;

/// Batches of a long migration.
const BATCHES: usize = 240;
/// Batches of an epoch.
const EPOCH: usize = 12;

/// Long migrations in which every base has to be the right one.
///
/// # Panics
///
/// If the backend breaks a promise.
pub fn histories(subject: Subject<'_>, seed: u64) {
    use Encoding::{Lz4Xor, Same, SparseXor, Zero};
    for allowed in [EncodingSet::ALL, EncodingSet::of(&[Zero, Same, SparseXor]), EncodingSet::of(&[Lz4Xor])] {
        for workers in [1, WORKERS] {
            // From the backend to itself: its encoders' history and its decoders' have slots of their own.
            Route { source: subject, destination: subject, workers, allowed }.migrate(BATCHES, EPOCH, seed);
        }
    }
    epochs_in_flight(subject, seed);
    slots_that_nobody_has(subject, seed);
}

/// An encoder does its batches in order, so that a batch can be based on one that is in flight.
fn epochs_in_flight(subject: Subject<'_>, seed: u64) {
    let allowed = EncodingSet::ALL;
    let reference = reference();
    let mut decoder = Subject::new(&reference).decoder(allowed);
    let mut encoders = subject.encoders(allowed, 1);
    let (mut guest, mut rng) = (Guest::new(seed), SplitMix64::new(!seed));
    let mut checker = Checker::new(allowed);
    for _ in 0..10 {
        let batches: Vec<_> = (0..4).flat_map(|_| guest.epoch(5)).collect();
        let encoded = encode_all(&mut encoders, &batches, &mut rng);
        for (batch, encoded) in batches.iter().zip(&encoded) {
            let at = At { subject, seed, allowed, batch: batch.number };
            checker.check(&at, batch, encoded, !subject.drops_bases);
            let decoded = decode(&mut *decoder, batch.decode_job(encoded));
            let decoded = decoded.unwrap_or_else(|error| panic!("{at}: the reference rejects it: {error}"));
            expect_pages(&at, "the reference", &decoded, &batch.plain, encoded);
        }
    }
}

/// A decoder without a history ignores the slots of its jobs, whatever they say, and one with a history manages without slots.
fn slots_that_nobody_has(subject: Subject<'_>, seed: u64) {
    let allowed = EncodingSet::ALL;
    let reference = reference();
    let mut encoders = Subject::new(&reference).encoders(allowed, 1);
    let (mut guest, mut rng) = (Guest::new(seed), SplitMix64::new(!seed));
    let mut without = subject.decoders_with(allowed, 1, 0);
    let mut with = subject.decoders(allowed, 1);
    for _ in 0..6 {
        let mut batches = guest.epoch(EPOCH);
        let encoded = encode_all(&mut encoders, &batches, &mut rng);
        for (decoders, has_history) in [(&mut without, false), (&mut with, subject.decodes_with_history())] {
            for batch in &mut batches {
                let slots = 0..batch.plain.len() as u32;
                batch.kept = match (has_history, rng.below(3)) {
                    (true, _) | (false, 0) => Vec::new(),
                    // All different, as in every job.
                    (false, 1) => slots.map(SlotUse::Delta).collect(),
                    (false, _) => slots.map(|slot| SlotUse::Delta(u32::MAX - slot)).collect(),
                };
            }
            let jobs = batches.iter().zip(&encoded).map(|(batch, encoded)| batch.decode_job(encoded));
            let decoded = decode_all(decoders, jobs.collect(), &mut rng);
            for ((batch, encoded), decoded) in batches.iter().zip(&encoded).zip(decoded) {
                let at = At { subject, seed, allowed, batch: batch.number };
                let decoded = decoded.unwrap_or_else(|error| panic!("{at}: rejected: {error}"));
                expect_pages(&at, "the backend", &decoded, &batch.plain, encoded);
            }
        }
    }
}
