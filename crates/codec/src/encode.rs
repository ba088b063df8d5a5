//! Which encoding a page gets. The rule is described in `docs/page-encodings.md`, section 8.

use crate::backend::EncodedBatch;
use crate::encoding::{Encoding, EncodingSet};
use crate::lz4::Lz4Encoder;
use crate::page::{PAGE_SIZE, Page};
use crate::simd::{Kernels, Masks, Simd};

/// A sparse form of at most this many bytes is taken without trying LZ4.
///
/// An LZ4 attempt costs about 7 µs of a core, and 512 bytes take 4 µs on a 1 Gbit/s link: below that even a block of no
/// bytes would gain nothing.
const SPARSE_IS_ENOUGH: usize = 512;

/// Encodes pages, one after another, at one SIMD level.
///
/// What it writes depends on the page, the base and the allowed encodings only: not on the level, nor on earlier pages.
pub struct PageEncoder {
    kernels: Kernels,
    allowed: EncodingSet,
    masks: Masks,
    xor_masks: Masks,
    xor: Box<Page>,
    lz4: Lz4Encoder,
}

impl std::fmt::Debug for PageEncoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageEncoder")
            .field("simd", &self.kernels.simd())
            .field("allowed", &self.allowed)
            .finish_non_exhaustive()
    }
}

/// How much of a page differs from its base.
#[derive(Clone, Copy)]
pub(crate) enum Change {
    /// Only in these lines of 64 bytes (bit i: line i).
    Lines(u64),
    /// Nobody looked.
    Unknown,
}

impl PageEncoder {
    /// An encoder that uses these encodings.
    ///
    /// `None` if this machine lacks the SIMD level.
    pub fn new(simd: Simd, allowed: EncodingSet) -> Option<PageEncoder> {
        Kernels::new(simd).map(|kernels| PageEncoder::with_kernels(kernels, allowed))
    }

    pub(crate) fn with_kernels(kernels: Kernels, allowed: EncodingSet) -> PageEncoder {
        PageEncoder {
            kernels,
            allowed,
            masks: Masks::EMPTY,
            xor_masks: Masks::EMPTY,
            xor: Box::new(Page::ZERO),
            lz4: Lz4Encoder::new(),
        }
    }

    /// From now on uses these encodings.
    pub(crate) fn allow(&mut self, allowed: EncodingSet) {
        self.allowed = allowed;
    }

    /// Appends the payload of the page to `out`, at most 4096 bytes, and returns its encoding.
    pub fn encode(&mut self, page: &Page, base: Option<&Page>, out: &mut Vec<u8>) -> Encoding {
        match base {
            None => self.encode_alone(page, out),
            Some(base) => self.encode_delta(page, base, out).0,
        }
    }

    /// Encodes a page without a base.
    pub(crate) fn encode_alone(&mut self, page: &Page, out: &mut Vec<u8>) -> Encoding {
        if self.allowed.contains(Encoding::Zero) && self.kernels.is_zero(page) {
            return Encoding::Zero;
        }
        self.encode_changed(page, None, out)
    }

    /// Encodes a page that has a base, and says where the two differ.
    pub(crate) fn encode_delta(&mut self, page: &Page, base: &Page, out: &mut Vec<u8>) -> (Encoding, Change) {
        if self.allowed.contains(Encoding::Zero) && self.kernels.is_zero(page) {
            return (Encoding::Zero, Change::Unknown);
        }
        if !self.allowed.needs_base() {
            return (self.encode_changed(page, None, out), Change::Unknown);
        }
        self.kernels.scan(page, Some(base), &mut self.xor_masks);
        let change = Change::Lines(self.xor_masks.lines());
        if self.xor_masks.lines() == 0 && self.allowed.contains(Encoding::Same) {
            return (Encoding::Same, change);
        }
        if self.sparse_len(Encoding::SparseXor) <= SPARSE_IS_ENOUGH {
            self.kernels.emit_sparse(page, Some(base), &self.xor_masks, out);
            return (Encoding::SparseXor, change);
        }
        (self.encode_changed(page, Some(base), out), change)
    }

    /// The length of the page in this sparse encoding, `usize::MAX` if it cannot or may not be used.
    fn sparse_len(&self, encoding: Encoding) -> usize {
        let masks = if encoding == Encoding::Sparse { &self.masks } else { &self.xor_masks };
        if self.allowed.contains(encoding) && masks.lines() != 0 { masks.sparse_len() } else { usize::MAX }
    }

    /// Encodes a page that is not known to be zero or the same. If there is a base, its `xor_masks` are known.
    fn encode_changed(&mut self, page: &Page, base: Option<&Page>, out: &mut Vec<u8>) -> Encoding {
        let allowed = |encoding| self.allowed.contains(encoding);
        let lz4_choice = allowed(Encoding::Lz4) && allowed(Encoding::Lz4Xor) && base.is_some();
        if allowed(Encoding::Sparse) || lz4_choice {
            self.kernels.scan(page, None, &mut self.masks);
        }
        let (mut best, mut best_len) = (Encoding::Raw, PAGE_SIZE);
        for encoding in [Encoding::Sparse, Encoding::SparseXor] {
            if (encoding == Encoding::Sparse || base.is_some()) && self.sparse_len(encoding) < best_len {
                (best, best_len) = (encoding, self.sparse_len(encoding));
            }
        }
        if best_len > SPARSE_IS_ENOUGH {
            let lz4_xor = match base {
                None => false,
                Some(_) if lz4_choice => 2 * self.xor_masks.count() <= self.masks.count(),
                Some(_) => self.allowed.contains(Encoding::Lz4Xor),
            };
            let (encoding, plain) = match base {
                Some(base) if lz4_xor => {
                    self.kernels.xor(page, base, &mut self.xor);
                    (Encoding::Lz4Xor, &*self.xor)
                }
                _ => (Encoding::Lz4, page),
            };
            if self.allowed.contains(encoding) && self.lz4.encode(plain, best_len, out) {
                return encoding;
            }
        }
        match best {
            Encoding::Sparse => self.kernels.emit_sparse(page, None, &self.masks, out),
            Encoding::SparseXor => self.kernels.emit_sparse(page, base, &self.xor_masks, out),
            _ => out.extend_from_slice(&page.0),
        }
        best
    }
}

/// Encodes a batch; page k has the base that `base_of(k)` gives.
pub(crate) fn encode_batch<'a>(
    encoder: &mut PageEncoder,
    pages: &[Page],
    base_of: impl Fn(usize) -> Option<&'a Page>,
    batch: &mut EncodedBatch,
) {
    batch.clear();
    let mut hash = xxhash_rust::xxh3::Xxh3Default::new();
    for (index, page) in pages.iter().enumerate() {
        let start = batch.payload.len();
        batch.encodings.push(encoder.encode(page, base_of(index), &mut batch.payload));
        batch.lens.push((batch.payload.len() - start) as u16);
        hash.update(&page.0);
    }
    batch.plain_hash = hash.digest();
}

/// Appends the payload of one page to `out`, at most 4096 bytes, and returns its encoding.
///
/// For many pages use a [`PageEncoder`], which keeps its tables.
///
/// # Panics
///
/// If this machine lacks the SIMD level.
pub fn encode_page(
    simd: Simd,
    allowed: EncodingSet,
    page: &Page,
    base: Option<&Page>,
    out: &mut Vec<u8>,
) -> Encoding {
    PageEncoder::new(simd, allowed)
        .unwrap_or_else(|| panic!("this machine has no {simd}"))
        .encode(page, base, out)
}
