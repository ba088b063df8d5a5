//! The meta of a segment: everything but its pages.

use pagewarp_codec::{EncodedBatch, Encoding, Page};
use pagewarp_wire::cursor::{Cursor, put_varint};
use pagewarp_wire::{WireError, at_most, malformed};

use super::hello::Terms;
use super::{MAX_CONNECTIONS, MAX_LITERALS, MAX_OPS, MAX_PAGES};
use crate::segment::{Op, Segment};

/// How the pages of a segment travel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Form {
    /// As they are, and into no history.
    #[default]
    Plain = 0,
    /// Each in its encoding.
    Encoded = 1,
    /// Each in its encoding, all of them together compressed with zstd.
    Zstd = 2,
    /// Each in its encoding, all of them together in blocks of LZ4.
    Lz4 = 3,
}

impl Form {
    /// All, in the order of their tags.
    pub const ALL: [Form; 4] = [Form::Plain, Form::Encoded, Form::Zstd, Form::Lz4];

    /// Whether all payloads together were compressed.
    pub fn is_packed(self) -> bool {
        matches!(self, Form::Zstd | Form::Lz4)
    }
}

/// A segment that must be decoded before this one, because this one uses a slot after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct After {
    /// The connection.
    pub connection: u16,
    /// The number of the segment on that connection, from 0.
    pub segment: u64,
}

/// How the pages of a segment travel, in detail.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageTable {
    /// How they travel.
    pub form: Form,
    /// Where to keep each; `None`: nowhere. Empty if the form is plain.
    pub slots: Vec<Option<u32>>,
    /// What must be decoded before.
    pub after: Vec<After>,
}

impl PageTable {
    /// Empties the table and keeps its buffers.
    pub fn clear(&mut self) {
        self.form = Form::Plain;
        self.slots.clear();
        self.after.clear();
    }
}

/// Literals shorter than this are not worth compressing.
const COMPRESS_FROM: usize = 64;

const LITERALS_PLAIN: u8 = 0;
const LITERALS_LZ4: u8 = 1;
const LITERALS_ZSTD: u8 = 2;

/// How to compress literals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LiteralForm {
    /// Not at all.
    Plain,
    /// Fast.
    Lz4,
    /// Well. Only where zstd was agreed on.
    Zstd,
}

/// Appends the meta of `segment` to `out`. Of `encoded` the tables count, unless the form is plain: then its hash alone.
pub fn encode(
    segment: &Segment,
    table: &PageTable,
    encoded: &EncodedBatch,
    literals: LiteralForm,
    out: &mut Vec<u8>,
) {
    out.push(table.form as u8);
    out.extend_from_slice(&encoded.plain_hash.to_le_bytes());
    put_varint(out, table.after.len() as u64);
    for after in &table.after {
        put_varint(out, after.connection.into());
        put_varint(out, after.segment);
    }
    put_varint(out, segment.ops.len() as u64);
    for &op in &segment.ops {
        let (kind, count) = match op {
            Op::Literal(n) => (0, n),
            Op::Words(n) => (1, n),
            Op::Pages(n) => (2, n),
            Op::PageRecords(n) => (3, n),
            Op::ZeroRecords(n) => (4, n),
        };
        put_varint(out, u64::from(count) << 3 | kind);
    }
    put_steps(out, segment.words.iter().copied(), 0);
    put_literals(out, &segment.literals, literals);
    if table.form != Form::Plain {
        put_encodings(out, encoded);
        // Slots come in ascending runs: the step that is expected is 1.
        put_steps(out, table.slots.iter().map(|slot| slot.map_or(0, |slot| u64::from(slot) + 1)), 1);
    }
}

