//! LZ4 blocks: an encoder of our own for inputs of at most 64 KiB, and the safe decoder of `lz4_flex`.
//!
//! The encoder is greedy, with a hash table of the last position of each key, like the fast mode of the C library. That
//! positions fit 16 bits spares it most of what a general encoder checks, so that it does without `unsafe`.
//! `docs/codec-performance.md` has the measurements that decided for it.
//!
//! There are two forms of it: [`Lz4Encoder`] for one page, here, whose blocks are as short as those of the C library, and
//! `Lz4BlockEncoder` for payloads of many pages, in `blocks`, which is quicker.

mod blocks;

use lz4_flex::block::decompress_into;

use crate::error::PageError;
use crate::page::{PAGE_SIZE, Page};

pub use blocks::{LZ4_BLOCK_SIZE, Lz4BlockEncoder, decode_lz4_blocks};

/// Entries of the hash table.
const HASH_ENTRIES: usize = 1 << 13;
/// The shortest match.
const MIN_MATCH: usize = 4;
/// The last match starts at least this far from the end.
const MATCH_LIMIT: usize = 12;
/// The last bytes are literals.
const LAST_LITERALS: usize = 5;
/// Bytes copied at once.
const WIDE: usize = 16;

/// Makes the LZ4 blocks of pages; holds what one block after another can reuse.
pub(crate) struct Lz4Encoder {
    table: Box<[u16; HASH_ENTRIES]>,
    block: Box<[u8; 2 * PAGE_SIZE]>,
}

impl Lz4Encoder {
    pub(crate) fn new() -> Lz4Encoder {
        Lz4Encoder { table: Box::new([0; HASH_ENTRIES]), block: Box::new([0; 2 * PAGE_SIZE]) }
    }

    /// Appends the LZ4 block of the page if it is shorter than `limit` bytes; says whether it was.
    pub(crate) fn encode(&mut self, page: &Page, limit: usize, out: &mut Vec<u8>) -> bool {
        self.table.fill(0);
        match self.compress(&page.0, limit.min(PAGE_SIZE)) {
            Some(len) => {
                out.extend_from_slice(&self.block[..len]);
                true
            }
            None => false,
        }
    }

    // Not inlined: it needs all registers. The algorithm is inlined here, and learns that all lengths are constants.
    #[inline(never)]
    fn compress(&mut self, plain: &[u8; PAGE_SIZE], limit: usize) -> Option<usize> {
        // After 32 searches without a match the steps become longer, as in the C library.
        compress::<4, 5, _>(&mut self.table, plain, limit, &mut *self.block)
    }
}

/// Writes the LZ4 block of `plain` to `block` and returns its length; `None` as soon as it reaches `limit`.
///
/// Finds matches of at least `KEY` bytes, 4 to 8. After 2^`SKIP` searches without one the steps become longer.
///
/// The table holds zeros; `plain` has at most 2^16 bytes, and `block` room for as many as `limit` and `plain` have
/// together.
#[inline(always)]
fn compress<const KEY: u32, const SKIP: u32, const ENTRIES: usize>(
    table: &mut [u16; ENTRIES],
    plain: &[u8],
    limit: usize,
    block: &mut [u8],
) -> Option<usize> {
    let mut writer = Writer { plain, block, len: 0, limit };
    if plain.len() <= MATCH_LIMIT {
        return writer.last_literals(0);
    }
    let last_match = plain.len() - MATCH_LIMIT;
    let mut anchor = 0;
    let mut at = 1;
    'sequences: loop {
        let mut searches = 1 << SKIP;
        let mut from = loop {
            if at > last_match {
                break 'sequences;
            }
            if let Some(from) = find::<KEY, _>(table, plain, read8(plain, at), at) {
                break from;
            }
            at += searches >> SKIP;
            searches += 1;
        };
        while at > anchor && from > 0 && plain[at - 1] == plain[from - 1] {
            at -= 1;
            from -= 1;
        }
        loop {
            let len = MIN_MATCH + common(plain, from + MIN_MATCH, at + MIN_MATCH);
            writer.sequence(anchor, at, at - from, len)?;
            at += len;
            anchor = at;
            if at > last_match {
                break 'sequences;
            }
            find::<KEY, _>(table, plain, read8(plain, at - 2), at - 2);
            match find::<KEY, _>(table, plain, read8(plain, at), at) {
                Some(next) => from = next,
                None => break,
            }
        }
        at += 1;
    }
    writer.last_literals(anchor)
}

#[inline(always)]
fn read8(plain: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(plain[at..at + 8].try_into().unwrap_or_default())
}

