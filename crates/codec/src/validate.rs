//! Checks of what a peer sent, without decoding it: what goes to a device must have passed here.

use lz4_flex::block::DecompressError;

use crate::backend::EncodedBatch;
use crate::decode::{check_len, check_tables, each_page};
use crate::encoding::{Encoding, EncodingSet};
use crate::error::{DecodeError, PageError};
use crate::page::PAGE_SIZE;
use crate::sparse::Sparse;

/// The length of a match whose token has no bits set for it.
const MIN_MATCH: usize = 4;
/// The value of four bits of a token which says that bytes follow that add to it.
const CONTINUED: usize = 15;

/// Makes every check that decoding makes, except the hash of the pages, and returns the same error.
///
/// `bases` is the number of bases that came with the batch. Nothing is written and nothing copied.
///
/// # Errors
///
/// The first error that decoding would find.
pub fn validate_batch(
    allowed: EncodingSet,
    max_pages: usize,
    encoded: &EncodedBatch,
    bases: usize,
) -> Result<(), DecodeError> {
    check_tables(max_pages, encoded, bases)?;
    each_page(allowed, encoded, |_, encoding, payload| validate_page(encoding, payload))
}

/// Whether this is a payload of this encoding.
pub(crate) fn validate_page(encoding: Encoding, payload: &[u8]) -> Result<(), PageError> {
    check_len(encoding, payload.len())?;
    match encoding {
        Encoding::Zero | Encoding::Same | Encoding::Raw => Ok(()),
        Encoding::Sparse | Encoding::SparseXor => {
            let sparse = Sparse::parse(payload)?;
            if sparse.data.contains(&0) { Err(sparse.zero_byte()) } else { Ok(()) }
        }
        Encoding::Lz4 | Encoding::Lz4Xor => validate_lz4(payload),
    }
}

/// Whether this is an LZ4 block of one page, by the rules of the decoder of `lz4_flex`.
fn validate_lz4(block: &[u8]) -> Result<(), PageError> {
    match lz4_len(block) {
        Ok(PAGE_SIZE) => Ok(()),
        Ok(seen) => Err(PageError::Lz4Length { seen }),
        Err(error) => Err(PageError::Lz4 { reason: error.to_string() }),
    }
}

/// Walks through the sequences of a block; returns how many bytes it decodes to, at most a page.
fn lz4_len(block: &[u8]) -> Result<usize, DecompressError> {
    let (mut at, mut len) = (0, 0);
    loop {
        let token = usize::from(*block.get(at).ok_or(DecompressError::ExpectedAnotherByte)?);
        at += 1;
        let mut literals = token >> 4;
        if literals == CONTINUED {
            literals += continued(block, &mut at)?;
        }
        if literals > block.len() - at {
            return Err(DecompressError::LiteralOutOfBounds);
        }
        at += literals;
        len = grown(len, literals)?;
        // The last sequence has no match; the bits of its token that are for one say nothing.
        if at == block.len() {
            return Ok(len);
        }
        let Some(&[low, high]) = block[at..].first_chunk() else {
            return Err(DecompressError::ExpectedAnotherByte);
        };
        at += 2;
        let offset = usize::from(u16::from_le_bytes([low, high]));
        if offset == 0 {
            return Err(DecompressError::OffsetZero);
        }
        let mut matched = token & CONTINUED;
        if matched == CONTINUED {
            matched += continued(block, &mut at)?;
        }
        let start = len;
        len = grown(start, MIN_MATCH + matched)?;
        if offset > start {
            return Err(DecompressError::OffsetOutOfBounds);
        }
    }
}

/// The sum of the bytes that continue a length: all up to the first that is not 255.
fn continued(block: &[u8], at: &mut usize) -> Result<usize, DecompressError> {
    let mut sum = 0;
    loop {
        let byte = *block.get(*at).ok_or(DecompressError::ExpectedAnotherByte)?;
        *at += 1;
        sum += usize::from(byte);
        if byte != u8::MAX {
            return Ok(sum);
        }
    }
}

