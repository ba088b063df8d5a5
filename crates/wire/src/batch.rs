//! The meta of a batch: which pages, how each is encoded, how long each payload is.

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::cursor::{Cursor, put_varint, varint_len};
use crate::error::{WireError, at_most, malformed};
use crate::session::Session;

/// In a slot table: the page is not kept in the history.
pub const NO_SLOT: u32 = u32::MAX;

/// What starts the meta.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawFixed {
    epoch: U32,
    region: U32,
    plain_hash: U64,
    pages: U32,
    flags: U32,
}

pub(crate) const BATCH_FIXED_LEN: usize = size_of::<RawFixed>();

/// Pages are listed as a bitmap instead of runs.
const FLAG_BITMAP: u32 = 1 << 0;
/// Tags are listed one by one instead of run-length coded.
const FLAG_TAG_LIST: u32 = 1 << 1;
/// A slot table follows.
const FLAG_SLOTS: u32 = 1 << 2;
const FLAGS: u32 = FLAG_BITMAP | FLAG_TAG_LIST | FLAG_SLOTS;

/// First page and length of a bitmap.
const BITMAP_HEAD_LEN: usize = 12;

/// The payload length of a page where its tag alone decides it; otherwise it is 1 to 4095 bytes and is written out.
pub const fn fixed_payload_len(tag: u8) -> Option<u16> {
    match tag {
        0 | 1 => Some(0),
        2 => Some(crate::PAGE_SIZE as u16),
        _ => None,
    }
}

/// The longest meta of a batch of `pages` pages, in bytes.
///
/// Per page: a run of 10 + 1 bytes, a tag run of 2, a length of 2, a slot of 4; and a bit of room for run lengths
/// above 127, of which there are less than one in 64 pages.
pub const fn batch_meta_max(pages: u32) -> usize {
    BATCH_FIXED_LEN + 16 + 20 * pages as usize
}

/// A batch about to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchView<'a> {
    /// The epoch.
    pub epoch: u32,
    /// The region that all pages are in.
    pub region: u32,
    /// The pages, ascending.
    pub pages: &'a [u64],
    /// One tag per page.
    pub tags: &'a [u8],
    /// One payload length in bytes per page.
    pub lens: &'a [u16],
    /// One slot per page or [`NO_SLOT`]; empty if the session has no history.
    pub slots: &'a [u32],
    /// The hash of the plain pages.
    pub plain_hash: u64,
}

/// A batch as received. Reuse it for the next one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BatchMeta {
    /// The epoch.
    pub epoch: u32,
    /// The region that all pages are in; it is one of the session's.
    pub region: u32,
    /// The pages, ascending, all within the region.
    pub pages: Vec<u64>,
    /// One tag per page, all of them agreed on.
    pub tags: Vec<u8>,
    /// One payload length in bytes per page, 0 to 4096, that fits the tag.
    pub lens: Vec<u16>,
    /// One slot per page or [`NO_SLOT`]; empty if the session has no history. No slot appears twice.
    pub slots: Vec<u32>,
    /// The hash that the decoded pages must have.
    pub plain_hash: u64,
    /// Bytes of the payload: the sum of `lens`.
    pub payload_len: usize,
}

impl BatchMeta {
    /// The same batch as it would be sent.
    pub fn view(&self) -> BatchView<'_> {
        BatchView {
            epoch: self.epoch,
            region: self.region,
            pages: &self.pages,
            tags: &self.tags,
            lens: &self.lens,
            slots: &self.slots,
            plain_hash: self.plain_hash,
        }
    }

    fn clear(&mut self) {
        self.pages.clear();
        self.tags.clear();
        self.lens.clear();
        self.slots.clear();
    }
}

