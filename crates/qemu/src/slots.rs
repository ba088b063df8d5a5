//! Which page versions are worth keeping, and in which order slots are used: the source decides, the destination obeys.
//!
//! Channels of one migration share the history. A version is a base for pages of later *epochs* only, because within an epoch nothing is known of
//! the order in which the destination QEMU takes what different channels carry: waiting for another channel might be for ever. For
//! each segment the table says after which others it has to be decoded, so that both sides use every slot in the same order.

use std::collections::HashMap;

use pagewarp_codec::SlotUse;

use crate::protocol::meta::After;
use crate::segment::Place;

/// How many slots are looked at before a page goes without.
const EVICTION_PROBES: usize = 16;
/// Pages of a block of which one entry tells everything: pages come in runs, so that most need no look into the map.
const RUN: u64 = 512;
/// A page without a slot.
const NO_SLOT: u32 = u32::MAX;

/// The slots of one session.
#[derive(Debug)]
pub struct SlotTable {
    pages: PageTable,
    slots: Vec<Slot>,
    free: Vec<u32>,
    capacity: u32,
    hand: usize,
    generation: u64,
}

/// What is known of each page.
#[derive(Debug, Default)]
struct PageTable {
    /// The place in `runs` of each run, by its block and its number there.
    run_of: HashMap<(u32, u64), usize>,
    runs: Vec<Run>,
    /// The run that was asked for last.
    last: Option<((u32, u64), usize)>,
}

/// What is known of 512 pages.
#[derive(Debug)]
struct Run {
    slots: [u32; RUN as usize],
    /// Which were seen before.
    seen: [u64; RUN as usize / 64],
}

impl Run {
    const EMPTY: Run = Run { slots: [NO_SLOT; RUN as usize], seen: [0; RUN as usize / 64] };
}

impl PageTable {
    fn find(&mut self, place: Place) -> Option<usize> {
        let key = (place.block, place.page / RUN);
        match self.last {
            Some((last, run)) if last == key => Some(run),
            _ => {
                let run = *self.run_of.get(&key)?;
                self.last = Some((key, run));
                Some(run)
            }
        }
    }

    /// The slot of a page.
    fn slot(&mut self, place: Place) -> Option<u32> {
        let run = self.find(place)?;
        Some(self.runs[run].slots[(place.page % RUN) as usize]).filter(|&slot| slot != NO_SLOT)
    }

    fn set_slot(&mut self, place: Place, slot: u32) {
        let run = self.find_or_add(place);
        self.runs[run].slots[(place.page % RUN) as usize] = slot;
    }

    /// Notes that this page was seen. `true` if it was before.
    fn mark(&mut self, place: Place) -> bool {
        let run = self.find_or_add(place);
        let (word, bit) = ((place.page % RUN / 64) as usize, place.page % 64);
        let word = &mut self.runs[run].seen[word];
        let before = *word >> bit & 1 == 1;
        *word |= 1 << bit;
        before
    }

    fn find_or_add(&mut self, place: Place) -> usize {
        self.find(place).unwrap_or_else(|| {
            self.runs.push(Run::EMPTY);
            self.run_of.insert((place.block, place.page / RUN), self.runs.len() - 1);
            self.runs.len() - 1
        })
    }

    fn forget_slots(&mut self) {
        self.runs.iter_mut().for_each(|run| run.slots.fill(NO_SLOT));
    }
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    place: Option<Place>,
    /// The epoch of the version on its channel.
    epoch: u32,
    /// The segment that used the slot last.
    user: After,
    /// Whether the page was sent more than once.
    sent_again: bool,
}

impl Slot {
    /// Whether its version may be the base of a page in a segment of this epoch. On one and the same connection everything is in order, so that the main channel, which
    /// has no epochs, has bases too; but a slot appears in a segment only once.
    fn may_be_base(&self, epoch: u32, user: After) -> bool {
        let in_order = self.user.connection == user.connection && self.user.segment < user.segment;
        self.user != user && (in_order || self.epoch < epoch)
    }
}

/// What the table decided for a segment.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// One entry per page.
    pub slots: Vec<SlotUse>,
    /// What must be decoded before: at most one segment per connection, its last one that matters.
    pub after: Vec<After>,
    /// Pages that have a base.
    pub with_base: usize,
    /// The table's generation; a plan of an older one must not be used.
    pub generation: u64,
}

impl SlotTable {
    /// A table of so many slots.
    pub fn new(capacity: u32) -> SlotTable {
        SlotTable {
            pages: PageTable::default(),
            slots: Vec::new(),
            free: Vec::new(),
            capacity,
            hand: 0,
            generation: 0,
        }
    }

    /// Slots that hold a version.
    pub fn in_use(&self) -> u64 {
        (self.slots.len() - self.free.len()) as u64
    }

    /// Changes whenever all versions become worthless.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// How many pages of segment `user`, which is of `epoch` on its connection, have a version that would be a base. Changes nothing.
    pub fn count_bases(&mut self, places: &[Option<Place>], epoch: u32, user: After) -> usize {
        let (pages, slots) = (&mut self.pages, &self.slots);
        let is_base = |slot: u32| slots[slot as usize].may_be_base(epoch, user);
        places.iter().flatten().filter(|&&place| pages.slot(place).is_some_and(is_base)).count()
    }