fn put_literals(out: &mut Vec<u8>, literals: &[u8], form: LiteralForm) {
    let compressed = match form {
        _ if literals.len() < COMPRESS_FROM => None,
        LiteralForm::Plain => None,
        LiteralForm::Lz4 => Some((LITERALS_LZ4, lz4_flex::block::compress(literals))),
        LiteralForm::Zstd => zstd::bulk::compress(literals, 1).ok().map(|bytes| (LITERALS_ZSTD, bytes)),
    };
    match compressed {
        Some((tag, bytes)) if bytes.len() < literals.len() => {
            out.push(tag);
            put_varint(out, bytes.len() as u64);
            out.extend_from_slice(&bytes);
        }
        _ => {
            out.push(LITERALS_PLAIN);
            out.extend_from_slice(literals);
        }
    }
}

fn put_encodings(out: &mut Vec<u8>, encoded: &EncodedBatch) {
    for run in encoded.encodings.chunk_by(|a, b| a == b) {
        out.push(run[0].tag());
        put_varint(out, run.len() as u64 - 1);
    }
    for (encoding, len) in encoded.encodings.iter().zip(&encoded.lens) {
        if encoding.fixed_len().is_none() {
            out.extend_from_slice(&len.to_le_bytes());
        }
    }
}

/// Numbers whose steps repeat: each run is its step, less `expected`, and how often it comes again.
fn put_steps(out: &mut Vec<u8>, numbers: impl Iterator<Item = u64>, expected: u64) {
    let mut last = 0u64;
    let mut run: Option<(u64, u64)> = None;
    let put = |out: &mut Vec<u8>, (step, again): (u64, u64)| {
        put_varint(out, zigzag(step));
        put_varint(out, again);
    };
    for number in numbers {
        let step = number.wrapping_sub(last).wrapping_sub(expected);
        last = number;
        match &mut run {
            Some((same, again)) if *same == step => *again += 1,
            _ => {
                if let Some(run) = run.replace((step, 0)) {
                    put(out, run);
                }
            }
        }
    }
    if let Some(run) = run {
        put(out, run);
    }
}

fn zigzag(step: u64) -> u64 {
    (step << 1) ^ ((step as i64 >> 63) as u64)
}

fn unzigzag(coded: u64) -> u64 {
    (coded >> 1) ^ (coded & 1).wrapping_neg()
}

/// Reads the meta of segment number `number` on `connection`. `segment` gets everything but its pages, of which it gets as many as there are, with
/// any content. `encoded` gets the tables; its payload is not touched. Returns the bytes of all payloads together; if they were
/// [packed](Form::is_packed) these are the bytes after decompressing.
pub fn decode(
    meta: &[u8],
    terms: &Terms,
    connection: u16,
    number: u64,
    segment: &mut Segment,
    table: &mut PageTable,
    encoded: &mut EncodedBatch,
) -> Result<usize, WireError> {
    segment.clear_but_pages();
    table.clear();
    encoded.encodings.clear();
    encoded.lens.clear();
    let mut from = Cursor::new("the meta of a segment", meta);
    let tag = from.u8()?;
    table.form = Form::ALL
        .get(usize::from(tag))
        .copied()
        .filter(|&form| terms.allow(form))
        .ok_or_else(|| malformed("the form of a segment", tag, "one that was agreed on"))?;
    encoded.plain_hash = from.u64()?;
    decode_after(&mut from, connection, number, &mut table.after)?;
    if table.form == Form::Plain && !table.after.is_empty() {
        return Err(malformed("a plain segment", "one that waits for others", "one that waits for none"));
    }
    let counts = decode_ops(&mut from, &mut segment.ops)?;
    take_steps(&mut from, counts.words, 0, |word| {
        segment.words.push(word);
        Ok(())
    })?;
    decode_literals(&mut from, terms, counts.literals, &mut segment.literals)?;
    segment.pages.resize(counts.pages, Page::ZERO);
    let mut payload_len = counts.pages * pagewarp_codec::PAGE_SIZE;
    if table.form != Form::Plain {
        payload_len = decode_encodings(&mut from, terms, counts.pages, encoded)?;
        let slots = &mut table.slots;
        take_steps(&mut from, counts.pages, 1, |number| {
            let slot = number.checked_sub(1);
            if slot.is_some_and(|slot| slot >= terms.history_slots.into()) {
                return Err(malformed(
                    "the slot of a page",
                    number - 1,
                    format_args!("less than {}", terms.history_slots),
                ));
            }
            slots.push(slot.map(|slot| slot as u32));
            Ok(())
        })?;
        check_slots(encoded, slots)?;
    }
    from.end()?;
    Ok(payload_len)
}