/// How many bytes from `a` and from `b` on are the same, `a < b`, up to the last place a match may end.
#[inline(always)]
fn common(plain: &[u8], a: usize, b: usize) -> usize {
    let max = plain.len() - LAST_LITERALS - b;
    let mut len = 0;
    while len + 8 <= max {
        let different = read8(plain, a + len) ^ read8(plain, b + len);
        if different != 0 {
            return len + different.trailing_zeros() as usize / 8;
        }
        len += 8;
    }
    while len < max && plain[a + len] == plain[b + len] {
        len += 1;
    }
    len
}

/// Enters `at` in the table for these bytes, and returns the position that was entered before if the same bytes are there.
///
/// An entry never written is position 0, which needs no case of its own: either the bytes there are the same, or they are not.
#[inline(always)]
fn find<const KEY: u32, const ENTRIES: usize>(
    table: &mut [u16; ENTRIES],
    plain: &[u8],
    words: u64,
    at: usize,
) -> Option<usize> {
    let bits = ENTRIES.trailing_zeros();
    let hash = if KEY == 4 {
        u64::from((words as u32).wrapping_mul(2_654_435_761) >> (32 - bits))
    } else {
        (words << (64 - 8 * KEY)).wrapping_mul(0x9e37_79b1_85eb_ca87) >> (64 - bits)
    };
    let entry = &mut table[hash as usize];
    let before = usize::from(*entry);
    *entry = at as u16;
    ((read8(plain, before) ^ words) << (64 - 8 * KEY) == 0).then_some(before)
}

/// Writes sequences: a token, literals, and a match.
struct Writer<'a> {
    plain: &'a [u8],
    block: &'a mut [u8],
    len: usize,
    limit: usize,
}

impl Writer<'_> {
    /// Literals from `anchor` to `at`, then a match of `len` bytes that lies `offset` bytes back.
    #[inline(always)]
    fn sequence(&mut self, anchor: usize, at: usize, offset: usize, len: usize) -> Option<()> {
        let token = self.len;
        let literals = self.literals(anchor, at)?;
        self.block[self.len..self.len + 2].copy_from_slice(&(offset as u16).to_le_bytes());
        self.len += 2;
        let len = len - MIN_MATCH;
        self.block[token] = literals | len.min(15) as u8;
        self.extended(len);
        Some(())
    }

    /// The last sequence: literals from `anchor` to the end. Returns the length of the block.
    fn last_literals(mut self, anchor: usize) -> Option<usize> {
        let token = self.len;
        self.block[token] = self.literals(anchor, self.plain.len())?;
        (self.len < self.limit).then_some(self.len)
    }

    /// Leaves room for a token, writes the literals, and returns their part of the token.
    ///
    /// `None` if the block gets too long. Below that there is room in the buffer, which is longer than any limit by the
    /// length of the input, for the longest sequence: each of its bytes but a few stands for a byte of the input.
    #[inline(always)]
    fn literals(&mut self, from: usize, to: usize) -> Option<u8> {
        let count = to - from;
        if self.len + count >= self.limit {
            return None;
        }
        self.len += 1;
        self.extended(count);
        if from + count + WIDE <= self.plain.len() {
            // Whole words, beyond the end: what is too much is overwritten by what comes next.
            let mut copied = 0;
            loop {
                self.block[self.len + copied..][..WIDE].copy_from_slice(&self.plain[from + copied..][..WIDE]);
                copied += WIDE;
                if copied >= count {
                    break;
                }
            }
        } else {
            self.block[self.len..self.len + count].copy_from_slice(&self.plain[from..to]);
        }
        self.len += count;
        Some((count.min(15) as u8) << 4)
    }

    /// The bytes that continue a length which does not fit the four bits of the token.
    #[inline(always)]
    fn extended(&mut self, len: usize) {
        if len >= 15 {
            let mut rest = len - 15;
            while rest >= 255 {
                self.block[self.len] = 255;
                self.len += 1;
                rest -= 255;
            }
            self.block[self.len] = rest as u8;
            self.len += 1;
        }
    }
}

/// Decodes a block that must be one page. After an error `out` holds anything.
pub(crate) fn decode(block: &[u8], out: &mut Page) -> Result<(), PageError> {
    match decompress_into(block, &mut out.0) {
        Ok(PAGE_SIZE) => Ok(()),
        Ok(seen) => Err(PageError::Lz4Length { seen }),
        Err(error) => Err(PageError::Lz4 { reason: error.to_string() }),
    }
}
