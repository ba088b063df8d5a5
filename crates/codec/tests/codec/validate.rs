//! The validation of batches: it says what the decoder says, but for the hash.

use crate::common::page_and_base;
use pagewarp_codec::{
    Backend, BackendError, CpuBackend, DecodeError, DecodeJob, DecoderConfig, EncodedBatch, Encoding,
    EncodingSet, Page, PageEncoder, Simd, plain_hash, validate_batch,
};
use proptest::collection::vec;
use proptest::prelude::*;

const MAX_PAGES: usize = 8;

/// What the decoder says, but for the hash.
fn decoded(allowed: EncodingSet, encoded: &EncodedBatch, bases: &[Page]) -> Result<(), DecodeError> {
    let config = DecoderConfig { allowed, max_batch_pages: MAX_PAGES, history_slots: 0 };
    let mut decoder = CpuBackend::new().decoders(config, 1).expect("decoders").remove(0);
    decoder.submit(DecodeJob { encoded: encoded.clone(), bases: bases.to_vec(), ..DecodeJob::default() });
    match decoder.complete().expect("a job in flight").result {
        Ok(()) | Err(BackendError::Peer(DecodeError::HashMismatch { .. })) => Ok(()),
        Err(BackendError::Peer(error)) => Err(error),
        Err(error) => panic!("the CPU backend fails: {error}"),
    }
}

/// A batch of these pages, and the bases it needs.
fn encode(pages: &[(Page, Page)]) -> (EncodedBatch, Vec<Page>) {
    let mut encoder = PageEncoder::new(Simd::detect(), EncodingSet::ALL).expect("detected");
    let (mut encoded, mut bases) = (EncodedBatch::default(), Vec::new());
    for (page, base) in pages {
        let start = encoded.payload.len();
        let encoding = encoder.encode(page, Some(base), &mut encoded.payload);
        encoded.encodings.push(encoding);
        encoded.lens.push((encoded.payload.len() - start) as u16);
        bases.extend(encoding.needs_base().then_some(*base));
    }
    encoded.plain_hash = plain_hash(&pages.iter().map(|(page, _)| *page).collect::<Vec<_>>());
    (encoded, bases)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn batches_are_judged_as_the_decoder_does(
        pages in vec(page_and_base(), 0..6),
        flips in vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
        tags in vec((any::<prop::sample::Index>(), 0u8..7), 0..2),
        lens in vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), -3i32..4), 0..3),
        cut in prop_oneof![6 => Just(0usize), 1 => 0usize..10],
        bases_off in prop_oneof![10 => Just(0isize), 1 => -1isize..=1],
        allowed in prop_oneof![5 => Just(0x7fu16), 1 => 0u16..128],
    ) {
        let (mut encoded, mut bases) = encode(&pages);
        prop_assert_eq!(validate_batch(EncodingSet::ALL, MAX_PAGES, &encoded, bases.len()), Ok(()));
        let EncodedBatch { encodings, lens: old, payload, .. } = &mut encoded;
        for (at, flip) in flips {
            if !payload.is_empty() {
                let at = at.index(payload.len());
                payload[at] ^= flip;
            }
        }
        for (at, tag) in tags {
            if !encodings.is_empty() {
                let at = at.index(encodings.len());
                encodings[at] = Encoding::from_tag(tag).expect("a known tag");
            }
        }
        for (from, to, by) in lens {
            if !old.is_empty() {
                // The sum stays the same, so that the pages are looked at.
                let (from, to) = (from.index(old.len()), to.index(old.len()));
                old[from] = old[from].wrapping_sub(by as u16);
                old[to] = old[to].wrapping_add(by as u16);
            }
        }
        payload.truncate(payload.len() - cut.min(payload.len()));
        let needed = encodings.iter().filter(|encoding| encoding.needs_base()).count();
        bases.resize(needed.saturating_add_signed(bases_off), Page::ZERO);
        let allowed = EncodingSet::from_bits(allowed | EncodingSet::RAW.bits()).expect("known bits");
        prop_assert_eq!(
            validate_batch(allowed, MAX_PAGES, &encoded, bases.len()),
            decoded(allowed, &encoded, &bases)
        );
    }
}

#[test]
fn tables_that_disagree_and_too_many_pages_are_rejected() {
    let (mut encoded, _) = encode(&[(Page([1; 4096]), Page([1; 4096]))]);
    encoded.lens.push(0);
    let tables = DecodeError::Tables { encodings: 1, lens: 2 };
    assert_eq!(validate_batch(EncodingSet::ALL, MAX_PAGES, &encoded, 1), Err(tables));
    let many =
        EncodedBatch { encodings: vec![Encoding::Zero; 9], lens: vec![0; 9], ..EncodedBatch::default() };
    let error = DecodeError::TooManyPages { seen: 9, max: MAX_PAGES };
    assert_eq!(validate_batch(EncodingSet::ALL, MAX_PAGES, &many, 0), Err(error));
}
