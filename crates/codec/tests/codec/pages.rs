//! Properties of single pages: every SIMD level gives what the scalar reference gives, every encoding round-trips, and
//! no bytes whatever make a decoder panic.

use crate::common::{page, page_and_base, simd_levels};
use pagewarp_codec::{Encoding, EncodingSet, PAGE_SIZE, Page, PageError, Simd, decode_page, encode_page};
use pagewarp_testkit::conformance::check_end_of_block;
use proptest::collection::vec;
use proptest::prelude::*;

/// All subsets of the encodings (with `raw`).
fn any_set() -> impl Strategy<Value = EncodingSet> {
    prop_oneof![
        2 => Just(EncodingSet::ALL),
        3 => (0u16..128).prop_map(|bits| EncodingSet::from_bits(bits | EncodingSet::RAW.bits()).expect("known bits")),
    ]
}

fn base_of(encoding: Encoding, base: &Page) -> Option<&Page> {
    encoding.needs_base().then_some(base)
}

/// Decodes at every level and returns the common result.
fn decode_everywhere(encoding: Encoding, payload: &[u8], base: Option<&Page>) -> Result<Page, PageError> {
    let mut results = simd_levels().into_iter().map(|simd| {
        // Not zero, so that a decoder that leaves bytes alone is found out.
        let mut out = Page([0xa5; PAGE_SIZE]);
        decode_page(simd, encoding, payload, base, &mut out).map(|()| out)
    });
    let reference = results.next().expect("scalar is always there");
    for result in results {
        assert_eq!(reference, result);
    }
    reference
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn all_levels_encode_alike_and_round_trip((page, base) in page_and_base(), with_base: bool, allowed in any_set()) {
        let base = with_base.then_some(&base);
        let mut reference = vec![7, 7, 7];
        let encoding = encode_page(Simd::Scalar, allowed, &page, base, &mut reference);
        prop_assert!(allowed.contains(encoding));
        prop_assert_eq!(&reference[..3], &[7, 7, 7]);
        prop_assert!(base.is_some() || !encoding.needs_base());
        for simd in simd_levels() {
            let mut payload = vec![7, 7, 7];
            prop_assert_eq!(encode_page(simd, allowed, &page, base, &mut payload), encoding);
            prop_assert_eq!(&payload, &reference);
        }
        let payload = &reference[3..];
        prop_assert!(payload.len() <= PAGE_SIZE);
        prop_assert_eq!(decode_everywhere(encoding, payload, base), Ok(page));
    }

    #[test]
    fn without_lz4_the_smallest_encoding_is_chosen((page, base) in page_and_base()) {
        use Encoding::*;
        let all = [Zero, Same, Raw, Sparse, SparseXor];
        let mut payload = Vec::new();
        let chosen = encode_page(Simd::detect(), EncodingSet::of(&all), &page, Some(&base), &mut payload);
        for only in all {
            let mut other = Vec::new();
            let used = encode_page(Simd::detect(), EncodingSet::of(&[only]), &page, Some(&base), &mut other);
            // 512: see "How this implementation chooses" in docs/page-encodings.md.
            let best = chosen == SparseXor && payload.len() <= 512 || payload.len() <= other.len();
            prop_assert!(best, "{} chosen, but {} is smaller", chosen, used);
        }
    }

    #[test]
    fn mutated_payloads_never_panic(
        (page, base) in page_and_base(),
        allowed in any_set(),
        flips in vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in any::<prop::sample::Index>(),
        extra in vec(any::<u8>(), 0..20),
        change_len in 0..3,
    ) {
        let mut payload = Vec::new();
        let encoding = encode_page(Simd::detect(), allowed, &page, Some(&base), &mut payload);
        for (at, flip) in flips {
            if !payload.is_empty() {
                let at = at.index(payload.len());
                payload[at] ^= flip;
            }
        }
        match change_len {
            0 => payload.truncate(cut.index(payload.len() + 1)),
            1 => payload.extend(extra),
            _ => (),
        }
        for encoding in [encoding].into_iter().chain(Encoding::ALL) {
            let _ = decode_everywhere(encoding, &payload, base_of(encoding, &base));
        }
    }

    #[test]
    fn any_bytes_never_panic(payload in vec(any::<u8>(), 0..5000), base in page()) {
        for encoding in Encoding::ALL {
            let _ = decode_everywhere(encoding, &payload, base_of(encoding, &base));
        }
    }

    #[test]
    fn lz4_blocks_are_what_other_libraries_read((page, base) in page_and_base()) {
        use Encoding::*;
        for allowed in [Lz4, Lz4Xor] {
            let mut block = Vec::new();
            if encode_page(Simd::detect(), EncodingSet::of(&[allowed]), &page, Some(&base), &mut block) != allowed {
                continue;
            }
            let plain = match allowed {
                Lz4Xor => std::array::from_fn(|i| page.0[i] ^ base.0[i]),
                _ => page.0,
            };
            let by_c = lz4::block::decompress(&block, Some(PAGE_SIZE as i32)).expect("liblz4 decodes it");
            prop_assert!(by_c == plain);
            let by_flex = lz4_flex::block::decompress(&block, PAGE_SIZE).expect("lz4_flex decodes it");
            prop_assert!(by_flex == plain);
            prop_assert_eq!(check_end_of_block(&block), Ok(()));

            // And the other way round.
            let from_c = lz4::block::compress(&plain, None, false).expect("liblz4 encodes it");
            if from_c.len() < PAGE_SIZE {
                prop_assert_eq!(decode_everywhere(allowed, &from_c, Some(&base)), Ok(page));
            }
        }
    }

    #[test]
    fn sparse_is_canonical((page, base) in page_and_base(), at in any::<prop::sample::Index>(), flip in 1u8..) {
        use Encoding::*;
        let mut payload = Vec::new();
        let set = EncodingSet::of(&[SparseXor]);
        if encode_page(Simd::detect(), set, &page, Some(&base), &mut payload) == SparseXor {
            // Whatever else decodes, decodes to another page.
            let at = at.index(payload.len());
            payload[at] ^= flip;
            prop_assert_ne!(decode_everywhere(SparseXor, &payload, Some(&base)), Ok(page));
        }
    }
}

