//! The operator, who decides about a VM that is left paused on the source: `pagewarp qemu resolve --resume` or `--discard` there, after a look at the destination.

use super::setup::{Operator, Setup};
use super::world::{Action, DestinationQemu, DestinationReport, Process, SourceReport, World};

/// What the operator tells the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Resolution {
    Resume,
    Discard,
}

/// How far the operator is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Decision {
    None,
    /// Has looked, and will do this.
    Made(Resolution),
    Done(Resolution),
}

/// What the operator may do about a VM that waits. The rows of the table in docs/handover.md.
pub(super) fn choices(world: &World, setup: &Setup) -> Vec<Action> {
    let destination = &world.destination;
    // It surely runs nowhere else.
    if world.source.report == Some(SourceReport::StillPaused) {
        return vec![Action::OperatorLooks];
    }
    if destination.process == Process::Working {
        // Whatever is seen now may change.
        return match setup.operator {
            Operator::Hasty => vec![Action::OperatorLooks],
            _ => Vec::new(),
        };
    }
    let committed = world.source.report == Some(SourceReport::InDoubt)
        || destination.report == Some(DestinationReport::Unconfirmed);
    match destination.qemu {
        DestinationQemu::Running | DestinationQemu::Ended => vec![Action::OperatorLooks],
        _ if is_paused_there(world) || setup.operator == Operator::Sloppy => vec![Action::OperatorLooks],
        DestinationQemu::Loaded if committed || setup.operator == Operator::Eager => {
            vec![Action::OperatorEndsDestinationQemu, Action::OperatorContsThere]
        }
        _ => vec![Action::OperatorEndsDestinationQemu],
    }
}

/// Whether `receive` has said that it has the VM, which is paused as it was.
fn is_paused_there(world: &World) -> bool {
    world.destination.qemu == DestinationQemu::Loaded
        && world.destination.report == Some(DestinationReport::Here)
}

/// What the operator decides on when it looks at the destination QEMU.
pub(super) fn advice(world: &World) -> Resolution {
    match world.destination.qemu {
        DestinationQemu::Running => Resolution::Discard,
        _ if is_paused_there(world) => Resolution::Discard,
        _ => Resolution::Resume,
    }
}
