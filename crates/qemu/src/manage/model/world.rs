//! Two QEMUs, `pagewarp qemu migrate` beside one and `receive` beside the other, the connections between them, and everything that can happen to them next. It
//! begins when `prepare` has come.

use std::collections::VecDeque;

use pagewarp_wire::SourceDuty;
use stateright::{Model, Property};

use super::note::Note;
use super::operator::{self, Decision, Resolution};
use super::properties::properties;
use super::setup::{Flaw, Operator, Setup};
use crate::manage::states::{
    DestinationDuty, DestinationPhase, DestinationState, Heard, Resumption, SourcePhase, SourceState,
    is_open_to_decision,
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
    /// What it has decided to do with the VM.
    pub(super) decided: Option<SourceDuty>,
    pub(super) report: Option<SourceReport>,
    /// Whether any of `commit` may have left.
    pub(super) commit_sent: bool,
    /// Its QEMU ended by itself.
    pub(super) qemu_died: bool,
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
struct Stream {
    open: bool,
    /// The destination QEMU has got everything.
    delivered: bool,
    /// The news on the return path that the VM is loaded.
    loaded: Way,
}

/// How far something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Way {
    NotSent,
    UnderWay,
    Arrived,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct World {
    pub(super) source: Source,
    pub(super) destination: Destination,
    stream: Stream,
    to_destination: VecDeque<Note>,
    to_source: VecDeque<Note>,
    pub(super) connected: bool,
    pub(super) misunderstood: bool,
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
    SourceSends(Note),
    SourceReads,
    /// It sees that it is over, or gives up, and says so, if there is anything to say.
    SourceDecides,
    /// It does what it has decided on.
    SourceEnds {
        qemu_obeys: bool,
    },
    /// After all is well.
    SourceQuitsQemu,
    SourceIsKilled,
    SourceQemuStopsVm,
    SourceQemuHasSentAll,
    SourceQemuHearsThatItIsLoaded,
    SourceQemuCompletes,
    SourceQemuFails,
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
    /// A monitor whose client is gone forgets what it was told.
    DestinationQemuForgets,
    DestinationQemuDies,
    Breaks,
    OperatorLooks,
    OperatorEndsDestinationQemu,
    OperatorContsThere,
    OperatorActs,
}

impl World {
    fn new(setup: &Setup) -> World {
        let mut state = SourceState::new();
        state.on_send(&Message::Prepare(Default::default())).expect("the first message");
        World {
            source: Source {
                state,
                process: Process::Working,
                qemu: if setup.ran { SourceQemu::Running } else { SourceQemu::Paused },
                migration: Migration::None,
                decided: None,
                report: None,
                commit_sent: false,
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
            stream: Stream { open: true, delivered: false, loaded: Way::NotSent },
            to_destination: VecDeque::new(),
            to_source: VecDeque::new(),
            connected: true,
            misunderstood: false,
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
            && !(self.waits_for_operator() && setup.operator != Operator::Absent)
    }

    fn source_acts(&self, setup: &Setup, actions: &mut Vec<Action>) {
        let Source { state, qemu, migration, decided, .. } = &self.source;
        if let Some(decided) = decided {
            // QEMU refuses to go on before it has ended the migration; that is waited for, for a while.
            let waits = *decided == SourceDuty::Resume && *qemu == SourceQemu::FinishMigrate && setup.ran;
            if !waits {
                actions.push(Action::SourceEnds { qemu_obeys: true });
            }
            if *decided == SourceDuty::Resume {
                actions.push(Action::SourceEnds { qemu_obeys: false });
            }
            return;
        }
        match (state.phase(), migration) {
            (SourcePhase::Migrating, Migration::None) => actions.push(Action::SourceStartsQemu),
            (SourcePhase::Migrating, Migration::Completed) => actions.push(Action::SourceSeesCompletion),
            (SourcePhase::Completed, _) => {
                actions.push(Action::SourceSends(Note::Commit { run: setup.ran }));
            }
            (SourcePhase::Migrating, Migration::Active)
                if setup.flaw == Some(Flaw::CommitsBeforeCompletion)
                    && *qemu == SourceQemu::FinishMigrate =>
            {
                actions.push(Action::SourceSends(Note::Commit { run: setup.ran }));
            }
            _ => {}
        }
        let is_over =
            matches!(state.phase(), SourcePhase::Failed | SourcePhase::InDoubt | SourcePhase::Moved);
        if is_over || setup.faults {
            actions.push(Action::SourceDecides);
        }
        if !matches!(state.phase(), SourcePhase::Failed | SourcePhase::InDoubt) && !self.to_source.is_empty()
        {
            actions.push(Action::SourceReads);
        }
    }

    fn source_qemu_acts(&self, setup: &Setup, actions: &mut Vec<Action>) {
        let Source { qemu, migration, .. } = &self.source;
        if *migration == Migration::Active {
            match qemu {
                SourceQemu::Running | SourceQemu::Paused => actions.push(Action::SourceQemuStopsVm),
                SourceQemu::FinishMigrate => {
                    if self.stream.open
                        && !self.stream.delivered
                        && self.destination.qemu == DestinationQemu::InMigrate
                    {
                        actions.push(Action::SourceQemuHasSentAll);
                    }
                    if self.stream.open && self.stream.loaded == Way::UnderWay {
                        actions.push(Action::SourceQemuHearsThatItIsLoaded);
                    }
                    if self.stream.loaded == Way::Arrived {
                        actions.push(Action::SourceQemuCompletes);
                    }
                }
                SourceQemu::PostMigrate | SourceQemu::Ended => {}
            }
            if setup.faults || !self.stream.open {
                actions.push(Action::SourceQemuFails);
            }
        }
        if self.source.report == Some(SourceReport::Moved) && *qemu == SourceQemu::PostMigrate {
            actions.push(Action::SourceQuitsQemu);
        }
        if setup.faults && *qemu != SourceQemu::Ended {
            actions.push(Action::SourceQemuDies);
        }
    }

    fn destination_acts(&self, setup: &Setup, actions: &mut Vec<Action>) {
        let Destination { state, qemu, gave_up, told, said, .. } = &self.destination;
        if *gave_up {
            actions.push(Action::DestinationEndsQemu { qemu_obeys: true });
            actions.push(Action::DestinationEndsQemu { qemu_obeys: false });
            return;
        }
        if !self.to_destination.is_empty() {
            actions.push(Action::DestinationReads);
        }
        let is_over = state.phase() == DestinationPhase::Failed;
        match state.phase() {
            DestinationPhase::Preparing if *qemu == DestinationQemu::Deferred => {
                actions.push(Action::DestinationStartsQemu);
            }
            DestinationPhase::Preparing => actions.push(Action::DestinationSends(Note::Prepared)),
            DestinationPhase::Listening
                if setup.flaw == Some(Flaw::RunsWhenLoaded) && *qemu == DestinationQemu::Loaded && !told =>
            {
                actions.push(Action::DestinationTellsQemu);
            }
            DestinationPhase::Committed { run } => {
                let run = run || setup.flaw == Some(Flaw::RunsWhatWasPaused);
                if run && !told && *qemu != DestinationQemu::Ended {
                    actions.push(Action::DestinationTellsQemu);
                }
                let has_it = match qemu {
                    DestinationQemu::Loaded => !run,
                    DestinationQemu::Running => true,
                    _ => false,
                };
                if has_it || setup.flaw == Some(Flaw::ConfirmsBeforeRunning) {
                    actions.push(Action::DestinationSeesTheVm);
                }
                if setup.faults {
                    actions.push(Action::DestinationDoesNotSeeTheVm);
                }
            }
            DestinationPhase::Running => match said {
                0 => actions.push(Action::DestinationSends(Note::Running)),
                1 => actions.push(Action::DestinationSends(Note::Report)),
                _ => actions.push(Action::DestinationEnds),
            },
            _ => {}
        }
        if is_over || setup.faults {
            actions.push(Action::DestinationGivesUp);
        }
    }

    fn destination_qemu_acts(&self, setup: &Setup, actions: &mut Vec<Action>) {
        let Destination { process, qemu, is_told, .. } = &self.destination;
        if self.stream.delivered && *qemu == DestinationQemu::InMigrate {
            actions.push(Action::DestinationQemuLoads);
        }
        if *is_told {
            if *qemu == DestinationQemu::Loaded {
                actions.push(Action::DestinationQemuRuns);
            }
            if *process != Process::Working {
                actions.push(Action::DestinationQemuForgets);
            }
        }
        if setup.faults && *qemu != DestinationQemu::Ended {
            actions.push(Action::DestinationQemuDies);
        }
    }

    fn operator_acts(&self, setup: &Setup, actions: &mut Vec<Action>) {
        if !self.waits_for_operator() || setup.operator == Operator::Absent {
            return;
        }
        if let Decision::Made(_) = self.operator {
            actions.push(Action::OperatorActs);
            return;
        }
        actions.extend(operator::choices(self, setup));
    }

    fn post_to_destination(&mut self, note: Note) {
        if self.connected && self.destination.process == Process::Working {
            self.to_destination.push_back(note);
        }
    }

    fn post_to_source(&mut self, note: Note) {
        if self.connected && self.source.process == Process::Working {
            self.to_source.push_back(note);
        }
    }

    fn source_commits(&mut self, note: Note, setup: &Setup) -> Option<()> {
        self.source.commit_sent = true;
        self.post_to_destination(note);
        match setup.flaw {
            // The transport says that it failed, though all has left.
            Some(Flaw::CommitsAfterWriting) => {
                self.source_decides(setup);
                return Some(());
            }
            Some(Flaw::CommitsBeforeCompletion) if self.source.state.phase() == SourcePhase::Migrating => {
                self.source.state.on_completed();
            }
            Some(Flaw::QuitsWithCommit) => self.source.qemu = SourceQemu::Ended,
            _ => {}
        }
        self.source.state.on_send(&note.message()).ok()
    }

    fn source_reads(&mut self) -> Option<()> {
        let note = self.to_source.pop_front()?;
        self.misunderstood |= self.source.state.on_receive(&note.message()) == Heard::OutOfPlace;
        Some(())
    }

    fn source_decides(&mut self, setup: &Setup) {
        let duty = match (self.source.state.give_up(), setup.flaw) {
            (SourceDuty::KeepPaused, Some(Flaw::ResumesAfterCommit)) => SourceDuty::Resume,
            (duty, _) => duty,
        };
        self.source.decided = Some(duty);
        // The bridge is ended.
        self.stream.open = false;
        if self.source.state.on_send(&Note::Cancel.message()).is_ok() {
            self.post_to_destination(Note::Cancel);
        }
    }

    fn source_ends(&mut self, qemu_obeys: bool, setup: &Setup) -> Option<()> {
        let source = &mut self.source;
        let resumption = source.qemu.status().map(Resumption::of);
        source.report = Some(match (source.decided?, resumption) {
            (SourceDuty::KeepPaused, _) => SourceReport::InDoubt,
            (SourceDuty::Release, _) => SourceReport::Moved,
            (SourceDuty::Resume, None) => SourceReport::Gone,
            (SourceDuty::Resume, Some(Resumption::Cont)) if setup.ran => {
                if qemu_obeys {
                    source.qemu = SourceQemu::Running;
                    SourceReport::Stays
                } else {
                    SourceReport::StillPaused
                }
            }
            (SourceDuty::Resume, Some(_)) => SourceReport::Stays,
        });
        source.process = Process::Ended;
        self.connected = false;
        self.to_source.clear();
        Some(())
    }

    fn source_qemu_fails(&mut self, setup: &Setup) {
        self.source.migration = Migration::Failed;
        if self.source.qemu == SourceQemu::FinishMigrate {
            self.source.qemu = if setup.ran { SourceQemu::Running } else { SourceQemu::PostMigrate };
        }
        self.stream.open = false;
    }

    fn destination_says(&mut self, note: Note) -> Option<()> {
        self.destination.state.on_send(&note.message()).ok()?;
        self.destination.said += u8::from(matches!(note, Note::Running | Note::Report));
        self.post_to_source(note);
        Some(())
    }

    fn destination_reads(&mut self) -> Option<()> {
        let note = self.to_destination.pop_front()?;
        self.misunderstood |= self.destination.state.on_receive(&note.message()) == Heard::OutOfPlace;
        Some(())
    }

    fn destination_gives_up(&mut self, setup: &Setup) -> Option<()> {
        let is_flawed = setup.flaw == Some(Flaw::EndsAfterCommit)
            && matches!(self.destination.state.phase(), DestinationPhase::Committed { .. });
        if self.destination.state.give_up() != DestinationDuty::End && !is_flawed {
            return None;
        }
        self.destination.gave_up = true;
        self.stream.open = false;
        self.destination_says(Note::Failed).or(is_flawed.then_some(()))
    }

    fn destination_ended(&mut self, report: DestinationReport) {
        self.destination.process = Process::Ended;
        self.destination.report = Some(report);
        self.stream.open = false;
        self.connected = false;
        self.to_destination.clear();
    }

    fn source_happens(&mut self, action: Action, setup: &Setup) -> Option<()> {
        match action {
            Action::SourceStartsQemu => {
                self.source.migration = Migration::Active;
            }
            Action::SourceSeesCompletion => self.source.state.on_completed(),
            Action::SourceSends(note) => self.source_commits(note, setup)?,
            Action::SourceReads => self.source_reads()?,
            Action::SourceDecides => self.source_decides(setup),
            Action::SourceEnds { qemu_obeys } => self.source_ends(qemu_obeys, setup)?,
            Action::SourceQuitsQemu => self.source.qemu = SourceQemu::Ended,
            Action::SourceIsKilled => {
                self.source.process = Process::Crashed;
                (self.stream.open, self.connected) = (false, false);
                self.to_source.clear();
            }
            Action::SourceQemuStopsVm => self.source.qemu = SourceQemu::FinishMigrate,
            Action::SourceQemuHasSentAll => self.stream.delivered = true,
            Action::SourceQemuHearsThatItIsLoaded => self.stream.loaded = Way::Arrived,
            Action::SourceQemuCompletes => {
                (self.source.qemu, self.source.migration) = (SourceQemu::PostMigrate, Migration::Completed);
            }
            Action::SourceQemuFails => self.source_qemu_fails(setup),
            Action::SourceQemuDies => {
                (self.source.qemu, self.source.qemu_died) = (SourceQemu::Ended, true);
                self.source.migration = match self.source.migration {
                    Migration::Active => Migration::Failed,
                    other => other,
                };
                self.stream.open = false;
                self.died_after_look |= self.operator != Decision::None;
            }
            _ => return None,
        }
        Some(())
    }

    fn destination_happens(&mut self, action: Action, setup: &Setup) -> Option<()> {
        match action {
            Action::DestinationStartsQemu => self.destination.qemu = DestinationQemu::InMigrate,
            Action::DestinationSends(note) => self.destination_says(note)?,
            Action::DestinationReads => self.destination_reads()?,
            Action::DestinationGivesUp => self.destination_gives_up(setup)?,
            Action::DestinationEndsQemu { qemu_obeys } => {
                if qemu_obeys {
                    (self.destination.qemu, self.destination.is_told) = (DestinationQemu::Ended, false);
                }
                self.destination_ended(DestinationReport::NotHere);
            }
            Action::DestinationTellsQemu => (self.destination.told, self.destination.is_told) = (true, true),
            Action::DestinationSeesTheVm => self.destination.state.on_taken_over(true),
            Action::DestinationDoesNotSeeTheVm => {
                self.destination.state.on_taken_over(false);
                self.destination_says(Note::Failed)?;
                if setup.flaw == Some(Flaw::EndsWhenUnconfirmed) {
                    self.destination.qemu = DestinationQemu::Ended;
                }
                self.destination_ended(DestinationReport::Unconfirmed);
            }
            Action::DestinationEnds => self.destination_ended(DestinationReport::Here),
            Action::DestinationIsKilled => {
                self.destination.process = Process::Crashed;
                (self.stream.open, self.connected) = (false, false);
                self.to_destination.clear();
            }
            Action::DestinationQemuLoads => {
                self.destination.qemu = match setup.flaw {
                    Some(Flaw::RunsByItself) => DestinationQemu::Running,
                    _ => DestinationQemu::Loaded,
                };
                if self.stream.open {
                    self.stream.loaded = Way::UnderWay;
                }
            }
            Action::DestinationQemuRuns => {
                (self.destination.qemu, self.destination.is_told) = (DestinationQemu::Running, false);
            }
            Action::DestinationQemuForgets => self.destination.is_told = false,
            Action::DestinationQemuDies => {
                (self.destination.qemu, self.destination.qemu_died) = (DestinationQemu::Ended, true);
                (self.stream.open, self.destination.is_told) = (false, false);
                self.died_after_look |= self.operator != Decision::None;
            }
            _ => return None,
        }
        Some(())
    }

    fn operator_happens(&mut self, action: Action, setup: &Setup) -> Option<()> {
        match action {
            Action::OperatorLooks => self.operator = Decision::Made(operator::advice(self, setup)?),
            Action::OperatorEndsDestinationQemu => {
                (self.destination.qemu, self.destination.is_told) = (DestinationQemu::Ended, false);
                self.operator_ends = true;
            }
            Action::OperatorContsThere => {
                self.destination.qemu = DestinationQemu::Running;
                self.operator_conts = true;
            }
            Action::OperatorActs => {
                let Decision::Made(resolution) = self.operator else { return None };
                self.operator = Decision::Done(resolution);
                self.source.qemu = match resolution {
                    Resolution::Resume => SourceQemu::Running,
                    Resolution::Discard => SourceQemu::Ended,
                };
            }
            _ => return None,
        }
        Some(())
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
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        let mut next = world.clone();
        if action == Action::Breaks {
            (next.connected, next.stream.open) = (false, false);
            return Some(next);
        }
        next.source_happens(action, &self.0)
            .or_else(|| next.destination_happens(action, &self.0))
            .or_else(|| next.operator_happens(action, &self.0))?;
        Some(next)
    }

    fn properties(&self) -> Vec<Property<HandOver>> {
        properties(&self.0)
    }
}
