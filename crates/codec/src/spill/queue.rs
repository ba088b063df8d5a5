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

/// A device's worker and the CPU's, as one.
///
/// Besides what the device has, one job may be in flight: one that *spilled* to the CPU, or one that is *held* because it should not spill
/// and was submitted all the same; whoever asks whether there is room does not know the batch yet. A held job is the youngest: the
/// device gets it before anything else is taken.
pub(super) struct Spill<W: Worker> {
    pub(super) device: W,
    cpu: W,
    owners: Arc<Owners>,
    /// Jobs given out, oldest first.
    given_out: VecDeque<GivenOut>,
    held: Option<W::Job>,
    /// The spilled job, done before its turn.
    early: Option<Done<W::Job>>,
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
            held: None,
            early: None,
            spare: Vec::new(),
            spilled,
        }
    }

    pub(super) fn depth(&self) -> usize {
        self.device.depth() + 1
    }

    pub(super) fn in_flight(&self) -> usize {
        self.given_out.len() + usize::from(self.held.is_some())
    }

    pub(super) fn has_room(&mut self) -> bool {
        self.feed_held();
        self.held.is_none() && (self.device.has_room() || !self.has_spilled() && self.is_busy())
    }

    pub(super) fn submit(&mut self, mut job: W::Job) {
        self.feed_held();
        if self.held.is_none() && self.device.has_room() {
            return self.give_out(job, Place::Device);
        }
        let taken = self.held.is_some() || self.has_spilled();
        assert!(!taken, "submitted more jobs than the depth of {}", self.depth());
        if self.is_busy() && self.worth_spilling(&mut job) {
            self.give_out(job, Place::Cpu);
        } else {
            self.held = Some(job);
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
            // A device that takes nothing with nothing to do will not take the held job later either.
            let job = self.held.take()?;
            self.give_out(job, Place::Cpu);
        }
        let GivenOut { place, mut moved } = self.given_out.pop_front()?;
        let mut done = match place {
            Place::Cpu => self.early.take().or_else(|| self.cpu.complete())?,
            Place::Device => {
                if self.cpu.in_flight() > 0 && !self.device.is_ready() {
                    self.early = self.cpu.complete();
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
                self.cpu.submit(job);
            }
        }
    }

    /// Gives the held job to the device if it has room now.
    fn feed_held(&mut self) {
        if self.held.is_some()
            && self.device.has_room()
            && let Some(job) = self.held.take()
        {
            self.give_out(job, Place::Device);
        }
    }

    /// Whether a job is with the CPU, done or not.
    fn has_spilled(&self) -> bool {
        self.early.is_some() || self.cpu.in_flight() > 0
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
