//! The test vectors of `docs/page-encodings.md` are true, and each of its tables is checked.

use pagewarp_codec::{
    Encoding, EncodingSet, PAGE_SIZE, Page, Simd, container, decode_page, encode_page, plain_hash,
};

use crate::common::simd_levels;

const DOC: &str = include_str!("../../../../docs/page-encodings.md");

/// The rows of the table under this heading, split into trimmed cells without back quotes.
fn rows(heading: &str) -> Vec<Vec<String>> {
    let start = DOC.find(heading).unwrap_or_else(|| panic!("no heading `{heading}`"));
    let lines =
        DOC[start..].lines().skip_while(|line| !line.starts_with('|')).take_while(|l| l.starts_with('|'));
    let rows: Vec<Vec<String>> = lines
        .skip(2)
        .map(|line| {
            line.trim_matches('|').split('|').map(|cell| cell.replace('`', "").trim().to_string()).collect()
        })
        .collect();
    assert!(!rows.is_empty(), "no rows under `{heading}`");
    rows
}

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).expect("ASCII"), 16).expect("hex");
    digits.chunks(2).map(byte).collect()
}

/// A page in the notation of the document: `fill=XX` and `offset=bytes`; `-` is no page.
fn page(text: &str) -> Option<Page> {
    if text == "-" {
        return None;
    }
    let mut page = Page::ZERO;
    for item in text.split_whitespace() {
        let (at, bytes) = item.split_once('=').expect("name=value");
        let bytes = hex(bytes);
        match at.parse::<usize>() {
            Ok(at) => page.0[at..at + bytes.len()].copy_from_slice(&bytes),
            Err(_) => page = Page([bytes[0]; PAGE_SIZE]),
        }
    }
    Some(page)
}

fn encoding(tag: &str) -> Encoding {
    Encoding::from_tag(tag.parse().expect("a number")).expect("a known tag")
}

#[test]
fn pages() {
    for row in rows("### Pages") {
        let [tag, plain, base, payload] = &row[..] else { panic!("four columns: {row:?}") };
        let (encoding, plain, base, payload) =
            (encoding(tag), page(plain).expect("a page"), page(base), hex(payload));
        for simd in simd_levels() {
            let mut decoded = Page([0x5a; PAGE_SIZE]);
            assert_eq!(decode_page(simd, encoding, &payload, base.as_ref(), &mut decoded), Ok(()), "{row:?}");
            assert!(decoded == plain, "{row:?}");
            if !matches!(encoding, Encoding::Lz4 | Encoding::Lz4Xor) {
                let mut encoded = Vec::new();
                let used =
                    encode_page(simd, EncodingSet::of(&[encoding]), &plain, base.as_ref(), &mut encoded);
                assert_eq!((used, encoded), (encoding, payload.clone()), "{row:?}");
            }
        }
    }
}

#[test]
fn rejected_pages() {
    for row in rows("### Pages that must be rejected") {
        let [tag, payload, _why] = &row[..] else { panic!("three columns: {row:?}") };
        for simd in simd_levels() {
            let mut decoded = Page::ZERO;
            let result = decode_page(simd, encoding(tag), &hex(payload), Some(&Page::ZERO), &mut decoded);
            assert!(result.is_err(), "{row:?}");
        }
    }
}

#[test]
fn hashes() {
    for row in rows("### Plain hashes") {
        let [pages, hash] = &row[..] else { panic!("two columns: {row:?}") };
        let pages: Vec<Page> = pages.split(',').filter_map(|text| page(text.trim())).collect();
        assert_eq!(format!("{:016x}", plain_hash(&pages)), *hash, "{row:?}");
    }
}

#[test]
fn a_container() {
    let heading = DOC.find("### A container").expect("the heading");
    let (_, rest) = DOC[heading..].split_once("```text\n").expect("a block");
    let (bytes, _) = rest.split_once("```").expect("the end of the block");
    let expected = hex(bytes);
    let mut image = vec![0; 2 * PAGE_SIZE];
    image[PAGE_SIZE] = 1;
    let mut written = Vec::new();
    container::write(&mut &image[..], None, 2, Simd::Scalar, EncodingSet::ALL, &mut written)
        .expect("in memory");
    let hex_of_written: Vec<_> = written.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(written, expected, "written: {}", hex_of_written.join(" "));
    let mut read = Vec::new();
    container::read(&mut &expected[..], None, &mut read).expect("valid");
    assert!(read == image);
}
