//! What must be true of an encoded batch, whoever encoded it.

use pagewarp_codec::{EncodedBatch, Encoding, EncodingSet, Page, PageEncoder, Simd, plain_hash};

use super::At;
use super::jobs::Batch;
use super::lz4_block::check_end_of_block;

/// A form of at most so many bytes may be taken without looking for a smaller one (`docs/page-encodings.md`, section 8).
const SMALL_ENOUGH: usize = 512;

/// Checks what a backend chose and wrote against what the reference does.
pub(super) struct Checker {
    chosen: PageEncoder,
    sparse: PageEncoder,
    sparse_xor: PageEncoder,
    without_lz4: PageEncoder,
    without_base: PageEncoder,
}

impl Checker {
    pub(super) fn new(allowed: EncodingSet) -> Checker {
        use Encoding::{Same, Sparse, SparseXor, Zero};
        let encoder = |set| PageEncoder::new(Simd::Scalar, set).expect("every machine can do without SIMD");
        let without_base = EncodingSet::of(&[Zero, Sparse]).intersection(allowed);
        let without_lz4 = EncodingSet::of(&[Zero, Same, Sparse, SparseXor]).intersection(allowed);
        Checker {
            chosen: encoder(allowed),
            sparse: encoder(EncodingSet::of(&[Sparse])),
            sparse_xor: encoder(EncodingSet::of(&[SparseXor])),
            without_lz4: encoder(without_lz4),
            without_base: encoder(without_base),
        }
    }

    /// Panics if the batch is not a right and reasonable form of its pages. `bases_used`: every base must have been looked at.
    pub(super) fn check(&mut self, at: &At<'_>, batch: &Batch, encoded: &EncodedBatch, bases_used: bool) {
        let count = batch.plain.len();
        let seen = (encoded.encodings.len(), encoded.lens.len());
        assert_eq!(seen, (count, count), "{at}: encodings and lengths of {count} pages");
        let sum: usize = encoded.lens.iter().map(|&len| usize::from(len)).sum();
        assert_eq!(encoded.payload.len(), sum, "{at}: the payload is as long as its pages");
        assert_eq!(encoded.plain_hash, plain_hash(&batch.plain), "{at}: hash of the plain pages");
        let mut payload = &encoded.payload[..];
        for index in 0..count {
            let (this, rest) = payload.split_at(usize::from(encoded.lens[index]));
            payload = rest;
            let base = batch.bases[index].as_ref();
            let page = PageAt { at, index, encoding: encoded.encodings[index] };
            self.check_page(&page, &batch.plain[index], base, this, bases_used);
        }
    }

    fn check_page(
        &mut self,
        page: &PageAt<'_>,
        plain: &Page,
        base: Option<&Page>,
        payload: &[u8],
        base_used: bool,
    ) {
        let encoding = page.encoding;
        assert!(page.at.allowed.contains(encoding), "{page}: not allowed");
        assert!(base.is_some() || !encoding.needs_base(), "{page}: the page has no base");
        let (expected, _) = run(&mut self.chosen, plain, base);
        assert_eq!(encoding == Encoding::Zero, expected == Encoding::Zero, "{page}: {expected} is right");
        if base_used || encoding == Encoding::Same {
            assert_eq!(encoding == Encoding::Same, expected == Encoding::Same, "{page}: {expected} is right");
        }
        let canonical = match encoding {
            Encoding::Sparse => Some(run(&mut self.sparse, plain, None)),
            Encoding::SparseXor => Some(run(&mut self.sparse_xor, plain, base)),
            Encoding::Raw => Some((Encoding::Raw, plain.0.to_vec())),
            _ => None,
        };
        if let Some(canonical) = canonical {
            assert!(
                (encoding, payload) == (canonical.0, &canonical.1),
                "{page}: another payload than the reference"
            );
        }
        if let Encoding::Lz4 | Encoding::Lz4Xor = encoding {
            check_end_of_block(payload).unwrap_or_else(|reason| panic!("{page}: {reason}"));
        }
        let (simple, simple_payload) = match base_used {
            true => run(&mut self.without_lz4, plain, base),
            false => run(&mut self.without_base, plain, None),
        };
        let (seen, enough) = (payload.len(), simple_payload.len().max(SMALL_ENOUGH));
        assert!(seen <= enough, "{page}: {seen} bytes, {simple} has {}", simple_payload.len());
    }
}

fn run(encoder: &mut PageEncoder, page: &Page, base: Option<&Page>) -> (Encoding, Vec<u8>) {
    let mut payload = Vec::new();
    let encoding = encoder.encode(page, base, &mut payload);
    (encoding, payload)
}

/// Where in a test a page is.
struct PageAt<'a> {
    at: &'a At<'a>,
    index: usize,
    encoding: Encoding,
}

impl std::fmt::Display for PageAt<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, page {} as {}", self.at, self.index, self.encoding)
    }
}
