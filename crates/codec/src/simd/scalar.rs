//! The reference: portable, safe, eight bytes at a time.

use super::masks::Masks;
use crate::error::PageError;
use crate::page::Page;
use crate::sparse::{LINE, Sparse, set_bits};

/// The page as 512 words.
fn words(page: &Page) -> impl Iterator<Item = u64> {
    page.0.as_chunks::<8>().0.iter().map(|&word| u64::from_le_bytes(word))
}

/// Bit i of the result is set if byte i of the word is not zero.
#[inline(always)]
fn byte_mask(word: u64) -> u64 {
    const LOW: u64 = 0x7f7f_7f7f_7f7f_7f7f;
    // The high bit of each byte: adding 0x7f carries into it unless the low seven bits are zero.
    let high = (((word & LOW) + LOW) | word) & !LOW;
    // The eight bits 8i gathered into the top byte; no two partial products share a bit, so nothing carries.
    (high >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56
}

pub(super) fn is_zero(page: &Page) -> bool {
    words(page).all(|word| word == 0)
}

pub(super) fn scan<const XOR: bool>(page: &Page, base: &Page, masks: &mut Masks) {
    *masks = Masks::EMPTY;
    for (i, (word, base)) in words(page).zip(words(base)).enumerate() {
        let word = if XOR { word ^ base } else { word };
        if word != 0 {
            masks.bytes[i / 8] |= byte_mask(word) << (8 * (i % 8));
        }
    }
    for (line, mask) in masks.bytes.iter().enumerate() {
        masks.lines |= u64::from(*mask != 0) << line;
        masks.count += mask.count_ones();
    }
}

pub(super) fn emit_sparse<const XOR: bool>(page: &Page, base: &Page, masks: &Masks, out: &mut Vec<u8>) {
    out.extend_from_slice(&masks.lines.to_le_bytes());
    for line in set_bits(masks.lines) {
        out.extend_from_slice(&masks.bytes[line].to_le_bytes());
    }
    for line in set_bits(masks.lines) {
        for byte in set_bits(masks.bytes[line]) {
            let at = line * LINE + byte;
            out.push(if XOR { page.0[at] ^ base.0[at] } else { page.0[at] });
        }
    }
}

pub(super) fn decode_sparse<const XOR: bool>(
    payload: &[u8],
    base: &Page,
    out: &mut Page,
) -> Result<(), PageError> {
    let sparse = Sparse::parse(payload)?;
    if sparse.data.contains(&0) {
        return Err(sparse.zero_byte());
    }
    if XOR {
        out.0.copy_from_slice(&base.0);
    } else {
        out.0.fill(0);
    }
    let mut data = sparse.data.iter();
    for (line, &mask) in set_bits(sparse.lines).zip(sparse.masks) {
        for (byte, value) in set_bits(u64::from_le_bytes(mask)).zip(&mut data) {
            out.0[line * LINE + byte] ^= value;
        }
    }
    Ok(())
}

pub(super) fn xor(page: &Page, base: &Page, out: &mut Page) {
    for ((out, page), base) in out.0.iter_mut().zip(&page.0).zip(&base.0) {
        *out = page ^ base;
    }
}

pub(super) fn xor_in_place(page: &mut Page, base: &Page) {
    for (page, base) in page.0.iter_mut().zip(&base.0) {
        *page ^= base;
    }
}
