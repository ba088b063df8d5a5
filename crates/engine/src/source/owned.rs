//! Dirty bits that were taken from the hypervisor and whose pages have not safely reached the destination.
//!
//! They are ours: reading and clearing the log made the hypervisor forget them. If the migration ends without a hand-over they are given
//! back, so that whoever reads the log next loses nothing.

use std::collections::VecDeque;

use crate::bitmap::PageBitmap;
use crate::vm::{DirtyLog, RegionInfo};

/// Dirty bits by the epoch they were taken for.
#[derive(Debug, Default)]
pub(crate) struct Owned {
    epochs: VecDeque<(u32, Vec<PageBitmap>)>,
}

impl Owned {
    /// The pages of `epoch` are ours from now on.
    pub(crate) fn take(&mut self, epoch: u32, dirty: &[PageBitmap]) {
        self.epochs.push_back((epoch, dirty.to_vec()));
    }

    /// The destination has everything of the epochs before `epoch`.
    pub(crate) fn delivered_before(&mut self, epoch: u32) {
        while self.epochs.front().is_some_and(|(taken, _)| *taken < epoch) {
            self.epochs.pop_front();
        }
    }

    /// Gives everything back that was not delivered.
    pub(crate) fn give_back(&mut self, regions: &[RegionInfo], log: &mut dyn DirtyLog) {
        for (_, dirty) in self.epochs.drain(..) {
            for (region, bitmap) in regions.iter().zip(&dirty) {
                log.give_back(region.id, bitmap);
            }
        }
    }
}
