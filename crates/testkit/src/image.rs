//! Page images: pages that look like real memory, and pages made to be hard on encoders.

use pagewarp_codec::{PAGE_SIZE, Page};

use crate::rng::SplitMix64;

/// Bytes in a line of the `sparse` encoding.
const LINE: usize = 64;

/// What a generated page looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageKind {
    /// All zero.
    Zero,
    /// Words, numbers and punctuation.
    Text,
    /// Allocator headers, pointers, small integers, short strings, padding.
    Heap,
    /// An array of 64-bit floats of similar size: high bytes repeat, low bytes do not.
    Floats,
    /// Incompressible.
    Random,
    /// Mostly zero, with 1 to 64 non-zero bytes.
    Sparse,
    /// Every other byte is zero: the worst case for byte masks.
    Alternating,
    /// Every line holds exactly one byte: the worst case for line masks.
    AlmostZeroLines,
    /// No zero byte anywhere, and little else to find.
    NoZeroByte,
    /// Four-byte matches at the smallest useful distances, with literals between them: LZ4 gains as little as it can.
    Lz4ShortMatches,
    /// Literal and match lengths at the edges of LZ4's length bytes (15, 270, 525 ...).
    Lz4LengthEdges,
}

impl PageKind {
    /// Every kind.
    pub const ALL: [PageKind; 11] = [
        PageKind::Zero,
        PageKind::Text,
        PageKind::Heap,
        PageKind::Floats,
        PageKind::Random,
        PageKind::Sparse,
        PageKind::Alternating,
        PageKind::AlmostZeroLines,
        PageKind::NoZeroByte,
        PageKind::Lz4ShortMatches,
        PageKind::Lz4LengthEdges,
    ];
}

/// Generates one page.
pub fn page(kind: PageKind, rng: &mut SplitMix64) -> Page {
    let mut page = Page::ZERO;
    let bytes = &mut page.0;
    match kind {
        PageKind::Zero => {}
        PageKind::Text => text(bytes, rng),
        PageKind::Heap => heap(bytes, rng),
        PageKind::Floats => floats(bytes, rng),
        PageKind::Random => rng.fill(bytes),
        PageKind::Sparse => {
            for _ in 0..=rng.below(64) {
                bytes[rng.index(PAGE_SIZE)] = rng.byte() | 1;
            }
        }
        PageKind::Alternating => {
            let first = rng.index(2);
            bytes.iter_mut().skip(first).step_by(2).for_each(|b| *b = rng.byte() | 1);
        }
        PageKind::AlmostZeroLines => {
            bytes.chunks_mut(LINE).for_each(|line| line[rng.index(LINE)] = rng.byte() | 1);
        }
        PageKind::NoZeroByte => bytes.iter_mut().for_each(|b| *b = rng.byte() | 1),
        PageKind::Lz4ShortMatches => short_matches(bytes, rng),
        PageKind::Lz4LengthEdges => length_edges(bytes, rng),
    }
    page
}

/// The pages that have exactly one non-zero byte, one page per position, in order.
pub fn single_byte_pages() -> impl Iterator<Item = Page> {
    (0..PAGE_SIZE).map(|position| {
        let mut page = Page::ZERO;
        page.0[position] = (position % 255) as u8 + 1;
        page
    })
}

/// An image of `pages` pages in the proportions of an in-memory store's heap: 30 % zero, 30 % heap, 20 % text, 10 % sparse, 5 % floats, 5 %
/// random. LZ4 makes it about 2.4 times smaller, its non-zero pages about 1.7 times.
pub fn mixed_image(pages: usize, seed: u64) -> Vec<Page> {
    (0..pages as u64).map(|number| mixed_page(number, seed)).collect()
}

/// Page `number` of the [`mixed_image`] with this seed.
pub fn mixed_page(number: u64, seed: u64) -> Page {
    let mut rng = SplitMix64::new(seed ^ crate::rng::mix(number + 1));
    let kind = match rng.below(100) {
        0..30 => PageKind::Zero,
        30..60 => PageKind::Heap,
        60..80 => PageKind::Text,
        80..90 => PageKind::Sparse,
        90..95 => PageKind::Floats,
        _ => PageKind::Random,
    };
    page(kind, &mut rng)
}

