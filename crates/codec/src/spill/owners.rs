//! Which of the two histories holds the version of a slot, and which batches should rather not change that.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::backend::SlotUse;

/// One of the two that do the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Device,
    Cpu,
}

/// For each slot, where the version sent last is, or will be once all jobs given out are done: a worker does its jobs in the order it
/// got them. Shared by the encoders, or the decoders, of one migration.
pub(super) struct Owners(Mutex<Vec<Option<Place>>>);

impl Owners {
    pub(super) fn new(slots: u32) -> Owners {
        Owners(Mutex::new(vec![None; slots as usize]))
    }

    /// A job with these slots is about to be given to `place`, which then holds all of them. Where it does not hold the version yet,
    /// `Delta` becomes `Store`; `moved` gets the indices of those.
    pub(super) fn take_over(&self, slots: &mut [SlotUse], place: Place, moved: &mut Vec<usize>) {
        let mut owners = self.lock();
        for (index, slot_use) in slots.iter_mut().enumerate() {
            let Some((slot, owner)) = with_owner(&mut owners, *slot_use) else { continue };
            if matches!(slot_use, SlotUse::Delta(_)) && *owner != Some(place) {
                *slot_use = SlotUse::Store(slot);
                moved.push(index);
            }
            *owner = Some(place);
        }
    }

    /// A job with these slots failed at `place`: what it left in them is unknown. Slots that have moved on since are not its business.
    pub(super) fn forget(&self, slots: &[SlotUse], place: Place) {
        let mut owners = self.lock();
        for &slot_use in slots {
            if let Some((_, owner)) = with_owner(&mut owners, slot_use)
                && *owner == Some(place)
            {
                *owner = None;
            }
        }
    }

    /// How many of these pages have the version that they could be based on at the device.
    pub(super) fn bases_at_device(&self, slots: &[SlotUse]) -> usize {
        let mut owners = self.lock();
        let at_device = |slot_use: &&SlotUse| {
            matches!(slot_use, SlotUse::Delta(_))
                && with_owner(&mut owners, **slot_use).is_some_and(|(_, owner)| *owner == Some(Place::Device))
        };
        slots.iter().filter(at_device).count()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Option<Place>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The slot and its owner. A slot that does not exist is left to the worker to complain about.
fn with_owner(owners: &mut [Option<Place>], slot_use: SlotUse) -> Option<(u32, &mut Option<Place>)> {
    let slot = slot_use.slot()?;
    Some((slot, owners.get_mut(slot as usize)?))
}

/// Undoes what [`Owners::take_over`] did to the slots.
pub(super) fn restore(slots: &mut [SlotUse], moved: &[usize]) {
    for &index in moved {
        if let Some(slot_use) = slots.get_mut(index)
            && let Some(slot) = slot_use.slot()
        {
            *slot_use = SlotUse::Delta(slot);
        }
    }
}

/// Whether the CPU should encode a batch of so many pages, so many of which have their base at the device.
///
/// Without its base a page is sent whole: more than ten times as many bytes as a typical delta, and an LZ4 attempt besides. When that
/// happens to most of a batch, the link and the CPU lose more than the device gains. With at most half, which are first of all the batches of
/// the first epoch, the CPU does mostly what anyone would have to do.
pub(super) fn worth_spilling(pages: usize, bases_at_device: usize) -> bool {
    2 * bases_at_device <= pages
}

#[cfg(test)]
mod tests {
    use super::*;
    use SlotUse::{Delta, None as NoSlot, Store};

    fn take_over(owners: &Owners, slots: &[SlotUse], place: Place) -> (Vec<SlotUse>, Vec<usize>) {
        let (mut slots, mut moved) = (slots.to_vec(), Vec::new());
        owners.take_over(&mut slots, place, &mut moved);
        (slots, moved)
    }

    #[test]
    fn a_delta_needs_its_version_at_the_same_place() {
        let owners = Owners::new(4);
        let all = [NoSlot, Delta(0), Store(1), Delta(2), Store(3)];
        let (given, moved) = take_over(&owners, &all, Place::Device);
        assert_eq!(given, [NoSlot, Store(0), Store(1), Store(2), Store(3)], "nobody has anything at first");
        assert_eq!(moved, [1, 3]);
        assert_eq!(take_over(&owners, &[Delta(0), Delta(3)], Place::Device).0, [Delta(0), Delta(3)]);
        assert_eq!(take_over(&owners, &[Delta(3)], Place::Cpu).0, [Store(3)]);
        assert_eq!(take_over(&owners, &[Delta(3)], Place::Cpu).0, [Delta(3)]);
        assert_eq!(owners.bases_at_device(&[NoSlot, Delta(0), Delta(1), Delta(3), Store(2)]), 2);
        let (mut given, moved) = take_over(&owners, &[Delta(0), Delta(3), Store(1)], Place::Device);
        assert_eq!((&given[..], &moved[..]), (&[Delta(0), Store(3), Store(1)][..], &[1][..]));
        restore(&mut given, &moved);
        assert_eq!(given, [Delta(0), Delta(3), Store(1)]);
    }

    #[test]
    fn after_a_failure_nobody_has_the_version_unless_it_moved_on() {
        let owners = Owners::new(2);
        take_over(&owners, &[Store(0), Store(1)], Place::Device);
        take_over(&owners, &[Store(1)], Place::Cpu);
        owners.forget(&[Store(0), Store(1)], Place::Device);
        assert_eq!(take_over(&owners, &[Delta(0)], Place::Device).0, [Store(0)]);
        assert_eq!(take_over(&owners, &[Delta(1)], Place::Cpu).0, [Delta(1)]);
    }

    #[test]
    fn slots_beyond_the_table_are_left_alone() {
        let owners = Owners::new(1);
        assert_eq!(take_over(&owners, &[Delta(1)], Place::Cpu).0, [Delta(1)]);
        owners.forget(&[Delta(1)], Place::Cpu);
        assert_eq!(owners.bases_at_device(&[Delta(1)]), 0);
    }

    #[test]
    fn batches_with_more_than_half_of_their_bases_at_the_device_stay_there() {
        for (pages, bases, spills) in
            [(0, 0, true), (1, 0, true), (1, 1, false), (2, 1, true), (256, 128, true), (256, 129, false)]
        {
            assert_eq!(worth_spilling(pages, bases), spills, "{bases} of {pages}");
        }
    }
}
