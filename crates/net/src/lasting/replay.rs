//! Bytes that were sent and that the other end has not confirmed.

use std::collections::VecDeque;
use std::io::IoSlice;

use zeroize::Zeroize;

/// Bytes in a block. A fuzzer has more of them with smaller ones.
const BLOCK: usize = if cfg!(fuzzing) { 1 << 10 } else { 256 << 10 };

/// The end of a stream of bytes, in blocks that are used again.
#[derive(Debug, Default)]
pub(super) struct Replay {
    blocks: VecDeque<Vec<u8>>,
    spare: Vec<Vec<u8>>,
    /// Where in the stream the first block begins.
    begin: u64,
    /// Before this everything is confirmed.
    confirmed: u64,
    /// Where the stream ends.
    end: u64,
}

impl Replay {
    /// Bytes that are not confirmed.
    pub(super) fn len(&self) -> usize {
        (self.end - self.confirmed) as usize
    }

    /// Bytes of the stream so far.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Appends the first `len` bytes of these.
    pub(super) fn push(&mut self, bytes: &[IoSlice<'_>], len: usize) {
        let mut left = len;
        for slice in bytes {
            let mut slice = &slice[..slice.len().min(left)];
            left -= slice.len();
            while !slice.is_empty() {
                if self.blocks.back().is_none_or(|block| block.len() == BLOCK) {
                    let block = self.spare.pop().unwrap_or_else(|| Vec::with_capacity(BLOCK));
                    self.blocks.push_back(block);
                }
                let Some(block) = self.blocks.back_mut() else { return };
                let (now, later) = slice.split_at(slice.len().min(BLOCK - block.len()));
                block.extend_from_slice(now);
                self.end += now.len() as u64;
                slice = later;
            }
        }
    }

    /// The other end has everything before `total`. `false` if that cannot be.
    pub(super) fn confirm(&mut self, total: u64) -> bool {
        if !(self.confirmed..=self.end).contains(&total) {
            return false;
        }
        self.confirmed = total;
        while self.begin + BLOCK as u64 <= total
            && let Some(mut block) = self.blocks.pop_front()
        {
            self.begin += BLOCK as u64;
            block.clear();
            self.spare.push(block);
        }
        true
    }

    /// What is not confirmed, from the oldest.
    pub(super) fn pieces(&self) -> impl Iterator<Item = &[u8]> {
        let skip = (self.confirmed - self.begin) as usize;
        let rest = self.blocks.iter().enumerate().map(move |(at, block)| {
            let skip = if at == 0 { skip } else { 0 };
            &block[skip.min(block.len())..]
        });
        rest.filter(|piece| !piece.is_empty())
    }
}

impl Drop for Replay {
    /// The blocks held memory of a guest.
    fn drop(&mut self) {
        self.blocks.iter_mut().chain(&mut self.spare).for_each(Zeroize::zeroize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_keeps_what_is_not_confirmed() {
        let mut replay = Replay::default();
        let stream: Vec<u8> = (0..5 * BLOCK + 77).map(|n| (n / 3) as u8).collect();
        let mut at = 0;
        let mut confirmed = 0;
        for (step, size) in [1, 100, BLOCK, BLOCK + 1, 3, 2 * BLOCK].into_iter().enumerate() {
            let (first, second) = stream[at..at + size].split_at(size / 2);
            let more = [0xff; 9];
            replay.push(&[IoSlice::new(first), IoSlice::new(second), IoSlice::new(&more)], size);
            at += size;
            assert_eq!((replay.end(), replay.len()), (at as u64, at - confirmed));
            confirmed += size * step / 5;
            assert!(replay.confirm(confirmed as u64));
            assert_eq!(replay.pieces().flatten().copied().collect::<Vec<_>>(), stream[confirmed..at]);
        }
        assert!(!replay.confirm(confirmed as u64 - 1), "less than before");
        assert!(!replay.confirm(at as u64 + 1), "more than was sent");
        assert!(replay.confirm(at as u64));
        assert_eq!(replay.pieces().count(), 0);
        assert!(replay.blocks.len() + replay.spare.len() <= 5, "blocks are used again");
    }
}
