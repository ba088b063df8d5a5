//! `idle`: a few ticking pages in memory that nobody else touches.

use super::{Corruption, PAGE_WORDS, Step, Verified, Workload};
use crate::rng::mix;

const TICKING: usize = 16;
/// Untouched pages whose first words are watched. A fixed set, spread out: looking at a page may make the
/// host allocate it.
const WATCHED: usize = 1024;

pub struct Idle<'m> {
    mem: &'m mut [u64],
    ticking: usize,
    seed: u64,
    /// Ticks so far, of all ticking pages together.
    ticks: u64,
    cursor: usize,
}

impl<'m> Idle<'m> {
    pub fn new(mem: &'m mut [u64], seed: u64) -> Self {
        let ticking = TICKING.min(mem.len() / PAGE_WORDS);
        Idle { mem, ticking, seed, ticks: 0, cursor: 0 }
    }

    /// How often page `i` has ticked: they take turns.
    fn ticks_of(&self, i: usize) -> u64 {
        let n = self.ticking as u64;
        (self.ticks + n - 1 - i as u64) / n
    }

    fn check(&self, word: usize, expected: u64, what: &'static str, found: &mut dyn FnMut(Corruption)) {
        let value = self.mem[word];
        if value != expected {
            found(Corruption { at: word * 8, what, expected, found: value });
        }
    }
}

impl Workload for Idle<'_> {
    fn step(&mut self, _now_ms: u64, _found: &mut dyn FnMut(Corruption)) -> Step {
        if self.ticking == 0 {
            return Step::default();
        }
        let i = (self.ticks % self.ticking as u64) as usize;
        self.ticks += 1;
        let ticks = self.ticks_of(i);
        self.mem[i * PAGE_WORDS] = ticks;
        self.mem[i * PAGE_WORDS + 1] = mix(ticks ^ self.seed);
        Step { ops: 1, pages: 1 }
    }

    fn verify(&mut self, found: &mut dyn FnMut(Corruption)) -> Verified {
        let i = self.cursor;
        self.cursor += 1;
        if i < self.ticking {
            let ticks = self.ticks_of(i);
            self.check(i * PAGE_WORDS, ticks, "tick", found);
            let sum = if ticks == 0 { 0 } else { mix(ticks ^ self.seed) };
            self.check(i * PAGE_WORDS + 1, sum, "tick-sum", found);
            return Verified { bytes: 16, sweep_done: false };
        }
        let pages = self.mem.len() / PAGE_WORDS - self.ticking;
        let watched = WATCHED.min(pages);
        let j = i - self.ticking;
        if j < watched {
            let page = self.ticking + j * (pages / watched);
            self.check(page * PAGE_WORDS + j % PAGE_WORDS, 0, "untouched", found);
            return Verified { bytes: 8, sweep_done: false };
        }
        self.cursor = 0;
        Verified { bytes: 0, sweep_done: true }
    }

    #[cfg(test)]
    fn flip(&mut self, at: usize, bits: u8) -> u8 {
        self.mem[at / 8] ^= u64::from(bits) << (at % 8 * 8);
        (self.mem[at / 8] >> (at % 8 * 8)) as u8
    }
}
