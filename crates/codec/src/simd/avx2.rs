//! AVX2: masks with 256-bit compares; lines are packed and unpacked eight bytes at a time with a table of shuffles.

use std::arch::x86_64::*;

use super::lut;
use super::masks::Masks;
use crate::error::PageError;
use crate::page::Page;
use crate::sparse::{LINE, LINES, Sparse};

/// Bytes in a vector.
const VECTOR: usize = 32;
/// Vectors in a page.
const VECTORS: usize = LINES * LINE / VECTOR;

/// Vector `i` of the page.
#[inline]
#[target_feature(enable = "avx2")]
fn load(page: &Page, i: usize) -> __m256i {
    let vector: &[u8; VECTOR] = &page.0.as_chunks::<VECTOR>().0[i];
    // SAFETY: 32 bytes may be read from a reference to 32 bytes; a page is aligned to 4096 and so is each vector to 32.
    unsafe { _mm256_load_si256(vector.as_ptr().cast()) }
}

/// Overwrites vector `i` of the page.
#[inline]
#[target_feature(enable = "avx2")]
fn store(page: &mut Page, i: usize, vector: __m256i) {
    let at: &mut [u8; VECTOR] = &mut page.0.as_chunks_mut::<VECTOR>().0[i];
    // SAFETY: 32 bytes may be written to a reference to 32 bytes; a page is aligned to 4096 and so is each vector to 32.
    unsafe { _mm256_store_si256(at.as_mut_ptr().cast(), vector) }
}

/// Vector `i` of the page, or of its XOR with the base.
#[inline]
#[target_feature(enable = "avx2")]
fn load_xor<const XOR: bool>(page: &Page, base: &Page, i: usize) -> __m256i {
    let vector = load(page, i);
    if XOR { _mm256_xor_si256(vector, load(base, i)) } else { vector }
}

/// Bit i is set if byte i of the vector is not zero.
#[inline]
#[target_feature(enable = "avx2")]
fn byte_mask(vector: __m256i) -> u32 {
    !(_mm256_movemask_epi8(_mm256_cmpeq_epi8(vector, _mm256_setzero_si256())) as u32)
}

/// The eight bytes of `word`, shuffled.
#[inline]
#[target_feature(enable = "avx2")]
fn shuffle(word: u64, indices: &[u8; 8]) -> u64 {
    let indices = _mm_cvtsi64_si128(i64::from_le_bytes(*indices));
    _mm_cvtsi128_si64(_mm_shuffle_epi8(_mm_cvtsi64_si128(word as i64), indices)) as u64
}

#[target_feature(enable = "avx2")]
pub(super) fn is_zero(page: &Page) -> bool {
    for line in 0..LINES {
        let both = _mm256_or_si256(load(page, 2 * line), load(page, 2 * line + 1));
        if _mm256_testz_si256(both, both) == 0 {
            return false;
        }
    }
    true
}

#[target_feature(enable = "avx2,popcnt")]
pub(super) fn scan<const XOR: bool>(page: &Page, base: &Page, masks: &mut Masks) {
    let mut lines = 0;
    let mut count = 0;
    for i in 0..LINES {
        let low = byte_mask(load_xor::<XOR>(page, base, 2 * i));
        let high = byte_mask(load_xor::<XOR>(page, base, 2 * i + 1));
        let mask = u64::from(high) << 32 | u64::from(low);
        masks.bytes[i] = mask;
        lines |= u64::from(mask != 0) << i;
        count += mask.count_ones();
    }
    masks.lines = lines;
    masks.count = count;
}

#[target_feature(enable = "avx2,popcnt,bmi1,bmi2,lzcnt")]
pub(super) fn emit_sparse<const XOR: bool>(page: &Page, base: &Page, masks: &Masks, out: &mut Vec<u8>) {
    let len = masks.sparse_len();
    // One word more than the form itself, because packed words are stored whole.
    out.reserve(len + 8);
    let start = out.len();
    let (page, _) = page.0.as_chunks::<8>();
    let (base, _) = base.0.as_chunks::<8>();
    let mut mask_at = 8;
    let mut data_at = 8 + 8 * masks.lines.count_ones() as usize;
    // SAFETY: `reserve` made room for `len + 8` bytes from `start` on. The masks end where the data starts, and the
    // counts in `masks` are those of its masks, so that `data_at` never exceeds `len`: all stores end by `len + 8`.
    // The first `len` bytes have all been written when the length is set.
    unsafe {
        let form = out.as_mut_ptr().add(start);
        form.cast::<u64>().write_unaligned(masks.lines.to_le());
        let mut lines = masks.lines;
        while lines != 0 {
            let i = lines.trailing_zeros() as usize;
            lines &= lines - 1;
            let mask = masks.bytes[i];
            form.add(mask_at).cast::<u64>().write_unaligned(mask.to_le());
            mask_at += 8;
            let mut bits = mask;
            while bits != 0 {
                let word = bits.trailing_zeros() as usize / 8;
                let present = (mask >> (8 * word)) as u8;
                bits &= !(0xff << (8 * word));
                let at = i * (LINE / 8) + word;
                let mut bytes = u64::from_le_bytes(page[at]);
                if XOR {
                    bytes ^= u64::from_le_bytes(base[at]);
                }
                let packed = shuffle(bytes, &lut::COMPRESS[usize::from(present)]);
                form.add(data_at).cast::<u64>().write_unaligned(packed);
                data_at += present.count_ones() as usize;
            }
        }
        out.set_len(start + len);
    }
}

#[target_feature(enable = "avx2,popcnt,bmi1,bmi2,lzcnt")]
pub(super) fn decode_sparse<const XOR: bool>(
    payload: &[u8],
    base: &Page,
    out: &mut Page,
) -> Result<(), PageError> {
    let sparse = Sparse::parse(payload)?;
    if sparse.data.contains(&0) {
        return Err(sparse.zero_byte());
    }
    for i in 0..VECTORS {
        store(out, i, if XOR { load(base, i) } else { _mm256_setzero_si256() });
    }
    let (words, _) = out.0.as_chunks_mut::<8>();
    let mut data = sparse.data;
    let mut lines = sparse.lines;
    for &mask in sparse.masks {
        let i = lines.trailing_zeros() as usize % LINES;
        lines &= lines.wrapping_sub(1);
        let mask = u64::from_le_bytes(mask);
        let mut bits = mask;
        while bits != 0 {
            let word = bits.trailing_zeros() as usize / 8;
            let present = (mask >> (8 * word)) as u8;
            bits &= !(0xff << (8 * word));
            let packed = if let Some(&packed) = data.first_chunk::<8>() {
                packed
            } else {
                let mut packed = [0; 8];
                packed[..data.len()].copy_from_slice(data);
                packed
            };
            data = data.get(present.count_ones() as usize..).unwrap_or_default();
            let value = shuffle(u64::from_le_bytes(packed), &lut::EXPAND[usize::from(present)]);
            let at = &mut words[i * (LINE / 8) + word];
            *at = (u64::from_le_bytes(*at) ^ value).to_le_bytes();
        }
    }
    Ok(())
}

#[target_feature(enable = "avx2")]
pub(super) fn xor(page: &Page, base: &Page, out: &mut Page) {
    for i in 0..VECTORS {
        store(out, i, load_xor::<true>(page, base, i));
    }
}

#[target_feature(enable = "avx2")]
pub(super) fn xor_in_place(page: &mut Page, base: &Page) {
    for i in 0..VECTORS {
        let vector = load_xor::<true>(page, base, i);
        store(page, i, vector);
    }
}