/// A sparse payload of these masks and this data.
fn sparse(lines: u64, masks: &[u64], data: &[u8]) -> Vec<u8> {
    let words = [lines].into_iter().chain(masks.iter().copied());
    words.flat_map(u64::to_le_bytes).chain(data.iter().copied()).collect()
}

#[test]
fn malformed_sparse_payloads_are_rejected_with_the_reason() {
    let cases: &[(Vec<u8>, PageError)] = &[
        (vec![1; 16], PageError::LengthRange { encoding: Encoding::Sparse, seen: 16, min: 17 }),
        (vec![1; 4096], PageError::LengthRange { encoding: Encoding::Sparse, seen: 4096, min: 17 }),
        (sparse(0, &[1], &[1]), PageError::SparseEmpty),
        (sparse(u64::MAX, &[1], &[1]), PageError::SparseLength { seen: 17, expected: 520 }),
        (sparse(3, &[1, 0], &[1]), PageError::SparseEmptyLine { line: 1 }),
        (sparse(1 << 63, &[0], &[1]), PageError::SparseEmptyLine { line: 63 }),
        (sparse(1, &[3], &[1]), PageError::SparseLength { seen: 17, expected: 18 }),
        (sparse(1, &[1], &[1, 1]), PageError::SparseLength { seen: 18, expected: 17 }),
        (sparse(1, &[7], &[1, 0, 1]), PageError::SparseZeroByte { index: 1 }),
        (sparse(1, &[u64::MAX], &[0; 64]), PageError::SparseZeroByte { index: 0 }),
    ];
    for (payload, error) in cases {
        assert_eq!(decode_everywhere(Encoding::Sparse, payload, None), Err(error.clone()));
        let seen = decode_everywhere(Encoding::SparseXor, payload, Some(&Page([9; PAGE_SIZE])));
        match error {
            PageError::LengthRange { seen: len, min, .. } => {
                let encoding = Encoding::SparseXor;
                assert_eq!(seen, Err(PageError::LengthRange { encoding, seen: *len, min: *min }));
            }
            _ => assert_eq!(seen, Err(error.clone())),
        }
    }
}

