//! Takes the bytes of a connection into segments, as far as they have come.

use pagewarp_codec::PAGE_SIZE;

use super::Blocks;
use super::cursor::{Cursor, Item, PACKET_LITERALS, PACKET_OFFSETS, Stuck};
use super::main::{self, Main};
use super::multifd::{self, Multifd};
use super::ram::{Record, Records};
use crate::protocol::MAX_OPS;
use crate::segment::{Op, Segment};

/// What a read came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// All that can be taken apart was; what is left of the bytes is the beginning of something, or nothing.
    Hungry,
    /// The segment is full. Call again with what is left and an empty segment.
    Full,
    /// The peer may be waiting for what came before: send the segment at once.
    ///
    /// These are a command, the end of what a section holds, the end of all sections, the description of the machine, a SYNC of a multifd
    /// connection, and the marker on the main connection that belongs to it.
    Boundary,
}

/// What a segment may hold.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How many pages.
    pub pages: usize,
    /// How many literal bytes and words together, where each word counts as 9 bytes: a zero record has a byte beside it.
    pub literal_bytes: usize,
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectionKind {
    /// Fewer than 4 bytes have come.
    Unknown,
    /// The sections.
    Main,
    /// Pages beside the main connection.
    Multifd,
    /// Something else: the pages that postcopy asked for, or a connection that is encrypted or recovers from a failure.
    Other,
}

/// So that the length of a run of literals fits its operation.
const MAX_LITERALS: usize = 1 << 30;

/// An item adds at most so many operations: a packet of multifd its literals, its words and literals again.
const MAX_ITEM_OPS: usize = 4;

/// Nothing needs more bytes than these to tell how long it is: the longest is the header of a multifd packet.
const LOOKAHEAD: usize = 2048;

/// Whether the segment may have one more operation.
#[inline]
pub(super) fn has_op(segment: &Segment) -> bool {
    segment.ops.len() < MAX_OPS
}

/// How many more bytes may be appended as literals.
fn literal_room(limits: &Limits, segment: &Segment) -> usize {
    let goes_on = matches!(segment.ops.last(), Some(Op::Literal(_)));
    if goes_on || has_op(segment) { room(limits, segment) } else { 0 }
}

/// How many more literal bytes the segment may hold.
#[inline]
pub(super) fn room(limits: &Limits, segment: &Segment) -> usize {
    let used = segment.literals.len() + 9 * segment.words.len();
    limits.literal_bytes.clamp(1, MAX_LITERALS).saturating_sub(used)
}

fn fits(item: Item, limits: &Limits, segment: &Segment) -> bool {
    let (pages, bytes) = match item {
        Item::Page(_) => (1, 0),
        Item::PageRecord(_) => (1, 9),
        Item::ZeroRecord => (0, 9),
        Item::Packet => (0, PACKET_LITERALS + 9 * PACKET_OFFSETS),
        Item::Literal(_) | Item::Boundary => (0, 0),
    };
    segment.pages.len() + pages <= limits.pages.max(segment.pages.len())
        && bytes <= room(limits, segment)
        && segment.ops.len() + MAX_ITEM_OPS <= MAX_OPS
}

enum Protocol {
    Unknown,
    Main(Box<Main>),
    Multifd(Box<Multifd>),
    /// Page records and nothing else, if it begins like that (which is known then).
    Other(Box<Records>, bool),
}

/// Reads the stream of one connection from the source, and takes it apart into [segments](Segment).
///
/// It does no I/O and it never fails. What it does not understand, it passes on; what it misunderstands, too.
pub struct StreamReader {
    blocks: Blocks,
    protocol: Protocol,
    /// What the next bytes are, where that is known already.
    next: Option<Item>,
    /// So many of the next bytes are literals.
    literals: u64,
    /// The start of an item that had to be passed on before its length was known.
    held: Vec<u8>,
    /// Bytes taken so far.
    position: u64,
    raw: Option<String>,
}

impl StreamReader {
    /// A reader for a new connection.
    pub fn new(blocks: Blocks) -> StreamReader {
        StreamReader {
            blocks,
            protocol: Protocol::Unknown,
            next: None,
            literals: 0,
            held: Vec::new(),
            position: 0,
            raw: None,
        }
    }