    /// Decides for the pages of segment `user`, which is of `epoch` on its connection. Segments must be planned in the order in which those
    /// of each connection follow each other.
    pub fn plan(&mut self, places: &[Option<Place>], epoch: u32, user: After, plan: &mut Plan) {
        plan.slots.clear();
        plan.after.clear();
        plan.with_base = 0;
        plan.generation = self.generation;
        for place in places {
            let slot =
                place.map_or(SlotUse::None, |place| self.plan_page(place, epoch, user, &mut plan.after));
            plan.with_base += usize::from(matches!(slot, SlotUse::Delta(_)));
            plan.slots.push(slot);
        }
    }

    fn plan_page(&mut self, place: Place, epoch: u32, user: After, after: &mut Vec<After>) -> SlotUse {
        if self.capacity == 0 {
            return SlotUse::None;
        }
        let again = self.pages.mark(place);
        if let Some(known) = self.pages.slot(place) {
            let slot = &mut self.slots[known as usize];
            if !slot.may_be_base(epoch, user) {
                return SlotUse::None;
            }
            wait_for(after, slot.user);
            *slot = Slot { place: Some(place), epoch, user, sent_again: true };
            return SlotUse::Delta(known);
        }
        let Some(slot) = self.take(again, epoch, user, after) else { return SlotUse::None };
        self.slots[slot as usize] = Slot { place: Some(place), epoch, user, sent_again: again };
        self.pages.set_slot(place, slot);
        SlotUse::Store(slot)
    }

    /// A page turned out to be zero: it needs no slot, as it is as cheap without a base. `false` if a later segment counts on the slot already: then the
    /// version must be kept after all, on both sides.
    #[must_use]
    pub fn give_back(&mut self, slot: u32, user: After) -> bool {
        let entry = &mut self.slots[slot as usize];
        if entry.user != user {
            return false;
        }
        if let Some(place) = entry.place.take() {
            self.pages.set_slot(place, NO_SLOT);
            self.free.push(slot);
        }
        true
    }

    /// Forgets all versions: they are lost. Who used a slot last is still to be waited for.
    pub fn invalidate(&mut self) {
        self.pages.forget_slots();
        self.free.clear();
        for (index, slot) in (0u32..).zip(&mut self.slots) {
            slot.place = None;
            self.free.push(index);
        }
        self.generation += 1;
    }

    fn take(&mut self, again: bool, epoch: u32, user: After, after: &mut Vec<After>) -> Option<u32> {
        // The oldest of the free ones would be the least likely to be waited for, the newest is warm in the cache.
        if let Some(&slot) = self.free.last()
            && self.may_follow(slot, epoch, user)
        {
            self.free.pop();
            wait_for(after, self.slots[slot as usize].user);
            return Some(slot);
        }
        if self.slots.len() < self.capacity as usize {
            self.slots.push(Slot { place: None, epoch, user, sent_again: false });
            return Some(self.slots.len() as u32 - 1);
        }
        // A page that comes for the first time may never come again: it drives out nobody.
        if again { self.evict(epoch, user, after) } else { None }
    }

    /// Whether a segment of `epoch` may wait for the last user of this slot.
    fn may_follow(&self, slot: u32, epoch: u32, user: After) -> bool {
        let Slot { user: last, epoch: last_epoch, .. } = self.slots[slot as usize];
        last != user && (last.connection == user.connection || last_epoch < epoch)
    }

    /// Takes the slot of a page that was never sent again, or else not for a whole turn of the hand.
    fn evict(&mut self, epoch: u32, user: After, after: &mut Vec<After>) -> Option<u32> {
        for _ in 0..EVICTION_PROBES.min(self.slots.len()) {
            let index = self.hand;
            self.hand = (self.hand + 1) % self.slots.len();
            let Slot { place, user: last, sent_again, .. } = self.slots[index];
            if std::mem::replace(&mut self.slots[index].sent_again, false) && sent_again {
                continue;
            }
            if !self.may_follow(index as u32, epoch, user) {
                continue;
            }
            // Free slots are in the list and must stay there.
            let Some(place) = place else { continue };
            self.pages.set_slot(place, NO_SLOT);
            wait_for(after, last);
            return Some(index as u32);
        }
        None
    }
}

