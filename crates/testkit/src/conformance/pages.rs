//! Pages of every kind and changes of every size, with every set of encodings.

use pagewarp_codec::{EncodedBatch, EncodingSet, Page, SlotUse};

use super::check::Checker;
use super::jobs::{Batch, decode, encode};
use super::{At, MAX_PAGES, Subject, reference, sets};
use crate::image::{Mutation, PageKind, mutate, page};
use crate::rng::SplitMix64;

/// How much of a page changes: nothing, single bytes, 0.1 % to everything, runs of the lengths at which something happens.
const CHANGES: [Mutation; 16] = [
    Mutation::Nothing,
    Mutation::Counter,
    Mutation::Bytes(1),
    Mutation::Bytes(33),
    Mutation::Share(0.001),
    Mutation::Share(0.01),
    Mutation::Share(0.1),
    Mutation::Share(0.25),
    Mutation::Share(0.5),
    Mutation::Share(1.0),
    Mutation::Run(64),
    Mutation::Run(1000),
    Mutation::Run(4096),
    Mutation::Replace(PageKind::Zero),
    Mutation::Replace(PageKind::Sparse),
    Mutation::Replace(PageKind::Text),
];

/// Every kind of page, stored and then changed in every way, with every set of encodings: what the backend encodes is right by the
/// reference's measure, and both the reference and the backend itself decode it to the same pages.
///
/// # Panics
///
/// If the backend breaks a promise.
pub fn pages(subject: Subject<'_>, seed: u64) {
    let mut ours = subject.decoder(EncodingSet::ALL);
    let reference = reference();
    let mut theirs = Subject::new(&reference).decoder(EncodingSet::ALL);
    for allowed in sets() {
        let mut encoder = subject.encoder(allowed);
        let mut checker = Checker::new(allowed);
        for batch in batches(seed) {
            let at = At { subject, seed, allowed, batch: batch.number };
            let encoded = encode(&mut *encoder, &batch);
            checker.check(&at, &batch, &encoded, true);
            for (name, decoder) in [("the reference", &mut theirs), ("the backend itself", &mut ours)] {
                let decoded = decode(&mut **decoder, batch.decode_job(&encoded));
                let decoded = decoded.unwrap_or_else(|error| panic!("{at}: {name} rejects it: {error}"));
                expect_pages(&at, name, &decoded, &batch.plain, &encoded);
            }
        }
    }
}

/// The same batches give the same bytes.
///
/// # Panics
///
/// If they do not.
pub fn determinism(subject: Subject<'_>, seed: u64) {
    let allowed = EncodingSet::ALL;
    let run = || {
        let mut encoder = subject.encoder(allowed);
        batches(seed).iter().map(|batch| encode(&mut *encoder, batch)).collect::<Vec<EncodedBatch>>()
    };
    for (batch, (first, second)) in run().iter().zip(&run()).enumerate() {
        let at = At { subject, seed, allowed, batch: batch as u64 };
        assert!(first == second, "{at}: encoding it twice gives different bytes");
    }
}

/// Panics unless the pages are the same, and names the first that is not.
pub(super) fn expect_pages(at: &At<'_>, who: &str, seen: &[Page], plain: &[Page], encoded: &EncodedBatch) {
    assert_eq!(seen.len(), plain.len(), "{at}: pages decoded by {who}");
    if let Some(page) = (0..plain.len()).find(|&index| seen[index] != plain[index]) {
        let byte = (0..seen[page].0.len()).find(|&index| seen[page].0[index] != plain[page].0[index]);
        panic!("{at}, page {page} as {}: {who} decodes byte {byte:?} wrong", encoded.encodings[page]);
    }
}

/// For each kind of page, a batch that stores pages of it and one in which each has changed in its own way.
fn batches(seed: u64) -> Vec<Batch> {
    let mut rng = SplitMix64::new(seed);
    let mut batches = Vec::new();
    for kind in PageKind::ALL {
        let first: Vec<Page> = CHANGES.iter().map(|_| page(kind, &mut rng)).collect();
        let mut second = first.clone();
        for (page, &change) in second.iter_mut().zip(&CHANGES) {
            mutate(page, change, &mut rng);
        }
        let slots = 0..MAX_PAGES as u32;
        let number = batches.len() as u64;
        batches.push(Batch {
            number,
            bases: vec![None; first.len()],
            slots: slots.clone().map(SlotUse::Store).collect(),
            kept: slots.clone().map(SlotUse::Store).collect(),
            plain: first.clone(),
        });
        batches.push(Batch {
            number: number + 1,
            bases: first.into_iter().map(Some).collect(),
            slots: slots.clone().map(SlotUse::Delta).collect(),
            kept: slots.map(SlotUse::Delta).collect(),
            plain: second,
        });
    }
    batches
}
