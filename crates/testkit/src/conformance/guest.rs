//! A migration in the small: pages that change, and slots at both ends that are given out, taken away and used again.

use pagewarp_codec::{Page, SlotUse};

use super::jobs::Batch;
use super::{MAX_PAGES, SLOTS};
use crate::image::{Mutation, PageKind, mutate, page};
use crate::rng::SplitMix64;

/// Pages of the guest: more than slots, so that slots are used again.
const PAGES: usize = 3 * SLOTS as usize / 2;

/// The guest, and what source and destination know of it.
///
/// No page is twice in an epoch, and slots change hands between epochs only, so that the batches of an epoch can be encoded and decoded in
/// any order.
pub(super) struct Guest {
    rng: SplitMix64,
    /// The version of each page that was sent last, which is what the destination has.
    sent: Vec<Option<Page>>,
    source: Slots,
    /// The destination keeps what it likes.
    destination: Slots,
    /// What was stored last in each slot of the source, also when its page has lost the slot since.
    stored: Vec<Option<Page>>,
    batches: u64,
}

impl Guest {
    pub(super) fn new(seed: u64) -> Guest {
        Guest {
            rng: SplitMix64::new(seed),
            sent: vec![None; PAGES],
            source: Slots::new(),
            destination: Slots::new(),
            stored: vec![None; SLOTS as usize],
            batches: 0,
        }
    }

    /// The next epoch, of at most so many batches. Pages without a slot have no base, whatever they were before.
    pub(super) fn epoch(&mut self, batches: usize) -> Vec<Batch> {
        self.source.evict(&mut self.rng);
        self.destination.evict(&mut self.rng);
        let mut dirty: Vec<usize> = (0..PAGES).collect();
        for index in 0..PAGES {
            dirty.swap(index, self.rng.index(PAGES));
        }
        (0..batches)
            .map(|_| {
                let count = match self.rng.below(16) {
                    0 => 0,
                    1 => 1,
                    2 => MAX_PAGES,
                    _ => 1 + self.rng.index(MAX_PAGES),
                };
                let rest = dirty.len().saturating_sub(count);
                self.batch(&dirty.split_off(rest))
            })
            .collect()
    }

    fn batch(&mut self, dirty: &[usize]) -> Batch {
        let mut batch = Batch { number: self.batches, ..Batch::default() };
        self.batches += 1;
        for &number in dirty {
            let slot = self.source.plan(number, &mut self.rng);
            batch.kept.push(self.destination.plan(number, &mut self.rng));
            batch.bases.push(self.sent[number].filter(|_| matches!(slot, SlotUse::Delta(_))));
            let version = self.write(number, slot);
            self.sent[number] = Some(version);
            if let Some(slot) = slot.slot() {
                self.stored[slot as usize] = Some(version);
            }
            batch.slots.push(slot);
            batch.plain.push(version);
        }
        batch
    }

    /// The new version of a page.
    fn write(&mut self, number: usize, slot: SlotUse) -> Page {
        let rng = &mut self.rng;
        let kind = PageKind::ALL[rng.index(PageKind::ALL.len())];
        // Like the page that had the slot before: who takes that for a base is found out.
        let stale = match slot {
            SlotUse::Store(slot) if rng.below(2) == 0 => self.stored[slot as usize],
            _ => None,
        };
        let mut version = stale.or(self.sent[number]).unwrap_or_else(|| page(kind, rng));
        let change = match rng.below(8) {
            0 => Mutation::Nothing,
            1 => Mutation::Counter,
            2 => Mutation::Bytes(1 + rng.index(300)),
            // All densities: as many changes between 0.1 % and 1 % as between 10 % and 100 %.
            3..6 => Mutation::Share(0.001_f64.powf(rng.unit())),
            6 => Mutation::Run(1 + rng.index(4096)),
            _ => Mutation::Replace(kind),
        };
        mutate(&mut version, change, rng);
        version
    }
}

/// Which page has which slot.
struct Slots {
    of_page: Vec<Option<u32>>,
    /// Whether a page has it.
    taken: Vec<bool>,
}

impl Slots {
    fn new() -> Slots {
        Slots { of_page: vec![None; PAGES], taken: vec![false; SLOTS as usize] }
    }

    /// What the page, which is about to be sent, does with the history.
    fn plan(&mut self, number: usize, rng: &mut SplitMix64) -> SlotUse {
        if rng.below(8) == 0 {
            // Its slot, if it has one, does not get this version, and would be a wrong base next time. It stays taken until the next
            // epoch, since no slot is in two batches of one.
            self.of_page[number] = None;
            return SlotUse::None;
        }
        if let Some(slot) = self.of_page[number] {
            return SlotUse::Delta(slot);
        }
        let slots = self.taken.len();
        // The ends of the range more often than others.
        let first = [0, slots - 1, rng.index(slots), rng.index(slots)][rng.index(4)];
        let Some(slot) = (first..first + slots).map(|slot| slot % slots).find(|&slot| !self.taken[slot])
        else {
            return SlotUse::None;
        };
        self.taken[slot] = true;
        self.of_page[number] = Some(slot as u32);
        SlotUse::Store(slot as u32)
    }

    /// Takes some pages' slots away.
    fn evict(&mut self, rng: &mut SplitMix64) {
        self.taken.fill(false);
        for slot in &mut self.of_page {
            *slot = slot.filter(|_| rng.below(8) > 0);
            if let Some(slot) = *slot {
                self.taken[slot as usize] = true;
            }
        }
    }
}