struct Counts {
    literals: usize,
    words: usize,
    pages: usize,
}

fn decode_after(
    from: &mut Cursor<'_>,
    connection: u16,
    number: u64,
    out: &mut Vec<After>,
) -> Result<(), WireError> {
    let count = from.varint()?;
    at_most("the segments to wait for", count, MAX_CONNECTIONS as u64)?;
    for _ in 0..count {
        let (other, segment) = (from.varint()?, from.varint()?);
        at_most("the number of a connection", other, MAX_CONNECTIONS as u64 - 1)?;
        // Waiting for itself, or for what comes later on its own connection, would never end.
        if other == u64::from(connection) && segment >= number {
            return Err(malformed("a segment to wait for", segment, format_args!("less than {number}")));
        }
        out.push(After { connection: other as u16, segment });
    }
    Ok(())
}

fn decode_ops(from: &mut Cursor<'_>, ops: &mut Vec<Op>) -> Result<Counts, WireError> {
    let count = from.varint()?;
    at_most("the operations of a segment", count, MAX_OPS as u64)?;
    let (mut literals, mut words, mut pages, mut zeros) = (0u64, 0u64, 0u64, 0u64);
    for _ in 0..count {
        let coded = from.varint()?;
        let wide = coded >> 3;
        at_most("the count of an operation", wide, MAX_LITERALS as u64)?;
        let n = wide as u32;
        ops.push(match coded & 7 {
            0 => {
                literals += wide;
                Op::Literal(n)
            }
            1 => {
                words += wide;
                Op::Words(n)
            }
            2 => {
                pages += wide;
                Op::Pages(n)
            }
            3 => {
                words += wide;
                pages += wide;
                Op::PageRecords(n)
            }
            4 => {
                words += wide;
                zeros += wide;
                Op::ZeroRecords(n)
            }
            seen => return Err(malformed("an operation", seen, "0 to 4")),
        });
    }
    at_most("the pages of a segment", pages, MAX_PAGES as u64)?;
    at_most("the bytes of a segment beside its pages", literals + 8 * words + zeros, MAX_LITERALS as u64)?;
    Ok(Counts { literals: literals as usize, words: words as usize, pages: pages as usize })
}

fn decode_literals(
    from: &mut Cursor<'_>,
    terms: &Terms,
    len: usize,
    out: &mut Vec<u8>,
) -> Result<(), WireError> {
    let tag = from.u8()?;
    if tag == LITERALS_PLAIN {
        out.extend_from_slice(from.bytes(len)?);
        return Ok(());
    }
    let compressed_len = from.varint()?;
    at_most("the compressed literals of a segment", compressed_len, MAX_LITERALS as u64)?;
    let compressed = from.bytes(compressed_len as usize)?;
    out.resize(len, 0);
    let seen = match tag {
        LITERALS_LZ4 => lz4_flex::block::decompress_into(compressed, out).map_err(|e| e.to_string()),
        LITERALS_ZSTD if terms.zstd => {
            zstd::bulk::decompress_to_buffer(compressed, &mut out[..]).map_err(|e| e.to_string())
        }
        _ => return Err(malformed("the form of literals", tag, "one that was agreed on")),
    };
    match seen {
        Ok(n) if n == len => Ok(()),
        Ok(n) => {
            Err(malformed("compressed literals", format_args!("{n} bytes"), format_args!("{len} bytes")))
        }
        Err(why) => Err(malformed("compressed literals", why, format_args!("{len} bytes"))),
    }
}