/// How a page differs from its base.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mutation {
    /// Not at all: dirtied, not changed.
    Nothing,
    /// One aligned 64-bit counter goes up by one.
    Counter,
    /// This many bytes at random places get another value; fewer if a place is drawn an even number of times.
    Bytes(usize),
    /// This share of all bytes, 0.0 to 1.0, gets another value.
    Share(f64),
    /// One run of this many bytes is overwritten at a random place.
    Run(usize),
    /// The page is overwritten with another page of this kind.
    Replace(PageKind),
}

/// Changes `page` in place.
pub fn mutate(page: &mut Page, mutation: Mutation, rng: &mut SplitMix64) {
    match mutation {
        Mutation::Nothing => {}
        Mutation::Counter => {
            let at = rng.index(PAGE_SIZE / 8) * 8;
            let mut word = [0; 8];
            word.copy_from_slice(&page.0[at..at + 8]);
            page.0[at..at + 8].copy_from_slice(&u64::from_le_bytes(word).wrapping_add(1).to_le_bytes());
        }
        Mutation::Bytes(count) => {
            for _ in 0..count {
                page.0[rng.index(PAGE_SIZE)] ^= rng.byte() | 1;
            }
        }
        Mutation::Share(share) => {
            for byte in &mut page.0 {
                if rng.unit() < share {
                    *byte ^= rng.byte() | 1;
                }
            }
        }
        Mutation::Run(length) => {
            let length = length.min(PAGE_SIZE);
            let at = rng.index(PAGE_SIZE - length + 1);
            rng.fill(&mut page.0[at..at + length]);
        }
        Mutation::Replace(kind) => *page = self::page(kind, rng),
    }
}

/// Copies as much of `piece` as fits to `*at` and moves on.
fn put(bytes: &mut [u8; PAGE_SIZE], at: &mut usize, piece: &[u8]) {
    let length = piece.len().min(PAGE_SIZE - *at);
    bytes[*at..*at + length].copy_from_slice(&piece[..length]);
    *at += length;
}

fn text(bytes: &mut [u8; PAGE_SIZE], rng: &mut SplitMix64) {
    const SYLLABLES: [&str; 24] = [
        "al", "ber", "con", "da", "en", "fi", "gra", "hi", "in", "ka", "lo", "mi", "nor", "o", "pre", "qua",
        "re", "sta", "ti", "un", "ver", "wa", "yo", "ze",
    ];
    let mut at = 0;
    while at < PAGE_SIZE {
        match rng.below(8) {
            0 => put(bytes, &mut at, rng.below(1_000_000).to_string().as_bytes()),
            // Common words come often, as in real text.
            1..4 => put(bytes, &mut at, ["the", "and", "user:", "value", "null"][rng.index(5)].as_bytes()),
            _ => {
                for _ in 0..=rng.below(3) {
                    put(bytes, &mut at, SYLLABLES[rng.index(SYLLABLES.len())].as_bytes());
                }
            }
        }
        put(bytes, &mut at, [" ", " ", " ", ", ", ".\n"][rng.index(5)].as_bytes());
    }
}

fn heap(bytes: &mut [u8; PAGE_SIZE], rng: &mut SplitMix64) {
    let arena = 0x7f00_0000_0000 | (rng.below(1 << 16) << 24);
    let mut at = 0;
    while at < PAGE_SIZE {
        let size = 32 + 16 * rng.below(5);
        put(bytes, &mut at, &(size | 1).to_le_bytes());
        for _ in 1..size / 8 {
            let word = match rng.below(8) {
                0..3 => arena | (rng.below(1 << 20) << 4),
                3..5 => rng.below(1000),
                5 => rng.next_u64() & 0x3f3f_3f3f_3f3f_3f3f | 0x4040_4040_4040_4040,
                _ => 0,
            };
            put(bytes, &mut at, &word.to_le_bytes());
        }
    }
}

fn floats(bytes: &mut [u8; PAGE_SIZE], rng: &mut SplitMix64) {
    for word in bytes.chunks_exact_mut(8) {
        word.copy_from_slice(&(1.0e-6 * (1.0 + rng.unit())).to_le_bytes());
    }
}

