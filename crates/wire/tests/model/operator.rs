//! The operator, who decides about a VM that a migration left paused: `pagewarp resolve NAME --resume` or `--discard`, both on the source.

use pagewarp_wire::DestinationDuty;

use crate::setup::{Operator, Setup};
use crate::world::{Process, Report, Vm, World};

/// What the operator tells the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Resolution {
    Resume,
    Discard,
}

/// How far the operator is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Decision {
    None,
    /// Has looked, and will do this.
    Made(Resolution),
    Done(Resolution),
}

/// What the operator decides on looking at the destination; `None`: to look again later. The rows of the table in docs/handover.md.
pub(crate) fn advice(world: &World, setup: &Setup) -> Option<Resolution> {
    if world.source.report == Some(Report::StillPaused) {
        return Some(Resolution::Resume);
    }
    let destination = &world.destination;
    match (destination.process, destination.vm) {
        (_, Vm::Running) => Some(Resolution::Discard),
        (Process::Ended | Process::Crashed, _) => Some(Resolution::Resume),
        (Process::Working, _) => match setup.operator {
            Operator::Hasty => Some(Resolution::Resume),
            Operator::Trusting if destination.state.duty() == DestinationDuty::Run => {
                Some(Resolution::Discard)
            }
            _ => None,
        },
    }
}
