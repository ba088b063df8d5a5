//! Which page versions are worth keeping: the source's slot table.
//!
//! The table only decides; the bytes live with the encoders, in host or device memory. A slot holds the version of its page
//! that was sent last, which is also what the destination has in its guest memory: that is what makes the version a
//! valid base.

use pagewarp_codec::{Encoding, SlotUse};

const NO_SLOT: u32 = u32::MAX;
/// How many slots are looked at before a page goes without.
const EVICTION_PROBES: usize = 16;

/// Slots of one migration.
///
/// Policy: the first epoch fills free slots as pages come. Later, a page that is sent again and has no slot takes a free one or that
/// of a page that has not been sent again for an epoch or more: pages that were sent twice are likely to be sent a third time.
#[derive(Debug)]
pub(crate) struct SlotTable {
    /// Per region, the slot of each page.
    slot_of: Vec<Vec<u32>>,
    slots: Vec<Slot>,
    capacity: u32,
    free: Vec<u32>,
    hand: usize,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    region: u32,
    page: u64,
    used_in: u32,
}

impl SlotTable {
    /// A table of `capacity` slots for regions of these sizes, in pages.
    pub(crate) fn new(region_pages: &[u64], capacity: u32) -> SlotTable {
        // With no slot to give there is nothing to look up.
        let pages = |&n: &u64| vec![NO_SLOT; if capacity == 0 { 0 } else { n as usize }];
        SlotTable {
            slot_of: region_pages.iter().map(pages).collect(),
            slots: Vec::new(),
            capacity,
            free: Vec::new(),
            hand: 0,
        }
    }

    /// Decides for one page that is about to be encoded. `region` is its index.
    pub(crate) fn plan(&mut self, region: usize, page: u64, epoch: u32) -> SlotUse {
        if self.capacity == 0 {
            return SlotUse::None;
        }
        let known = self.slot_of[region][page as usize];
        if known != NO_SLOT {
            self.slots[known as usize].used_in = epoch;
            return SlotUse::Delta(known);
        }
        let Some(slot) = self.take(epoch) else { return SlotUse::None };
        self.slot_of[region][page as usize] = slot;
        self.slots[slot as usize] = Slot { region: region as u32, page, used_in: epoch };
        SlotUse::Store(slot)
    }

    /// Hears how the page was encoded. A zero page needs no slot: it is as cheap without a base.
    pub(crate) fn settle(&mut self, slot: SlotUse, encoding: Encoding) {
        if let (Some(slot), Encoding::Zero) = (slot.slot(), encoding) {
            let Slot { region, page, .. } = self.slots[slot as usize];
            self.slot_of[region as usize][page as usize] = NO_SLOT;
            self.free.push(slot);
        }
    }

    /// Forgets the version of this page.
    pub(crate) fn forget(&mut self, region: usize, page: u64) {
        if let Some(known) = self.slot_of[region].get_mut(page as usize)
            && *known != NO_SLOT
        {
            self.free.push(std::mem::replace(known, NO_SLOT));
        }
    }

    /// Forgets everything: the versions are lost.
    pub(crate) fn invalidate(&mut self) {
        for region in &mut self.slot_of {
            region.fill(NO_SLOT);
        }
        self.slots.clear();
        self.free.clear();
        self.hand = 0;
    }

    /// Slots that hold a version.
    pub(crate) fn in_use(&self) -> u64 {
        (self.slots.len() - self.free.len()) as u64
    }

    fn take(&mut self, epoch: u32) -> Option<u32> {
        if let Some(slot) = self.free.pop() {
            return Some(slot);
        }
        if self.slots.len() < self.capacity as usize {
            self.slots.push(Slot { region: 0, page: 0, used_in: epoch });
            return Some(self.slots.len() as u32 - 1);
        }
        self.evict(epoch)
    }

    /// Takes the slot of a page that was not sent in this epoch nor in the one before.
    ///
    /// What was sent in this epoch must stay: another thread may be using that slot at this moment.
    fn evict(&mut self, epoch: u32) -> Option<u32> {
        for _ in 0..EVICTION_PROBES.min(self.slots.len()) {
            let index = self.hand;
            self.hand = (self.hand + 1) % self.slots.len();
            let Slot { region, page, used_in } = self.slots[index];
            // A page that was sent in epoch 0 alone proves nothing about being written.
            if used_in + 2 <= epoch || (used_in == 0 && epoch == 1) {
                self.slot_of[region as usize][page as usize] = NO_SLOT;
                return Some(index as u32);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_sent_again_has_its_old_version_as_base() {
        let mut table = SlotTable::new(&[10, 10], 4);
        assert_eq!(table.plan(1, 3, 0), SlotUse::Store(0));
        assert_eq!(table.plan(0, 3, 0), SlotUse::Store(1));
        assert_eq!(table.plan(1, 3, 1), SlotUse::Delta(0));
        assert_eq!(table.in_use(), 2);
    }

    #[test]
    fn a_zero_page_gives_its_slot_back() {
        let mut table = SlotTable::new(&[10], 1);
        let slot = table.plan(0, 0, 0);
        table.settle(slot, Encoding::Zero);
        assert_eq!(table.in_use(), 0);
        assert_eq!(table.plan(0, 1, 0), SlotUse::Store(0));
        assert_eq!(table.plan(0, 0, 1), SlotUse::Store(0), "page 1 was sent in epoch 0 alone");
    }

    #[test]
    fn the_first_epoch_never_evicts() {
        let mut table = SlotTable::new(&[10], 2);
        for page in 0..10 {
            let expected = if page < 2 { SlotUse::Store(page as u32) } else { SlotUse::None };
            assert_eq!(table.plan(0, page, 0), expected);
        }
    }

    #[test]
    fn pages_sent_lately_are_not_evicted() {
        let mut table = SlotTable::new(&[10], 2);
        for epoch in 0..3 {
            table.plan(0, 0, epoch);
            table.plan(0, 1, epoch);
        }
        assert_eq!(table.plan(0, 5, 2), SlotUse::None);
        assert_eq!(table.plan(0, 5, 3), SlotUse::None, "both were sent in epoch 2");
        assert_eq!(table.plan(0, 5, 4), SlotUse::Store(0));
        assert_eq!(table.plan(0, 0, 4), SlotUse::Store(1), "page 0 has lost its slot, page 1 loses its own");
        assert_eq!(table.plan(0, 1, 4), SlotUse::None, "nothing used in this epoch is evicted");
    }

    #[test]
    fn without_slots_there_is_no_base_and_no_table() {
        let mut table = SlotTable::new(&[1 << 30], 0);
        assert_eq!(table.plan(0, 77, 3), SlotUse::None);
    }

    #[test]
    fn a_page_that_was_forgotten_has_no_base_and_gives_its_slot_back() {
        let mut table = SlotTable::new(&[10], 1);
        table.plan(0, 3, 0);
        table.forget(0, 3);
        table.forget(0, 3);
        table.forget(0, 4);
        assert_eq!(table.in_use(), 0);
        assert_eq!(table.plan(0, 5, 0), SlotUse::Store(0));
    }

    #[test]
    fn invalidation_forgets_every_base() {
        let mut table = SlotTable::new(&[4], 4);
        table.plan(0, 0, 0);
        table.invalidate();
        assert_eq!(table.plan(0, 0, 1), SlotUse::Store(0));
    }
}