/// Appends the meta of `batch`.
pub(crate) fn encode(batch: &BatchView<'_>, out: &mut Vec<u8>) -> Result<(), WireError> {
    let count = batch.pages.len();
    if count == 0 {
        return Err(malformed("a Batch", "no pages", "at least one"));
    }
    at_most("a Batch in pages", count as u64, crate::MAX_BATCH_PAGES.into())?;
    let with_slots = !batch.slots.is_empty();
    for (what, len) in
        [("tags", batch.tags.len()), ("lengths", batch.lens.len()), ("slots", batch.slots.len())]
    {
        if len != count && (what != "slots" || with_slots) {
            return Err(malformed("a Batch", format_args!("{len} {what}"), format_args!("{count} {what}")));
        }
    }
    if let Some(pair) = batch.pages.array_windows().find(|[a, b]| a >= b) {
        return Err(malformed("the pages of a Batch", format_args!("{pair:?}"), "ascending pages"));
    }
    for (&tag, &len) in batch.tags.iter().zip(batch.lens) {
        check_len(tag, len)?;
    }

    let runs_len = runs(batch.pages).map(|(gap, more)| varint_len(gap) + varint_len(more)).sum::<usize>();
    let span = batch.pages[count - 1] - batch.pages[0];
    let bitmap_len = usize::try_from(span / 8 + 1).unwrap_or(usize::MAX).saturating_add(BITMAP_HEAD_LEN);
    let tag_runs_len = tag_runs(batch.tags).map(|(_, more)| 1 + varint_len(more)).sum::<usize>();
    let mut flags = 0;
    if bitmap_len < runs_len {
        flags |= FLAG_BITMAP;
    }
    if count < tag_runs_len {
        flags |= FLAG_TAG_LIST;
    }
    if with_slots {
        flags |= FLAG_SLOTS;
    }

    let fixed = RawFixed {
        epoch: batch.epoch.into(),
        region: batch.region.into(),
        plain_hash: batch.plain_hash.into(),
        pages: (count as u32).into(),
        flags: flags.into(),
    };
    out.extend_from_slice(fixed.as_bytes());
    if flags & FLAG_BITMAP != 0 {
        put_bitmap(batch.pages, bitmap_len - BITMAP_HEAD_LEN, out);
    } else {
        for (gap, more) in runs(batch.pages) {
            put_varint(out, gap);
            put_varint(out, more);
        }
    }
    if flags & FLAG_TAG_LIST != 0 {
        out.extend_from_slice(batch.tags);
    } else {
        for (tag, more) in tag_runs(batch.tags) {
            out.push(tag);
            put_varint(out, more);
        }
    }
    for (&tag, len) in batch.tags.iter().zip(batch.lens) {
        if fixed_payload_len(tag).is_none() {
            out.extend_from_slice(&len.to_le_bytes());
        }
    }
    for slot in batch.slots {
        out.extend_from_slice(&slot.to_le_bytes());
    }
    Ok(())
}

/// The runs of ascending pages: how far each starts from where it could start at the earliest, and how many pages it
/// has after its first.
fn runs(pages: &[u64]) -> impl Iterator<Item = (u64, u64)> {
    // The earliest next start leaves one page out: otherwise the runs would be one.
    let mut earliest = 0;
    pages.chunk_by(|a, b| a + 1 == *b).map(move |run| {
        let gap = run[0] - earliest;
        earliest = run[run.len() - 1].saturating_add(2);
        (gap, run.len() as u64 - 1)
    })
}

fn tag_runs(tags: &[u8]) -> impl Iterator<Item = (u8, u64)> {
    tags.chunk_by(|a, b| a == b).map(|run| (run[0], run.len() as u64 - 1))
}

fn put_bitmap(pages: &[u64], len: usize, out: &mut Vec<u8>) {
    out.extend_from_slice(&pages[0].to_le_bytes());
    out.extend_from_slice(&(len as u32).to_le_bytes());
    let start = out.len();
    out.resize(start + len, 0);
    for page in pages {
        let bit = (page - pages[0]) as usize;
        out[start + bit / 8] |= 1 << (bit % 8);
    }
}

/// Parses the meta of a batch. The caller compares `out.payload_len` with the length of the payload.
pub(crate) fn decode(
    meta: &[u8],
    session: &Session,
    scratch: &mut Vec<u32>,
    out: &mut BatchMeta,
) -> Result<(), WireError> {
    out.clear();
    let mut from = Cursor::new("the meta of a Batch", meta);
    let fixed: [u8; BATCH_FIXED_LEN] = from.array()?;
    let fixed: RawFixed = zerocopy::transmute!(fixed);
    let (count, flags) = (fixed.pages.get(), fixed.flags.get());
    if count == 0 {
        return Err(malformed("a Batch", "no pages", "at least one"));
    }
    at_most("a Batch in pages", count.into(), session.max_batch_pages.into())?;
    if flags & !FLAGS != 0 {
        return Err(malformed("flags of a Batch", format_args!("{flags:#x}"), "known flags only"));
    }
    let with_slots = flags & FLAG_SLOTS != 0;
    if with_slots != (session.history_slots > 0) {
        let expected =
            if with_slots { "no slots, as none were agreed" } else { "slots, as they were agreed" };
        return Err(malformed("a Batch", if with_slots { "slots" } else { "no slots" }, expected));
    }
    out.epoch = fixed.epoch.get();
    out.region = fixed.region.get();
    out.plain_hash = fixed.plain_hash.get();
    let Some(region) = session.region(out.region) else {
        return Err(malformed("region of a Batch", out.region, "a region that was offered"));
    };

    let count = count as usize;
    if flags & FLAG_BITMAP != 0 {
        decode_bitmap(&mut from, count, region.pages, &mut out.pages)?;
    } else {
        decode_runs(&mut from, count, region.pages, &mut out.pages)?;
    }
    decode_tags(&mut from, count, flags & FLAG_TAG_LIST != 0, session.encodings, &mut out.tags)?;
    out.payload_len = 0;
    for &tag in &out.tags {
        let len = match fixed_payload_len(tag) {
            Some(len) => len,
            None => from.u16()?,
        };
        check_len(tag, len)?;
        out.payload_len += usize::from(len);
        out.lens.push(len);
    }
    if with_slots {
        decode_slots(&mut from, count, session.history_slots, scratch, &mut out.slots)?;
    }
    from.end()
}

