//! The container of encoded pages: round trips, and every way it can be wrong.

use std::io;

use crate::common::{page, page_and_base};
use pagewarp_codec::container::{self, ContainerError, Summary};
use pagewarp_codec::{DecodeError, Encoding, EncodingSet, PAGE_SIZE, Page, Simd, fuzzing};
use proptest::collection::vec;
use proptest::prelude::*;
use xxhash_rust::xxh3::xxh3_64;

const HEADER_LEN: usize = 40;

fn bytes(pages: &[Page]) -> Vec<u8> {
    pages.iter().flat_map(|page| page.0).collect()
}

fn write(image: &[u8], base: Option<&[u8]>) -> (Vec<u8>, Summary) {
    let mut out = Vec::new();
    let pages = container::pages_in("image", image.len() as u64).expect("whole pages");
    let mut base = base;
    let base = base.as_mut().map(|base| base as &mut dyn io::Read);
    let summary = container::write(&mut &*image, base, pages, Simd::detect(), EncodingSet::ALL, &mut out);
    (out, summary.expect("in memory"))
}

fn read(container: &[u8], base: Option<&[u8]>) -> Result<(Vec<u8>, Summary), ContainerError> {
    let mut out = Vec::new();
    let mut base = base;
    let base = base.as_mut().map(|base| base as &mut dyn io::Read);
    let summary = container::read(&mut &*container, base, &mut out)?;
    Ok((out, summary))
}

/// An image of many frames: zero pages, and pages with their number.
fn numbered(pages: usize) -> Vec<u8> {
    let page = |number: usize| {
        let mut page = Page::ZERO;
        page.0[..8].copy_from_slice(&(number as u64 * (number as u64 % 3)).to_le_bytes());
        page
    };
    bytes(&(0..pages).map(page).collect::<Vec<_>>())
}

/// A container whose header has these bytes at `at`, with the right header hash.
fn with_header(container: &[u8], at: usize, value: &[u8]) -> Vec<u8> {
    let mut changed = container.to_vec();
    changed[at..at + value.len()].copy_from_slice(value);
    let hash = xxh3_64(&changed[..32]);
    changed[32..40].copy_from_slice(&hash.to_le_bytes());
    changed
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn images_round_trip(pages in vec(page_and_base(), 0..12), base_pages in 0usize..14) {
        let (image, base): (Vec<_>, Vec<_>) = pages.into_iter().unzip();
        let (image, base) = (bytes(&image), bytes(&base));
        let (container, written) = write(&image, None);
        prop_assert_eq!(container.len() as u64, written.container_bytes);
        prop_assert_eq!(written.encodings.iter().map(|e| e.pages).sum::<u64>(), written.pages);
        prop_assert_eq!(read(&container, None).expect("valid"), (image.clone(), written));

        // The base may end early.
        let base = &base[..base.len().min(base_pages * PAGE_SIZE)];
        let (container, written) = write(&image, Some(base));
        prop_assert_eq!(read(&container, Some(base)).expect("valid"), (image, written));
        if written_without_base_is_refused(&container) {
            prop_assert!(matches!(read(&container, None), Err(ContainerError::NeedsBase)));
        }
    }

    #[test]
    fn damaged_containers_never_panic_and_never_pass(
        pages in vec(page(), 1..5),
        at in any::<prop::sample::Index>(),
        flip in 1u8..,
        cut in any::<prop::sample::Index>(),
    ) {
        let image = bytes(&pages);
        let (container, _) = write(&image, None);
        let cut = cut.index(container.len());
        prop_assert!(read(&container[..cut], None).is_err());
        let mut damaged = container;
        let at = at.index(damaged.len());
        damaged[at] ^= flip;
        if let Ok((decoded, _)) = read(&damaged, None) {
            // An LZ4 block can be changed without changing what it decodes to.
            prop_assert_eq!(decoded, image);
            prop_assert!(at >= HEADER_LEN);
        }
    }

    #[test]
    fn any_bytes_keep_every_promise(data in vec(any::<u8>(), 0..600)) {
        fuzzing::fuzz_container(&data);
        fuzzing::fuzz_decode_page(&data);
        fuzzing::fuzz_encode_page(&data);
        fuzzing::fuzz_decode_batch(&data);
        // Behind a valid header, so that frames are reached.
        let (valid, _) = write(&numbered(300), Some(&numbered(0)));
        fuzzing::fuzz_container(&[&valid[..HEADER_LEN], &data].concat());
    }
}

/// Whether the container says that it needs a base.
fn written_without_base_is_refused(container: &[u8]) -> bool {
    container[10] == 1
}

#[test]
fn frames_have_256_pages_and_the_last_one_the_rest() {
    for pages in [0, 1, 255, 256, 257, 700] {
        let image = numbered(pages);
        let (container, written) = write(&image, None);
        assert_eq!(written.pages, pages as u64);
        let (decoded, summary) = read(&container, None).expect("valid");
        assert!(decoded == image);
        assert_eq!(summary, written);
        if pages > 0 {
            let first =
                u32::from_le_bytes(container[HEADER_LEN..HEADER_LEN + 4].try_into().expect("4 bytes"));
            assert_eq!(first as usize, pages.min(256));
        } else {
            assert_eq!(container.len(), HEADER_LEN);
        }
    }
}

