//! AVX-512 with VBMI2: a line is a vector, its byte mask a mask register, and `vpcompressb`/`vpexpandb` pack and unpack it.
//!
//! The register forms of compress are used, never the memory form, which is microcoded and slow on AMD Zen 4.

use std::arch::x86_64::*;

use super::masks::Masks;
use crate::error::PageError;
use crate::page::Page;
use crate::sparse::{LINE, LINES, Sparse};

/// Line `i` of the page.
#[inline]
#[target_feature(enable = "avx512f")]
fn load(page: &Page, i: usize) -> __m512i {
    debug_assert!(i < LINES);
    let lines: &[u8; LINE] = &page.0.as_chunks::<LINE>().0[i];
    // SAFETY: 64 bytes may be read from a reference to 64 bytes; a page is aligned to 4096 and so is each line to 64.
    unsafe { _mm512_load_si512(lines.as_ptr().cast()) }
}

/// Overwrites line `i` of the page.
#[inline]
#[target_feature(enable = "avx512f")]
fn store(page: &mut Page, i: usize, line: __m512i) {
    let lines: &mut [u8; LINE] = &mut page.0.as_chunks_mut::<LINE>().0[i];
    // SAFETY: 64 bytes may be written to a reference to 64 bytes; a page is aligned to 4096 and so is each line to 64.
    unsafe { _mm512_store_si512(lines.as_mut_ptr().cast(), line) }
}

#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn is_zero(page: &Page) -> bool {
    for i in 0..LINES {
        let line = load(page, i);
        if _mm512_test_epi64_mask(line, line) != 0 {
            return false;
        }
    }
    true
}

#[target_feature(enable = "avx512f,avx512bw,popcnt")]
pub(super) fn scan<const XOR: bool>(page: &Page, base: &Page, masks: &mut Masks) {
    let mut lines = 0;
    let mut count = 0;
    for i in 0..LINES {
        let mut line = load(page, i);
        if XOR {
            line = _mm512_xor_si512(line, load(base, i));
        }
        let mask = _mm512_test_epi8_mask(line, line);
        masks.bytes[i] = mask;
        lines |= u64::from(mask != 0) << i;
        count += mask.count_ones();
    }
    masks.lines = lines;
    masks.count = count;
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt,bmi1,bmi2,lzcnt")]
pub(super) fn emit_sparse<const XOR: bool>(page: &Page, base: &Page, masks: &Masks, out: &mut Vec<u8>) {
    let len = masks.sparse_len();
    // One vector more than the form itself, because each line is stored as a whole vector.
    out.reserve(len + LINE);
    let start = out.len();
    let mut mask_at = 8;
    let mut data_at = 8 + 8 * masks.lines.count_ones() as usize;
    // SAFETY: `reserve` made room for `len + LINE` bytes from `start` on. The masks end where the data starts, and the
    // counts in `masks` are those of its masks, so that `data_at` never exceeds `len`: all stores end by `len + LINE`.
    // The first `len` bytes have all been written when the length is set.
    unsafe {
        let form = out.as_mut_ptr().add(start);
        form.cast::<u64>().write_unaligned(masks.lines.to_le());
        let mut rest = masks.lines;
        while rest != 0 {
            let i = rest.trailing_zeros() as usize;
            rest &= rest - 1;
            let mask = masks.bytes[i];
            let mut line = load(page, i);
            if XOR {
                line = _mm512_xor_si512(line, load(base, i));
            }
            form.add(mask_at).cast::<u64>().write_unaligned(mask.to_le());
            mask_at += 8;
            _mm512_storeu_si512(form.add(data_at).cast(), _mm512_maskz_compress_epi8(mask, line));
            data_at += mask.count_ones() as usize;
        }
        out.set_len(start + len);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi2,popcnt,bmi1,bmi2,lzcnt")]
pub(super) fn decode_sparse<const XOR: bool>(
    payload: &[u8],
    base: &Page,
    out: &mut Page,
) -> Result<(), PageError> {
    let sparse = Sparse::parse(payload)?;
    for i in 0..LINES {
        store(out, i, if XOR { load(base, i) } else { _mm512_setzero_si512() });
    }
    let mut data = sparse.data;
    let mut zeros = 0;
    let mut rest = sparse.lines;
    for &mask in sparse.masks {
        let i = rest.trailing_zeros() as usize % LINES;
        rest &= rest.wrapping_sub(1);
        let mask = u64::from_le_bytes(mask);
        let packed = if let Some(packed) = data.first_chunk::<LINE>() {
            // SAFETY: 64 bytes may be read from a reference to 64 bytes.
            unsafe { _mm512_loadu_si512(packed.as_ptr().cast()) }
        } else {
            let present = _bzhi_u64(u64::MAX, data.len() as u32);
            // SAFETY: `present` has the bits of the bytes that `data` has; the others are not accessed.
            unsafe { _mm512_maskz_loadu_epi8(present, data.as_ptr().cast()) }
        };
        data = data.get(mask.count_ones() as usize..).unwrap_or_default();
        let mut line = _mm512_maskz_expand_epi8(mask, packed);
        zeros |= _mm512_test_epi8_mask(line, line) ^ mask;
        if XOR {
            line = _mm512_xor_si512(line, load(base, i));
        }
        store(out, i, line);
    }
    if zeros != 0 {
        return Err(sparse.zero_byte());
    }
    Ok(())
}

#[target_feature(enable = "avx512f")]
pub(super) fn xor(page: &Page, base: &Page, out: &mut Page) {
    for i in 0..LINES {
        store(out, i, _mm512_xor_si512(load(page, i), load(base, i)));
    }
}

#[target_feature(enable = "avx512f")]
pub(super) fn xor_in_place(page: &mut Page, base: &Page) {
    for i in 0..LINES {
        let line = _mm512_xor_si512(load(page, i), load(base, i));
        store(page, i, line);
    }
}