/// `len` and `more` together, if a page has room for so much.
fn grown(len: usize, more: usize) -> Result<usize, DecompressError> {
    let expected = len + more;
    if expected > PAGE_SIZE {
        return Err(DecompressError::OutputTooSmall { expected, actual: PAGE_SIZE });
    }
    Ok(expected)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::decode::decode_page;
    use crate::lz4::Lz4Encoder;
    use crate::page::Page;
    use crate::simd::Simd;

    /// Says what the decoder says, and returns whether that is `Ok`.
    fn agrees(encoding: Encoding, payload: &[u8]) -> bool {
        let base = Page([0x33; PAGE_SIZE]);
        let decoded = decode_page(Simd::detect(), encoding, payload, Some(&base), &mut { Page::ZERO });
        assert_eq!(validate_page(encoding, payload), decoded, "{encoding} payload {payload:02x?}");
        decoded.is_ok()
    }

    fn lz4_agrees(block: &[u8]) -> bool {
        // `validate_page` looks at the length first: blocks of any length go to the walk itself.
        let decoded = crate::lz4::decode(block, &mut { Page::ZERO });
        assert_eq!(validate_lz4(block), decoded, "block {block:02x?}");
        decoded.is_ok()
    }

    /// One sequence: literals, and a match unless it is the last one.
    #[derive(Clone, Debug)]
    struct Sequence {
        literals: usize,
        offset: u16,
        matched: usize,
    }

    fn sequence() -> impl Strategy<Value = Sequence> {
        let edges =
            || prop_oneof![4 => 0usize..40, 1 => 250usize..300, 1 => 500usize..600, 1 => 0usize..2500];
        let offset = prop_oneof![1 => 0u16..3, 4 => 1u16..64, 2 => 1u16..4200, 1 => any::<u16>()];
        (edges(), offset, edges()).prop_map(|(literals, offset, matched)| Sequence {
            literals,
            offset,
            matched,
        })
    }

    fn length(block: &mut Vec<u8>, len: usize) {
        if let Some(mut rest) = len.checked_sub(CONTINUED) {
            while rest >= 255 {
                block.push(255);
                rest -= 255;
            }
            block.push(rest as u8);
        }
    }

    /// A block of these sequences, the last without a match. With `fit`, offsets are moved to where they are allowed and
    /// the last literals fill the page, if it is not full already.
    fn block(sequences: &[Sequence], last: usize, low_bits: u8, fit: bool) -> Vec<u8> {
        let (mut block, mut len) = (Vec::new(), 0);
        for Sequence { literals, offset, matched } in sequences {
            if fit && len + literals + matched + MIN_MATCH > PAGE_SIZE {
                break;
            }
            block.push((literals.min(&15) << 4 | matched.min(&15)) as u8);
            length(&mut block, *literals);
            block.extend((0..*literals).map(|i| i as u8));
            len += literals;
            let offset = if fit { (*offset).clamp(1, (len as u16).max(1)) } else { *offset };
            block.extend(offset.to_le_bytes());
            length(&mut block, *matched);
            len += matched + MIN_MATCH;
        }
        let last = if fit { PAGE_SIZE.saturating_sub(len) } else { last };
        block.push((last.min(15) << 4) as u8 | low_bits);
        length(&mut block, last);
        block.extend((0..last).map(|i| i as u8));
        block
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]

        #[test]
        fn lz4_blocks_of_any_sequences_are_judged_as_lz4_flex_does(
            sequences in vec(sequence(), 0..60),
            last in 0usize..50,
            low_bits in 0u8..16,
            fit: bool,
        ) {
            let block = block(&sequences, last, low_bits, fit);
            let valid = lz4_agrees(&block);
            // The first sequence may have no literals, then no offset is allowed.
            prop_assert!(valid || !fit || sequences.first().is_some_and(|first| first.literals == 0));
        }

        #[test]
        fn cut_and_changed_lz4_blocks_are_judged_as_lz4_flex_does(
            sequences in vec(sequence(), 0..60),
            changes in vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
            cut in any::<prop::sample::Index>(),
            extra in vec(any::<u8>(), 0..20),
        ) {
            let mut block = block(&sequences, 0, 0, true);
            lz4_agrees(&block[..cut.index(block.len() + 1)]);
            for (at, value) in changes {
                let at = at.index(block.len());
                block[at] = value;
            }
            lz4_agrees(&block);
            block.extend(extra);
            lz4_agrees(&block);
        }

        #[test]
        fn random_bytes_are_judged_as_the_decoders_do(bytes in vec(any::<u8>(), 0..5000), small in vec(0u8..20, 0..300)) {
            lz4_agrees(&bytes);
            lz4_agrees(&small);
            for encoding in Encoding::ALL {
                agrees(encoding, &bytes);
                agrees(encoding, &small);
            }
        }

        #[test]
        fn sparse_payloads_are_judged_as_the_decoders_do(
            lines in any::<u64>(),
            masks in vec(prop_oneof![1 => Just(0u64), 20 => any::<u64>(), 20 => (0u32..64).prop_map(|bit| 1 << bit)], 64),
            data in prop_oneof![3 => Just(1u8..=255), 1 => Just(0u8..=255)].prop_flat_map(|range| vec(range, 4096)),
            wrong_by in prop_oneof![5 => Just(0i32), 1 => -9i32..9],
        ) {
            let masks = &masks[..lines.count_ones() as usize];
            let count = masks.iter().map(|mask| mask.count_ones()).sum::<u32>() as i32 + wrong_by;
            let mut payload = lines.to_le_bytes().to_vec();
            payload.extend(masks.iter().flat_map(|mask| mask.to_le_bytes()));
            payload.extend(&data[..count.clamp(0, 4096) as usize]);
            agrees(Encoding::Sparse, &payload);
            agrees(Encoding::SparseXor, &payload);
        }
    }

    #[test]
    fn a_valid_block_cut_anywhere_is_no_page() {
        let mut page = Page::ZERO;
        page.0.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i % 50 * (i / 300)) as u8);
        let mut block = Vec::new();
        assert!(Lz4Encoder::new().encode(&page, PAGE_SIZE, &mut block));
        assert!(lz4_agrees(&block));
        for cut in 0..block.len() {
            assert!(!lz4_agrees(&block[..cut]), "cut at {cut}");
        }
        for at in 0..block.len() {
            for bit in 0..8 {
                let mut changed = block.clone();
                changed[at] ^= 1 << bit;
                lz4_agrees(&changed);
            }
        }
    }

    #[test]
    fn the_smallest_blocks_are_judged_as_lz4_flex_does() {
        assert!(!lz4_agrees(&[]));
        for first in 0..=255 {
            lz4_agrees(&[first]);
            for second in 0..=255 {
                lz4_agrees(&[first, second]);
            }
        }
    }
}
