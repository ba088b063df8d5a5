//! Where both sides are in the hand-over: which message may come and go when, and what becomes of the VM. Pure: others talk, and do it.
//!
//! docs/handover.md has the diagrams; the model in `model/` runs these types through everything that can happen.

use std::fmt::Debug;

use pagewarp_engine::error::MigrationError;
use pagewarp_wire::SourceDuty;

use crate::protocol::control::Message;

/// How a message of the other side is to be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// It was due.
    Due,
    /// The other side gives up.
    GaveUp,
    /// It must not come now.
    OutOfPlace,
}

/// Where the source is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum SourcePhase {
    /// `prepare` is sent, or about to be.
    Preparing,
    /// `prepared` came: QEMU migrates.
    Migrating,
    /// QEMU has completed the migration: it does not run the VM by itself any more. The VM is still the source's.
    Completed,
    /// `commit` was sent, or may have been: the source never runs the VM by itself from here on.
    Committed,
    /// `running` came.
    Moved,
    /// It failed or was cancelled before `commit`: the VM stays here.
    Failed,
    /// `commit` was sent, and `running` will not come.
    InDoubt,
}

/// The source.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct SourceState {
    phase: SourcePhase,
    /// Whether what was written into the destination QEMU has to be compared before `commit`, and was not yet.
    to_verify: bool,
}

impl SourceState {
    /// Before `prepare`.
    pub(super) fn new(verify: bool) -> SourceState {
        SourceState { phase: SourcePhase::Preparing, to_verify: verify }
    }

    #[cfg(test)]
    pub(super) fn phase(&self) -> SourcePhase {
        self.phase
    }

    /// QEMU has completed the migration, and nothing has gone wrong.
    pub(super) fn on_completed(&mut self) {
        if self.phase == SourcePhase::Migrating {
            self.phase = SourcePhase::Completed;
        }
    }

    /// What was written into the destination QEMU was compared with what was read from this one, and is the same.
    pub(super) fn on_verified(&mut self) {
        self.to_verify = false;
    }

    /// `message` is about to be sent: to be asked before its first byte leaves, because a `commit` of which a part may have left counts as sent.
    ///
    /// # Errors
    /// If it must not be.
    pub(super) fn on_send(&mut self, message: &Message) -> Result<(), MigrationError> {
        match (self.phase, message) {
            (SourcePhase::Preparing, Message::Prepare(_)) => {}
            (SourcePhase::Completed, Message::Commit { .. }) if !self.to_verify => {
                self.phase = SourcePhase::Committed;
            }
            (phase, Message::Cancel { .. }) if duty_in(phase) == SourceDuty::Resume => {
                self.phase = SourcePhase::Failed;
            }
            (phase, message) => return Err(out_of_place(phase, message)),
        }
        Ok(())
    }

    /// `message` came. What must not come ends the migration, as the loss of the connection does.
    pub(super) fn on_receive(&mut self, message: &Message) -> Heard {
        match (self.phase, message) {
            (SourcePhase::Preparing, Message::Prepared) => self.phase = SourcePhase::Migrating,
            (SourcePhase::Committed, Message::Running(_)) => self.phase = SourcePhase::Moved,
            (SourcePhase::Moved, Message::Report(_)) => {}
            (_, Message::Failed { .. }) => {
                self.give_up();
                return Heard::GaveUp;
            }
            _ => {
                self.give_up();
                return Heard::OutOfPlace;
            }
        }
        Heard::Due
    }

    /// The connection is lost, or this side gives up, for whatever reason. Returns what becomes of the VM.
    pub(super) fn give_up(&mut self) -> SourceDuty {
        self.phase = match self.phase {
            SourcePhase::Committed | SourcePhase::InDoubt => SourcePhase::InDoubt,
            SourcePhase::Moved => SourcePhase::Moved,
            _ => SourcePhase::Failed,
        };
        self.duty()
    }

    /// What becomes of the VM if nothing more is said.
    pub(super) fn duty(&self) -> SourceDuty {
        duty_in(self.phase)
    }
}

fn duty_in(phase: SourcePhase) -> SourceDuty {
    match phase {
        SourcePhase::Committed | SourcePhase::InDoubt => SourceDuty::KeepPaused,
        SourcePhase::Moved => SourceDuty::Release,
        SourcePhase::Preparing | SourcePhase::Migrating | SourcePhase::Completed | SourcePhase::Failed => {
            SourceDuty::Resume
        }
    }
}

/// A defect of this program.
fn out_of_place(phase: impl Debug, message: &Message) -> MigrationError {
    MigrationError::Internal(format!("{message:?} must not be sent in the state {phase:?}"))
}

