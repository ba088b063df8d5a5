//! What fuzz targets and property tests call: each function takes any bytes and panics if a promise is broken.

use std::io;

use crate::backend::EncodedBatch;
use crate::container;
use crate::decode::{decode_batch, decode_with};
use crate::encode::PageEncoder;
use crate::encoding::{Encoding, EncodingSet};
use crate::error::DecodeError;
use crate::lz4::{LZ4_BLOCK_SIZE, Lz4BlockEncoder, decode_lz4_blocks};
use crate::page::{PAGE_SIZE, Page};
use crate::simd::{Kernels, Simd};
use crate::validate::validate_batch;

/// A length from which 255 more go beyond that of a block; for Miri, which would take minutes for one, just a length.
const AROUND_A_BLOCK: usize = if cfg!(miri) { 500 } else { LZ4_BLOCK_SIZE - 127 };

fn all_kernels() -> impl Iterator<Item = Kernels> {
    Simd::ALL.into_iter().filter_map(Kernels::new)
}

/// A page that repeats these bytes; zero if there are none.
fn repeat(bytes: &[u8]) -> Page {
    let mut page = Page::ZERO;
    page.0.iter_mut().zip(bytes.iter().cycle()).for_each(|(to, from)| *to = *from);
    page
}

/// Decodes `data` (a byte for the tag, one that fills the base, a payload) at every level; the payload also as LZ4 blocks.
///
/// # Panics
///
/// If levels disagree, if a sparse payload decodes that is not the canonical form of the page, or if what LZ4 blocks
/// decode to does not come back when it is encoded again.
pub fn fuzz_decode_page(data: &[u8]) {
    let [tag, fill, payload @ ..] = data else { return };
    let encoding = Encoding::ALL[usize::from(*tag) % Encoding::ALL.len()];
    let base = Page([*fill; PAGE_SIZE]);
    let mut reference = None;
    for kernels in all_kernels() {
        let mut page = Page([0x5a; PAGE_SIZE]);
        let result = decode_with(kernels, encoding, payload, Some(&base), &mut page).map(|()| page);
        assert_eq!(
            reference.get_or_insert_with(|| result.clone()),
            &result,
            "{encoding} at {}",
            kernels.simd()
        );
        if let (Ok(page), Encoding::Sparse | Encoding::SparseXor) = (&result, encoding) {
            let mut again = Vec::new();
            let used = PageEncoder::with_kernels(kernels, EncodingSet::of(&[encoding])).encode(
                page,
                Some(&base),
                &mut again,
            );
            assert_eq!((used, &again[..]), (encoding, payload), "not canonical");
        }
    }
    // Around the length of one block, and short ones.
    for len in [usize::from(*tag), AROUND_A_BLOCK + usize::from(*tag)] {
        let mut plain = vec![*fill; len];
        if decode_lz4_blocks(payload, &mut plain).is_ok() {
            lz4_blocks_come_back(&plain);
        }
    }
}

/// # Panics
///
/// If the bytes change on the way through LZ4 blocks.
fn lz4_blocks_come_back(plain: &[u8]) {
    let mut payload = Vec::new();
    if Lz4BlockEncoder::new().encode(plain, &mut payload) {
        assert!(payload.len() < plain.len());
        let mut decoded = vec![0x5a; plain.len()];
        decode_lz4_blocks(&payload, &mut decoded).expect("own output decodes");
        assert!(decoded == plain, "LZ4 blocks changed the bytes");
    } else {
        assert!(payload.is_empty());
    }
}

/// Encodes a page made of one half of `data` against a base made of the other, with encodings that the first byte selects;
/// and the data, as they are and again and again, as LZ4 blocks.
///
/// # Panics
///
/// If levels disagree or the page does not come back, or the data do not.
pub fn fuzz_encode_page(data: &[u8]) {
    let [set, data @ ..] = data else { return };
    lz4_blocks_come_back(data);
    // It takes a hundred times as long as the rest.
    if data.len().is_multiple_of(16) {
        let len = AROUND_A_BLOCK + usize::from(*set);
        lz4_blocks_come_back(&data.iter().copied().cycle().take(len).collect::<Vec<_>>());
    }
    let allowed = EncodingSet::ALL.bits() & u16::from(*set) | EncodingSet::RAW.bits();
    let allowed = EncodingSet::from_bits(allowed).expect("known bits and raw");
    let (page, base) = data.split_at(data.len() / 2);
    let (page, base) = (repeat(page), repeat(base));
    let base = (set & 0x80 == 0).then_some(&base);
    let mut reference = None;
    for kernels in all_kernels() {
        let mut payload = Vec::new();
        let encoding = PageEncoder::with_kernels(kernels, allowed).encode(&page, base, &mut payload);
        let mut decoded = Page([0x5a; PAGE_SIZE]);
        decode_with(kernels, encoding, &payload, base, &mut decoded).expect("own output decodes");
        assert!(decoded == page, "{encoding} at {} changed the page", kernels.simd());
        let result = (encoding, payload);
        assert_eq!(reference.get_or_insert_with(|| result.clone()), &result, "at {}", kernels.simd());
    }
}

/// Decodes `data` as a batch: a count, that many tags and lengths, and a payload.
///
/// # Panics
///
/// If a batch decodes whose pages do not hash to its hash, or the validation says something else than the decoder.
pub fn fuzz_decode_batch(data: &[u8]) {
    let [count, data @ ..] = data else { return };
    let count = usize::from(count % 32);
    let Some((tables, payload)) = data.split_at_checked(3 * count + 8) else { return };
    let (hash, tables) = tables.split_at(8);
    let (tags, lens) = tables.split_at(count);
    let encoded = EncodedBatch {
        encodings: tags.iter().map(|tag| Encoding::ALL[usize::from(*tag) % Encoding::ALL.len()]).collect(),
        lens: lens.as_chunks::<2>().0.iter().map(|len| u16::from_le_bytes(*len)).collect(),
        payload: payload.to_vec(),
        plain_hash: hash.iter().fold(0, |hash, &byte| hash << 8 | u64::from(byte)),
    };
    let bases = vec![Page([0x33; PAGE_SIZE]); encoded.encodings.iter().filter(|e| e.needs_base()).count()];
    let valid = validate_batch(EncodingSet::ALL, 24, &encoded, bases.len());
    for kernels in all_kernels() {
        let mut pages = Vec::new();
        let decoded = decode_batch(kernels, EncodingSet::ALL, 24, &encoded, bases.iter(), &mut pages);
        if decoded.is_ok() {
            assert_eq!(crate::plain_hash(&pages), encoded.plain_hash);
        }
        let but_for_the_hash = match decoded {
            Err(DecodeError::HashMismatch { .. }) => Ok(()),
            other => other,
        };
        assert_eq!(valid, but_for_the_hash, "at {}", kernels.simd());
    }
}

/// Reads `data` as a container, with and without a base image; and again with a header that fits.
///
/// # Panics
///
/// If what was read is not as long as the container says.
pub fn fuzz_container(data: &[u8]) {
    for container in [Some(data.to_vec()), container::with_fitting_header(data)].into_iter().flatten() {
        let mut image = Vec::new();
        if let Ok(summary) = container::read(&mut &container[..], None, &mut image) {
            assert_eq!(image.len() as u64, summary.pages * PAGE_SIZE as u64);
            assert_eq!(summary.container_bytes, container.len() as u64);
        }
        let _ = container::read(&mut &container[..], Some(&mut io::repeat(0x33)), &mut io::sink());
    }
}
