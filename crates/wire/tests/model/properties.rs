//! What must always hold, and what must be possible, lest the model says nothing.

use pagewarp_wire::{DestinationPhase, Outcome, SourcePhase};
use stateright::{Model, Property};

use crate::link::Transport;
use crate::operator::{Decision, Resolution};
use crate::setup::{Operator, Setup};
use crate::world::{Action, HandOver, Process, Report, Vm, World};

pub(crate) const NEVER_TWO: &str = "the VM never runs on both sides";
pub(crate) const NEVER_NONE: &str = "in the end the VM runs on one side, or the source says that it is in doubt or paused, or the VM died with its owner";
pub(crate) const NO_CRASH_NO_LOSS: &str =
    "without a crash the VM runs on one side in the end, or the source has it and says so";
pub(crate) const SOURCE_GAVE_IT_AWAY: &str =
    "the source runs the VM only before Commit, or on the word of an operator";
pub(crate) const DESTINATION_WAS_GIVEN_IT: &str = "the destination runs the VM only after Commit";
pub(crate) const THE_RIGHT_IS_USED: &str =
    "a destination that has got Commit runs the VM, or says that it does not start, though the source died";
pub(crate) const THE_VM_STAYS: &str = "before Commit the destination's death costs nothing";
pub(crate) const UNDERSTOOD: &str = "no end refuses what the other says";
pub(crate) const DOUBT_IS_REAL: &str = "the source is in doubt only after Commit";
pub(crate) const MOVED_IS_TRUE: &str =
    "the source says that the VM has moved only if it has run at the destination";
pub(crate) const WHOLE: &str = "the VM runs at the destination only with all its pages";
pub(crate) const VERIFIED: &str =
    "with digests, the VM runs at the destination only with the memory of the source";
pub(crate) const RESOLVED: &str = "what the operator does leaves the VM running on one side";
pub(crate) const DOUBT_ENDS: &str = "every doubt can be resolved once the destination has ended";
pub(crate) const REST: &str = "there is nothing to do but to crash exactly when both have ended";

/// Whether nothing more happens in this world, as the other properties mean it.
fn at_rest(model: &HandOver, world: &World) -> bool {
    world.is_at_rest(&model.0)
}

fn nobody_crashed(world: &World) -> bool {
    world.source.process != Process::Crashed && world.destination.process != Process::Crashed
}

/// Whoever had the VM, and the right to run it, died.
fn died_with_its_owner(world: &World) -> bool {
    let source_died = world.source.process == Process::Crashed;
    let destination_died = world.destination.process == Process::Crashed;
    match (source_died, destination_died) {
        (true, true) => true,
        // The destination says so itself if it could not start the VM.
        (true, false) => !world.was_given() || world.destination.start_failed,
        (false, true) => world.was_given() && world.source.vm == Vm::Gone,
        (false, false) => false,
    }
}

fn always() -> Vec<Property<HandOver>> {
    vec![
        Property::always(NEVER_TWO, |_, world: &World| world.running() <= 1),
        Property::always(NEVER_NONE, |model, world: &World| {
            !at_rest(model, world)
                || world.running() == 1
                || world.waits_for_operator()
                || died_with_its_owner(world)
        }),
        Property::always(NO_CRASH_NO_LOSS, |model, world: &World| {
            !at_rest(model, world)
                || !nobody_crashed(world)
                || world.running() == 1
                || (world.waits_for_operator() && world.source.vm == Vm::Paused)
        }),
        Property::always(SOURCE_GAVE_IT_AWAY, |_, world: &World| {
            world.source.vm != Vm::Running
                || !world.source.commit_sent
                || world.operator == Decision::Done(Resolution::Resume)
        }),
        Property::always(DESTINATION_WAS_GIVEN_IT, |_, world: &World| {
            world.destination.vm != Vm::Running || world.source.commit_sent
        }),
        Property::always(THE_RIGHT_IS_USED, |model, world: &World| {
            !at_rest(model, world)
                || !world.was_given()
                || world.source.process != Process::Crashed
                || world.destination.process == Process::Crashed
                || world.destination.vm == Vm::Running
                || world.destination.start_failed
        }),
        Property::always(THE_VM_STAYS, |model, world: &World| {
            !at_rest(model, world)
                || world.source.commit_sent
                || world.source.process == Process::Crashed
                || world.source.vm == Vm::Running
                || (world.source.report == Some(Report::StillPaused) && world.source.vm == Vm::Paused)
        }),
        Property::always(UNDERSTOOD, |_, world: &World| !world.misunderstood),
        Property::always(DOUBT_IS_REAL, |_, world: &World| {
            world.source.report != Some(Report::InDoubt) || world.source.commit_sent
        }),
        Property::always(MOVED_IS_TRUE, |_, world: &World| {
            world.source.report != Some(Report::Moved)
                || world.destination.vm == Vm::Running
                || world.destination.process == Process::Crashed
        }),
        Property::always(WHOLE, |_, world: &World| {
            world.destination.vm != Vm::Running || world.holes.is_empty()
        }),
        Property::always(VERIFIED, |_, world: &World| {
            world.destination.vm != Vm::Running || !world.destination.differs
        }),
        Property::always(RESOLVED, |model, world: &World| {
            !at_rest(model, world)
                || !matches!(world.operator, Decision::Done(_))
                || world.died_after_look
                || world.source.process == Process::Crashed
                || world.running() == 1
        }),
        Property::always(DOUBT_ENDS, |model, world: &World| {
            model.0.operator == Operator::Absent || !at_rest(model, world) || !world.waits_for_operator()
        }),
        Property::always(REST, |model, world: &World| {
            let mut actions = Vec::new();
            model.actions(world, &mut actions);
            let only_crashes = actions
                .iter()
                .all(|action| matches!(action, Action::SourceCrashes | Action::DestinationCrashes));
            only_crashes == at_rest(model, world)
        }),
    ]
}