/// Adds `user` to those to wait for.
fn wait_for(after: &mut Vec<After>, user: After) {
    match after.iter_mut().find(|other| other.connection == user.connection) {
        Some(other) => other.segment = other.segment.max(user.segment),
        None => after.push(user),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(page: u64) -> Option<Place> {
        Some(Place { block: 1, page })
    }

    fn user(connection: u16, segment: u64) -> After {
        After { connection, segment }
    }

    fn plan(table: &mut SlotTable, pages: &[u64], epoch: u32, user: After) -> Plan {
        let mut plan = Plan::default();
        let places: Vec<_> = pages.iter().map(|&page| at(page)).collect();
        table.plan(&places, epoch, user, &mut plan);
        plan
    }

    #[test]
    fn on_one_connection_every_earlier_version_is_a_base() {
        let mut table = SlotTable::new(10);
        assert_eq!(plan(&mut table, &[1, 2], 0, user(0, 0)).slots, [SlotUse::Store(0), SlotUse::Store(1)]);
        let again = plan(&mut table, &[2, 3], 0, user(0, 1));
        assert_eq!(again.slots, [SlotUse::Delta(1), SlotUse::Store(2)]);
        assert_eq!(again.after, [user(0, 0)]);
        assert_eq!(again.with_base, 1);
    }

    #[test]
    fn bases_are_counted_as_they_are_planned() {
        let mut table = SlotTable::new(10);
        // Without multifd the epoch is 0 throughout.
        for (epochs, connections) in [([0, 0], [0, 0]), ([0, 1], [1, 2]), ([1, 1], [3, 4])] {
            table.invalidate();
            plan(&mut table, &[1, 2], epochs[0], user(connections[0], 10));
            let next = user(connections[1], 11);
            let places = [at(2), at(3), None];
            let count = table.count_bases(&places, epochs[1], next);
            assert_eq!(
                count,
                plan(&mut table, &[2, 3], epochs[1], next).with_base,
                "{epochs:?} {connections:?}"
            );
            assert_eq!(count, usize::from(connections[0] == connections[1] || epochs[0] < epochs[1]));
        }
    }

    #[test]
    fn a_page_twice_in_a_segment_uses_its_slot_once() {
        let mut table = SlotTable::new(10);
        assert_eq!(plan(&mut table, &[1, 1], 0, user(0, 0)).slots, [SlotUse::Store(0), SlotUse::None]);
    }

    #[test]
    fn across_connections_only_earlier_epochs_are_bases() {
        let mut table = SlotTable::new(10);
        plan(&mut table, &[1, 2], 1, user(1, 0));
        assert_eq!(plan(&mut table, &[1], 1, user(2, 0)).slots, [SlotUse::None], "the same epoch");
        assert_eq!(plan(&mut table, &[1], 0, user(2, 1)).slots, [SlotUse::None], "a channel that lags");
        let later = plan(&mut table, &[1, 2], 2, user(2, 2));
        assert_eq!(later.slots, [SlotUse::Delta(0), SlotUse::Delta(1)]);
        assert_eq!(later.after, [user(1, 0)]);
    }

    #[test]
    fn pages_sent_again_drive_out_pages_sent_once() {
        let mut table = SlotTable::new(2);
        assert_eq!(
            plan(&mut table, &[0, 1, 2, 3], 0, user(0, 0)).slots,
            [SlotUse::Store(0), SlotUse::Store(1), SlotUse::None, SlotUse::None]
        );
        assert_eq!(plan(&mut table, &[4], 0, user(0, 1)).slots, [SlotUse::None], "never seen before");
        let again = plan(&mut table, &[3, 2], 0, user(0, 2));
        assert_eq!(again.slots, [SlotUse::Store(0), SlotUse::Store(1)]);
        assert_eq!(again.after, [user(0, 0)]);
        assert_eq!(table.in_use(), 2);
        assert_eq!(
            plan(&mut table, &[0], 0, user(0, 3)).slots,
            [SlotUse::None],
            "both were sent again lately"
        );
        assert_eq!(
            plan(&mut table, &[0], 0, user(0, 4)).slots,
            [SlotUse::Store(0)],
            "not since the hand came by"
        );
    }

    #[test]
    fn no_segment_waits_for_its_own_epoch_elsewhere() {
        let mut table = SlotTable::new(1);
        let first = plan(&mut table, &[0], 3, user(1, 0));
        assert_eq!(first.slots, [SlotUse::Store(0)]);
        assert!(table.give_back(0, user(1, 0)));
        assert_eq!(
            plan(&mut table, &[1], 3, user(2, 0)).slots,
            [SlotUse::None],
            "free, but last used in this epoch"
        );
        let later = plan(&mut table, &[1], 4, user(2, 1));
        assert_eq!((later.slots, later.after), (vec![SlotUse::Store(0)], vec![user(1, 0)]));
    }

    #[test]
    fn after_a_loss_there_are_no_bases_but_still_an_order() {
        let mut table = SlotTable::new(4);
        let old = plan(&mut table, &[0, 1], 0, user(0, 0));
        table.invalidate();
        assert_ne!(table.generation(), old.generation);
        assert_eq!(table.in_use(), 0);
        let new = plan(&mut table, &[0, 1], 0, user(0, 1));
        assert!(new.slots.iter().all(|slot| matches!(slot, SlotUse::Store(_))));
        assert_eq!(new.after, [user(0, 0)]);
    }

    #[test]
    fn a_slot_that_somebody_else_uses_by_now_is_not_given_back() {
        let mut table = SlotTable::new(4);
        plan(&mut table, &[0], 0, user(0, 0));
        plan(&mut table, &[0], 0, user(0, 1));
        assert!(!table.give_back(0, user(0, 0)));
        assert_eq!(table.in_use(), 1);
    }
}
