//! Feeding a reader, and what comes out of it.

use std::collections::HashMap;

use pagewarp_qemu::protocol::MAX_OPS;
use pagewarp_qemu::segment::{Op, Place, Segment};
use pagewarp_qemu::stream::{Blocks, ConnectionKind, Limits, Stop, StreamReader};

use super::Model;

pub const WIDE: Limits = Limits { pages: 1 << 20, literal_bytes: 1 << 30 };

/// What came out of a reader.
#[derive(Debug, Default)]
pub struct Output {
    pub bytes: Vec<u8>,
    /// Adjacent operations of the same kind are one.
    pub ops: Vec<Op>,
    /// Where pages begin, and their places.
    pub pages: Vec<(u64, Option<Place>)>,
    /// Where zero records begin.
    pub zeros: Vec<u64>,
    pub boundaries: Vec<u64>,
    /// The epoch of each page.
    pub epochs: Vec<u32>,
    pub ram_ended_at: Option<u64>,
    pub raw: Option<String>,
    pub kind: Option<ConnectionKind>,
    pub last_epoch: u32,
    pub return_path: bool,
    pub postcopy: bool,
}

impl Output {
    fn add(&mut self, segment: &Segment, epoch: u32) {
        let mut at = self.bytes.len() as u64;
        let mut places = segment.places.iter();
        let mut page = |at| self.pages.push((at, *places.next().expect("a place for each page")));
        for &op in &segment.ops {
            match op {
                Op::Literal(n) => at += u64::from(n),
                Op::Words(n) => at += 8 * u64::from(n),
                Op::Pages(n) => (0..n).for_each(|_| {
                    page(at);
                    at += 4096;
                }),
                Op::PageRecords(n) => (0..n).for_each(|_| {
                    page(at + 8);
                    at += 4104;
                }),
                Op::ZeroRecords(n) => (0..n).for_each(|_| {
                    self.zeros.push(at);
                    at += 9;
                }),
            }
            merge(&mut self.ops, op);
        }
        self.epochs.resize(self.pages.len(), epoch);
        segment.rebuild(|piece| self.bytes.extend_from_slice(piece));
        assert_eq!(self.bytes.len() as u64, at, "the operations are those of the bytes");
    }

    /// Pages with the names of their blocks, for comparing.
    pub fn model(&self, blocks: &Blocks, names: &[&str]) -> Model {
        let names: HashMap<u32, &str> =
            names.iter().map(|name| (blocks.number(name.as_bytes()).expect("few blocks"), *name)).collect();
        let place = |place: Place| (names[&place.block].to_string(), place.page);
        Model {
            pages: self.pages.iter().map(|(at, p)| (*at, p.map(place))).collect(),
            zeros: self.zeros.clone(),
            boundaries: self.boundaries.clone(),
        }
    }
}

fn merge(ops: &mut Vec<Op>, op: Op) {
    match (ops.last_mut(), op) {
        (Some(Op::Literal(a)), Op::Literal(b))
        | (Some(Op::Words(a)), Op::Words(b))
        | (Some(Op::Pages(a)), Op::Pages(b))
        | (Some(Op::PageRecords(a)), Op::PageRecords(b))
        | (Some(Op::ZeroRecords(a)), Op::ZeroRecords(b)) => *a += b,
        _ => ops.push(op),
    }
}

/// Reads all of `stream`, which comes in pieces of the lengths that `chunk` gives; where `flush` says so after a piece, the reader is made
/// to take all there is.
pub fn read(
    blocks: &Blocks,
    stream: &[u8],
    limits: &Limits,
    mut chunk: impl FnMut() -> usize,
    mut flush: impl FnMut() -> bool,
) -> Output {
    let mut reader = StreamReader::new(blocks.clone());
    let mut output = Output::default();
    let mut segment = Segment::default();
    let (mut taken, mut come) = (0, 0);
    while taken < stream.len() {
        let last = come == stream.len();
        come = (come + chunk().max(1)).min(stream.len());
        let flush = flush() || last;
        let mut flushes = 0;
        loop {
            let epoch = reader.epoch();
            let (n, stop) = reader.read(&stream[taken..come], limits, &mut segment);
            let full = stop == Stop::Full;
            assert!(!full || !segment.is_empty(), "an empty segment is not full");
            assert!(segment.pages.len() <= limits.pages);
            assert!(segment.ops.len() <= MAX_OPS, "{} operations", segment.ops.len());
            let bytes = segment.stream_len() - 4096 * segment.pages.len();
            assert!(bytes <= limits.literal_bytes.max(1), "{bytes} bytes");
            taken += n;
            output.add(&segment, epoch);
            segment.clear();
            assert_eq!(output.bytes.len(), taken, "each byte is in a segment once it was taken");
            if reader.ram_ended() && output.ram_ended_at.is_none() {
                output.ram_ended_at = Some(taken as u64);
            }
            match stop {
                Stop::Boundary => output.boundaries.push(taken as u64),
                Stop::Full => {}
                Stop::Hungry if flush && taken < come => {
                    let epoch = reader.epoch();
                    let n = reader.flush(&stream[taken..come], limits, &mut segment);
                    assert!(n > 0, "a flush takes something");
                    assert!(segment.ops.len() <= MAX_OPS, "{} operations", segment.ops.len());
                    taken += n;
                    output.add(&segment, epoch);
                    segment.clear();
                    flushes += 1;
                    assert!(flushes < 1_000_000, "the flush comes to an end");
                }
                Stop::Hungry => break,
            }
        }
    }
    assert!(output.bytes == stream, "what was read is what went in");
    output.raw = reader.raw().map(str::to_owned);
    output.kind = Some(reader.kind());
    output.last_epoch = reader.epoch();
    output.return_path = reader.return_path();
    output.postcopy = reader.postcopy();
    output
}

/// Reads all of `stream` at once.
pub fn read_whole(blocks: &Blocks, stream: &[u8]) -> Output {
    read(blocks, stream, &WIDE, || usize::MAX / 2, || false)
}
