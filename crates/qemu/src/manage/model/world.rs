//! Two QEMUs, `pagewarp qemu migrate` beside one and `receive` beside the other, the connections between them, and everything that can happen to them next. It
//! begins when `prepare` has come.

mod actions;
mod steps;

use std::collections::VecDeque;

use pagewarp_wire::SourceDuty;
use stateright::{Model, Property};

use super::note::Note;
use super::operator::Decision;
use super::properties::properties;
use super::setup::{Operator, Setup};
use crate::manage::states::{
    DestinationDuty, DestinationState, Resumption, SourceState, is_open_to_decision,
};
use crate::protocol::control::Message;

/// `migrate` or `receive`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Process {
    Working,
    /// It has ended, and has said how.
    Ended,
    /// It was killed. Its QEMU stays as it is.
    Crashed,
}

/// The source QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum SourceQemu {
    Running,
    /// By somebody else.
    Paused,
    /// For the switch-over.
    FinishMigrate,
    PostMigrate,
    Ended,
}

impl SourceQemu {
    /// QEMU's name for it; `None`: nobody answers.
    pub(super) fn status(self) -> Option<&'static str> {
        match self {
            SourceQemu::Running => Some("running"),
            SourceQemu::Paused => Some("paused"),
            SourceQemu::FinishMigrate => Some("finish-migrate"),
            SourceQemu::PostMigrate => Some("postmigrate"),
            SourceQemu::Ended => None,
        }
    }
}

/// The source QEMU's migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Migration {
    None,
    Active,
    Completed,
    Failed,
}

/// The destination QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum DestinationQemu {
    /// `-incoming defer`.
    Deferred,
    /// Waits for the VM and loads it.
    InMigrate,
    /// All of it is here, and paused.
    Loaded,
    Running,
    Ended,
}

/// What the source says in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum SourceReport {
    Moved,
    Stays,
    StillPaused,
    InDoubt,
    /// Its QEMU is gone, and the VM with it.
    Gone,
}

/// What the destination says in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum DestinationReport {
    Here,
    NotHere,
    Unconfirmed,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Source {
    pub(super) state: SourceState,
    pub(super) process: Process,
    pub(super) qemu: SourceQemu,
    pub(super) migration: Migration,
    /// Whether it has compared what was written into the destination QEMU.
    is_verified: bool,
    /// What it has decided to do with the VM.
    pub(super) decided: Option<SourceDuty>,
    pub(super) report: Option<SourceReport>,
    /// Whether any of `commit` may have left.
    pub(super) commit_sent: bool,
    /// Whether it believes that the VM is to run.
    runs: bool,
    /// It has not heard yet that somebody has paused the VM.
    has_news: bool,
    /// QEMU was told to let the VM go on, and has not got to that yet.
    pub(super) is_told: bool,
    /// Its QEMU ended by itself.
    pub(super) qemu_died: bool,
}

impl Source {
    /// Whether it has decided to let the VM go on, and QEMU would have to be told.
    fn would_tell_qemu(&self) -> bool {
        self.decided == Some(SourceDuty::Resume)
            && self.runs
            && self.qemu.status().map(Resumption::of) == Some(Resumption::Cont)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Destination {
    pub(super) state: DestinationState,
    pub(super) process: Process,
    pub(super) qemu: DestinationQemu,
    /// It has given up, and is about to end QEMU.
    gave_up: bool,
    /// It has told QEMU to run the VM.
    told: bool,
    /// QEMU has not got to that yet.
    pub(super) is_told: bool,
    /// How much it has said since: `running`, `report`.
    said: u8,
    pub(super) report: Option<DestinationReport>,
    pub(super) qemu_died: bool,
}

/// The way of the VM from QEMU to QEMU, over the bridge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Stream {
    open: bool,
    /// The destination QEMU has got everything.
    delivered: bool,
    /// The news on the return path that the VM is loaded.
    loaded: Way,
    /// What was written into the destination QEMU is not what was read from the source QEMU.
    pub(super) differs: bool,
}

/// How far something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Way {
    NotSent,
    Sent,
    Arrived,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct World {
    pub(super) source: Source,
    pub(super) destination: Destination,
    pub(super) stream: Stream,
    to_destination: VecDeque<Note>,
    to_source: VecDeque<Note>,
    pub(super) connected: bool,
    pub(super) misunderstood: bool,
    /// Somebody has paused the VM while it migrated.
    pub(super) somebody_paused: bool,
    pub(super) operator: Decision,
    /// A QEMU died after the operator had looked at it.
    pub(super) died_after_look: bool,
    /// The operator has let the VM go on at the destination.
    pub(super) operator_conts: bool,
    /// The operator has ended the destination QEMU.
    pub(super) operator_ends: bool,
}

/// Something that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    SourceStartsQemu,
    SourceSeesCompletion,
    /// What the destination has said of what it has written is what was read.
    SourceVerifies,
    /// Something on the way from QEMU to QEMU is not as it was.
    StreamIsDamaged,
    SourceSends(Note),
    SourceReads,
    /// It sees that it is over, or gives up, and says so, if there is anything to say.
    SourceDecides,
    SourceTellsQemu,
    /// It has done what it had decided on, or cannot.
    SourceEnds,
    /// After all is well.
    SourceQuitsQemu,
    SourceIsKilled,
    /// Somebody pauses the VM in the monitor, while it migrates.
    SomebodyPauses,
    SourceHearsThatSomebodyPaused,
    SourceQemuStopsVm,
    SourceQemuHasSentAll,
    SourceQemuHearsThatItIsLoaded,
    SourceQemuCompletes,
    SourceQemuFails,
    SourceQemuRuns,
    /// A monitor whose client is gone forgets what it was told.
    SourceQemuForgets,
    SourceQemuDies,
    DestinationStartsQemu,
    DestinationSends(Note),
    DestinationReads,
    DestinationGivesUp,
    DestinationEndsQemu {
        qemu_obeys: bool,
    },
    DestinationTellsQemu,
    DestinationSeesTheVm,
    DestinationDoesNotSeeTheVm,
    DestinationEnds,
    DestinationIsKilled,
    DestinationQemuLoads,
    DestinationQemuRuns,
    DestinationQemuForgets,
    DestinationQemuDies,
    Breaks,
    StreamBreaks,
    OperatorLooks,
    OperatorEndsDestinationQemu,
    OperatorContsThere,
    OperatorActs,
}

