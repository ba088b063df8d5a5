//! The records of the `ram` section, and of a postcopy-preempt connection, which holds nothing else.

use pagewarp_codec::PAGE_SIZE;

use super::Blocks;
use super::cursor::{Cursor, Item, Stuck};
use super::reader::{Limits, has_op, room};
use crate::segment::{Place, Segment};

/// The bits of a record's head below the address.
const FLAGS: u64 = PAGE_SIZE as u64 - 1;
const ZERO: u64 = 0x002;
const MEM_SIZE: u64 = 0x004;
const PAGE: u64 = 0x008;
const EOS: u64 = 0x010;
const CONTINUE: u64 = 0x020;
const XBZRLE: u64 = 0x040;
const COMPRESS_PAGE: u64 = 0x100;
const MULTIFD_FLUSH: u64 = 0x200;

/// A zlib stream of a page is never much longer than the page.
const MAX_COMPRESSED: u32 = 2 * PAGE_SIZE as u32;

/// A record, or the next part of one.
pub(super) enum Record {
    Item(Item),
    /// The end of the section: 8 bytes.
    Eos,
    /// What the multifd connections sent so far is to be waited for: 8 bytes.
    Flush,
    /// A list of blocks with so many bytes follows: 8 bytes.
    MemSize(u64),
}

/// Reads records.
pub(super) struct Records {
    blocks: Blocks,
    /// The block that was named last on this connection, which lasts beyond the end of a section: its number, if it got one.
    block: Option<Option<u32>>,
    /// The head and the name of a record were read, its page is next.
    payload: Option<Option<Place>>,
}

impl Records {
    pub(super) fn new(blocks: Blocks) -> Records {
        Records { blocks, block: None, payload: None }
    }

    /// Takes records that continue a block, as long as that goes: nearly all that there are. Returns how many bytes.
    pub(super) fn take_continued(&self, bytes: &[u8], limits: &Limits, segment: &mut Segment) -> usize {
        let (Some(block), None) = (self.block, self.payload) else { return 0 };
        let mut rest = bytes;
        while let Some((head, after)) = rest.split_first_chunk::<8>() {
            if room(limits, segment) < 9 || !has_op(segment) {
                break;
            }
            let head = u64::from_be_bytes(*head);
            match head & FLAGS {
                flags if flags == PAGE | CONTINUE => {
                    let Some((page, after)) = after.split_first_chunk::<PAGE_SIZE>() else { break };
                    if segment.pages.len() >= limits.pages {
                        break;
                    }
                    segment.push_page_record(head, place(block, head), page);
                    rest = after;
                }
                flags if flags == ZERO | CONTINUE => {
                    let Some((0, after)) = after.split_first() else { break };
                    segment.push_zero_record(head);
                    rest = after;
                }
                _ => break,
            }
        }
        bytes.len() - rest.len()
    }

    pub(super) fn parse(&mut self, bytes: &[u8]) -> Result<Record, Stuck> {
        if let Some(place) = self.payload.take() {
            return Ok(Record::Item(Item::Page(place)));
        }
        let mut cursor = Cursor::new(bytes);
        let head = cursor.u64()?;
        let flags = head & FLAGS;
        match flags {
            EOS => return Ok(Record::Eos),
            MULTIFD_FLUSH => return Ok(Record::Flush),
            MEM_SIZE => return Ok(Record::MemSize(head & !FLAGS)),
            _ => {}
        }
        if !matches!(flags & !CONTINUE, ZERO | PAGE | XBZRLE | COMPRESS_PAGE) {
            return Err(Stuck::Raw(format!("a record with flags {flags:#x}")));
        }
        let name = if flags & CONTINUE == 0 { Some(cursor.name()?) } else { None };
        if name.is_none() && self.block.is_none() {
            return Err(Stuck::Raw("a page of no block".into()));
        }
        let item = match flags & !CONTINUE {
            ZERO => match (cursor.u8()?, name) {
                (0, None) => Item::ZeroRecord,
                _ => Item::Literal(cursor.len()),
            },
            PAGE if name.is_some() => Item::Literal(cursor.len()),
            PAGE => Item::PageRecord(place(self.block.flatten(), head)),
            XBZRLE => {
                let (encoding, len) = (cursor.u8()?, cursor.u16()?);
                if encoding != 1 || usize::from(len) > PAGE_SIZE {
                    return Err(Stuck::Raw(format!("an XBZRLE record of kind {encoding} and length {len}")));
                }
                Item::Literal(cursor.len() + u64::from(len))
            }
            _ => {
                let len = cursor.u32()?;
                if len > MAX_COMPRESSED {
                    return Err(Stuck::Raw(format!("a compressed page of {len} bytes")));
                }
                Item::Literal(cursor.len() + u64::from(len))
            }
        };
        // All that is needed is there: from here on nothing is read twice.
        if let Some(name) = name {
            let block = self.blocks.number(name);
            self.block = Some(block);
            if flags == PAGE {
                self.payload = Some(place(block, head));
            }
        }
        Ok(Record::Item(item))
    }

    /// Whether `bytes` begin with a record that names its block, as a postcopy-preempt connection does.
    pub(super) fn begins(bytes: &[u8]) -> Result<bool, Stuck> {
        // An address of more than 48 bits is none. This tells such a connection from TLS before more bytes have come.
        if !Cursor::new(bytes).bytes(2)?.iter().all(|&b| b == 0) {
            return Ok(false);
        }
        let mut cursor = Cursor::new(bytes);
        let head = cursor.u64()?;
        Ok(matches!(head & FLAGS, ZERO | PAGE) && super::cursor::printable(cursor.counted()?))
    }
}

fn place(block: Option<u32>, head: u64) -> Option<Place> {
    block.map(|block| Place { block, page: head / PAGE_SIZE as u64 })
}

/// What a list of blocks holds beside names and lengths.
pub(super) struct ListLayout {
    /// Page sizes, where they are not that of the host: where postcopy was advised.
    pub(super) page_sizes: bool,
    /// Guest physical addresses: with x-ignore-shared.
    pub(super) addresses: bool,
}

/// Reads an entry of the list of blocks, when `left` bytes of memory have not been listed yet. Returns its length in the
/// stream and the block's in memory.
pub(super) fn list_entry(
    bytes: &[u8],
    left: u64,
    layout: &ListLayout,
    blocks: &Blocks,
) -> Result<(u64, u64), Stuck> {
    let mut cursor = Cursor::new(bytes);
    let name = cursor.name()?;
    let used = cursor.u64()?;
    if used > left {
        return Err(Stuck::Raw(format!(
            "the RAM block '{}' is longer than all of them",
            name.escape_ascii()
        )));
    }
    if layout.page_sizes && has_page_size(cursor.rest(), used == left)? {
        cursor.u64()?;
    }
    if layout.addresses {
        cursor.u64()?;
    }
    blocks.number(name);
    Ok((cursor.len(), used))
}

/// Nothing says whether a page size follows: a name (its length is not zero), or the record after the list may be there instead.
fn has_page_size(rest: &[u8], last: bool) -> Result<bool, Stuck> {
    if !last && Cursor::new(rest).u8()? != 0 {
        return Ok(false);
    }
    let next = Cursor::new(rest).u64()?;
    let is_size = next.is_power_of_two() && next >= PAGE_SIZE as u64;
    if !last && !is_size {
        return Err(Stuck::Raw(format!("a RAM block with pages of {next} bytes")));
    }
    Ok(is_size)
}
