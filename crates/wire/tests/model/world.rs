//! Two hosts, a VM, and the connections between them; and everything that can happen to them next.

use pagewarp_wire::{
    DestinationDuty, DestinationPhase, DestinationState, Outcome, SourceDuty, SourcePhase, SourceState,
};
use stateright::{Model, Property};

use crate::letter::Letter;
use crate::link::{Pipe, Transport};
use crate::operator::{Decision, Resolution, advice};
use crate::properties::properties;
use crate::setup::{Flaw, Operator, Setup};

/// A process that has, or is to have, the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Process {
    /// Migrates.
    Working,
    /// Its migration is over, and it has said how. Its VM, if it has one, lives on in it.
    Ended,
    /// It, or its host, died, and its VM with it.
    Crashed,
}

/// The VM, or a copy, on one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Vm {
    Running,
    /// At the destination: being restored, or loaded.
    Paused,
    Gone,
}

/// What the source says in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Report {
    Moved,
    /// The VM goes on here.
    Stays,
    /// The VM is whole but paused here, and surely runs nowhere else.
    StillPaused,
    InDoubt,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Source {
    pub(crate) state: SourceState,
    pub(crate) process: Process,
    pub(crate) vm: Vm,
    /// Epochs begun.
    pub(crate) started: u8,
    /// What it has decided to do with the VM, which it does in the next step.
    pub(crate) decided: Option<SourceDuty>,
    pub(crate) report: Option<Report>,
    /// Whether any of `Commit` may have left.
    pub(crate) commit_sent: bool,
}

impl Source {
    /// Whether it reads what comes: not when its migration is over.
    fn listens(&self) -> bool {
        self.process == Process::Working && !self.is_over()
    }

    fn is_over(&self) -> bool {
        matches!(self.state.phase(), SourcePhase::Done | SourcePhase::Failed | SourcePhase::InDoubt)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Destination {
    pub(crate) state: DestinationState,
    pub(crate) process: Process,
    pub(crate) vm: Vm,
    /// Epochs done.
    pub(crate) done: u8,
    /// It was given the VM and could not start it, and says so.
    pub(crate) start_failed: bool,
    /// For a flaw: it is about to give up.
    giving_up: bool,
}

impl Destination {
    fn listens(&self) -> bool {
        self.process == Process::Working && !self.is_over()
    }

    fn is_over(&self) -> bool {
        matches!(self.state.phase(), DestinationPhase::Done | DestinationPhase::Failed)
    }
}

/// A data connection: the barriers that were sent and have arrived. Batches arrive in between.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Data {
    sent: u8,
    arrived: u8,
}

/// A batch that arrived damaged, until its pages have come again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Hole {
    /// The source has not heard of it yet.
    Reported { epoch: u8 },
    /// The source has not sent the pages again yet.
    Known,
    /// The pages come with this epoch.
    Closing { epoch: u8 },
}

/// Both hosts and what is between them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct World {
    pub(crate) source: Source,
    pub(crate) destination: Destination,
    to_destination: Pipe,
    to_source: Pipe,
    /// Whether the control connection is up.
    pub(crate) connected: bool,
    /// New connections there were.
    pub(crate) resumptions: u8,
    data: Vec<Data>,
    pub(crate) holes: Vec<Hole>,
    pub(crate) damages: u8,
    acks: u8,
    /// An end refused what the other had sent.
    pub(crate) misunderstood: bool,
    pub(crate) operator: Decision,
    /// The destination died after the operator had looked at it.
    pub(crate) died_after_look: bool,
}

/// Something that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    SourcePauses,
    SourceSends(Letter),
    SourceReads,
    SourceEndsEpochOn(usize),
    /// It sees that the migration is over, or gives up: asks what becomes of the VM.
    SourceDecides,
    /// It does so, and says a last word, if it has one.
    SourceEnds {
        vm_obeys: bool,
        word: Option<Letter>,
    },
    SourceCrashes,
    DestinationSends(Letter),
    DestinationReads,
    BarrierArrivesOn(usize),
    /// It gives up, if it may, and says a last word, if it has one.
    DestinationGivesUp(Option<Letter>),
    /// For a flaw: it looks whether it may give up.
    DestinationLooks,
    DestinationStarts {
        vm_obeys: bool,
    },
    /// The VM runs, and nobody is waited for any more.
    DestinationEnds,
    DestinationCrashes,
    Breaks,
    Resumes,
    /// A sender is told what has arrived.
    SourceIsAcknowledged,
    DestinationIsAcknowledged,
    OperatorLooks,
    OperatorActs,
}

