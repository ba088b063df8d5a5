//! What is checked: what may happen in the model, and what is wrong with it.

/// What the operator does about a VM that nobody runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operator {
    /// Nothing.
    Absent,
    /// Follows docs/handover.md: waits until `receive` has ended, and ends a destination QEMU that does not run the VM before the source resumes it; or, if
    /// either side says that `commit` was sent, lets the VM go on there.
    Careful,
    /// Takes a VM that does not run for one that never will, though `receive` still works.
    Hasty,
    /// Lets a VM that is loaded there go on there, though it is not known that `commit` was sent.
    Eager,
    /// Takes a VM that does not run for one that never will, once `receive` has ended, though the destination QEMU has not.
    Sloppy,
}

/// A defect that the checker must find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flaw {
    /// The source resumes though it has sent `commit`, because the connection is lost.
    ResumesAfterCommit,
    /// The source counts `commit` as sent only when the transport has taken it all.
    CommitsAfterWriting,
    /// The source sends `commit` when QEMU has stopped the VM, though it has not completed the migration.
    CommitsBeforeCompletion,
    /// The source ends its QEMU with `commit` instead of `running`.
    QuitsWithCommit,
    /// The destination QEMU runs the VM as soon as it is loaded, as it does unless it is told otherwise.
    RunsByItself,
    /// The destination lets QEMU run the VM when it is loaded.
    RunsWhenLoaded,
    /// The destination ends its QEMU after `commit`, because the connection is lost.
    EndsAfterCommit,
    /// The destination ends its QEMU when that does not say that it runs the VM.
    EndsWhenUnconfirmed,
    /// The destination says `running` before QEMU does.
    ConfirmsBeforeRunning,
    /// A VM that was paused runs at the destination.
    RunsWhatWasPaused,
    /// Whoever gives up on the direct route leaves the stream to the QEMUs.
    LeavesTheStream,
    /// The source sends `commit` though what was written into the destination QEMU is not what was read.
    CommitsInSpiteOfDifference,
}

/// What is checked.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setup {
    /// Whether the VM ran when the migration began.
    pub(super) ran: bool,
    /// Whether anything goes wrong: cancels, timeouts, kills, broken connections, QEMUs that die, fail or do not answer.
    pub(super) faults: bool,
    /// Whether somebody may pause the VM while it migrates.
    pub(super) somebody_pauses: bool,
    /// Whether what is written into the destination QEMU is compared with what was read.
    pub(super) verify: bool,
    /// Whether the two QEMUs are alone with the stream: it goes on when either pagewarp is gone, or both have lost each other, and it may break by itself.
    pub(super) direct: bool,
    pub(super) operator: Operator,
    pub(super) flaw: Option<Flaw>,
}

impl Setup {
    pub(super) fn new() -> Setup {
        Setup {
            ran: true,
            faults: true,
            somebody_pauses: false,
            verify: false,
            direct: false,
            operator: Operator::Careful,
            flaw: None,
        }
    }
}
