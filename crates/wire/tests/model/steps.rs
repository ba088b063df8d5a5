//! What it does to the world.

use pagewarp_wire::{DestinationDuty, DestinationPhase, SourceDuty};

use super::{Action, Hole, Process, Report, Vm, World};
use crate::letter::Letter;
use crate::link::Transport;
use crate::operator::{Decision, Resolution, advice};
use crate::setup::{Flaw, Setup};

impl World {
    /// The source hands a letter to the transport.
    pub(super) fn post_to_destination(&mut self, letter: Letter, transport: Transport) {
        if self.destination.process == Process::Working && (self.connected || transport != Transport::Plain) {
            self.to_destination.push(letter);
        }
    }

    pub(super) fn post_to_source(&mut self, letter: Letter, transport: Transport) {
        if self.source.process == Process::Working && (self.connected || transport != Transport::Plain) {
            self.to_source.push(letter);
        }
    }

    pub(super) fn source_sent(&mut self, letter: Letter, setup: &Setup) -> Option<()> {
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

    pub(super) fn source_reads(&mut self, setup: &Setup) -> Option<()> {
        let letter = self.to_source.arrive(setup.transport)?;
        match self.source.state.on_receive(&letter.message(setup.verify)) {
            Ok(()) => match letter {
                Letter::Damaged(epoch) => {
                    let hole = self.holes.iter_mut().find(|hole| **hole == Hole::Reported { epoch })?;
                    *hole = Hole::Known;
                }
                Letter::Digests(agree) => self.source.saw_difference = !agree,
                Letter::DigestsEnd => {
                    let flawed = setup.flaw == Some(Flaw::CommitsInSpiteOfDifference);
                    if !self.source.saw_difference || flawed {
                        self.source.state.on_digests_agree().ok()?;
                    }
                }
                _ => {}
            },
            // Whoever has made up his mind does not mind any more.
            Err(_) => self.misunderstood |= self.source.decided.is_none(),
        }
        Some(())
    }

    pub(super) fn source_decides(&mut self, setup: &Setup) {
        let duty = match (self.source.state.duty(), setup.flaw) {
            (SourceDuty::KeepPaused, Some(Flaw::ResumesAfterCommit)) => SourceDuty::Resume,
            (duty, _) => duty,
        };
        self.source.decided = Some(duty);
    }

    pub(super) fn source_ends(
        mut self,
        vm_obeys: bool,
        word: Option<Letter>,
        setup: &Setup,
    ) -> Option<World> {
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

    pub(super) fn destination_sent(&mut self, letter: Letter, setup: &Setup) -> Option<()> {
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

    pub(super) fn destination_reads(&mut self, setup: &Setup) -> Option<()> {
        let letter = self.to_destination.arrive(setup.transport)?;
        if self.destination.state.on_receive(&letter.message(setup.verify)).is_err() {
            self.misunderstood = true;
        }
        Some(())
    }

    pub(super) fn destination_gives_up(&mut self, word: Option<Letter>, setup: &Setup) -> Option<()> {
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

    pub(super) fn destination_starts(&mut self, vm_obeys: bool, setup: &Setup) {
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

    pub(super) fn destination_ended(&mut self, vm: Vm) {
        self.destination.process = Process::Ended;
        self.destination.vm = vm;
        self.to_destination.clear();
    }

    pub(super) fn happens(mut self, action: Action, setup: &Setup) -> Option<World> {
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
            Action::MemoryIsDamaged => self.destination.differs = true,
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