impl World {
    fn new(setup: &Setup) -> World {
        World {
            source: Source {
                state: SourceState::new(),
                process: Process::Working,
                vm: Vm::Running,
                started: 0,
                decided: None,
                report: None,
                commit_sent: false,
            },
            destination: Destination {
                state: DestinationState::new(),
                process: Process::Working,
                vm: Vm::Paused,
                done: 0,
                start_failed: false,
                giving_up: false,
            },
            to_destination: Pipe::default(),
            to_source: Pipe::default(),
            connected: true,
            resumptions: 0,
            data: vec![Data::default(); setup.data],
            holes: Vec::new(),
            damages: 0,
            acks: 0,
            misunderstood: false,
            operator: Decision::None,
            died_after_look: false,
        }
    }

    /// How many copies run.
    pub(crate) fn running(&self) -> usize {
        usize::from(self.source.vm == Vm::Running) + usize::from(self.destination.vm == Vm::Running)
    }

    /// Whether the destination was given the right to run the VM.
    pub(crate) fn was_given(&self) -> bool {
        matches!(
            self.destination.state.outcome(),
            Outcome::RunOnDestination | Outcome::VmRunsOnDestination | Outcome::FailedAfterCommit
        )
    }

    /// Whether the source waits for an operator, and says so.
    pub(crate) fn waits_for_operator(&self) -> bool {
        self.source.process == Process::Ended
            && matches!(self.source.report, Some(Report::InDoubt | Report::StillPaused))
            && !matches!(self.operator, Decision::Done(_))
    }

    /// Whether nothing more happens, but that hosts may die.
    pub(crate) fn is_at_rest(&self, setup: &Setup) -> bool {
        self.source.process != Process::Working
            && self.destination.process != Process::Working
            && !(self.waits_for_operator() && setup.operator != Operator::Absent)
    }

    fn source_sends(&self, setup: &Setup, actions: &mut Vec<Action>) {
        let Source { state, vm, started, decided, .. } = &self.source;
        if decided.is_some() {
            return;
        }
        let mut send = |letter| actions.push(Action::SourceSends(letter));
        match state.phase() {
            SourcePhase::Connecting => send(Letter::Hello),
            SourcePhase::Connected => send(Letter::Offer),
            SourcePhase::Precopy => {
                if *started < setup.epochs {
                    send(Letter::EpochStart(*started));
                }
                if *vm == Vm::Paused {
                    send(Letter::StateEnd);
                    if *started > 0 {
                        send(Letter::Prepare(started - 1));
                    }
                } else if *started > 0 {
                    actions.push(Action::SourcePauses);
                }
            }
            SourcePhase::SwitchingOver => {
                // After damage, which is limited.
                send(Letter::EpochStart(*started));
                if setup.flaw == Some(Flaw::CommitsWithoutReady) {
                    send(Letter::Commit);
                }
            }
            SourcePhase::Ready => send(Letter::Commit),
            SourcePhase::Running => send(Letter::Bye),
            _ => {}
        }
        for (index, data) in self.data.iter().enumerate() {
            if data.sent < *started {
                actions.push(Action::SourceEndsEpochOn(index));
            }
        }
    }

    fn source_finishes(&self, setup: &Setup, actions: &mut Vec<Action>) {
        let Source { vm, decided, .. } = &self.source;
        let Some(decided) = *decided else {
            if self.source.is_over() || setup.faults {
                actions.push(Action::SourceDecides);
            }
            return;
        };
        let words: &[_] = match decided {
            _ if !setup.faults => &[None],
            SourceDuty::Resume => &[None, Some(Letter::Cancel), Some(Letter::Error)],
            SourceDuty::KeepPaused | SourceDuty::Release => &[None, Some(Letter::Error)],
        };
        for &word in words {
            actions.push(Action::SourceEnds { vm_obeys: true, word });
        }
        if decided == SourceDuty::Resume && *vm == Vm::Paused {
            actions.push(Action::SourceEnds { vm_obeys: false, word: None });
        }
    }