/// What the source QEMU is told when its VM is to go on. `status` is its own name for what it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Resumption {
    /// The migration has stopped the VM: tell it to go on. In `finish-migrate` QEMU has not ended the migration yet and refuses: try again.
    Cont,
    /// It runs, or somebody else has stopped it, or it has ended: leave it as it is.
    Leave,
}

impl Resumption {
    pub(super) fn of(status: &str) -> Resumption {
        match status {
            "finish-migrate" | "postmigrate" => Resumption::Cont,
            _ => Resumption::Leave,
        }
    }
}

/// Whether an operator may decide about a VM on the source: only about one whose QEMU has completed a migration.
pub(super) fn is_open_to_decision(status: &str) -> bool {
    status == "postmigrate"
}

/// Where the destination is, once a source has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum DestinationPhase {
    /// `prepare` came.
    Preparing,
    /// `prepared` was sent: QEMU waits for the VM, loads it, and has loaded it, but does not run it.
    Listening,
    /// `commit` came: the VM belongs here, whatever becomes of the source.
    Committed {
        /// Whether it is to run.
        run: bool,
    },
    /// QEMU has the VM, and runs it if it is to run.
    Running,
    /// QEMU never told that it has the VM. It may.
    Unconfirmed,
    /// There is no `commit`, and there will be none.
    Failed,
}

/// What the destination does with its QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DestinationDuty {
    /// It must not run the VM, and may hold all of it: end it.
    End,
    /// The VM is ours: let it run, or leave it paused.
    TakeOver {
        /// Whether it is to run.
        run: bool,
    },
    /// The VM runs in it, or may: nobody here ends it.
    LeaveAlone,
}

/// The destination.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct DestinationState {
    phase: DestinationPhase,
}

impl DestinationState {
    /// `prepare` came.
    pub(super) fn new() -> DestinationState {
        DestinationState { phase: DestinationPhase::Preparing }
    }

    #[cfg(test)]
    pub(super) fn phase(&self) -> DestinationPhase {
        self.phase
    }

    /// `message` is about to be sent.
    ///
    /// # Errors
    /// If it must not be.
    pub(super) fn on_send(&mut self, message: &Message) -> Result<(), MigrationError> {
        match (self.phase, message) {
            (DestinationPhase::Preparing, Message::Prepared) => self.phase = DestinationPhase::Listening,
            (DestinationPhase::Preparing | DestinationPhase::Listening, Message::Failed { .. }) => {
                self.phase = DestinationPhase::Failed;
            }
            (DestinationPhase::Failed | DestinationPhase::Unconfirmed, Message::Failed { .. })
            | (DestinationPhase::Running, Message::Running(_) | Message::Report(_)) => {}
            (phase, message) => return Err(out_of_place(phase, message)),
        }
        Ok(())
    }

    /// `message` came. What must not come, and the source's word that it is off, are signs of a failure; whoever collects them
    /// [gives up](DestinationState::give_up) when he has enough. Until then a `commit` counts, whatever was seen before.
    pub(super) fn on_receive(&mut self, message: &Message) -> Heard {
        match (self.phase, message) {
            (DestinationPhase::Listening, &Message::Commit { run }) => {
                self.phase = DestinationPhase::Committed { run };
                Heard::Due
            }
            (_, Message::Cancel { .. }) => Heard::GaveUp,
            _ => Heard::OutOfPlace,
        }
    }

    /// This side gives up, for whatever reason. Returns what becomes of QEMU: with the VM in hand there is no giving up.
    pub(super) fn give_up(&mut self) -> DestinationDuty {
        if let DestinationPhase::Preparing | DestinationPhase::Listening = self.phase {
            self.phase = DestinationPhase::Failed;
        }
        self.duty()
    }

    /// QEMU was told to take the VM over: it says that it has, or there is no knowing.
    pub(super) fn on_taken_over(&mut self, is_confirmed: bool) {
        if let DestinationPhase::Committed { .. } = self.phase {
            self.phase = if is_confirmed { DestinationPhase::Running } else { DestinationPhase::Unconfirmed };
        }
    }

    /// What becomes of QEMU if nothing more is said.
    pub(super) fn duty(&self) -> DestinationDuty {
        match self.phase {
            DestinationPhase::Preparing | DestinationPhase::Listening | DestinationPhase::Failed => {
                DestinationDuty::End
            }
            DestinationPhase::Committed { run } => DestinationDuty::TakeOver { run },
            DestinationPhase::Running | DestinationPhase::Unconfirmed => DestinationDuty::LeaveAlone,
        }
    }
}
