//! What can happen next.

use pagewarp_wire::{DestinationDuty, DestinationPhase, SourceDuty, SourcePhase};

use super::{Action, Destination, Process, Source, Vm, World};
use crate::letter::Letter;
use crate::link::Transport;
use crate::setup::{Flaw, Setup};

impl World {
    pub(super) fn source_sends(&self, setup: &Setup, actions: &mut Vec<Action>) {
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

    pub(super) fn source_finishes(&self, setup: &Setup, actions: &mut Vec<Action>) {
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

    pub(super) fn destination_sends(&self, setup: &Setup, actions: &mut Vec<Action>) {
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
                send(Letter::Digests(!self.destination.differs));
                send(Letter::DigestsEnd);
                send(Letter::Ready);
            }
            DestinationPhase::Committed
                if *vm == Vm::Running || setup.flaw == Some(Flaw::ConfirmsBeforeRunning) =>
            {
                send(Letter::Running);
            }
            _ => {}
        }
        if self.acks < setup.acks {
            send(Letter::Ack(self.acks + 1));
        }
    }

    pub(super) fn destination_acts(&self, setup: &Setup, actions: &mut Vec<Action>) {
        let Destination { state, vm, giving_up, differs, .. } = &self.destination;
        // Once the epochs are all there, and before the digests are taken, which begins at once: what happens later, nobody can find out.
        if setup.verify && setup.faults && !differs && state.phase() == DestinationPhase::Loading {
            let digests = Letter::Digests(true).message(true);
            if state.clone().on_send(&digests).is_ok() {
                actions.push(Action::MemoryIsDamaged);
            }
        }
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

    pub(super) fn link(&self, setup: &Setup, actions: &mut Vec<Action>) {
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
}
