//! A segment: a piece of the byte stream of one QEMU connection, taken apart so that it compresses well.
//!
//! The operations say how to put the bytes together again. Nothing in them knows of QEMU: whoever rebuilds the bytes needs no parser.

use std::io::IoSlice;

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
        self.clear_but_pages();
        self.pages.clear();
    }

    /// Empties the segment but for its pages, for whoever overwrites these: to make new ones takes a copy of 4 KiB each.
    pub(crate) fn clear_but_pages(&mut self) {
        self.ops.clear();
        self.literals.clear();
        self.words.clear();
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
        let mut pieces = Pieces::default();
        pieces.lay_out(self);
        pieces.slices(self).for_each(|slice| piece(&slice));
    }
}

/// The bytes of a segment in pieces, so that pages need not be copied to be written.
#[derive(Debug, Default)]
pub struct Pieces {
    /// Everything but the pages.
    bytes: Vec<u8>,
    order: Vec<Piece>,
}

#[derive(Clone, Copy, Debug)]
enum Piece {
    /// So many of the bytes.
    Bytes(usize),
    /// The next page.
    Page,
}

impl Pieces {
    /// Takes the order of the pieces from a segment, which must hold as much as its operations say.
    pub fn lay_out(&mut self, segment: &Segment) {
        self.bytes.clear();
        self.order.clear();
        let mut words = segment.words.iter().map(|word| word.to_be_bytes());
        let mut literals = &segment.literals[..];
        for &op in &segment.ops {
            match op {
                Op::Literal(n) => {
                    let (head, rest) = literals.split_at(n as usize);
                    literals = rest;
                    self.push(head);
                }
                Op::Words(n) => words.by_ref().take(n as usize).for_each(|word| self.push(&word)),
                Op::Pages(n) => self.order.extend((0..n).map(|_| Piece::Page)),
                Op::PageRecords(n) => {
                    for word in words.by_ref().take(n as usize) {
                        self.push(&word);
                        self.order.push(Piece::Page);
                    }
                }
                Op::ZeroRecords(n) => {
                    for word in words.by_ref().take(n as usize) {
                        self.push(&word);
                        self.push(&[0]);
                    }
                }
            }
        }
    }

    fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        match self.order.last_mut() {
            Some(Piece::Bytes(n)) => *n += bytes.len(),
            _ => self.order.push(Piece::Bytes(bytes.len())),
        }
    }

    /// The pieces of the segment that was laid out last.
    pub fn slices<'a>(&'a self, segment: &'a Segment) -> impl Iterator<Item = IoSlice<'a>> {
        let (mut bytes, mut pages) = (&self.bytes[..], segment.pages.iter());
        self.order.iter().map(move |piece| match *piece {
            Piece::Bytes(n) => {
                let (head, rest) = bytes.split_at(n);
                bytes = rest;
                IoSlice::new(head)
            }
            Piece::Page => IoSlice::new(&pages.next().expect("as many pages as the operations take").0),
        })
    }
}
