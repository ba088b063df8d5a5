//! A migration in the small: pages that change, slots that are given out, and what the destination has.

use std::collections::BTreeMap;

use crate::common::noise;
use pagewarp_codec::{EncodeJob, Page, SlotUse};

/// Pages of the guest.
const PAGES: usize = 160;
/// Slots, fewer than pages so that some pages have none.
pub(crate) const SLOTS: u32 = 120;
/// Pages of the largest batch.
pub(crate) const MAX_PAGES: usize = 12;

/// A small generator of random numbers (xorshift).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 20) as usize % bound
    }
}

/// The guest and the source's slot table.
pub(crate) struct Guest {
    random: Random,
    pages: Vec<Page>,
    slot_of: Vec<Option<u32>>,
    page_of: Vec<Option<usize>>,
    batches: u64,
}

/// A batch on its way: which pages of the guest its job has.
#[derive(Clone, Debug)]
pub(crate) struct Sent {
    pub(crate) number: u64,
    pub(crate) pages: Vec<usize>,
    pub(crate) plain: Vec<Page>,
    pub(crate) slots: Vec<SlotUse>,
}

impl Sent {
    pub(crate) fn job(&self) -> EncodeJob {
        EncodeJob {
            number: self.number,
            pages: self.plain.clone(),
            slots: self.slots.clone(),
            ..EncodeJob::default()
        }
    }
}

impl Guest {
    pub(crate) fn new(seed: u64) -> Guest {
        Guest {
            random: Random::new(seed),
            pages: (0..PAGES as u64).map(|n| noise(n ^ seed << 20)).collect(),
            slot_of: vec![None; PAGES],
            page_of: vec![None; SLOTS as usize],
            batches: 0,
        }
    }

    /// The batches of the next epoch: some pages have changed a little, some a lot, some not at all.
    pub(crate) fn epoch(&mut self) -> Vec<Sent> {
        let start = self.random.below(PAGES);
        let count = 1 + self.random.below(PAGES - 1);
        let mut dirty: Vec<usize> = (start..start + count).map(|n| n % PAGES).collect();
        let mut batches = Vec::new();
        while !dirty.is_empty() {
            let rest = dirty.split_off(dirty.len().min(1 + self.random.below(MAX_PAGES)));
            for &page in &dirty {
                self.write(page);
            }
            batches.push(Sent {
                number: self.batches,
                plain: dirty.iter().map(|&page| self.pages[page]).collect(),
                slots: dirty.iter().map(|&page| self.slot(page)).collect(),
                pages: dirty,
            });
            self.batches += 1;
            dirty = rest;
        }
        batches
    }

    fn write(&mut self, page: usize) {
        let fresh = noise(self.random.below(1 << 40) as u64);
        let page = &mut self.pages[page];
        match self.random.below(8) {
            0 => *page = fresh,
            1 => *page = Page::ZERO,
            2 | 3 => {}
            _ => {
                for _ in 0..1 + self.random.below(40) {
                    page.0[self.random.below(4096)] ^= 0x55;
                }
            }
        }
    }

    fn slot(&mut self, page: usize) -> SlotUse {
        if let Some(slot) = self.slot_of[page] {
            return SlotUse::Delta(slot);
        }
        let first = self.random.below(SLOTS as usize);
        let free = (0..SLOTS as usize)
            .map(|n| (first + n) % SLOTS as usize)
            .find(|&slot| self.page_of[slot].is_none());
        let Some(slot) = free else { return SlotUse::None };
        self.slot_of[page] = Some(slot as u32);
        self.page_of[slot] = Some(page);
        SlotUse::Store(slot as u32)
    }
}

/// The guest memory of the destination: the version of each page that came last.
#[derive(Default)]
pub(crate) struct Destination(BTreeMap<usize, Page>);

impl Destination {
    /// The base of each page for which `needed` says so.
    pub(crate) fn bases(&self, pages: &[usize], needed: impl Fn(usize) -> bool) -> Vec<Page> {
        let wanted = pages.iter().enumerate().filter(|(index, _)| needed(*index));
        wanted
            .map(|(_, page)| self.0.get(page).copied().unwrap_or_else(|| panic!("page {page} has no base")))
            .collect()
    }

    pub(crate) fn restore(&mut self, pages: &[usize], plain: &[Page]) {
        self.0.extend(pages.iter().copied().zip(plain.iter().copied()));
    }
}
