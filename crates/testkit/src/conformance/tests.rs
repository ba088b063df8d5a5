//! The suite itself: backends with one mistake each do not pass.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};

use pagewarp_codec::{
    BackendError, DecodeError, DecodeJob, Done, EncodeJob, FakeBackend, FakeConfig, Page, SlotUse,
};

use super::*;

/// What a backend does wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mistake {
    Nothing,
    /// The encoder takes what the slot held before for a base.
    EncodesWithStaleBase,
    /// The encoder never uses a base.
    EncodesWithoutBase,
    /// The encoder does not store pages that are all zero.
    StoresNoZeroPages,
    /// Every encoder has a history of its own.
    SharesNoHistory,
    /// The encoder does not use the slot with the highest number.
    OmitsLastSlot,
    /// The encoder does not give the slots back.
    LosesSlots,
    /// The encoder's hash is that of no pages.
    HashesNothing,
    /// Encoder and decoder complete the youngest job first.
    TurnsOrder,
    /// The decoder does not look at the hash.
    IgnoresHash,
    /// The decoder gives another reason than it should.
    BlamesHash,
    /// The decoder fails all jobs after one that failed.
    StaysBroken,
    /// The decoder takes what the slot held before for a base.
    DecodesWithStaleBase,
    /// The decoder keeps only pages that came without a base.
    KeepsWholePagesOnly,
}

/// The fake backend with a mistake.
struct Wrong {
    inner: FakeBackend,
    mistake: Mistake,
}

fn wrong(mistake: Mistake) -> Wrong {
    let config = FakeConfig { depth: 2, decode_history: true, ..FakeConfig::default() };
    Wrong { inner: FakeBackend::new(config), mistake }
}

impl Backend for Wrong {
    fn name(&self) -> String {
        format!("{:?}", self.mistake)
    }

    fn decode_history_slots(&self, wanted: u32) -> u32 {
        self.inner.decode_history_slots(wanted)
    }

    fn encoders(&self, config: EncoderConfig, workers: usize) -> Result<Vec<Box<dyn Encoder>>, BackendError> {
        let inner = match self.mistake {
            Mistake::SharesNoHistory => {
                (0..workers).flat_map(|_| self.inner.encoders(config, 1)).flatten().collect()
            }
            _ => self.inner.encoders(config, workers)?,
        };
        let worker = |inner| Box::new(WrongWorker::new(inner, self.mistake)) as Box<dyn Encoder>;
        Ok(inner.into_iter().map(worker).collect())
    }

    fn decoders(&self, config: DecoderConfig, workers: usize) -> Result<Vec<Box<dyn Decoder>>, BackendError> {
        let inner = self.inner.decoders(config, workers)?;
        let worker = |inner| Box::new(WrongWorker::new(inner, self.mistake)) as Box<dyn Decoder>;
        Ok(inner.into_iter().map(worker).collect())
    }
}

struct WrongWorker<W, J> {
    inner: W,
    mistake: Mistake,
    /// The slots of the jobs in flight, as they were.
    slots: VecDeque<Vec<SlotUse>>,
    /// Completed and not handed out.
    done: Vec<Done<J>>,
    failed: bool,
}

impl<W, J> WrongWorker<W, J> {
    fn new(inner: W, mistake: Mistake) -> Self {
        WrongWorker { inner, mistake, slots: VecDeque::new(), done: Vec::new(), failed: false }
    }

    /// The job that the inner worker completes next, or all of them, the last first.
    fn take(&mut self, complete: impl Fn(&mut W) -> Option<Done<J>>) -> Option<Done<J>> {
        if self.mistake != Mistake::TurnsOrder {
            return complete(&mut self.inner);
        }
        while let Some(done) = complete(&mut self.inner) {
            self.done.push(done);
        }
        self.done.pop()
    }
}

fn store_as_delta(slot: &mut SlotUse) {
    if let SlotUse::Store(held) = *slot {
        *slot = SlotUse::Delta(held);
    }
}

impl Encoder for WrongWorker<Box<dyn Encoder>, EncodeJob> {
    fn depth(&self) -> usize {
        self.inner.depth()
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight() + self.done.len()
    }

    fn submit(&mut self, mut job: EncodeJob) {
        self.slots.push_back(job.slots.clone());
        for (slot, page) in job.slots.iter_mut().zip(&job.pages) {
            match (self.mistake, *slot) {
                (Mistake::EncodesWithStaleBase, _) => store_as_delta(slot),
                (Mistake::EncodesWithoutBase, SlotUse::Delta(held)) => *slot = SlotUse::Store(held),
                (Mistake::StoresNoZeroPages, _) if *page == Page::ZERO => *slot = SlotUse::None,
                (Mistake::OmitsLastSlot, _) if slot.slot() == Some(SLOTS - 1) => *slot = SlotUse::None,
                _ => {}
            }
        }
        self.inner.submit(job);
    }