fn decode_encodings(
    from: &mut Cursor<'_>,
    terms: &Terms,
    pages: usize,
    encoded: &mut EncodedBatch,
) -> Result<usize, WireError> {
    while encoded.encodings.len() < pages {
        let (tag, again) = (from.u8()?, from.varint()?);
        let Some(encoding) = Encoding::from_tag(tag).filter(|&encoding| terms.encodings.contains(encoding))
        else {
            return Err(malformed("the tag of a page", tag, format_args!("one of {}", terms.encodings)));
        };
        let left = pages - encoded.encodings.len();
        if again >= left as u64 {
            return Err(malformed(
                "a run of tags",
                format_args!("{again} more pages"),
                format_args!("less than {left}"),
            ));
        }
        encoded.encodings.resize(encoded.encodings.len() + again as usize + 1, encoding);
    }
    let mut total = 0;
    for encoding in &encoded.encodings {
        let len = match encoding.fixed_len() {
            Some(len) => len as u16,
            None => from.u16()?,
        };
        at_most("the payload of a page", len.into(), pagewarp_codec::PAGE_SIZE as u64)?;
        encoded.lens.push(len);
        total += usize::from(len);
    }
    Ok(total)
}

/// A page with a base says where that is, and no slot is used twice.
fn check_slots(encoded: &EncodedBatch, slots: &[Option<u32>]) -> Result<(), WireError> {
    for (encoding, slot) in encoded.encodings.iter().zip(slots) {
        if encoding.needs_base() && slot.is_none() {
            return Err(malformed(
                "the slot of a page",
                "none",
                format_args!("the slot of the base of a page in {encoding}"),
            ));
        }
    }
    let mut used: Vec<u32> = slots.iter().flatten().copied().collect();
    used.sort_unstable();
    match used.array_windows().find(|[a, b]| a == b) {
        Some([slot, _]) => {
            Err(malformed("the slots of a segment", format_args!("slot {slot} twice"), "each once"))
        }
        None => Ok(()),
    }
}