fn decode_runs(
    from: &mut Cursor<'_>,
    count: usize,
    limit: u64,
    pages: &mut Vec<u64>,
) -> Result<(), WireError> {
    let outside = |page: u64| malformed("a page of a Batch", page, format_args!("at most {}", limit - 1));
    let mut earliest = 0u64;
    while pages.len() < count {
        let (gap, more) = (from.varint()?, from.varint()?);
        let left = (count - pages.len()) as u64;
        if more >= left {
            return Err(malformed(
                "a run of pages",
                format_args!("{more} more pages"),
                format_args!("less than {left}"),
            ));
        }
        let first = earliest.checked_add(gap).ok_or_else(|| outside(u64::MAX))?;
        let last = first.checked_add(more).filter(|&last| last < limit).ok_or_else(|| outside(first))?;
        pages.extend(first..=last);
        // Cannot overflow in a region of any size that fits an address space; saturating is outside of it anyway.
        earliest = last.saturating_add(2);
    }
    Ok(())
}

fn decode_bitmap(
    from: &mut Cursor<'_>,
    count: usize,
    limit: u64,
    pages: &mut Vec<u64>,
) -> Result<(), WireError> {
    let (first, len) = (from.u64()?, from.u32()?);
    let bitmap = from.bytes(len as usize)?;
    let ends_set = bitmap.first().is_some_and(|b| b & 1 != 0) && bitmap.last().is_some_and(|&b| b != 0);
    if !ends_set {
        return Err(malformed(
            "a bitmap of pages",
            "a clear first or last part",
            "its first bit and a bit of its last byte set",
        ));
    }
    let seen: usize = bitmap.iter().map(|b| b.count_ones() as usize).sum();
    if seen != count {
        return Err(malformed("a bitmap of pages", format_args!("{seen} bits set"), count));
    }
    let last_byte = u64::from(len) - 1;
    let last_bit = last_byte * 8 + u64::from(7 - bitmap[last_byte as usize].leading_zeros());
    if first.checked_add(last_bit).is_none_or(|last| last >= limit) {
        return Err(malformed(
            "a page of a Batch",
            format_args!("{first} + {last_bit}"),
            format_args!("at most {}", limit - 1),
        ));
    }
    for (i, &byte) in (0u64..).zip(bitmap) {
        let mut bits = byte;
        while bits != 0 {
            pages.push(first + i * 8 + u64::from(bits.trailing_zeros()));
            bits &= bits - 1;
        }
    }
    Ok(())
}

fn decode_tags(
    from: &mut Cursor<'_>,
    count: usize,
    list: bool,
    encodings: u16,
    tags: &mut Vec<u8>,
) -> Result<(), WireError> {
    let check = |tag: u8| match encodings.checked_shr(tag.into()) {
        Some(rest) if rest & 1 != 0 => Ok(()),
        _ => Err(malformed("tag of a page", tag, format_args!("a tag agreed on (set {encodings:#06x})"))),
    };
    if list {
        tags.extend_from_slice(from.bytes(count)?);
        return tags.iter().try_for_each(|&tag| check(tag));
    }
    while tags.len() < count {
        let (tag, more) = (from.u8()?, from.varint()?);
        check(tag)?;
        let left = count - tags.len();
        if more >= left as u64 {
            return Err(malformed(
                "a run of tags",
                format_args!("{more} more pages"),
                format_args!("less than {left}"),
            ));
        }
        if tags.last() == Some(&tag) {
            return Err(malformed(
                "a run of tags",
                format_args!("tag {tag} again"),
                "another tag than in the run before",
            ));
        }
        tags.resize(tags.len() + more as usize + 1, tag);
    }
    Ok(())
}

fn decode_slots(
    from: &mut Cursor<'_>,
    count: usize,
    history_slots: u32,
    scratch: &mut Vec<u32>,
    slots: &mut Vec<u32>,
) -> Result<(), WireError> {
    let (table, _) = from.bytes(count * 4)?.as_chunks();
    slots.extend(table.iter().copied().map(u32::from_le_bytes));
    scratch.clear();
    scratch.extend(slots.iter().filter(|&&slot| slot != NO_SLOT));
    scratch.sort_unstable();
    if let Some(&slot) = scratch.last().filter(|&&slot| slot >= history_slots) {
        return Err(malformed("slot of a page", slot, format_args!("less than {history_slots}")));
    }
    if let Some([slot, _]) = scratch.array_windows().find(|[a, b]| a == b) {
        return Err(malformed(
            "slots of a Batch",
            format_args!("slot {slot} twice"),
            "each slot at most once",
        ));
    }
    Ok(())
}

fn check_len(tag: u8, len: u16) -> Result<(), WireError> {
    let fits = match fixed_payload_len(tag) {
        Some(fixed) => len == fixed,
        None => (1..crate::PAGE_SIZE as u16).contains(&len),
    };
    if fits {
        return Ok(());
    }
    let expected = match fixed_payload_len(tag) {
        Some(fixed) => fixed.to_string(),
        None => format!("1 to {}", crate::PAGE_SIZE - 1),
    };
    Err(malformed("payload length of a page", format_args!("{len} (tag {tag})"), expected))
}
