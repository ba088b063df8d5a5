//! Pages of many kinds, for property tests.

use pagewarp_codec::{PAGE_SIZE, Page, Simd};
use proptest::collection::vec;
use proptest::prelude::*;

/// Every SIMD level of this machine. Says loudly which ones go untested.
///
/// With `PAGEWARP_REQUIRE_AVX512=1` a machine that lacks a level fails the test.
pub(crate) fn simd_levels() -> Vec<Simd> {
    let levels = Simd::available();
    let missing: Vec<_> = Simd::ALL.into_iter().filter(|simd| !levels.contains(simd)).collect();
    if !missing.is_empty() {
        eprintln!("NOT TESTED: this machine lacks {missing:?}");
        assert_ne!(
            std::env::var("PAGEWARP_REQUIRE_AVX512").as_deref(),
            Ok("1"),
            "PAGEWARP_REQUIRE_AVX512 is set, but this machine lacks {missing:?}"
        );
    }
    levels
}

/// Distinct pages that do not compress.
pub(crate) fn noise(seed: u64) -> Page {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    Page(std::array::from_fn(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    }))
}

/// A page in which these bytes are set.
fn page_of(bytes: &[(usize, u8)]) -> Page {
    let mut page = Page::ZERO;
    for &(at, value) in bytes {
        page.0[at] = value;
    }
    page
}

/// Pages of all densities and textures: zero, a few bytes, clustered bytes, text-like, structured, random.
pub(crate) fn page() -> impl Strategy<Value = Page> {
    let byte = (0..PAGE_SIZE, any::<u8>());
    prop_oneof![
        1 => Just(Page::ZERO),
        4 => vec(byte.clone(), 1..80).prop_map(|bytes| page_of(&bytes)),
        2 => vec(byte, 80..6000).prop_map(|bytes| page_of(&bytes)),
        2 => (0..PAGE_SIZE, vec(any::<u8>(), 1..600)).prop_map(|(start, bytes)| {
            let bytes: Vec<_> = bytes.into_iter().enumerate().map(|(i, b)| ((start + i) % PAGE_SIZE, b)).collect();
            page_of(&bytes)
        }),
        2 => (vec(any::<u8>(), 1..300), any::<u8>()).prop_map(|(pattern, noise)| {
            let mut page = Page::ZERO;
            for (i, byte) in page.0.iter_mut().enumerate() {
                *byte = pattern[i % pattern.len()] ^ if i % 251 == 0 { noise } else { 0 };
            }
            page
        }),
        2 => vec(any::<u8>(), PAGE_SIZE).prop_map(|bytes| Page(bytes.try_into().expect("a page of bytes"))),
        1 => any::<u8>().prop_map(|byte| Page([byte; PAGE_SIZE])),
    ]
}

/// A page and an earlier version of it: unrelated, equal, or with some bytes changed.
pub(crate) fn page_and_base() -> impl Strategy<Value = (Page, Page)> {
    prop_oneof![
        1 => (page(), page()),
        1 => page().prop_map(|page| (page, page)),
        4 => (page(), page()).prop_map(|(base, change)| {
            let mut page = base;
            page.0.iter_mut().zip(&change.0).for_each(|(byte, change)| *byte ^= change);
            (page, base)
        }),
    ]
}
