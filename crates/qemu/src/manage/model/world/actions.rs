//! What can happen next.

use super::{
    Action, Destination, DestinationQemu, Migration, Process, Source, SourceQemu, SourceReport, Way, World,
};
use crate::manage::model::note::Note;
use crate::manage::model::operator::{self, Decision};
use crate::manage::model::setup::{Flaw, Operator, Setup};
use crate::manage::states::{DestinationPhase, SourcePhase};

impl World {
    pub(super) fn source_acts(&self, setup: &Setup, actions: &mut Vec<Action>) {
        let Source { state, qemu, migration, decided, has_news, is_told, .. } = &self.source;
        if decided.is_some() {
            // QEMU refuses to go on before it has ended the migration; that is waited for, for a while.
            if self.source.would_tell_qemu() && *qemu == SourceQemu::PostMigrate && !is_told {
                actions.push(Action::SourceTellsQemu);
            }
            actions.push(Action::SourceEnds);
            return;
        }
        if *has_news {
            actions.push(Action::SourceHearsThatSomebodyPaused);
        }
        match (state.phase(), migration) {
            (SourcePhase::Migrating, Migration::None) => actions.push(Action::SourceStartsQemu),
            // What QEMU tells comes in order.
            (SourcePhase::Migrating, Migration::Completed) if !has_news => {
                actions.push(Action::SourceSeesCompletion);
            }
            (SourcePhase::Completed, _) if setup.verify && !self.source.is_verified => {
                let flawed = setup.flaw == Some(Flaw::CommitsInSpiteOfDifference);
                if !self.stream.differs || flawed {
                    actions.push(Action::SourceVerifies);
                }
            }
            (SourcePhase::Completed, _) => {
                actions.push(Action::SourceSends(Note::Commit { run: self.source.runs }));
            }
            (SourcePhase::Migrating, Migration::Active)
                if setup.flaw == Some(Flaw::CommitsBeforeCompletion)
                    && *qemu == SourceQemu::FinishMigrate =>
            {
                actions.push(Action::SourceSends(Note::Commit { run: self.source.runs }));
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

    pub(super) fn source_qemu_acts(&self, setup: &Setup, actions: &mut Vec<Action>) {
        let Source { process, qemu, migration, is_told, .. } = &self.source;
        if *is_told {
            actions.push(Action::SourceQemuRuns);
            if *process != Process::Working {
                actions.push(Action::SourceQemuForgets);
            }
        }
        if *migration == Migration::Active {
            let is_under_way = self.stream.open && !self.stream.delivered && !self.stream.differs;
            if setup.verify && setup.faults && is_under_way {
                actions.push(Action::StreamIsDamaged);
            }
            if setup.somebody_pauses && *qemu == SourceQemu::Running {
                actions.push(Action::SomebodyPauses);
            }
            match qemu {
                SourceQemu::Running | SourceQemu::Paused => actions.push(Action::SourceQemuStopsVm),
                SourceQemu::FinishMigrate => {
                    if self.stream.open
                        && !self.stream.delivered
                        && self.destination.qemu == DestinationQemu::InMigrate
                    {
                        actions.push(Action::SourceQemuHasSentAll);
                    }
                    if self.stream.open && self.stream.loaded == Way::Sent {
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

    pub(super) fn destination_acts(&self, setup: &Setup, actions: &mut Vec<Action>) {
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

    pub(super) fn destination_qemu_acts(&self, setup: &Setup, actions: &mut Vec<Action>) {
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

    pub(super) fn operator_acts(&self, setup: &Setup, actions: &mut Vec<Action>) {
        if !self.waits_for_operator() || setup.operator == Operator::Absent {
            return;
        }
        if let Decision::Made(_) = self.operator {
            actions.push(Action::OperatorActs);
            return;
        }
        actions.extend(operator::choices(self, setup));
    }
}
