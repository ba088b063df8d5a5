//! How fast and how well pages are encoded: the measurement behind `pagewarp codec bench`.

use std::hint::black_box;
use std::time::{Duration, Instant};

use crate::backend::{BackendError, EncodedBatch};
use crate::decode::decode_batch;
use crate::encode::{PageEncoder, encode_batch};
use crate::encoding::{Encoding, EncodingSet};
use crate::page::{PAGE_SIZE, Page};
use crate::simd::{Kernels, Simd};

/// Pages in a batch while measuring.
const BATCH_PAGES: usize = 256;

/// Pages that are measured together, 64 MiB: more than caches hold, little enough to keep their encoded form in memory.
const SEGMENT_PAGES: usize = 64 * BATCH_PAGES;

/// Pages and bytes of one encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncodingCount {
    /// The encoding.
    pub encoding: Encoding,
    /// Pages that got it.
    pub pages: u64,
    /// Bytes of their payloads.
    pub bytes: u64,
}

impl EncodingCount {
    /// One count per encoding, in tag order, of nothing yet.
    pub fn none() -> [EncodingCount; Encoding::ALL.len()] {
        Encoding::ALL.map(|encoding| EncodingCount { encoding, pages: 0, bytes: 0 })
    }

    /// Adds the pages of a batch to counts in tag order.
    pub fn add(counts: &mut [EncodingCount], encoded: &EncodedBatch) {
        for (encoding, &len) in encoded.encodings.iter().zip(&encoded.lens) {
            let count = &mut counts[usize::from(encoding.tag())];
            count.pages += 1;
            count.bytes += u64::from(len);
        }
    }

    /// Bytes of all pages on the wire: payloads, one tag byte and two length bytes per page.
    pub fn wire_bytes(counts: &[EncodingCount]) -> u64 {
        counts.iter().map(|count| count.bytes + 3 * count.pages).sum()
    }
}

/// What [`bench()`] measured. GB/s are 10^9 bytes of plain pages per second, on one core,
/// the best round of each 64 MiB.
#[derive(Clone, Debug)]
pub struct BenchReport {
    /// Pages of the image.
    pub pages: u64,
    /// One entry per encoding, in tag order, also where no page got it.
    pub encodings: Vec<EncodingCount>,
    /// Plain bytes divided by encoded bytes (payloads, one tag byte and two length bytes per page).
    pub ratio: f64,
    /// Encoding with hash, in batches of 256 pages.
    pub encode_gb_per_s: f64,
    /// Decoding with verification of the hash, in batches of 256 pages.
    pub decode_gb_per_s: f64,
    /// Copying the pages once, page by page, into another buffer.
    pub memcpy_gb_per_s: f64,
    /// Whether every page came back as it was.
    pub verified: bool,
}

/// Plain bytes per second of the best round, in 10^9.
fn gb_per_s(pages: usize, best: Duration) -> f64 {
    if pages == 0 { 0.0 } else { (pages * PAGE_SIZE) as f64 / best.as_secs_f64().max(1e-9) / 1e9 }
}

/// Runs `f` `rounds` times (at least once) and returns the shortest time.
fn best_of(rounds: usize, mut f: impl FnMut()) -> Duration {
    (0..rounds.max(1))
        .map(|_| {
            let start = Instant::now();
            f();
            start.elapsed()
        })
        .min()
        .unwrap_or_default()
}

/// Encodes and decodes the image in memory, each part of it `rounds` times, and verifies the round trip.
///
/// The base of page k is `base[k]`; pages beyond the end of the base have none. Besides image and base it takes at most
/// 128 MiB, whatever their size.
///
/// # Errors
///
/// [`BackendError::Unavailable`] if this machine lacks the SIMD level; [`BackendError::Peer`] if what was encoded does not
/// decode, which is a bug or a memory fault.
pub fn bench(
    image: &[Page],
    base: Option<&[Page]>,
    simd: Simd,
    allowed: EncodingSet,
    rounds: usize,
) -> Result<BenchReport, BackendError> {
    let kernels = Kernels::new(simd).ok_or_else(|| BackendError::Unavailable {
        device: format!("cpu ({simd})"),
        reason: format!("this machine has no {simd}; use {}", Simd::detect()),
    })?;
    let mut encoder = PageEncoder::with_kernels(kernels, allowed);
    let mut encodings = EncodingCount::none();
    let mut verified = true;
    let (mut memcpy, mut encode, mut decode) = (Duration::ZERO, Duration::ZERO, Duration::ZERO);
    let mut batches = vec![EncodedBatch::default(); SEGMENT_PAGES / BATCH_PAGES];
    let mut copy = vec![Page::ZERO; SEGMENT_PAGES.min(image.len())];
    let mut pages = Vec::with_capacity(BATCH_PAGES);

    for (number, segment) in image.chunks(SEGMENT_PAGES).enumerate() {
        memcpy += best_of(rounds, || {
            for (to, from) in copy.iter_mut().zip(segment) {
                to.0.copy_from_slice(&from.0);
            }
            black_box(&mut copy);
        });
        let base_of = |batch: usize, page: usize| {
            base.and_then(|base| base.get(number * SEGMENT_PAGES + batch * BATCH_PAGES + page))
        };
        encode += best_of(rounds, || {
            for (batch, (plain, encoded)) in segment.chunks(BATCH_PAGES).zip(&mut batches).enumerate() {
                encode_batch(&mut encoder, plain, |page| base_of(batch, page), encoded);
            }
        });
        let bases: Vec<Vec<&Page>> = (segment.chunks(BATCH_PAGES).zip(&batches).enumerate())
            .map(|(batch, (_, encoded))| {
                let pages = encoded.encodings.iter().enumerate();
                pages.filter(|(_, e)| e.needs_base()).filter_map(|(page, _)| base_of(batch, page)).collect()
            })
            .collect();
        let mut decoded = Ok(());
        decode += best_of(rounds, || {
            for (encoded, bases) in batches.iter().zip(&bases) {
                let bases = bases.iter().copied();
                let result = decode_batch(kernels, allowed, BATCH_PAGES, encoded, bases, &mut pages);
                decoded = std::mem::replace(&mut decoded, Ok(())).and(result);
            }
        });
        decoded?;
        for ((encoded, bases), plain) in batches.iter().zip(&bases).zip(segment.chunks(BATCH_PAGES)) {
            decode_batch(kernels, allowed, BATCH_PAGES, encoded, bases.iter().copied(), &mut pages)?;
            verified &= pages == plain;
            EncodingCount::add(&mut encodings, encoded);
        }
    }
    let encoded_bytes = EncodingCount::wire_bytes(&encodings);
    Ok(BenchReport {
        pages: image.len() as u64,
        encodings: encodings.to_vec(),
        ratio: if image.is_empty() { 1.0 } else { size_of_val(image) as f64 / encoded_bytes as f64 },
        encode_gb_per_s: gb_per_s(image.len(), encode),
        decode_gb_per_s: gb_per_s(image.len(), decode),
        memcpy_gb_per_s: gb_per_s(image.len(), memcpy),
        verified,
    })
}
