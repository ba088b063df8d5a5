//! Decoding, with every check of `docs/page-encodings.md`.

use crate::backend::EncodedBatch;
use crate::encoding::{Encoding, EncodingSet};
use crate::error::{DecodeError, PageError};
use crate::lz4;
use crate::page::{PAGE_SIZE, Page};
use crate::simd::{Kernels, Simd};

/// The shortest sparse payload: one line with one byte.
const SPARSE_MIN: usize = 8 + 8 + 1;

/// Decodes one page into `out`. `base` must be there if the encoding needs one and is ignored otherwise.
///
/// After an error `out` holds anything.
///
/// # Panics
///
/// If this machine lacks the SIMD level; never because of the payload.
pub fn decode_page(
    simd: Simd,
    encoding: Encoding,
    payload: &[u8],
    base: Option<&Page>,
    out: &mut Page,
) -> Result<(), PageError> {
    let kernels = Kernels::new(simd).unwrap_or_else(|| panic!("this machine has no {simd}"));
    decode_with(kernels, encoding, payload, base, out)
}

/// Whether a payload of this length can be of this encoding.
pub(crate) fn check_len(encoding: Encoding, seen: usize) -> Result<(), PageError> {
    if let Some(expected) = encoding.fixed_len() {
        return if seen == expected {
            Ok(())
        } else {
            Err(PageError::FixedLength { encoding, seen, expected })
        };
    }
    let min = if matches!(encoding, Encoding::Sparse | Encoding::SparseXor) { SPARSE_MIN } else { 1 };
    if (min..PAGE_SIZE).contains(&seen) {
        Ok(())
    } else {
        Err(PageError::LengthRange { encoding, seen, min })
    }
}

pub(crate) fn decode_with(
    kernels: Kernels,
    encoding: Encoding,
    payload: &[u8],
    base: Option<&Page>,
    out: &mut Page,
) -> Result<(), PageError> {
    check_len(encoding, payload.len())?;
    let base = || base.ok_or(PageError::NoBase { encoding });
    match encoding {
        Encoding::Zero => out.0.fill(0),
        Encoding::Same => out.0.copy_from_slice(&base()?.0),
        Encoding::Raw => out.0.copy_from_slice(payload),
        Encoding::Sparse => kernels.decode_sparse(payload, None, out)?,
        Encoding::SparseXor => kernels.decode_sparse(payload, Some(base()?), out)?,
        Encoding::Lz4 => lz4::decode(payload, out)?,
        Encoding::Lz4Xor => {
            let base = base()?;
            lz4::decode(payload, out)?;
            kernels.xor_in_place(out, base);
        }
    }
    Ok(())
}

/// Checks what can be checked of a batch as a whole: the tables, the payload's length, the number of bases.
pub(crate) fn check_tables(
    max_pages: usize,
    encoded: &EncodedBatch,
    bases: usize,
) -> Result<(), DecodeError> {
    let count = encoded.encodings.len();
    if count > max_pages {
        return Err(DecodeError::TooManyPages { seen: count, max: max_pages });
    }
    if encoded.lens.len() != count {
        return Err(DecodeError::Tables { encodings: count, lens: encoded.lens.len() });
    }
    let expected = encoded.lens.iter().map(|&len| usize::from(len)).sum();
    if encoded.payload.len() != expected {
        return Err(DecodeError::PayloadLength { seen: encoded.payload.len(), expected });
    }
    let expected = encoded.encodings.iter().filter(|encoding| encoding.needs_base()).count();
    if bases != expected {
        return Err(DecodeError::Bases { seen: bases, expected });
    }
    Ok(())
}

/// Calls `page` with the index, the encoding and the payload of each page, up to the first error.
///
/// The tables must have been checked.
pub(crate) fn each_page(
    allowed: EncodingSet,
    encoded: &EncodedBatch,
    mut page: impl FnMut(usize, Encoding, &[u8]) -> Result<(), PageError>,
) -> Result<(), DecodeError> {
    let mut payload = encoded.payload.as_slice();
    for (index, (&encoding, &len)) in encoded.encodings.iter().zip(&encoded.lens).enumerate() {
        if !allowed.contains(encoding) {
            return Err(PageError::NotAllowed { encoding, allowed }.at(index));
        }
        // The lengths add up to the payload, so the split cannot fail.
        let (this, rest) = payload.split_at(usize::from(len));
        payload = rest;
        page(index, encoding, this).map_err(|reason| reason.at(index))?;
    }
    Ok(())
}

/// Decodes a whole batch into `pages` and checks its hash. After an error `pages` holds anything.
///
/// `bases` are the bases of those pages that need one, in page order.
pub(crate) fn decode_batch<'a>(
    kernels: Kernels,
    allowed: EncodingSet,
    max_pages: usize,
    encoded: &EncodedBatch,
    mut bases: impl ExactSizeIterator<Item = &'a Page>,
    pages: &mut Vec<Page>,
) -> Result<(), DecodeError> {
    check_tables(max_pages, encoded, bases.len())?;
    pages.resize(encoded.encodings.len(), Page::ZERO);
    let mut hash = xxhash_rust::xxh3::Xxh3Default::new();
    each_page(allowed, encoded, |index, encoding, payload| {
        let base = if encoding.needs_base() { bases.next() } else { None };
        decode_with(kernels, encoding, payload, base, &mut pages[index])?;
        hash.update(&pages[index].0);
        Ok(())
    })?;
    let seen = hash.digest();
    if seen != encoded.plain_hash {
        return Err(DecodeError::HashMismatch { seen, expected: encoded.plain_hash });
    }
    Ok(())
}
