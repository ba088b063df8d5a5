//! Two hosts, a VM, and the connections between them; and everything that can happen to them next.

mod actions;
mod steps;

use pagewarp_wire::{DestinationPhase, DestinationState, Outcome, SourceDuty, SourcePhase, SourceState};
use stateright::{Model, Property};

use crate::letter::Letter;
use crate::link::Pipe;
use crate::operator::Decision;
use crate::properties::properties;
use crate::setup::{Operator, Setup};

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
    /// Whether the digests that came are not those of the memory here.
    pub(crate) saw_difference: bool,
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
    /// Its memory is not that of the source, and nobody knows.
    pub(crate) differs: bool,
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
    /// A bit flips in the memory at the destination, or the dirty log has missed a page.
    MemoryIsDamaged,
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
                saw_difference: false,
            },
            destination: Destination {
                state: DestinationState::new(),
                process: Process::Working,
                vm: Vm::Paused,
                done: 0,
                start_failed: false,
                differs: false,
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
