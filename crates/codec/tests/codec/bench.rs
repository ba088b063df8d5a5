//! The measurement behind `pagewarp codec bench`: what it counts, not how fast it is.

use pagewarp_codec::{Encoding, EncodingSet, PAGE_SIZE, Page, Simd, bench};

#[test]
fn a_bench_counts_pages_and_verifies_them() {
    let base = vec![Page([7; PAGE_SIZE]); 500];
    let mut image = vec![Page([7; PAGE_SIZE]); 600];
    image[..100].fill(Page::ZERO);
    image[100..200].iter_mut().for_each(|page| page.0[9] = 1);
    let report = bench(&image, Some(&base), Simd::Scalar, EncodingSet::ALL, 1).expect("scalar is there");
    assert!(report.verified);
    assert_eq!(report.pages, 600);
    let pages = |encoding: Encoding| report.encodings[usize::from(encoding.tag())].pages;
    assert_eq!((pages(Encoding::Zero), pages(Encoding::SparseXor), pages(Encoding::Same)), (100, 100, 300));
    // Pages beyond the end of the base.
    assert_eq!(pages(Encoding::Lz4), 100);
    let bytes: u64 = report.encodings.iter().map(|count| count.bytes + 3 * count.pages).sum();
    assert_eq!(report.ratio, (600 * PAGE_SIZE) as f64 / bytes as f64);
    assert!(report.encode_gb_per_s > 0.0 && report.decode_gb_per_s > 0.0 && report.memcpy_gb_per_s > 0.0);
}

#[test]
fn a_bench_of_nothing_is_fine() {
    let report = bench(&[], None, Simd::detect(), EncodingSet::RAW, 3).expect("detected");
    assert_eq!((report.pages, report.ratio, report.verified), (0, 1.0, true));
}