    fn destination_sends(&self, setup: &Setup, actions: &mut Vec<Action>) {
        let Destination { state, vm, done, .. } = &self.destination;
        let mut send = |letter| actions.push(Action::DestinationSends(letter));
        match state.phase() {
            DestinationPhase::Greeting => send(Letter::HelloAck),
            DestinationPhase::Offered => send(Letter::Accept),
            DestinationPhase::Receiving | DestinationPhase::Loading => {
                if self.data.iter().all(|data| data.arrived > *done) {
                    send(Letter::EpochDone(*done));
                }
                if self.damages < setup.damages {
                    send(Letter::Damaged(*done));
                }
                send(Letter::Ready);
            }
            DestinationPhase::Committed
                if *vm == Vm::Running || setup.flaw == Some(Flaw::ConfirmsBeforeRunning) =>
            {
                send(Letter::Running);
            }
            DestinationPhase::Running => {
                send(Letter::Digests);
                send(Letter::DigestsEnd);
            }
            _ => {}
        }
        if self.acks < setup.acks {
            send(Letter::Ack(self.acks + 1));
        }
    }

    fn destination_acts(&self, setup: &Setup, actions: &mut Vec<Action>) {
        let Destination { state, vm, giving_up, .. } = &self.destination;
        let may_start = state.duty() == DestinationDuty::Run
            || (setup.flaw == Some(Flaw::RunsWhenReady) && state.phase() == DestinationPhase::Ready);
        if may_start && *vm == Vm::Paused {
            actions.push(Action::DestinationStarts { vm_obeys: true });
            if setup.faults {
                actions.push(Action::DestinationStarts { vm_obeys: false });
            }
        }
        let is_over = self.destination.is_over();
        if *vm == Vm::Running && (is_over || setup.faults) {
            actions.push(Action::DestinationEnds);
        }
        if *vm == Vm::Paused && (is_over || setup.faults) {
            if setup.flaw == Some(Flaw::GivesUpInTwoSteps) && !giving_up {
                actions.push(Action::DestinationLooks);
                return;
            }
            actions.push(Action::DestinationGivesUp(None));
            actions.push(Action::DestinationGivesUp(Some(Letter::Error)));
        }
    }

    fn link(&self, setup: &Setup, actions: &mut Vec<Action>) {
        let is_plain = setup.transport == Transport::Plain;
        let both_work =
            self.source.process == Process::Working && self.destination.process == Process::Working;
        // What had arrived before a plain connection broke is read; whoever does not get to it loses it.
        if self.connected || is_plain {
            if self.source.listens() && self.to_source.has_news() {
                actions.push(Action::SourceReads);
            }
            if self.destination.listens() && self.to_destination.has_news() {
                actions.push(Action::DestinationReads);
            }
        }
        if !both_work {
            return;
        }
        if self.connected && !is_plain {
            if self.to_destination.has_arrived() {
                actions.push(Action::SourceIsAcknowledged);
            }
            if self.to_source.has_arrived() {
                actions.push(Action::DestinationIsAcknowledged);
            }
        }
        if self.connected && setup.faults {
            actions.push(Action::Breaks);
        }
        if !self.connected && !is_plain && self.resumptions < setup.resumptions {
            actions.push(Action::Resumes);
        }
    }

    /// The source hands a letter to the transport.
    fn post_to_destination(&mut self, letter: Letter, transport: Transport) {
        if self.destination.process == Process::Working && (self.connected || transport != Transport::Plain) {
            self.to_destination.push(letter);
        }
    }

    fn post_to_source(&mut self, letter: Letter, transport: Transport) {
        if self.source.process == Process::Working && (self.connected || transport != Transport::Plain) {
            self.to_source.push(letter);
        }
    }

    fn source_sent(&mut self, letter: Letter, setup: &Setup) -> Option<()> {
        let allowed = self.source.state.on_send(&letter.message(setup.verify));
        match (letter, setup.flaw) {
            (Letter::Commit, Some(Flaw::CommitsWithoutReady)) => {}
            _ => allowed.ok()?,
        }
        match letter {
            Letter::EpochStart(epoch) => {
                self.source.started += 1;
                for hole in &mut self.holes {
                    if *hole == Hole::Known {
                        *hole = Hole::Closing { epoch };
                    }
                }
            }
            Letter::Commit => self.source.commit_sent = true,
            _ => {}
        }
        if letter == Letter::Commit && setup.flaw == Some(Flaw::ReleasesWithCommit) {
            self.source.decided = Some(SourceDuty::Release);
        }
        self.post_to_destination(letter, setup.transport);
        Some(())
    }