fn take_steps(
    from: &mut Cursor<'_>,
    mut count: usize,
    expected: u64,
    mut take: impl FnMut(u64) -> Result<(), WireError>,
) -> Result<(), WireError> {
    let mut last = 0u64;
    while count > 0 {
        let (step, again) = (unzigzag(from.varint()?), from.varint()?);
        if again >= count as u64 {
            return Err(malformed(
                "a run of steps",
                format_args!("{again} more"),
                format_args!("less than {count}"),
            ));
        }
        for _ in 0..=again {
            last = last.wrapping_add(expected).wrapping_add(step);
            take(last)?;
        }
        count -= again as usize + 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use pagewarp_codec::EncodingSet;
    use proptest::prelude::*;

    use super::*;

    const TERMS: Terms =
        Terms { encodings: EncodingSet::ALL, zstd: true, verify: false, direct: false, history_slots: 1000 };

    fn segment() -> Segment {
        let mut segment = Segment::default();
        segment.push_literal(b"a name");
        let page = [5; 4096];
        segment.push_page(None, &page);
        for i in 1..100u64 {
            segment.push_page_record(0x28 + (i << 12), None, &page);
        }
        for i in 0..2000u64 {
            segment.push_zero_record(0x22 + ((i * 3) << 12));
        }
        segment.push_word(u64::MAX);
        segment.push_literal(&[9; 5000]);
        segment
    }

    fn tables(pages: usize) -> (PageTable, EncodedBatch) {
        let all = Encoding::ALL;
        let encodings: Vec<_> = (0..pages).map(|i| all[i / 5 % all.len()]).collect();
        let lens =
            encodings.iter().enumerate().map(|(i, e)| e.fixed_len().unwrap_or(20 + i) as u16).collect();
        let table = PageTable {
            form: Form::Zstd,
            slots: encodings
                .iter()
                .enumerate()
                .map(|(i, e)| (e.needs_base() || i % 2 == 0).then_some(i as u32 * 7))
                .collect(),
            after: vec![After { connection: 3, segment: 1 << 40 }, After { connection: 2, segment: 4 }],
        };
        (table, EncodedBatch { encodings, lens, payload: Vec::new(), plain_hash: 0x1234_5678_9abc })
    }

    fn bytes_of(segment: &Segment) -> Vec<u8> {
        let mut bytes = Vec::new();
        segment.rebuild(|piece| bytes.extend_from_slice(piece));
        bytes
    }

    #[test]
    fn a_segment_comes_back() {
        for (form, literals) in [
            (Form::Plain, LiteralForm::Plain),
            (Form::Encoded, LiteralForm::Lz4),
            (Form::Zstd, LiteralForm::Zstd),
            (Form::Lz4, LiteralForm::Lz4),
        ] {
            let segment = segment();
            let (mut table, encoded) = tables(segment.pages.len());
            table.form = form;
            if form == Form::Plain {
                table.slots.clear();
                table.after.clear();
            }
            let mut meta = Vec::new();
            encode(&segment, &table, &encoded, literals, &mut meta);
            if literals != LiteralForm::Plain {
                assert!(meta.len() < 1000, "2100 records and 5000 equal literals in {} bytes", meta.len());
            }
            let (mut back, mut back_table, mut back_encoded) = Default::default();
            let len = decode(&meta, &TERMS, 2, 5, &mut back, &mut back_table, &mut back_encoded).unwrap();
            assert_eq!(back_table, table);
            if form == Form::Plain {
                assert_eq!(len, 100 * 4096);
            } else {
                assert_eq!(back_encoded, encoded);
                assert_eq!(len, encoded.lens.iter().map(|&len| usize::from(len)).sum::<usize>());
            }
            back.pages = segment.pages.clone();
            assert!(bytes_of(&back) == bytes_of(&segment));
        }
    }

    #[test]
    fn waiting_for_oneself_is_rejected() {
        let segment = Segment::default();
        // Nor does a segment wait for others that needs nothing of them.
        for (form, connection, number, good) in [
            (Form::Encoded, 1, 4, false),
            (Form::Encoded, 1, 5, false),
            (Form::Encoded, 1, 3, true),
            (Form::Encoded, 0, 9, true),
            (Form::Plain, 1, 3, false),
        ] {
            let after = vec![After { connection, segment: number }];
            let table = PageTable { form, after, ..PageTable::default() };
            let mut meta = Vec::new();
            encode(&segment, &table, &EncodedBatch::default(), LiteralForm::Plain, &mut meta);
            let (mut back, mut back_table, mut back_encoded) = Default::default();
            let result = decode(&meta, &TERMS, 1, 4, &mut back, &mut back_table, &mut back_encoded);
            assert_eq!(result.is_ok(), good, "{form:?} {connection} {number}");
        }
    }

    #[test]
    fn what_was_not_agreed_on_is_rejected() {
        let segment = segment();
        let (table, encoded) = tables(segment.pages.len());
        let mut meta = Vec::new();
        encode(&segment, &table, &encoded, LiteralForm::Lz4, &mut meta);
        let (mut back, mut back_table, mut back_encoded) = Default::default();
        for terms in [
            Terms { zstd: false, ..TERMS },
            Terms { history_slots: 50, ..TERMS },
            Terms { encodings: EncodingSet::RAW, ..TERMS },
        ] {
            assert!(
                decode(&meta, &terms, 2, 5, &mut back, &mut back_table, &mut back_encoded).is_err(),
                "{terms:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_rejected(
            meta in proptest::collection::vec(any::<u8>(), 0..300),
            flip in any::<prop::sample::Index>(),
            value in any::<u8>(),
        ) {
            let (mut back, mut back_table, mut back_encoded) = Default::default();
            let _ = decode(&meta, &TERMS, 0, 9, &mut back, &mut back_table, &mut back_encoded);
            let segment = segment();
            let (table, encoded) = tables(segment.pages.len());
            let mut changed = Vec::new();
            encode(&segment, &table, &encoded, LiteralForm::Lz4, &mut changed);
            let at = flip.index(changed.len());
            changed[at] = value;
            if decode(&changed, &TERMS, 0, 9, &mut back, &mut back_table, &mut back_encoded).is_ok() {
                prop_assert!(back.stream_len() <= MAX_LITERALS + MAX_PAGES * 4096);
                let _ = bytes_of(&back);
            }
        }
    }
}
