//! `uniform`: random words written to random pages.
//!
//! A page is: its number and version, a sum over the rest, and random words. The sum finds damage; a page
//! that is whole but *old* (a lost write, the typical fault of a migration) has a correct sum, so the
//! expected versions are kept outside, 16 bits each.

use super::{Corruption, PAGE_WORDS, Plan, Step, Verified, Workload};
use crate::rng::Rng;

const HEADER: usize = 2;
/// Writes a step: enough to make time-keeping cheap, few enough to stay far below 100 µs.
const BURST: usize = 8;

pub struct Uniform<'m> {
    pages: &'m mut [u64],
    versions: Versions<'m>,
    working_set: usize,
    rng: Rng,
    cursor: usize,
}

impl<'m> Uniform<'m> {
    /// Fills memory.
    pub fn new(mem: &'m mut [u64], plan: Plan) -> Self {
        let filled = plan.filled.min(mem.len() / PAGE_WORDS);
        // The version table is part of the filled memory: one page for 2048.
        let count = filled - filled.div_ceil(2048);
        let (pages, rest) = mem.split_at_mut(count * PAGE_WORDS);
        let mut rng = Rng::new(plan.seed);
        for (number, page) in pages.chunks_exact_mut(PAGE_WORDS).enumerate() {
            page[0] = (number as u64) << 32;
            page[HEADER..].fill_with(|| rng.next_u64());
            page[1] = sum(page);
        }
        let working_set = plan.working_set.clamp(1, count.max(1)).min(count);
        Uniform { pages, versions: Versions(&mut rest[..count.div_ceil(4)]), working_set, rng, cursor: 0 }
    }
}

impl Workload for Uniform<'_> {
    fn step(&mut self, _now_ms: u64, _found: &mut dyn FnMut(Corruption)) -> Step {
        if self.working_set == 0 {
            return Step::default();
        }
        for _ in 0..BURST {
            let number = self.rng.below(self.working_set as u64) as usize;
            let slot = HEADER + self.rng.below((PAGE_WORDS - HEADER) as u64) as usize;
            let value = self.rng.next_u64();
            let page = &mut self.pages[number * PAGE_WORDS..][..PAGE_WORDS];
            let version = page[0] as u32;
            // The version wraps at 32 bits without reaching the page number.
            let head = page[0] & !0xffff_ffff | u64::from(version.wrapping_add(1));
            page[1] = page[1]
                .wrapping_add(head.wrapping_sub(page[0]).wrapping_mul(weight(0)))
                .wrapping_add(value.wrapping_sub(page[slot]).wrapping_mul(weight(slot)));
            page[0] = head;
            page[slot] = value;
            self.versions.set(number, head as u16);
        }
        Step { ops: BURST as u64, pages: BURST as u64 }
    }

    fn verify(&mut self, found: &mut dyn FnMut(Corruption)) -> Verified {
        let Some(page) = self.pages.get(self.cursor * PAGE_WORDS..(self.cursor + 1) * PAGE_WORDS) else {
            self.cursor = 0;
            return Verified { bytes: 0, sweep_done: true };
        };
        let word = self.cursor * PAGE_WORDS;
        let mut check = |what, expected, value| {
            if expected != value {
                found(Corruption { at: word * 8, what, expected, found: value });
            }
        };
        check("page-number", self.cursor as u64, page[0] >> 32);
        check("page-version", u64::from(self.versions.get(self.cursor)), page[0] & 0xffff);
        check("page-sum", sum(page), page[1]);
        self.cursor += 1;
        Verified { bytes: 4096, sweep_done: false }
    }

    #[cfg(test)]
    fn flip(&mut self, at: usize, bits: u8) -> u8 {
        self.pages[at / 8] ^= u64::from(bits) << (at % 8 * 8);
        (self.pages[at / 8] >> (at % 8 * 8)) as u8
    }
}

/// An odd factor for each place, so that exchanged words change the sum.
fn weight(slot: usize) -> u64 {
    (2 * slot as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Linear in every word, so that a write updates it without reading the page.
fn sum(page: &[u64]) -> u64 {
    page.iter()
        .enumerate()
        .filter(|&(slot, _)| slot != 1)
        .fold(0, |sum, (slot, &w)| sum.wrapping_add(w.wrapping_mul(weight(slot))))
}

/// A table of 16-bit numbers in words.
pub struct Versions<'m>(pub &'m mut [u64]);

impl Versions<'_> {
    pub fn get(&self, i: usize) -> u16 {
        (self.0[i / 4] >> (i % 4 * 16)) as u16
    }

    pub fn set(&mut self, i: usize, version: u16) {
        let shift = i % 4 * 16;
        let word = &mut self.0[i / 4];
        *word = *word & !(0xffff << shift) | u64::from(version) << shift;
    }
}