    /// Takes complete items from the start of `bytes` into `segment`, and returns how many bytes it took and why it
    /// stopped. The next call must be given what was left, and what came since.
    pub fn read(&mut self, bytes: &[u8], limits: &Limits, segment: &mut Segment) -> (usize, Stop) {
        self.take(bytes, limits, segment, false)
    }

    /// Takes all of `bytes`, though they are the beginning of something: nothing more came for a while, and somebody may be
    /// waiting for them. Returns how many bytes it took: all, unless the segment is full or a boundary is reached before.
    pub fn flush(&mut self, bytes: &[u8], limits: &Limits, segment: &mut Segment) -> usize {
        self.take(bytes, limits, segment, true).0
    }

    /// What the connection is for.
    pub fn kind(&self) -> ConnectionKind {
        match self.protocol {
            Protocol::Unknown => ConnectionKind::Unknown,
            Protocol::Main(_) => ConnectionKind::Main,
            Protocol::Multifd(_) => ConnectionKind::Multifd,
            Protocol::Other(..) => ConnectionKind::Other,
        }
    }

    /// The SYNC packets read so far on a multifd connection: the pages of an epoch are between two. 0 on other connections.
    ///
    /// It changes when [`Stop::Boundary`] is returned for the SYNC, whose own pages belong to the epoch before.
    pub fn epoch(&self) -> u32 {
        if let Protocol::Multifd(multifd) = &self.protocol { multifd.epoch() } else { 0 }
    }

    /// On a multifd connection: the packets so far that carry pages, zero pages or the states of devices. 0 on other connections.
    pub fn packets_with_contents(&self) -> u64 {
        if let Protocol::Multifd(multifd) = &self.protocol { multifd.carrying() } else { 0 }
    }

    /// On the main connection: whether the return path was opened.
    pub fn return_path(&self) -> bool {
        self.main().is_some_and(|main| main.return_path)
    }

    /// On the main connection: whether postcopy has begun, so that latency matters more than ratio.
    pub fn postcopy(&self) -> bool {
        self.main().is_some_and(|main| main.postcopy)
    }

    /// On the main connection: whether the END section of `ram`, or the end of all sections, was seen. What follows is the tail.
    pub fn ram_ended(&self) -> bool {
        self.main().is_some_and(|main| main.ram_ended)
    }

    /// Whether pages may come next: anywhere but on the main connection, and there among the records of `ram`.
    pub fn in_pages(&self) -> bool {
        if let Protocol::Main(main) = &self.protocol { main.records().is_some() } else { true }
    }

    /// Whether the rest of the connection travels as it is, and why. The states of devices after the pages, which always travel
    /// as they are, are no reason.
    pub fn raw(&self) -> Option<&str> {
        self.raw.as_deref()
    }

    fn main(&self) -> Option<&Main> {
        if let Protocol::Main(main) = &self.protocol { Some(main) } else { None }
    }

    /// The reader of records, if these come next.
    fn records(&self) -> Option<&Records> {
        if self.next.is_some() || !self.held.is_empty() {
            return None;
        }
        match &self.protocol {
            Protocol::Main(main) => main.records(),
            Protocol::Other(records, true) => Some(records),
            _ => None,
        }
    }

    fn take(&mut self, bytes: &[u8], limits: &Limits, segment: &mut Segment, all: bool) -> (usize, Stop) {
        let start = self.position;
        let stop = loop {
            let rest = &bytes[(self.position - start) as usize..];
            if self.literals > 0 {
                let left = usize::try_from(self.literals).unwrap_or(usize::MAX);
                let n = rest.len().min(left).min(literal_room(limits, segment));
                if n == 0 {
                    break if rest.is_empty() { Stop::Hungry } else { Stop::Full };
                }
                segment.push_literal(&rest[..n]);
                self.position += n as u64;
                self.literals -= n as u64;
                continue;
            }
            let continued = self.records().map_or(0, |records| records.take_continued(rest, limits, segment));
            self.position += continued as u64;
            let rest = &rest[continued..];

            match self.item(rest) {
                Ok(Item::Boundary) => break Stop::Boundary,
                Ok(Item::Literal(n)) => self.literals = n,
                Ok(item) if (rest.len() as u64) < item.len() => {
                    if !all || rest.is_empty() {
                        self.next = Some(item);
                        break Stop::Hungry;
                    }
                    self.literals = item.len();
                }
                Ok(item) if !fits(item, limits, segment) => {
                    if !segment.is_empty() {
                        self.next = Some(item);
                        break Stop::Full;
                    }
                    // It does not fit into any segment.
                    self.literals = item.len();
                }
                Ok(item) => {
                    let len = item.len() as usize;
                    push(item, &rest[..len], segment);
                    self.position += len as u64;
                }
                Err(Stuck::Hungry) if all && !rest.is_empty() => {
                    let n = rest.len().min(literal_room(limits, segment));
                    if n == 0 {
                        break Stop::Full;
                    }
                    self.held.extend_from_slice(&rest[..n]);
                    segment.push_literal(&rest[..n]);
                    self.position += n as u64;
                }
                Err(Stuck::Hungry) => break Stop::Hungry,
                Err(Stuck::Raw(reason)) => {
                    let at = self.position - self.held.len() as u64;
                    self.raw = Some(format!("{reason} at byte {at}"));
                    self.held = Vec::new();
                    self.literals = u64::MAX;
                }
            }
        };
        ((self.position - start) as usize, stop)
    }