#[test]
fn malformed_headers_are_rejected_with_the_field() {
    let (container, _) = write(&numbered(3), None);
    for (at, value, expected) in [
        (10, &[2, 0][..], "flags"),
        (12, &[0, 0x20, 0, 0], "page size"),
        (16, &[1, 0, 0, 0, 0, 1, 0, 0], "number of pages"),
        (24, &[0, 0, 0, 0], "pages per batch"),
        (24, &[1, 0x10, 0, 0], "pages per batch"),
        (28, &[0, 0], "set of encodings"),
        (28, &[0x84, 0], "set of encodings"),
        (28, &[0x06, 0], "set of encodings"),
        (30, &[1, 0], "reserved field"),
    ] {
        match read(&with_header(&container, at, value), None) {
            Err(ContainerError::Header { field, .. }) => assert_eq!(field, expected),
            other => panic!("{expected}: {other:?}"),
        }
    }
    let mut damaged = container.clone();
    damaged[33] ^= 1;
    assert!(matches!(read(&damaged, None), Err(ContainerError::Header { field: "header hash", .. })));
    let version = with_header(&container, 8, &[2, 0]);
    assert!(matches!(read(&version, None), Err(ContainerError::Version { seen: 2 })));
    for not_ours in [&b""[..], b"PWPAGES\0", b"QEVM\0\0\0\x03 and so on and so on, much longer than 40 bytes"]
    {
        assert!(matches!(read(not_ours, None), Err(ContainerError::NotAContainer { .. })));
    }
}

#[test]
fn malformed_frames_are_rejected_with_the_field() {
    let (container, _) = write(&numbered(300), None);
    let frame = |at: usize, value: u8| {
        let mut changed = container.clone();
        changed[HEADER_LEN + at] = value;
        read(&changed, None).expect_err("malformed")
    };
    assert!(matches!(frame(0, 1), ContainerError::Frame { first_page: 0, field: "number of pages", .. }));
    assert!(matches!(frame(7, 1), ContainerError::Frame { field: "payload length", .. }));
    assert!(matches!(frame(16 + 9, 7), ContainerError::Frame { field: "tag of a page", seen: 7, .. }));
    let payload = DecodeError::PayloadLength { seen: 0, expected: 0 };
    assert!(matches!(frame(4, 0xff), ContainerError::Decode { source, .. } if same_kind(&source, &payload)));
    let hash = DecodeError::HashMismatch { seen: 0, expected: 0 };
    assert!(matches!(frame(8, 0xff), ContainerError::Decode { source, .. } if same_kind(&source, &hash)));

    let trailing = [&container[..], &[0]].concat();
    assert!(matches!(read(&trailing, None), Err(ContainerError::TrailingBytes)));
    for cut in [HEADER_LEN, HEADER_LEN + 10, container.len() - 1] {
        assert!(matches!(
            read(&container[..cut], None),
            Err(ContainerError::Truncated { what: "container", expected: 300, .. })
        ));
    }
}

fn same_kind(seen: &DecodeError, expected: &DecodeError) -> bool {
    std::mem::discriminant(seen) == std::mem::discriminant(expected)
}

#[test]
fn a_wrong_base_or_image_is_rejected() {
    let image = numbered(300);
    let base: Vec<u8> = image.iter().enumerate().map(|(i, byte)| byte ^ u8::from(i % 4096 == 9)).collect();
    let (container, summary) = write(&image, Some(&base));
    let xor = summary.encodings[usize::from(Encoding::SparseXor.tag())];
    assert_eq!((xor.pages, xor.bytes), (200, 200 * 17));
    assert!(read(&container, Some(&base)).expect("valid").0 == image);
    let error = read(&container, Some(&image)).expect_err("wrong base");
    assert!(
        matches!(error, ContainerError::Decode { source: DecodeError::HashMismatch { .. }, .. }),
        "{error}"
    );
    let error = read(&container, Some(&base[..4096 * 299])).expect_err("short base");
    assert!(matches!(error, ContainerError::Decode { source: DecodeError::Bases { .. }, .. }), "{error}");
    let error = read(&container, Some(&base[..base.len() - 1])).expect_err("ragged base");
    assert!(matches!(error, ContainerError::NotPages { what: "base image", .. }), "{error}");

    let write = |image: &[u8], pages| {
        container::write(&mut &*image, None, pages, Simd::detect(), EncodingSet::ALL, &mut io::sink())
    };
    let error = write(&image, 301).expect_err("short image");
    assert!(
        matches!(error, ContainerError::Truncated { what: "image", pages: 300, expected: 301 }),
        "{error}"
    );
    let error = write(&image[..5000], 2).expect_err("ragged image");
    assert!(matches!(error, ContainerError::NotPages { what: "image", bytes: 5000 }), "{error}");
    assert!(container::pages_in("image", 4097).is_err());
}