#[test]
fn payload_lengths_and_bases_are_checked() {
    let base = Page([9; PAGE_SIZE]);
    for (encoding, len, expected) in [
        (Encoding::Zero, 1, 0),
        (Encoding::Same, 1, 0),
        (Encoding::Raw, 4095, 4096),
        (Encoding::Raw, 4097, 4096),
        (Encoding::Raw, 0, 4096),
    ] {
        let seen = decode_everywhere(encoding, &vec![1; len], base_of(encoding, &base));
        assert_eq!(seen, Err(PageError::FixedLength { encoding, seen: len, expected }));
    }
    for encoding in [Encoding::Lz4, Encoding::Lz4Xor] {
        for seen in [0, 4096, 5000] {
            let result = decode_everywhere(encoding, &vec![1; seen], base_of(encoding, &base));
            assert_eq!(result, Err(PageError::LengthRange { encoding, seen, min: 1 }));
        }
    }
    for (encoding, payload) in [
        (Encoding::Same, vec![]),
        (Encoding::SparseXor, sparse(1, &[1], &[1])),
        (Encoding::Lz4Xor, vec![0x10, 1]),
    ] {
        assert_eq!(decode_everywhere(encoding, &payload, None), Err(PageError::NoBase { encoding }));
    }
}

#[test]
fn lz4_blocks_of_another_length_are_rejected() {
    for len in [0, 1, 100, 4095] {
        let block = lz4_flex::block::compress(&vec![3; len]);
        assert_eq!(decode_everywhere(Encoding::Lz4, &block, None), Err(PageError::Lz4Length { seen: len }));
    }
    for len in [4097, 5000, 100_000] {
        let block = lz4_flex::block::compress(&vec![3; len]);
        let seen = decode_everywhere(Encoding::Lz4, &block, None);
        assert!(matches!(seen, Err(PageError::Lz4 { .. })), "{seen:?}");
    }
}

#[test]
fn encodings_are_chosen_as_documented() {
    let zero = Page::ZERO;
    let random = Page(std::array::from_fn(|i| {
        let mixed = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 56) as u8
    }));
    let text = Page(std::array::from_fn(|i| b"GET /index.html HTTP/1.1\r\n"[i % 26]));
    let mut touched = random;
    touched.0[100] ^= 1;
    let mut rewritten = random;
    rewritten.0[..1500].fill(1);
    for simd in simd_levels() {
        let encode = |page, base, allowed| {
            let mut payload = Vec::new();
            let encoding = encode_page(simd, allowed, page, base, &mut payload);
            (encoding, payload.len())
        };
        let all = EncodingSet::ALL;
        assert_eq!(encode(&zero, None, all), (Encoding::Zero, 0));
        assert_eq!(encode(&zero, Some(&zero), all), (Encoding::Zero, 0));
        assert_eq!(encode(&zero, Some(&random), all), (Encoding::Zero, 0));
        assert_eq!(encode(&random, Some(&random), all), (Encoding::Same, 0));
        assert_eq!(encode(&random, None, all), (Encoding::Raw, 4096));
        assert_eq!(encode(&touched, Some(&random), all), (Encoding::SparseXor, 17));
        assert_eq!(encode(&text, None, all).0, Encoding::Lz4);
        assert_eq!(encode(&text, Some(&random), all).0, Encoding::Lz4);
        assert_eq!(encode(&rewritten, Some(&random), all).0, Encoding::Lz4Xor);
        // What may not be used is not used, also where that costs bytes.
        assert_eq!(encode(&zero, Some(&random), EncodingSet::RAW), (Encoding::Raw, 4096));
        assert_eq!(encode(&zero, None, EncodingSet::of(&[Encoding::Sparse])), (Encoding::Raw, 4096));
        assert_eq!(
            encode(&random, Some(&random), EncodingSet::of(&[Encoding::SparseXor])),
            (Encoding::Raw, 4096)
        );
        let lz4_xor = EncodingSet::of(&[Encoding::Lz4Xor]);
        assert_eq!(encode(&random, Some(&random), lz4_xor).0, Encoding::Lz4Xor);
    }
}
