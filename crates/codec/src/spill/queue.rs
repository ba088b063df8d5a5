//! Jobs of one thread: at the device, at the CPU, or held back until the device has room.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::owners::{self, Owners, Place};
use crate::backend::{Done, SlotUse};

/// What encoders and decoders have in common.
pub(super) trait Worker: Send {
    type Job;
    /// Whether a job can be done without a base from a history, at no cost.
    const BASES_COME_WITH_JOBS: bool;
    fn slots(job: &mut Self::Job) -> &mut [SlotUse];
    fn depth(&self) -> usize;
    fn in_flight(&self) -> usize;
    fn submit(&mut self, job: Self::Job);
    fn complete(&mut self) -> Option<Done<Self::Job>>;
    fn has_room(&mut self) -> bool;
    fn is_ready(&mut self) -> bool;
}

/// Jobs in flight besides those of the device. Each costs the buffers of a batch; a device that is not much slower than the CPU needs few.
const MAX_BESIDE: usize = 8;

/// A device's worker and the CPU's, as one.
///
/// Besides what the device has, up to [`MAX_BESIDE`] jobs may be in flight: such that *spilled* to the CPU, and such that are *held* because they
/// should not spill and were submitted all the same; whoever asks whether there is room does not know the batch yet. Held jobs are the
/// youngest: the device gets them before anything else is taken.
pub(super) struct Spill<W: Worker> {
    pub(super) device: W,
    cpu: W,
    owners: Arc<Owners>,
    /// Jobs given out, oldest first.
    given_out: VecDeque<GivenOut>,
    held: VecDeque<W::Job>,
    /// Spilled jobs that were done before their turn, oldest first.
    early: VecDeque<Done<W::Job>>,
    /// Lists for `moved` that are not in use, so that none is allocated per job.
    spare: Vec<Vec<usize>>,
    spilled: Arc<AtomicU64>,
}

/// A job that is with one of the two.
struct GivenOut {
    place: Place,
    /// Pages that moved to this place, see [`Owners::take_over`].
    moved: Vec<usize>,
}

impl<W: Worker> Spill<W> {
    pub(super) fn new(device: W, cpu: W, owners: Arc<Owners>, spilled: Arc<AtomicU64>) -> Spill<W> {
        Spill {
            device,
            cpu,
            owners,
            given_out: VecDeque::new(),
            held: VecDeque::new(),
            early: VecDeque::new(),
            spare: Vec::new(),
            spilled,
        }
    }

    pub(super) fn depth(&self) -> usize {
        self.device.depth() + MAX_BESIDE
    }

    pub(super) fn in_flight(&self) -> usize {
        self.given_out.len() + self.held.len()
    }

    pub(super) fn has_room(&mut self) -> bool {
        self.feed_held();
        self.held.is_empty() && (self.device.has_room() || self.spilled() < MAX_BESIDE && self.is_busy())
    }

    pub(super) fn submit(&mut self, mut job: W::Job) {
        self.feed_held();
        if self.held.is_empty() && self.device.has_room() {
            return self.give_out(job, Place::Device);
        }
        let beside = self.spilled() + self.held.len();
        assert!(beside < MAX_BESIDE, "submitted more jobs than the depth of {}", self.depth());
        if self.held.is_empty() && self.is_busy() && self.worth_spilling(&mut job) {
            self.give_out(job, Place::Cpu);
        } else {
            self.held.push_back(job);
        }
    }

    pub(super) fn is_ready(&mut self) -> bool {
        match self.given_out.front() {
            Some(GivenOut { place: Place::Device, .. }) => self.device.is_ready(),
            _ => true,
        }
    }

    pub(super) fn complete(&mut self) -> Option<Done<W::Job>> {
        self.feed_held();
        if self.given_out.is_empty() {
            // A device that takes nothing with nothing to do will not take a held job later either.
            let job = self.held.pop_front()?;
            self.give_out(job, Place::Cpu);
        }
        let GivenOut { place, mut moved } = self.given_out.pop_front()?;
        let mut done = match place {
            Place::Cpu => self.early.pop_front().or_else(|| self.cpu.complete())?,
            Place::Device => {
                if !self.device.is_ready() {
                    self.finish_early();
                }
                self.device.complete()?
            }
        };
        let slots = W::slots(&mut done.job);
        owners::restore(slots, &moved);
        if done.result.is_err() {
            self.owners.forget(slots, place);
        }
        moved.clear();
        self.spare.push(moved);
        // Only now, because a failure changes what the device has.
        self.feed_held();
        Some(done)
    }

    fn give_out(&mut self, mut job: W::Job, place: Place) {
        let mut moved = self.spare.pop().unwrap_or_default();
        self.owners.take_over(W::slots(&mut job), place, &mut moved);
        self.given_out.push_back(GivenOut { place, moved });
        match place {
            Place::Device => self.device.submit(job),
            Place::Cpu => {
                self.spilled.fetch_add(1, Ordering::Relaxed);
                if self.cpu.in_flight() == self.cpu.depth() {
                    self.finish_early();
                }
                self.cpu.submit(job);
            }
        }
    }

    /// Gives held jobs to the device as long as it has room.
    fn feed_held(&mut self) {
        while !self.held.is_empty() && self.device.has_room() {
            let Some(job) = self.held.pop_front() else { return };
            self.give_out(job, Place::Device);
        }
    }

    /// Jobs that are with the CPU, done or not.
    fn spilled(&self) -> usize {
        self.early.len() + self.cpu.in_flight()
    }

    /// The CPU does what it has, instead of waiting.
    fn finish_early(&mut self) {
        while let Some(done) = self.cpu.complete() {
            self.early.push_back(done);
        }
    }

    /// Whether a caller that needs a result would wait for the device.
    fn is_busy(&mut self) -> bool {
        self.device.in_flight() > 0 && !self.device.is_ready()
    }

    fn worth_spilling(&self, job: &mut W::Job) -> bool {
        let slots = W::slots(job);
        W::BASES_COME_WITH_JOBS || owners::worth_spilling(slots.len(), self.owners.bases_at_device(slots))
    }
}