fn short_matches(bytes: &mut [u8; PAGE_SIZE], rng: &mut SplitMix64) {
    rng.fill(bytes);
    let mut at = 16;
    while at + 12 <= PAGE_SIZE {
        let distance = 5 + rng.index(at.min(64) - 5);
        bytes.copy_within(at - distance..at - distance + 4, at);
        at += 5 + rng.index(7);
    }
}

fn length_edges(bytes: &mut [u8; PAGE_SIZE], rng: &mut SplitMix64) {
    const EDGES: [usize; 9] = [4, 14, 15, 16, 18, 19, 269, 270, 525];
    let mut at = 0;
    while at < PAGE_SIZE {
        let literals = EDGES[rng.index(EDGES.len())].min(PAGE_SIZE - at);
        rng.fill(&mut bytes[at..at + literals]);
        at += literals;
        // A run of one byte is a match that overlaps itself at distance 1.
        let run = EDGES[rng.index(EDGES.len())].min(PAGE_SIZE - at);
        let byte = rng.byte();
        bytes[at..at + run].fill(byte);
        at += run;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn non_zero(page: &Page) -> usize {
        page.0.iter().filter(|&&b| b != 0).count()
    }

    fn differences(a: &Page, b: &Page) -> usize {
        a.0.iter().zip(&b.0).filter(|(x, y)| x != y).count()
    }

    #[test]
    fn the_same_seed_gives_the_same_pages_and_another_seed_others() {
        for kind in PageKind::ALL {
            let first = page(kind, &mut SplitMix64::new(5));
            assert_eq!(first, page(kind, &mut SplitMix64::new(5)), "{kind:?}");
            assert!(kind == PageKind::Zero || first != page(kind, &mut SplitMix64::new(6)), "{kind:?}");
        }
        assert_eq!(mixed_image(200, 1), mixed_image(200, 1));
        assert_ne!(mixed_image(200, 1), mixed_image(200, 2));
        assert_eq!(mixed_image(200, 1)[77], mixed_page(77, 1));
    }

    #[test]
    fn kinds_are_what_they_say() {
        let mut rng = SplitMix64::new(9);
        for _ in 0..50 {
            assert_eq!(non_zero(&page(PageKind::Zero, &mut rng)), 0);
            assert!((1..=64).contains(&non_zero(&page(PageKind::Sparse, &mut rng))));
            assert_eq!(non_zero(&page(PageKind::Alternating, &mut rng)), PAGE_SIZE / 2);
            assert_eq!(non_zero(&page(PageKind::NoZeroByte, &mut rng)), PAGE_SIZE);
            let lines = page(PageKind::AlmostZeroLines, &mut rng);
            assert!(lines.0.chunks(LINE).all(|line| line.iter().filter(|&&b| b != 0).count() == 1));
            assert!(page(PageKind::Text, &mut rng).0.iter().all(u8::is_ascii));
        }
    }

    #[test]
    fn every_position_has_its_single_byte_page() {
        let pages: Vec<Page> = single_byte_pages().collect();
        assert_eq!(pages.len(), PAGE_SIZE);
        assert!(pages.iter().enumerate().all(|(at, page)| page.0[at] != 0 && non_zero(page) == 1));
    }

    #[test]
    fn a_mixed_image_keeps_its_proportions() {
        let image = mixed_image(2000, 3);
        let zero = image.iter().filter(|page| **page == Page::ZERO).count();
        assert!((500..700).contains(&zero), "{zero} of 2000 pages are zero, 600 were meant");
    }

    #[test]
    fn mutations_change_what_they_say() {
        let mut rng = SplitMix64::new(11);
        let base = page(PageKind::Heap, &mut rng);
        let mut changed = |mutation| {
            let mut copy = base;
            mutate(&mut copy, mutation, &mut rng);
            differences(&base, &copy)
        };
        assert_eq!(changed(Mutation::Nothing), 0);
        assert!((1..=8).contains(&changed(Mutation::Counter)));
        assert!((1..=10).contains(&changed(Mutation::Bytes(10))));
        assert!((20..80).contains(&changed(Mutation::Share(0.01))));
        assert!((1..=100).contains(&changed(Mutation::Run(100))));
        assert!(changed(Mutation::Run(PAGE_SIZE * 2)) > PAGE_SIZE / 2);
        assert!(changed(Mutation::Replace(PageKind::Random)) > PAGE_SIZE / 2);
    }
}
