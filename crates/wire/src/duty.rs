//! What each end does with its VM. The drivers around the state machines ask this, and decide nothing of it themselves; the model in `tests/model`
//! asks the same.

use crate::Outcome;

/// What the source does with its VM when its migration ends, for whatever reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceDuty {
    /// Nobody else may run it: let it go on here.
    Resume,
    /// Somebody else may be running it: keep it, paused, and say so.
    KeepPaused,
    /// It runs at the destination: never run this copy again.
    Release,
}

impl SourceDuty {
    pub(crate) fn of(outcome: Outcome) -> SourceDuty {
        match outcome {
            Outcome::InDoubt => SourceDuty::KeepPaused,
            Outcome::VmRunsOnDestination => SourceDuty::Release,
            _ => SourceDuty::Resume,
        }
    }
}

/// What the destination does with its VM when nothing more comes, for whatever reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationDuty {
    /// The VM is another's, or may be: discard what is here, and never run it.
    Discard,
    /// The VM is ours: run it, whatever else has failed, because nobody else will.
    Run,
}

impl DestinationDuty {
    pub(crate) fn of(outcome: Outcome) -> DestinationDuty {
        match outcome {
            Outcome::RunOnDestination | Outcome::VmRunsOnDestination => DestinationDuty::Run,
            _ => DestinationDuty::Discard,
        }
    }
}
