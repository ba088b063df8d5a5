//! What a scan found, for the emission of the sparse form.

use crate::sparse::LINES;

/// Where the bytes are that are not zero.
///
/// Invariant: `lines` and `count` are what their comments say of `bytes`. The SIMD loops rely on it for memory safety, so only
/// the scans of `simd` can write the fields.
#[derive(Clone, Debug)]
#[repr(C, align(64))]
pub(crate) struct Masks {
    /// Bit j of entry i is set if byte j of line i is not zero.
    pub(super) bytes: [u64; LINES],
    /// Bit i is set if line i has a byte that is not zero.
    pub(super) lines: u64,
    /// Number of bytes that are not zero.
    pub(super) count: u32,
}

impl Masks {
    pub(crate) const EMPTY: Masks = Masks { bytes: [0; LINES], lines: 0, count: 0 };

    /// Bit i is set if line i has a byte that is not zero.
    #[inline(always)]
    pub(crate) fn lines(&self) -> u64 {
        self.lines
    }

    /// Number of bytes that are not zero.
    #[inline(always)]
    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    /// Length of the sparse form in bytes.
    #[inline(always)]
    pub(crate) fn sparse_len(&self) -> usize {
        8 + 8 * self.lines.count_ones() as usize + self.count as usize
    }
}
