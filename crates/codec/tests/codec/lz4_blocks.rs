//! LZ4 over many pages at once: whatever goes in comes back, other libraries read it, and no bytes make the decoder panic.

use crate::common::noise;
use pagewarp_codec::{LZ4_BLOCK_SIZE, Lz4BlockEncoder, Lz4BlocksError, decode_lz4_blocks};
use pagewarp_testkit::conformance::check_end_of_block_of;
use proptest::collection::vec;
use proptest::prelude::*;

/// Bytes of five kinds, by the number of the kind.
fn bytes(kind: usize, len: usize) -> Vec<u8> {
    match kind {
        0 => vec![0; len],
        1 => (0..).flat_map(|seed| noise(seed).0).take(len).collect(),
        2 => text(len),
        3 => (0..len).map(|at| (at / 7 % 5) as u8).collect(),
        // Records of 64 bytes: a counter, random bytes and zeros, as in a table of a database.
        _ => (0u64..)
            .flat_map(|record| {
                let mut bytes = [0; 64];
                bytes[..8].copy_from_slice(&record.to_le_bytes());
                bytes[8..24].copy_from_slice(&noise(record).0[..16]);
                bytes
            })
            .take(len)
            .collect(),
    }
}
const KINDS: usize = 5;

/// Words and numbers in no order that repeats.
fn text(len: usize) -> Vec<u8> {
    const WORDS: [&str; 16] = [
        "user", "session", "cart", "price", "online", "token", "item", "order", "street", "amount", "status",
        "active", "country", "payment", "customer", "visited",
    ];
    (0..)
        .flat_map(|seed| noise(seed).0)
        .flat_map(|random| {
            let word = WORDS[usize::from(random % 16)];
            if random < 100 { format!("{word}={random}, ") } else { format!("{word} ") }.into_bytes()
        })
        .take(len)
        .collect()
}

/// Every short length, and the ones around pages and blocks.
fn lengths() -> impl Iterator<Item = usize> {
    let around = |at: usize| at - 13..=at + 13;
    (0..=200)
        .chain([1, 2, 4, 8, 15].into_iter().flat_map(move |pages| around(pages * 4096)))
        .chain(around(LZ4_BLOCK_SIZE))
        .chain([2 * LZ4_BLOCK_SIZE - 1, 2 * LZ4_BLOCK_SIZE, 2 * LZ4_BLOCK_SIZE + 1, 300_000])
}

/// Decodes a payload with other libraries than the decoder does.
fn decode_with_c(mut payload: &[u8], len: usize) -> Vec<u8> {
    let mut plain = Vec::new();
    while plain.len() < len {
        let expected = (len - plain.len()).min(LZ4_BLOCK_SIZE);
        let (block_len, rest) = payload.split_first_chunk().expect("a length");
        match usize::from(u16::from_le_bytes(*block_len)) {
            0 => {
                plain.extend_from_slice(&rest[..expected]);
                payload = &rest[expected..];
            }
            block_len => {
                let block = &rest[..block_len];
                check_end_of_block_of(block, expected).expect("by the rules of the format");
                let by_c = lz4::block::decompress(block, Some(expected as i32)).expect("liblz4 decodes it");
                let by_flex = lz4_flex::block::decompress(block, expected).expect("lz4_flex decodes it");
                assert!(by_c == by_flex);
                plain.extend_from_slice(&by_c);
                payload = &rest[block_len..];
            }
        }
    }
    assert!(payload.is_empty());
    plain
}

/// Encodes, checks that it comes back, and returns what was encoded if it is shorter.
fn round_trip(encoder: &mut Lz4BlockEncoder, plain: &[u8]) -> Option<Vec<u8>> {
    let mut payload = vec![7, 7, 7];
    let shorter = encoder.encode(plain, &mut payload);
    assert_eq!(payload[..3], [7, 7, 7]);
    let payload = payload.split_off(3);
    if !shorter {
        assert!(payload.is_empty());
        return None;
    }
    assert!(payload.len() < plain.len());
    let mut decoded = vec![0xa5; plain.len()];
    assert_eq!(decode_lz4_blocks(&payload, &mut decoded), Ok(()));
    assert!(decoded == plain);
    assert!(decode_with_c(&payload, plain.len()) == plain);
    Some(payload)
}

