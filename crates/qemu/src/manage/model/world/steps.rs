//! What it does to the world.

use pagewarp_wire::SourceDuty;

use super::{
    Action, DestinationQemu, DestinationReport, Migration, Process, SourceQemu, SourceReport, Way, World,
};
use crate::manage::model::note::Note;
use crate::manage::model::operator::{self, Decision, Resolution};
use crate::manage::model::setup::{Flaw, Setup};
use crate::manage::states::{DestinationDuty, DestinationPhase, Heard, SourcePhase};

impl World {
    pub(super) fn post_to_destination(&mut self, note: Note) {
        if self.connected && self.destination.process == Process::Working {
            self.to_destination.push_back(note);
        }
    }

    pub(super) fn post_to_source(&mut self, note: Note) {
        if self.connected && self.source.process == Process::Working {
            self.to_source.push_back(note);
        }
    }

    pub(super) fn source_commits(&mut self, note: Note, setup: &Setup) -> Option<()> {
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

    pub(super) fn source_reads(&mut self) -> Option<()> {
        let note = self.to_source.pop_front()?;
        self.misunderstood |= self.source.state.on_receive(&note.message()) == Heard::OutOfPlace;
        Some(())
    }

    pub(super) fn source_decides(&mut self, setup: &Setup) {
        let duty = match (self.source.state.give_up(), setup.flaw) {
            (SourceDuty::KeepPaused, Some(Flaw::ResumesAfterCommit)) => SourceDuty::Resume,
            (duty, _) => duty,
        };
        self.source.decided = Some(duty);
        self.stream_is_cut(setup);
        if self.source.state.on_send(&Note::Cancel.message()).is_ok() {
            self.post_to_destination(Note::Cancel);
        }
    }

    pub(super) fn source_ends(&mut self) -> Option<()> {
        let must_tell_qemu = self.source.would_tell_qemu();
        let source = &mut self.source;
        source.report = Some(match source.decided? {
            SourceDuty::KeepPaused => SourceReport::InDoubt,
            SourceDuty::Release => SourceReport::Moved,
            SourceDuty::Resume if must_tell_qemu => SourceReport::StillPaused,
            SourceDuty::Resume if source.qemu == SourceQemu::Ended => SourceReport::Gone,
            SourceDuty::Resume => SourceReport::Stays,
        });
        source.process = Process::Ended;
        self.connected = false;
        self.to_source.clear();
        Some(())
    }

    pub(super) fn source_qemu_fails(&mut self, setup: &Setup) {
        self.source.migration = Migration::Failed;
        if self.source.qemu == SourceQemu::FinishMigrate {
            let was_paused = self.was_paused(setup);
            self.source.qemu = if was_paused { SourceQemu::PostMigrate } else { SourceQemu::Running };
        }
        self.stream.open = false;
    }

    pub(super) fn destination_says(&mut self, note: Note) -> Option<()> {
        self.destination.state.on_send(&note.message()).ok()?;
        self.destination.said += u8::from(matches!(note, Note::Running | Note::Report));
        self.post_to_source(note);
        Some(())
    }

    pub(super) fn destination_reads(&mut self) -> Option<()> {
        let note = self.to_destination.pop_front()?;
        self.misunderstood |= self.destination.state.on_receive(&note.message()) == Heard::OutOfPlace;
        Some(())
    }

    pub(super) fn destination_gives_up(&mut self, setup: &Setup) -> Option<()> {
        let is_flawed = setup.flaw == Some(Flaw::EndsAfterCommit)
            && matches!(self.destination.state.phase(), DestinationPhase::Committed { .. });
        if self.destination.state.give_up() != DestinationDuty::End && !is_flawed {
            return None;
        }
        self.destination.gave_up = true;
        self.stream_is_cut(setup);
        self.destination_says(Note::Failed).or(is_flawed.then_some(()))
    }

    /// A process ends or loses the other one, and the stream with it unless the QEMUs are alone with that.
    pub(super) fn bridge_ends(&mut self, setup: &Setup) {
        self.stream.open &= setup.direct;
    }

    /// Whoever gives up ends the stream, whoever it belongs to.
    fn stream_is_cut(&mut self, setup: &Setup) {
        self.stream.open &= setup.direct && setup.flaw == Some(Flaw::LeavesTheStream);
    }

    pub(super) fn destination_ended(&mut self, report: DestinationReport, setup: &Setup) {
        self.destination.process = Process::Ended;
        self.destination.report = Some(report);
        self.bridge_ends(setup);
        self.connected = false;
        self.to_destination.clear();
    }

    pub(super) fn source_happens(&mut self, action: Action, setup: &Setup) -> Option<()> {
        match action {
            Action::SourceStartsQemu => {
                self.source.migration = Migration::Active;
            }
            Action::SourceSeesCompletion => self.source.state.on_completed(),
            Action::SourceVerifies => {
                self.source.is_verified = true;
                self.source.state.on_verified();
            }
            Action::StreamIsDamaged => self.stream.differs = true,
            Action::SourceSends(note) => self.source_commits(note, setup)?,
            Action::SourceReads => self.source_reads()?,
            Action::SourceDecides => self.source_decides(setup),
            Action::SourceTellsQemu => self.source.is_told = true,
            Action::SourceEnds => self.source_ends()?,
            Action::SourceQuitsQemu => self.source.qemu = SourceQemu::Ended,
            Action::SourceIsKilled => {
                self.source.process = Process::Crashed;
                self.bridge_ends(setup);
                self.connected = false;
                self.to_source.clear();
            }
            Action::SomebodyPauses => {
                (self.source.qemu, self.source.has_news, self.somebody_paused) =
                    (SourceQemu::Paused, true, true);
            }
            Action::SourceHearsThatSomebodyPaused => {
                self.source.has_news = false;
                // It asks QEMU who has stopped the VM, and hears what is so by then.
                self.source.runs = self.source.qemu != SourceQemu::Paused;
            }
            Action::SourceQemuStopsVm => self.source.qemu = SourceQemu::FinishMigrate,
            Action::SourceQemuHasSentAll => self.stream.delivered = true,
            Action::SourceQemuHearsThatItIsLoaded => self.stream.loaded = Way::Arrived,
            Action::SourceQemuCompletes => {
                (self.source.qemu, self.source.migration) = (SourceQemu::PostMigrate, Migration::Completed);
            }
            Action::SourceQemuFails => self.source_qemu_fails(setup),
            Action::SourceQemuRuns => {
                (self.source.qemu, self.source.is_told) = (SourceQemu::Running, false);
            }
            Action::SourceQemuForgets => self.source.is_told = false,
            Action::SourceQemuDies => {
                (self.source.qemu, self.source.qemu_died) = (SourceQemu::Ended, true);
                self.source.is_told = false;
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

    pub(super) fn destination_happens(&mut self, action: Action, setup: &Setup) -> Option<()> {
        match action {
            Action::DestinationStartsQemu => self.destination.qemu = DestinationQemu::InMigrate,
            Action::DestinationSends(note) => self.destination_says(note)?,
            Action::DestinationReads => self.destination_reads()?,
            Action::DestinationGivesUp => self.destination_gives_up(setup)?,
            Action::DestinationEndsQemu { qemu_obeys } => {
                if qemu_obeys {
                    (self.destination.qemu, self.destination.is_told) = (DestinationQemu::Ended, false);
                    self.stream.open = false;
                }
                self.destination_ended(DestinationReport::NotHere, setup);
            }
            Action::DestinationTellsQemu => (self.destination.told, self.destination.is_told) = (true, true),
            Action::DestinationSeesTheVm => self.destination.state.on_taken_over(true),
            Action::DestinationDoesNotSeeTheVm => {
                self.destination.state.on_taken_over(false);
                self.destination_says(Note::Failed)?;
                if setup.flaw == Some(Flaw::EndsWhenUnconfirmed) {
                    self.destination.qemu = DestinationQemu::Ended;
                }
                self.destination_ended(DestinationReport::Unconfirmed, setup);
            }
            Action::DestinationEnds => self.destination_ended(DestinationReport::Here, setup),
            Action::DestinationIsKilled => {
                self.destination.process = Process::Crashed;
                self.bridge_ends(setup);
                self.connected = false;
                self.to_destination.clear();
            }
            Action::DestinationQemuLoads => {
                self.destination.qemu = match setup.flaw {
                    Some(Flaw::RunsByItself) => DestinationQemu::Running,
                    _ => DestinationQemu::Loaded,
                };
                if self.stream.open {
                    self.stream.loaded = Way::Sent;
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

    pub(super) fn operator_happens(&mut self, action: Action) -> Option<()> {
        match action {
            Action::OperatorLooks => self.operator = Decision::Made(operator::advice(self)),
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
                self.source.is_told = false;
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