    fn source_reads(&mut self, setup: &Setup) -> Option<()> {
        let letter = self.to_source.arrive(setup.transport)?;
        match self.source.state.on_receive(&letter.message(setup.verify)) {
            Ok(()) => {
                if let Letter::Damaged(epoch) = letter {
                    let hole = self.holes.iter_mut().find(|hole| **hole == Hole::Reported { epoch })?;
                    *hole = Hole::Known;
                }
            }
            // Whoever has made up his mind does not mind any more.
            Err(_) => self.misunderstood |= self.source.decided.is_none(),
        }
        Some(())
    }

    fn source_decides(&mut self, setup: &Setup) {
        let duty = match (self.source.state.duty(), setup.flaw) {
            (SourceDuty::KeepPaused, Some(Flaw::ResumesAfterCommit)) => SourceDuty::Resume,
            (duty, _) => duty,
        };
        self.source.decided = Some(duty);
    }

    fn source_ends(mut self, vm_obeys: bool, word: Option<Letter>, setup: &Setup) -> Option<World> {
        let source = &mut self.source;
        let (report, vm) = match source.decided? {
            SourceDuty::Resume if vm_obeys => (Report::Stays, Vm::Running),
            SourceDuty::Resume => (Report::StillPaused, source.vm),
            SourceDuty::KeepPaused => (Report::InDoubt, source.vm),
            SourceDuty::Release => (Report::Moved, Vm::Gone),
        };
        (source.report, source.vm, source.process) = (Some(report), vm, Process::Ended);
        if let Some(letter) = word {
            source.state.on_send(&letter.message(setup.verify)).ok()?;
            self.post_to_destination(letter, setup.transport);
        }
        self.to_source.clear();
        Some(self)
    }

    fn destination_sent(&mut self, letter: Letter, setup: &Setup) -> Option<()> {
        let allowed = self.destination.state.on_send(&letter.message(setup.verify));
        match (letter, setup.flaw) {
            (Letter::Ready, Some(Flaw::ReadyInSpiteOfDamage)) if !self.holes.is_empty() => {
                // Once.
                if !matches!(self.destination.state.phase(), DestinationPhase::Loading) || self.misunderstood
                {
                    return None;
                }
            }
            _ => allowed.ok()?,
        }
        match letter {
            Letter::EpochDone(done) => {
                self.destination.done += 1;
                self.holes.retain(|hole| *hole != Hole::Closing { epoch: done });
            }
            Letter::Damaged(epoch) => {
                self.damages += 1;
                self.holes.push(Hole::Reported { epoch });
            }
            Letter::Ack(count) => self.acks = count,
            _ => {}
        }
        self.post_to_source(letter, setup.transport);
        Some(())
    }

    fn destination_reads(&mut self, setup: &Setup) -> Option<()> {
        let letter = self.to_destination.arrive(setup.transport)?;
        if self.destination.state.on_receive(&letter.message(setup.verify)).is_err() {
            self.misunderstood = true;
        }
        Some(())
    }

    fn destination_gives_up(&mut self, word: Option<Letter>, setup: &Setup) -> Option<()> {
        let was_ready = self.destination.state.phase() == DestinationPhase::Ready;
        if let Some(letter) = word {
            self.destination.state.on_last_word(&letter.message(setup.verify)).ok()?;
            self.post_to_source(letter, setup.transport);
        }
        let duty = self.destination.state.give_up();
        let goes = duty == DestinationDuty::Discard
            || matches!(setup.flaw, Some(Flaw::GivesUpAfterCommit | Flaw::GivesUpInTwoSteps));
        if !goes {
            return None;
        }
        self.destination_ended(Vm::Gone);
        if was_ready && setup.flaw == Some(Flaw::RunsWhenLost) {
            self.destination.vm = Vm::Running;
        }
        Some(())
    }