impl World {
    fn new(setup: &Setup) -> World {
        let mut state = SourceState::new(setup.verify);
        state.on_send(&Message::Prepare(Default::default())).expect("the first message");
        World {
            source: Source {
                state,
                process: Process::Working,
                qemu: if setup.ran { SourceQemu::Running } else { SourceQemu::Paused },
                migration: Migration::None,
                is_verified: false,
                decided: None,
                report: None,
                commit_sent: false,
                runs: setup.ran,
                has_news: false,
                is_told: false,
                qemu_died: false,
            },
            destination: Destination {
                state: DestinationState::new(),
                process: Process::Working,
                qemu: DestinationQemu::Deferred,
                gave_up: false,
                told: false,
                is_told: false,
                said: 0,
                report: None,
                qemu_died: false,
            },
            stream: Stream { open: true, delivered: false, loaded: Way::NotSent, differs: false },
            to_destination: VecDeque::new(),
            to_source: VecDeque::new(),
            connected: true,
            misunderstood: false,
            somebody_paused: false,
            operator: Decision::None,
            died_after_look: false,
            operator_conts: false,
            operator_ends: false,
        }
    }

    pub(super) fn running(&self) -> usize {
        usize::from(self.source.qemu == SourceQemu::Running)
            + usize::from(self.destination.qemu == DestinationQemu::Running)
    }

    /// Whether the destination was given the right to run the VM.
    pub(super) fn was_given(&self) -> bool {
        self.destination.state.duty() != DestinationDuty::End
    }

    /// Whether the VM was paused, and is to stay so.
    pub(super) fn was_paused(&self, setup: &Setup) -> bool {
        !setup.ran || self.somebody_paused
    }

    pub(super) fn qemu_died(&self) -> bool {
        self.source.qemu_died || self.destination.qemu_died
    }

    /// Whether the source holds a VM that waits for an operator: `migrate` says so, or was killed at the wrong moment, which is to be seen from QEMU.
    pub(super) fn waits_for_operator(&self) -> bool {
        let Source { process, qemu, report, .. } = &self.source;
        let is_asked = match process {
            Process::Working => false,
            Process::Ended => {
                matches!(report, Some(SourceReport::InDoubt | SourceReport::StillPaused))
            }
            Process::Crashed => true,
        };
        is_asked
            && qemu.status().is_some_and(is_open_to_decision)
            && !matches!(self.operator, Decision::Done(_))
    }

    /// Whether nothing more happens, but that QEMUs may die.
    pub(super) fn is_at_rest(&self, setup: &Setup) -> bool {
        self.source.process != Process::Working
            && self.destination.process != Process::Working
            && self.source.migration != Migration::Active
            && !(self.stream.delivered && self.destination.qemu == DestinationQemu::InMigrate)
            && !self.destination.is_told
            && !self.source.is_told
            && !(self.waits_for_operator() && setup.operator != Operator::Absent)
    }
}

/// The model: what is checked.
pub(super) struct HandOver(pub(super) Setup);

impl Model for HandOver {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(&self.0)]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        let setup = &self.0;
        if world.source.process == Process::Working {
            world.source_acts(setup, actions);
            if setup.faults {
                actions.push(Action::SourceIsKilled);
            }
        }
        world.source_qemu_acts(setup, actions);
        if world.destination.process == Process::Working {
            world.destination_acts(setup, actions);
            if setup.faults {
                actions.push(Action::DestinationIsKilled);
            }
        }
        world.destination_qemu_acts(setup, actions);
        world.operator_acts(setup, actions);
        let both_work =
            world.source.process == Process::Working && world.destination.process == Process::Working;
        if setup.faults && world.connected && both_work {
            actions.push(Action::Breaks);
        }
        if setup.faults && setup.direct && world.stream.open {
            actions.push(Action::StreamBreaks);
        }
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        let mut next = world.clone();
        if action == Action::Breaks {
            next.connected = false;
            next.bridge_ends(&self.0);
            return Some(next);
        }
        if action == Action::StreamBreaks {
            next.stream.open = false;
            return Some(next);
        }
        next.source_happens(action, &self.0)
            .or_else(|| next.destination_happens(action, &self.0))
            .or_else(|| next.operator_happens(action))?;
        Some(next)
    }

    fn properties(&self) -> Vec<Property<HandOver>> {
        properties(&self.0)
    }
}