    fn complete(&mut self) -> Option<Done<EncodeJob>> {
        let mut done = self.take(|inner| inner.complete())?;
        let slots = self.slots.pop_front().expect("as many as jobs");
        if !matches!(self.mistake, Mistake::LosesSlots | Mistake::TurnsOrder) {
            done.job.slots = slots;
        } else if self.mistake == Mistake::LosesSlots {
            done.job.slots.clear();
        }
        if self.mistake == Mistake::HashesNothing {
            done.job.encoded.plain_hash = pagewarp_codec::plain_hash(&[]);
        }
        Some(done)
    }
}

impl Decoder for WrongWorker<Box<dyn Decoder>, DecodeJob> {
    fn depth(&self) -> usize {
        self.inner.depth()
    }

    fn in_flight(&self) -> usize {
        self.inner.in_flight() + self.done.len()
    }

    fn submit(&mut self, mut job: DecodeJob) {
        self.slots.push_back(job.slots.clone());
        for (slot, encoding) in job.slots.iter_mut().zip(&job.encoded.encodings) {
            match self.mistake {
                Mistake::DecodesWithStaleBase => store_as_delta(slot),
                Mistake::KeepsWholePagesOnly
                    if encoding.needs_base() && matches!(slot, SlotUse::Store(_)) =>
                {
                    *slot = SlotUse::None;
                }
                _ => {}
            }
        }
        self.inner.submit(job);
    }

    fn complete(&mut self) -> Option<Done<DecodeJob>> {
        let mut done = self.take(|inner| inner.complete())?;
        let slots = self.slots.pop_front().expect("as many as jobs");
        if self.mistake != Mistake::TurnsOrder {
            done.job.slots = slots;
        }
        let error = DecodeError::HashMismatch { seen: 0, expected: done.job.encoded.plain_hash };
        let broken = self.failed;
        self.failed |= done.result.is_err();
        match (self.mistake, &done.result) {
            (Mistake::IgnoresHash, Err(BackendError::Peer(DecodeError::HashMismatch { .. }))) => {
                done.result = Ok(());
            }
            (Mistake::BlamesHash, Err(_)) => done.result = Err(error.into()),
            (Mistake::StaysBroken, Ok(())) if broken => done.result = Err(error.into()),
            _ => {}
        }
        Some(done)
    }
}

/// What the suite has to say.
fn complaint(test: impl FnOnce()) -> Option<String> {
    let panic = catch_unwind(AssertUnwindSafe(test)).err()?;
    let text = panic.downcast_ref::<String>().cloned();
    Some(text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).expect("a message"))
}

#[test]
fn a_backend_with_a_mistake_does_not_pass() {
    use Mistake::*;
    let run = |mistake, test: fn(Subject<'_>)| complaint(|| test(Subject::new(&wrong(mistake))));
    let histories: fn(Subject<'_>) = |subject| histories(subject, 1);
    let malformed: fn(Subject<'_>) = |subject| malformed(subject, 200, 1);
    let cross: fn(Subject<'_>) = |subject| cross(subject, 60, 1);
    for test in [histories, malformed, cross, |subject| all(subject, 1)] {
        assert_eq!(run(Nothing, test), None, "a backend without a mistake passes");
    }
    for (mistake, test, expected) in [
        (EncodesWithStaleBase, histories, "the page has no base"),
        (EncodesWithStaleBase, cross, "the page has no base"),
        (EncodesWithoutBase, histories, "bytes, sparse-xor has"),
        (StoresNoZeroPages, histories, ""),
        (SharesNoHistory, cross, ""),
        (OmitsLastSlot, cross, ""),
        (LosesSlots, cross, "come back as they were"),
        (HashesNothing, cross, "hash of the plain pages"),
        (TurnsOrder, cross, "completion is in submission order"),
        (TurnsOrder, malformed, "completion is in submission order"),
        (IgnoresHash, malformed, "decoded, the reference says"),
        (BlamesHash, malformed, "not the reference's reason"),
        (StaysBroken, malformed, "the reference decodes it"),
        (DecodesWithStaleBase, histories, "rejects it"),
        (KeepsWholePagesOnly, histories, "rejects it"),
    ] {
        let seen = run(mistake, test).unwrap_or_else(|| panic!("{mistake:?} passes"));
        assert!(seen.contains(expected), "{mistake:?}: {seen}");
        println!("{mistake:?}: {seen}");
    }
}

#[test]
fn only_a_backend_of_several_may_leave_out_bases() {
    let backend = wrong(Mistake::EncodesWithoutBase);
    histories(Subject::spilling(&backend), 1);
    cross(Subject::spilling(&backend), 60, 1);
    let alone = complaint(|| pages(Subject::spilling(&backend), 1)).expect("nothing else is in flight");
    assert!(alone.contains("same is right"), "{alone}");
}