/// Both have ended alive, and the source said this.
fn ended(model: &HandOver, world: &World, report: Report) -> bool {
    at_rest(model, world) && nobody_crashed(world) && world.source.report == Some(report)
}

fn sometimes() -> Vec<Property<HandOver>> {
    vec![
        Property::sometimes("the VM moves, and both say goodbye", |model, world: &World| {
            ended(model, world, Report::Moved)
                && world.source.state.phase() == SourcePhase::Done
                && world.destination.state.phase() == DestinationPhase::Done
                && world.destination.vm == Vm::Running
                && (world.source.state.digests_complete() || !model.0.verify)
        }),
        Property::sometimes("the VM stays", |model, world: &World| ended(model, world, Report::Stays)),
        Property::sometimes("the VM stays, and does not go on", |_, world: &World| {
            world.source.report == Some(Report::StillPaused)
        }),
        Property::sometimes("a Commit is lost", |_, world: &World| {
            world.source.report == Some(Report::InDoubt)
                && world.destination.process == Process::Ended
                && world.destination.state.outcome() == Outcome::NeverCommitted
        }),
        Property::sometimes("the news that the VM runs are lost", |_, world: &World| {
            world.source.report == Some(Report::InDoubt)
                && world.destination.process == Process::Ended
                && world.destination.vm == Vm::Running
        }),
        Property::sometimes("the VM does not start", |_, world: &World| {
            world.source.report == Some(Report::InDoubt) && world.destination.start_failed
        }),
        Property::sometimes("the destination dies with the VM", |_, world: &World| {
            world.source.report == Some(Report::InDoubt)
                && world.destination.process == Process::Crashed
                && world.was_given()
        }),
        Property::sometimes("the source dies, and the VM is not lost", |_, world: &World| {
            world.source.process == Process::Crashed
                && world.source.report.is_none()
                && world.destination.process == Process::Ended
                && world.destination.vm == Vm::Running
        }),
        Property::sometimes("the source dies, and the VM with it", |_, world: &World| {
            world.source.process == Process::Crashed
                && world.source.commit_sent
                && world.destination.state.outcome() == Outcome::NeverCommitted
        }),
        Property::sometimes(
            "the destination holds the right, and the connection is gone",
            |_, world: &World| {
                !world.connected
                    && world.destination.state.phase() == DestinationPhase::Committed
                    && world.destination.vm == Vm::Paused
            },
        ),
    ]
}

/// Those that make sense for this setup.
pub(crate) fn properties(setup: &Setup) -> Vec<Property<HandOver>> {
    let mut properties = always();
    if setup.flaw.is_some() || !setup.faults {
        return properties;
    }
    properties.extend(sometimes());
    if setup.operator == Operator::Careful {
        properties.push(Property::sometimes("the operator resumes", |_, world: &World| {
            world.operator == Decision::Done(Resolution::Resume)
                && world.source.report == Some(Report::InDoubt)
        }));
        properties.push(Property::sometimes("the operator discards", |_, world: &World| {
            world.operator == Decision::Done(Resolution::Discard)
        }));
        properties.push(Property::sometimes("the operator has to wait", |model, world: &World| {
            world.waits_for_operator() && crate::operator::advice(world, &model.0).is_none()
        }));
    }
    if setup.operator == Operator::Absent {
        properties.push(Property::sometimes("a doubt stays", |model, world: &World| {
            ended(model, world, Report::InDoubt)
        }));
    }
    if setup.verify {
        properties
            .push(Property::sometimes("the memory differs, and the VM stays", |model, world: &World| {
                world.source.saw_difference && ended(model, world, Report::Stays)
            }));
    }
    if setup.damages > 0 {
        properties.push(Property::sometimes(
            "damage is repaired after the VM was paused",
            |_, world: &World| {
                world.damages > 0 && world.destination.vm == Vm::Running && world.destination.done > 1
            },
        ));
    }
    if setup.transport == Transport::Reconnecting {
        properties.push(Property::sometimes(
            "the VM moves over a connection that broke",
            |model, world: &World| world.resumptions > 0 && ended(model, world, Report::Moved),
        ));
    }
    properties
}