    fn destination_starts(&mut self, vm_obeys: bool, setup: &Setup) {
        if vm_obeys {
            self.destination.vm = Vm::Running;
            return;
        }
        let word = Letter::Error;
        if self.destination.state.on_send(&word.message(setup.verify)).is_ok() {
            self.post_to_source(word, setup.transport);
        }
        self.destination.state.on_start_failed();
        self.destination.start_failed = true;
        self.destination_ended(Vm::Gone);
    }

    fn destination_ended(&mut self, vm: Vm) {
        self.destination.process = Process::Ended;
        self.destination.vm = vm;
        self.to_destination.clear();
    }

    fn happens(mut self, action: Action, setup: &Setup) -> Option<World> {
        match action {
            Action::SourcePauses => self.source.vm = Vm::Paused,
            Action::SourceSends(Letter::Commit) if setup.flaw == Some(Flaw::CommitsAfterWriting) => {
                self.source.commit_sent = true;
                self.post_to_destination(Letter::Commit, setup.transport);
                // The transport says that it failed, though all has left.
                self.source_decides(setup);
            }
            Action::SourceSends(letter) => self.source_sent(letter, setup)?,
            Action::SourceReads => self.source_reads(setup)?,
            Action::SourceEndsEpochOn(index) => self.data[index].sent += 1,
            Action::SourceDecides => self.source_decides(setup),
            Action::SourceEnds { vm_obeys, word } => return self.source_ends(vm_obeys, word, setup),
            Action::SourceCrashes => {
                (self.source.process, self.source.vm) = (Process::Crashed, Vm::Gone);
                self.to_source.clear();
            }
            Action::DestinationSends(letter) => self.destination_sent(letter, setup)?,
            Action::DestinationReads => self.destination_reads(setup)?,
            Action::BarrierArrivesOn(index) => self.data[index].arrived += 1,
            Action::DestinationGivesUp(word) => self.destination_gives_up(word, setup)?,
            Action::DestinationLooks => {
                self.destination.giving_up = self.destination.state.duty() == DestinationDuty::Discard;
            }
            Action::DestinationStarts { vm_obeys } => self.destination_starts(vm_obeys, setup),
            Action::DestinationEnds => self.destination_ended(Vm::Running),
            Action::DestinationCrashes => {
                (self.destination.process, self.destination.vm) = (Process::Crashed, Vm::Gone);
                self.to_destination.clear();
                self.died_after_look = self.operator != Decision::None;
            }
            Action::Breaks => self.connected = false,
            Action::Resumes => {
                self.connected = true;
                self.resumptions += 1;
                self.to_destination.resume(setup.transport);
                self.to_source.resume(setup.transport);
            }
            Action::SourceIsAcknowledged => self.to_destination.acknowledge(),
            Action::DestinationIsAcknowledged => self.to_source.acknowledge(),
            Action::OperatorLooks => self.operator = Decision::Made(advice(&self, setup)?),
            Action::OperatorActs => {
                let Decision::Made(resolution) = self.operator else { return None };
                self.operator = Decision::Done(resolution);
                self.source.vm = match resolution {
                    Resolution::Resume => Vm::Running,
                    Resolution::Discard => Vm::Gone,
                };
            }
        }
        // The data connections are alike: which of them is ahead makes no difference.
        self.data.sort_unstable();
        Some(self)
    }
}

/// The model: what is checked.
pub(crate) struct HandOver(pub(crate) Setup);

impl Model for HandOver {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(&self.0)]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        let setup = &self.0;
        if world.source.process == Process::Working {
            world.source_sends(setup, actions);
            world.source_finishes(setup, actions);
        }
        if world.destination.process == Process::Working {
            world.destination_sends(setup, actions);
            world.destination_acts(setup, actions);
            for (index, data) in world.data.iter().enumerate() {
                if data.arrived < data.sent {
                    actions.push(Action::BarrierArrivesOn(index));
                }
            }
        }
        world.link(setup, actions);
        if world.waits_for_operator() && setup.operator != Operator::Absent {
            actions.push(match world.operator {
                Decision::None => Action::OperatorLooks,
                _ => Action::OperatorActs,
            });
        }
        if setup.faults {
            if world.source.process != Process::Crashed {
                actions.push(Action::SourceCrashes);
            }
            if world.destination.process != Process::Crashed {
                actions.push(Action::DestinationCrashes);
            }
        }
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        world.clone().happens(action, &self.0)
    }

    fn properties(&self) -> Vec<Property<HandOver>> {
        properties(&self.0)
    }
}
