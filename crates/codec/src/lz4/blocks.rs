//! Payloads of any length as LZ4 blocks of 64 KiB of plain bytes. `docs/page-encodings.md`, section 9, has the format.
//!
//! Neighbouring pages look alike, so that long matches alone make a block of 16 pages nearly as short as the blocks of each of them are.

use lz4_flex::block::decompress_into;

use super::{HASH_ENTRIES, compress};
use crate::error::Lz4BlocksError;

/// Plain bytes of every block of a payload but the last one, and the most that a block can have: positions fit 16 bits.
pub const LZ4_BLOCK_SIZE: usize = 1 << 16;

/// A limit that every block is below, also if nothing in it repeats.
const NO_LIMIT: usize = LZ4_BLOCK_SIZE + LZ4_BLOCK_SIZE / 255 + 16;

/// The shortest match that is looked for, and how soon the steps become longer. What a search costs is the branch that nobody foresees: with
/// keys of 4 bytes and steps as in the C library a page of a key-value store takes twice as long, and becomes a quarter shorter
/// (`docs/codec-performance.md`). Whoever wants it shorter takes zstd.
const KEY: u32 = 8;
const SKIP: u32 = 2;

/// The length that stands for a block which is stored as it is. No block is empty.
const STORED: u16 = 0;

/// Makes LZ4 blocks of up to 64 KiB of plain bytes; holds what one block after another can reuse.
///
/// What it writes depends on the plain bytes only, not on what it encoded before.
pub struct Lz4BlockEncoder {
    table: Box<[u16; HASH_ENTRIES]>,
    block: Box<[u8; NO_LIMIT + LZ4_BLOCK_SIZE]>,
}

impl Default for Lz4BlockEncoder {
    fn default() -> Lz4BlockEncoder {
        Lz4BlockEncoder::new()
    }
}

impl std::fmt::Debug for Lz4BlockEncoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lz4BlockEncoder").finish_non_exhaustive()
    }
}

impl Lz4BlockEncoder {
    /// An encoder, with 150 KiB of memory.
    pub fn new() -> Lz4BlockEncoder {
        Lz4BlockEncoder { table: zeros(), block: zeros() }
    }

    /// Appends the bytes as one LZ4 block if it is shorter than `limit` bytes; says whether it was.
    ///
    /// Gives up as soon as the block reaches the limit.
    ///
    /// # Panics
    ///
    /// If there are more than 64 KiB of plain bytes.
    pub fn encode_block(&mut self, plain: &[u8], limit: usize, out: &mut Vec<u8>) -> bool {
        assert!(plain.len() <= LZ4_BLOCK_SIZE, "{} bytes are too many for a block", plain.len());
        self.table.fill(0);
        match self.compress(plain, limit.min(NO_LIMIT)) {
            Some(len) => {
                out.extend_from_slice(&self.block[..len]);
                true
            }
            None => false,
        }
    }

    // Not inlined: it needs all registers.
    #[inline(never)]
    fn compress(&mut self, plain: &[u8], limit: usize) -> Option<usize> {
        compress::<KEY, SKIP, _>(&mut self.table, plain, limit, &mut *self.block)
    }

    /// Appends the bytes, any number of them, as a sequence of blocks if that is shorter than they are; says whether it was.
    ///
    /// Otherwise `out` is as before. [`decode_lz4_blocks`] is the way back.
    pub fn encode(&mut self, plain: &[u8], out: &mut Vec<u8>) -> bool {
        let start = out.len();
        for plain in plain.chunks(LZ4_BLOCK_SIZE) {
            let at = out.len();
            out.extend_from_slice(&STORED.to_le_bytes());
            let block = at + size_of_val(&STORED);
            if self.encode_block(plain, plain.len(), out) {
                let len = (out.len() - block) as u16;
                out[at..block].copy_from_slice(&len.to_le_bytes());
            } else {
                out.extend_from_slice(plain);
            }
        }
        let shorter = out.len() - start < plain.len();
        if !shorter {
            out.truncate(start);
        }
        shorter
    }
}

/// Decodes a payload of [`Lz4BlockEncoder::encode`] that must have exactly as many plain bytes as `out`.
///
/// Takes no memory and a number of steps that is bounded by the lengths of the two. After an error `out` holds anything.
///
/// # Errors
///
/// What is wrong with the payload.
pub fn decode_lz4_blocks(mut payload: &[u8], out: &mut [u8]) -> Result<(), Lz4BlocksError> {
    for (block, out) in out.chunks_mut(LZ4_BLOCK_SIZE).enumerate() {
        let Some((len, rest)) = payload.split_first_chunk() else {
            return Err(Lz4BlocksError::Ends { block, seen: payload.len(), expected: size_of_val(&STORED) });
        };
        let len = u16::from_le_bytes(*len);
        let expected = if len == STORED { out.len() } else { usize::from(len) };
        let Some((bytes, rest)) = rest.split_at_checked(expected) else {
            return Err(Lz4BlocksError::Ends { block, seen: rest.len(), expected });
        };
        if len == STORED {
            out.copy_from_slice(bytes);
        } else if bytes.len() >= out.len() {
            return Err(Lz4BlocksError::NotShorter { block, seen: bytes.len(), plain: out.len() });
        } else {
            match decompress_into(bytes, out) {
                Ok(seen) if seen == out.len() => (),
                Ok(seen) => return Err(Lz4BlocksError::PlainLength { block, seen, expected: out.len() }),
                Err(error) => return Err(Lz4BlocksError::Malformed { block, reason: error.to_string() }),
            }
        }
        payload = rest;
    }
    match payload.len() {
        0 => Ok(()),
        seen => Err(Lz4BlocksError::Trailing { seen }),
    }
}

/// Zeros that do not pass over the stack, where there may be little room.
fn zeros<T: Copy + Default + std::fmt::Debug, const N: usize>() -> Box<[T; N]> {
    vec![T::default(); N].try_into().expect("as many as there are")
}