#[test]
fn every_length_comes_back() {
    let mut encoder = Lz4BlockEncoder::new();
    for kind in 0..KINDS {
        let all = bytes(kind, 300_000);
        for len in lengths() {
            let payload = round_trip(&mut encoder, &all[..len]);
            match kind {
                0 | 3 => {
                    assert!(payload.is_some() || len < 50, "kind {kind}, {len} bytes");
                }
                1 => assert_eq!(payload, None, "{len} random bytes"),
                _ => assert!(payload.is_some() || len < 250, "kind {kind}, {len} bytes"),
            }
            // Whatever the encoder encoded before, it is the same.
            if len % 100 == 1 {
                assert_eq!(round_trip(&mut Lz4BlockEncoder::default(), &all[..len]), payload);
            }
        }
    }
}

#[test]
fn single_blocks_of_every_length_come_back() {
    let mut encoder = Lz4BlockEncoder::new();
    for kind in 0..KINDS {
        let all = bytes(kind, LZ4_BLOCK_SIZE);
        for len in lengths().filter(|len| *len <= LZ4_BLOCK_SIZE) {
            let plain = &all[..len];
            let mut block = vec![7];
            assert!(encoder.encode_block(plain, usize::MAX, &mut block), "there is no limit");
            let block = block.split_off(1);
            assert!(lz4_flex::block::decompress(&block, len).expect("decodes") == plain);
            assert_eq!(check_end_of_block_of(&block, len), Ok(()));
            if len < 13 {
                assert_eq!(block[0], (len as u8) << 4, "all literals");
                assert_eq!(&block[1..], plain);
            }
            // The limit is exact, and leaves nothing behind.
            let mut again = Vec::new();
            assert!(!encoder.encode_block(plain, block.len(), &mut again));
            assert!(!encoder.encode_block(plain, 0, &mut again));
            assert!(again.is_empty());
            assert!(encoder.encode_block(plain, block.len() + 1, &mut again));
            assert_eq!(again, block);
        }
    }
}

#[test]
#[should_panic(expected = "too many for a block")]
fn a_block_of_more_than_64_kib_is_refused() {
    Lz4BlockEncoder::new().encode_block(&[0; LZ4_BLOCK_SIZE + 1], usize::MAX, &mut Vec::new());
}

#[test]
fn blocks_that_do_not_shrink_are_stored() {
    let mut plain = bytes(1, LZ4_BLOCK_SIZE);
    plain.extend([0; LZ4_BLOCK_SIZE]);
    plain.extend(bytes(1, 100));
    let payload = round_trip(&mut Lz4BlockEncoder::new(), &plain).expect("the zeros make it shorter");
    assert_eq!(payload[..2], [0, 0]);
    assert!(payload[2..][..LZ4_BLOCK_SIZE] == plain[..LZ4_BLOCK_SIZE]);
    let block = usize::from(u16::from_le_bytes([payload[2 + LZ4_BLOCK_SIZE], payload[3 + LZ4_BLOCK_SIZE]]));
    assert!((1..400).contains(&block), "{block} bytes for 64 KiB of zeros");
    assert_eq!(payload.len(), 2 + LZ4_BLOCK_SIZE + 2 + block + 2 + 100);
}

#[test]
fn blocks_are_not_much_longer_than_those_of_the_c_library() {
    for kind in [2, 3, 4] {
        let plain = bytes(kind, 4 * LZ4_BLOCK_SIZE);
        let payload = round_trip(&mut Lz4BlockEncoder::new(), &plain).expect("shorter");
        let by_c: usize = plain
            .chunks(LZ4_BLOCK_SIZE)
            .map(|plain| lz4::block::compress(plain, None, false).expect("liblz4 encodes it").len())
            .sum();
        // Text pays most for keys of 8 bytes.
        assert!(payload.len() <= by_c + by_c / 4, "kind {kind}: {} bytes, {by_c} by C", payload.len());
    }
}