    /// What `rest` begins with.
    fn item(&mut self, rest: &[u8]) -> Result<Item, Stuck> {
        if let Some(item) = self.next.take() {
            return Ok(item);
        }
        // What was held has been passed on already: of items that begin in it, only what is not yet is left, as literals.
        while !self.held.is_empty() {
            let more = rest.len().min(LOOKAHEAD.saturating_sub(self.held.len()));
            let held = self.held.len();
            self.held.extend_from_slice(&rest[..more]);
            let view = std::mem::take(&mut self.held);
            let item = self.parse(&view);
            self.held = view;
            self.held.truncate(held);
            let item = item?;
            if let Item::Boundary = item {
                return Ok(item);
            }
            match item.len().checked_sub(held as u64) {
                Some(left) => {
                    self.held.clear();
                    if left > 0 {
                        return Ok(Item::Literal(left));
                    }
                }
                None => drop(self.held.drain(..item.len() as usize)),
            }
        }
        self.parse(rest)
    }

    fn parse(&mut self, bytes: &[u8]) -> Result<Item, Stuck> {
        if let Protocol::Unknown = self.protocol {
            let blocks = self.blocks.clone();
            self.protocol = match Cursor::new(bytes).u32()? {
                main::MAGIC => Protocol::Main(Box::new(Main::new(blocks))),
                multifd::MAGIC => Protocol::Multifd(Box::new(Multifd::new(blocks))),
                _ => Protocol::Other(Box::new(Records::new(blocks)), false),
            };
        }
        let item = match &mut self.protocol {
            Protocol::Unknown => Err(Stuck::Hungry),
            Protocol::Main(main) => main.parse(bytes),
            Protocol::Multifd(multifd) => multifd.parse(bytes),
            Protocol::Other(records, known) => other(records, known, bytes),
        };
        match item {
            Err(Stuck::Hungry) if bytes.len() >= LOOKAHEAD => {
                Err(Stuck::Raw("something without an end".into()))
            }
            item => item,
        }
    }
}

fn other(records: &mut Records, known: &mut bool, bytes: &[u8]) -> Result<Item, Stuck> {
    if !*known && !Records::begins(bytes)? {
        return Err(Stuck::Raw("a connection that is neither main nor multifd".into()));
    }
    *known = true;
    match records.parse(bytes)? {
        Record::Item(item) => Ok(item),
        Record::Eos => Ok(Item::Literal(8)),
        Record::Flush | Record::MemSize(_) => Err(Stuck::Raw("a record that is no page".into())),
    }
}

fn push(item: Item, bytes: &[u8], segment: &mut Segment) {
    match item {
        Item::Literal(_) | Item::Boundary => segment.push_literal(bytes),
        Item::Page(place) => segment.push_page(place, bytes),
        Item::PageRecord(place) => {
            let (head, page) = bytes.split_at(bytes.len() - PAGE_SIZE);
            segment.push_page_record(word(head), place, page);
        }
        Item::ZeroRecord => segment.push_zero_record(word(&bytes[..8])),
        Item::Packet => {
            let (literals, offsets) = bytes.split_at(PACKET_LITERALS);
            segment.push_literal(literals);
            offsets.chunks_exact(8).for_each(|offset| segment.push_word(word(offset)));
        }
    }
}

fn word(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes.try_into().expect("the length of a word"))
}
