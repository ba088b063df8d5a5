//! A segment: a piece of the byte stream of one QEMU connection, taken apart so that it compresses well.
//!
//! The operations say how to put the bytes together again. Nothing in them knows of QEMU: whoever rebuilds the bytes needs no parser.

use pagewarp_codec::{PAGE_SIZE, Page};

/// One step of putting the bytes of a segment together. Words are big-endian, as everything that QEMU sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// The next so many literal bytes.
    Literal(u32),
    /// The next so many words.
    Words(u32),
    /// The next so many pages, one after another.
    Pages(u32),
    /// So many times: the next word, then the next page.
    PageRecords(u32),
    /// So many times: the next word, then a byte of zero.
    ZeroRecords(u32),
}

/// Where a page is in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    /// The number that [`Blocks`](crate::stream::Blocks) gave to the RAM block.
    pub block: u32,
    /// The page in the block.
    pub page: u64,
}

/// A piece of the stream of one connection.
#[derive(Clone, Debug, Default)]
pub struct Segment {
    /// How to put the bytes together.
    pub ops: Vec<Op>,
    /// Bytes that were not understood, or are not worth understanding.
    pub literals: Vec<u8>,
    /// Words: heads of records, offsets in packets.
    pub words: Vec<u64>,
    /// Pages of guest memory.
    pub pages: Vec<Page>,
    /// Where each page belongs; `None` where that is not known. As long as `pages` on the source, empty on the destination.
    pub places: Vec<Option<Place>>,
}

impl Segment {
    /// Empties the segment and keeps its buffers.
    pub fn clear(&mut self) {
        self.ops.clear();
        self.literals.clear();
        self.words.clear();
        self.pages.clear();
        self.places.clear();
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// How many bytes of the stream it stands for.
    pub fn stream_len(&self) -> usize {
        let zeros: usize =
            self.ops.iter().map(|op| if let Op::ZeroRecords(n) = op { *n as usize } else { 0 }).sum();
        self.literals.len() + 8 * self.words.len() + PAGE_SIZE * self.pages.len() + zeros
    }

    /// Appends bytes as they are.
    pub fn push_literal(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.literals.extend_from_slice(bytes);
        let len = bytes.len() as u32;
        match self.ops.last_mut() {
            Some(Op::Literal(n)) => *n += len,
            _ => self.ops.push(Op::Literal(len)),
        }
    }

    /// Appends a word without anything that belongs to it.
    pub fn push_word(&mut self, word: u64) {
        self.words.push(word);
        match self.ops.last_mut() {
            Some(Op::Words(n)) => *n += 1,
            _ => self.ops.push(Op::Words(1)),
        }
    }

    /// Appends a page with nothing before it. `bytes` must be of the length of a page.
    pub fn push_page(&mut self, place: Option<Place>, bytes: &[u8]) {
        self.take_page(place, bytes);
        match self.ops.last_mut() {
            Some(Op::Pages(n)) => *n += 1,
            _ => self.ops.push(Op::Pages(1)),
        }
    }

    /// Appends a word and the page that follows it. `bytes` must be of the length of a page.
    pub fn push_page_record(&mut self, head: u64, place: Option<Place>, bytes: &[u8]) {
        self.words.push(head);
        self.take_page(place, bytes);
        match self.ops.last_mut() {
            Some(Op::PageRecords(n)) => *n += 1,
            _ => self.ops.push(Op::PageRecords(1)),
        }
    }

    /// Appends a word and the zero byte that follows it.
    pub fn push_zero_record(&mut self, head: u64) {
        self.words.push(head);
        match self.ops.last_mut() {
            Some(Op::ZeroRecords(n)) => *n += 1,
            _ => self.ops.push(Op::ZeroRecords(1)),
        }
    }

    fn take_page(&mut self, place: Option<Place>, bytes: &[u8]) {
        self.pages.push(Page(bytes.try_into().expect("the caller passes a whole page")));
        self.places.push(place);
    }

    /// Calls `piece` with the bytes of the stream, piece by piece, in order.
    pub fn rebuild(&self, mut piece: impl FnMut(&[u8])) {
        let (mut literals, mut words, mut pages) = (&self.literals[..], self.words.iter(), self.pages.iter());
        let word = |words: &mut std::slice::Iter<'_, u64>| {
            words.next().expect("as many words as the operations take").to_be_bytes()
        };
        for &op in &self.ops {
            match op {
                Op::Literal(n) => {
                    let (head, rest) = literals.split_at(n as usize);
                    literals = rest;
                    piece(head);
                }
                Op::Words(n) => (0..n).for_each(|_| piece(&word(&mut words))),
                Op::Pages(n) => pages.by_ref().take(n as usize).for_each(|page| piece(&page.0)),
                Op::PageRecords(n) => {
                    for page in pages.by_ref().take(n as usize) {
                        piece(&word(&mut words));
                        piece(&page.0);
                    }
                }
                Op::ZeroRecords(n) => (0..n).for_each(|_| {
                    piece(&word(&mut words));
                    piece(&[0]);
                }),
            }
        }
    }
}