#[test]
fn payloads_that_are_not_as_they_must_be_are_rejected() {
    use Lz4BlocksError::*;
    let decode = |payload: &[u8], len| decode_lz4_blocks(payload, &mut vec![0; len]);
    // 20 times the letter a: a literal, a match of 14 bytes, 5 literals.
    let block = [0x1a, 0x61, 1, 0, 0x50, 0x61, 0x61, 0x61, 0x61, 0x61];
    let payload = [&[10, 0][..], &block].concat();
    let mut plain = [0; 20];
    assert_eq!(decode_lz4_blocks(&payload, &mut plain), Ok(()));
    assert_eq!(plain, [0x61; 20]);

    assert_eq!(decode(&[], 0), Ok(()));
    assert_eq!(decode(&[0], 0), Err(Trailing { seen: 1 }));
    assert_eq!(decode(&[], 20), Err(Ends { block: 0, seen: 0, expected: 2 }));
    assert_eq!(decode(&[10], 20), Err(Ends { block: 0, seen: 1, expected: 2 }));
    assert_eq!(decode(&payload[..11], 20), Err(Ends { block: 0, seen: 9, expected: 10 }));
    assert_eq!(decode(&[&payload[..], &[0]].concat(), 20), Err(Trailing { seen: 1 }));
    assert_eq!(decode(&payload, 21), Err(PlainLength { block: 0, seen: 20, expected: 21 }));
    assert!(matches!(decode(&payload, 19), Err(Malformed { block: 0, .. })));
    assert_eq!(decode(&payload, 10), Err(NotShorter { block: 0, seen: 10, plain: 10 }));
    assert_eq!(decode(&[0, 0, 1, 2], 3), Err(Ends { block: 0, seen: 2, expected: 3 }));
    assert_eq!(decode(&[0, 0, 1, 2, 3], 3), Ok(()));

    // The second block.
    let stored = [&[0, 0][..], &[7; LZ4_BLOCK_SIZE]].concat();
    let len = LZ4_BLOCK_SIZE + 20;
    assert_eq!(decode(&[&stored[..], &payload].concat(), len), Ok(()));
    assert_eq!(decode(&stored, len), Err(Ends { block: 1, seen: 0, expected: 2 }));
    let mut far = payload;
    far[4] = 2;
    let malformed = decode(&[&stored[..], &far].concat(), len);
    assert!(matches!(&malformed, Err(Malformed { block: 1, .. })), "{malformed:?}");
    let message = malformed.expect_err("malformed").to_string();
    assert!(message.starts_with("malformed LZ4 block 1: "), "{message}");
}

/// Bytes with repetitions near and far.
fn plain() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        vec(any::<u8>(), 0..300),
        vec(0u8..3, 0..3000),
        (0..KINDS, 0usize..200_000).prop_map(|(kind, len)| bytes(kind, len)),
        (vec(vec(any::<u8>(), 1..300), 1..20), vec(any::<prop::sample::Index>(), 0..2000))
            .prop_map(|(parts, order)| order.iter().flat_map(|index| index.get(&parts).clone()).collect()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_bytes_come_back(plain in plain()) {
        round_trip(&mut Lz4BlockEncoder::new(), &plain);
    }

    #[test]
    fn damaged_payloads_never_panic(
        plain in plain(),
        flips in vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in any::<prop::sample::Index>(),
        change_len in 0..3,
        other_len in 0usize..200_000,
    ) {
        let mut payload = Vec::new();
        if !Lz4BlockEncoder::new().encode(&plain, &mut payload) {
            payload = plain.clone();
        }
        for (at, flip) in flips {
            if !payload.is_empty() {
                let at = at.index(payload.len());
                payload[at] ^= flip;
            }
        }
        let mut len = plain.len();
        match change_len {
            0 => payload.truncate(cut.index(payload.len() + 1)),
            1 => len = other_len,
            _ => (),
        }
        let _ = decode_lz4_blocks(&payload, &mut vec![0xa5; len]);
    }

    #[test]
    fn any_payload_never_panics(payload in vec(any::<u8>(), 0..5000), len in 0usize..200_000) {
        let _ = decode_lz4_blocks(&payload, &mut vec![0xa5; len]);
    }
}
