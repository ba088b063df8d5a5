//! What is checked: how large the model is, what may happen in it, and what is wrong with it.

use crate::link::Transport;

/// What the operator does about a VM that is in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operator {
    /// Nothing.
    Absent,
    /// Follows docs/handover.md: looks at the destination, and decides when it is sure.
    Careful,
    /// Takes a destination that will run the VM for one that does.
    Trusting,
    /// Takes a VM that does not run for one that never will.
    Hasty,
}

/// A defect that the checker must find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flaw {
    /// The source resumes though it has sent `Commit`, because the connection is lost.
    ResumesAfterCommit,
    /// The source counts `Commit` as sent only when the transport has taken it all.
    CommitsAfterWriting,
    /// The source sends `Commit` though `Ready` has not come.
    CommitsWithoutReady,
    /// The source discards its VM with `Commit` instead of `Running`.
    ReleasesWithCommit,
    /// The destination runs the VM when it is ready.
    RunsWhenReady,
    /// The destination runs the VM when the source has gone silent.
    RunsWhenLost,
    /// The destination gives up after `Commit` because the connection is lost.
    GivesUpAfterCommit,
    /// The destination looks whether it may give up, and does so a moment later.
    GivesUpInTwoSteps,
    /// The destination says `Running` before the VM runs.
    ConfirmsBeforeRunning,
    /// The destination says `Ready` though batches were damaged.
    ReadyInSpiteOfDamage,
    /// The source sends `Commit` though the digests differ.
    CommitsInSpiteOfDifference,
}

/// What is checked.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    /// Whether digests are compared before the hand-over.
    pub(crate) verify: bool,
    pub(crate) transport: Transport,
    /// Data connections.
    pub(crate) data: usize,
    /// Epochs, at most; further ones only repair damage.
    pub(crate) epochs: u8,
    /// Damaged batches, at most.
    pub(crate) damages: u8,
    /// `Ack`s, at most.
    pub(crate) acks: u8,
    /// New connections of a transport that can have them, at most.
    pub(crate) resumptions: u8,
    /// Whether anything goes wrong: cancels, timeouts, crashes, broken connections, VMs that do not start or go on.
    pub(crate) faults: bool,
    pub(crate) operator: Operator,
    pub(crate) flaw: Option<Flaw>,
}

impl Setup {
    /// The smallest that has everything.
    pub(crate) fn new() -> Setup {
        Setup {
            verify: false,
            transport: Transport::Plain,
            data: 1,
            epochs: 2,
            damages: 0,
            acks: 0,
            resumptions: 1,
            faults: true,
            operator: Operator::Careful,
            flaw: None,
        }
    }
}
