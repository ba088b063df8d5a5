//! The sparse form: the checks every decoder makes.

use crate::error::PageError;
use crate::page::PAGE_SIZE;

/// Bytes in a line.
pub(crate) const LINE: usize = 64;
/// Lines in a page.
pub(crate) const LINES: usize = PAGE_SIZE / LINE;

/// A sparse payload whose lengths have been checked.
///
/// Invariants: `lines` is not 0; `masks` has 8 bytes for each set bit of `lines` and none of them is a 0 mask; `data`
/// has as many bytes as the masks have bits. The SIMD decoders rely on them for memory safety.
pub(crate) struct Sparse<'a> {
    pub(crate) lines: u64,
    pub(crate) masks: &'a [[u8; 8]],
    pub(crate) data: &'a [u8],
}

impl<'a> Sparse<'a> {
    /// Checks everything but that no data byte is zero, which decoders see for free.
    ///
    /// Inlined into each decoder so that it counts bits with that decoder's instructions.
    #[inline(always)]
    pub(crate) fn parse(payload: &'a [u8]) -> Result<Sparse<'a>, PageError> {
        let seen = payload.len();
        let Some((&lines, rest)) = payload.split_first_chunk::<8>() else {
            return Err(PageError::SparseLength { seen, expected: 8 });
        };
        let lines = u64::from_le_bytes(lines);
        if lines == 0 {
            return Err(PageError::SparseEmpty);
        }
        let masks_len = 8 * lines.count_ones() as usize;
        if rest.len() < masks_len {
            return Err(PageError::SparseLength { seen, expected: 8 + masks_len });
        }
        let (masks, data) = rest.split_at(masks_len);
        let (masks, _) = masks.as_chunks::<8>();
        let mut count = 0;
        let mut empty = false;
        for &mask in masks {
            let mask = u64::from_le_bytes(mask);
            empty |= mask == 0;
            count += mask.count_ones() as usize;
        }
        if empty {
            return Err(empty_line(lines, masks));
        }
        if data.len() != count {
            return Err(PageError::SparseLength { seen, expected: 8 + masks_len + count });
        }
        Ok(Sparse { lines, masks, data })
    }

    /// The error for data of which some byte is zero.
    #[cold]
    pub(crate) fn zero_byte(&self) -> PageError {
        PageError::SparseZeroByte { index: self.data.iter().position(|&b| b == 0).unwrap_or(self.data.len()) }
    }
}

/// The error for byte masks of which some is 0.
#[cold]
fn empty_line(lines: u64, masks: &[[u8; 8]]) -> PageError {
    let line = set_bits(lines).zip(masks).find(|&(_, &mask)| mask == [0; 8]).map_or(LINES, |(line, _)| line);
    PageError::SparseEmptyLine { line }
}

/// The indices of the set bits, lowest first.
#[inline(always)]
pub(crate) fn set_bits(mut mask: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        (mask != 0).then(|| {
            let bit = mask.trailing_zeros() as usize;
            mask &= mask - 1;
            bit
        })
    })
}
