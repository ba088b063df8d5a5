//! Randomized batches from the backend to the reference and back.

use pagewarp_codec::{DecodeJob, EncodingSet};

use super::check::Checker;
use super::guest::Guest;
use super::jobs::{decode_all, encode_all};
use super::pages::expect_pages;
use super::{At, Subject, WORKERS, reference, sets};
use crate::rng::{SplitMix64, mix};

/// Batches of an epoch.
const EPOCH: usize = 16;

/// With every encoding alone, and with sets of several, so many randomized batches: encoded by the backend and decoded by the reference, and the
/// other way round.
///
/// Pages of all kinds, changes of all densities, batches of all sizes, with and without slots; several batches in flight at several
/// encoders and decoders.
///
/// # Panics
///
/// If a page comes out different, or the backend breaks another promise.
pub fn cross(subject: Subject<'_>, batches_per_encoding: usize, seed: u64) {
    let reference = reference();
    let reference = Subject::new(&reference);
    for allowed in sets() {
        for (source, destination) in [(subject, reference), (reference, subject)] {
            let route = Route { source, destination, workers: WORKERS, allowed };
            route.migrate(batches_per_encoding, EPOCH, seed);
        }
    }
}

/// From one backend to another.
pub(super) struct Route<'a> {
    pub(super) source: Subject<'a>,
    pub(super) destination: Subject<'a>,
    pub(super) workers: usize,
    pub(super) allowed: EncodingSet,
}

impl Route<'_> {
    /// So many batches, in epochs of at most so many. Every batch is checked, and decoded to what it was.
    pub(super) fn migrate(&self, batches: usize, epoch: usize, seed: u64) {
        let Route { source, destination, workers, allowed } = *self;
        let mut encoders = source.encoders(allowed, workers);
        let mut decoders = destination.decoders(allowed, workers);
        let mut checker = Checker::new(allowed);
        let mut rng = SplitMix64::new(mix(seed ^ u64::from(allowed.bits())));
        let mut guest = Guest::new(rng.next_u64());
        let mut left = batches;
        while left > 0 {
            let epoch = guest.epoch(left.min(epoch));
            left -= epoch.len();
            let encoded = encode_all(&mut encoders, &epoch, &mut rng);
            for (batch, encoded) in epoch.iter().zip(&encoded) {
                let at = At { subject: source, seed, allowed, batch: batch.number };
                checker.check(&at, batch, encoded, !source.drops_bases);
            }
            let jobs: Vec<DecodeJob> =
                epoch.iter().zip(&encoded).map(|(batch, encoded)| batch.decode_job(encoded)).collect();
            let decoded = decode_all(&mut decoders, jobs, &mut rng);
            for ((batch, encoded), decoded) in epoch.iter().zip(&encoded).zip(decoded) {
                let at = At { subject: source, seed, allowed, batch: batch.number };
                let decoded =
                    decoded.unwrap_or_else(|error| panic!("{at}: {destination} rejects it: {error}"));
                expect_pages(&at, &destination.to_string(), &decoded, &batch.plain, encoded);
            }
        }
    }
}
