//! What must always hold, and what must be possible, lest the model says nothing.

use stateright::{Model, Property};

use super::operator::{Decision, Resolution};
use super::setup::{Operator, Setup};
use super::world::{
    Action, DestinationQemu, DestinationReport, HandOver, Process, SourceQemu, SourceReport, World,
};

pub(super) const NEVER_TWO: &str = "the VM never runs on both sides";
pub(super) const NEVER_NONE: &str =
    "unless a QEMU dies, the VM is on one side in the end, or waits on the source for an operator";
pub(super) const SOURCE_GAVE_IT_AWAY: &str =
    "the source QEMU runs the VM only before commit, or on the word of an operator";
pub(super) const DESTINATION_WAS_GIVEN_IT: &str =
    "the destination QEMU runs the VM only after commit, or on the word of an operator";
pub(super) const THE_RIGHT_IS_USED: &str =
    "a destination that has got commit has the VM in its QEMU in the end, or says that it does not know";
pub(super) const NOBODY_ENDS_IT: &str = "after commit nobody but an operator ends the destination QEMU";
pub(super) const THE_VM_STAYS: &str = "before commit nothing that happens to the destination costs the VM";
pub(super) const PAUSED_STAYS_PAUSED: &str = "a VM that was paused runs only on the word of an operator";
pub(super) const UNDERSTOOD: &str = "no side refuses what the other says";
pub(super) const DOUBT_IS_REAL: &str = "the source is in doubt only after commit";
pub(super) const MOVED_IS_TRUE: &str =
    "the source says that the VM has moved only if the destination QEMU had it";
pub(super) const VERIFIED: &str =
    "if it is verified, the destination QEMU is given only what the source QEMU has sent";
pub(super) const RESOLVED: &str = "what the operator does leaves the VM on one side";
pub(super) const DOUBT_ENDS: &str = "every doubt can be resolved once `receive` has ended";
pub(super) const REST: &str = "nothing happens but by chance exactly when all have ended";

/// Whether nothing more happens in this world, as the other properties mean it.
fn at_rest(model: &HandOver, world: &World) -> bool {
    world.is_at_rest(&model.0)
}

/// Whether one side has the VM: runs it, or keeps it as it was.
fn has_a_place(model: &HandOver, world: &World) -> bool {
    let is_there = world.source.report == Some(SourceReport::Moved)
        || world.operator == Decision::Done(Resolution::Discard);
    match world.running() {
        0 if !world.was_paused(&model.0) => false,
        0 if is_there => world.destination.qemu == DestinationQemu::Loaded,
        0 => matches!(world.source.qemu, SourceQemu::Paused | SourceQemu::PostMigrate),
        running => running == 1,
    }
}

/// Whether the destination QEMU has the VM: runs it, or keeps it as it was.
fn is_there(model: &HandOver, world: &World) -> bool {
    match world.destination.qemu {
        DestinationQemu::Running => true,
        DestinationQemu::Loaded => world.was_paused(&model.0),
        _ => false,
    }
}

fn always() -> Vec<Property<HandOver>> {
    vec![
        Property::always(NEVER_TWO, |_, world: &World| world.running() <= 1),
        Property::always(NEVER_NONE, |model, world: &World| {
            !at_rest(model, world)
                || world.qemu_died()
                || has_a_place(model, world)
                || world.waits_for_operator()
        }),
        Property::always(SOURCE_GAVE_IT_AWAY, |_, world: &World| {
            world.source.qemu != SourceQemu::Running
                || !world.source.commit_sent
                || world.operator == Decision::Done(Resolution::Resume)
        }),
        Property::always(DESTINATION_WAS_GIVEN_IT, |_, world: &World| {
            world.destination.qemu != DestinationQemu::Running
                || world.source.commit_sent
                || world.operator_conts
        }),
        Property::always(THE_RIGHT_IS_USED, |model, world: &World| {
            !world.was_given()
                || world.destination.process != Process::Ended
                || world.destination.qemu_died
                || world.destination.report == Some(DestinationReport::Unconfirmed)
                || world.operator_ends
                || is_there(model, world)
        }),
        Property::always(NOBODY_ENDS_IT, |_, world: &World| {
            !world.was_given()
                || world.destination.qemu != DestinationQemu::Ended
                || world.destination.qemu_died
                || world.operator_ends
        }),
        Property::always(THE_VM_STAYS, |model, world: &World| {
            let stays = match world.source.qemu {
                SourceQemu::Running => true,
                SourceQemu::Paused | SourceQemu::PostMigrate => {
                    world.was_paused(&model.0) || world.source.report == Some(SourceReport::StillPaused)
                }
                SourceQemu::FinishMigrate | SourceQemu::Ended => false,
            };
            !at_rest(model, world)
                || world.source.commit_sent
                || world.source.qemu_died
                || world.source.process == Process::Crashed
                || stays
        }),
        Property::always(PAUSED_STAYS_PAUSED, |model, world: &World| {
            !world.was_paused(&model.0)
                || world.running() == 0
                || world.operator_conts
                || world.operator == Decision::Done(Resolution::Resume)
        }),
        Property::always(UNDERSTOOD, |_, world: &World| !world.misunderstood),
        Property::always(DOUBT_IS_REAL, |_, world: &World| {
            world.source.report != Some(SourceReport::InDoubt) || world.source.commit_sent
        }),
        Property::always(MOVED_IS_TRUE, |model, world: &World| {
            world.source.report != Some(SourceReport::Moved)
                || is_there(model, world)
                || world.destination.qemu_died
        }),
        Property::always(VERIFIED, |_, world: &World| {
            !world.stream.differs || !(world.source.commit_sent || world.was_given())
        }),
        Property::always(RESOLVED, |model, world: &World| {
            !at_rest(model, world)
                || !matches!(world.operator, Decision::Done(_))
                || world.died_after_look
                || has_a_place(model, world)
        }),
        Property::always(DOUBT_ENDS, |model, world: &World| {
            model.0.operator == Operator::Absent || !at_rest(model, world) || !world.waits_for_operator()
        }),
        Property::always(REST, |model, world: &World| {
            let mut actions = Vec::new();
            model.actions(world, &mut actions);
            let by_chance = |action: &Action| {
                use Action as A;
                matches!(
                    action,
                    A::SourceQemuDies | A::DestinationQemuDies | A::SourceQuitsQemu | A::StreamBreaks
                )
            };
            actions.iter().all(by_chance) == at_rest(model, world)
        }),
    ]
}

/// Both have ended, no QEMU has died, and the source said this.
fn ended(model: &HandOver, world: &World, report: SourceReport) -> bool {
    at_rest(model, world) && !world.qemu_died() && world.source.report == Some(report)
}

fn sometimes() -> Vec<Property<HandOver>> {
    vec![
        Property::sometimes("the VM moves", |model, world: &World| {
            ended(model, world, SourceReport::Moved)
                && world.destination.report == Some(DestinationReport::Here)
                && is_there(model, world)
        }),
        Property::sometimes("the VM stays, and the destination QEMU is ended", |model, world: &World| {
            ended(model, world, SourceReport::Stays) && world.destination.qemu == DestinationQemu::Ended
        }),
        Property::sometimes("the VM stays though the destination QEMU had all of it", |_, world: &World| {
            world.source.report == Some(SourceReport::Stays)
                && world.destination.qemu == DestinationQemu::Loaded
        }),
        Property::sometimes("a commit is lost", |_, world: &World| {
            world.source.report == Some(SourceReport::InDoubt)
                && world.destination.report == Some(DestinationReport::NotHere)
        }),
        Property::sometimes("the news that the VM is there are lost", |_, world: &World| {
            world.source.report == Some(SourceReport::InDoubt)
                && world.destination.report == Some(DestinationReport::Here)
        }),
        Property::sometimes("nobody knows whether the VM runs", |_, world: &World| {
            world.source.report == Some(SourceReport::InDoubt)
                && world.destination.report == Some(DestinationReport::Unconfirmed)
        }),
        Property::sometimes("`receive` is killed with the VM in its hands", |_, world: &World| {
            world.was_given()
                && world.destination.process == Process::Crashed
                && world.destination.qemu == DestinationQemu::Loaded
        }),
        Property::sometimes(
            "`migrate` is killed before commit, and QEMU has completed",
            |model, world: &World| {
                world.source.process == Process::Crashed
                    && world.source.qemu == SourceQemu::PostMigrate
                    && !world.source.commit_sent
                    && (model.0.operator != Operator::Absent || at_rest(model, world))
            },
        ),
        Property::sometimes(
            "`migrate` is killed after commit, and the VM is there",
            |model, world: &World| {
                world.source.process == Process::Crashed
                    && world.destination.report == Some(DestinationReport::Here)
                    && (model.0.operator != Operator::Absent || at_rest(model, world))
            },
        ),
        Property::sometimes("the destination QEMU dies with the VM", |_, world: &World| {
            world.source.report == Some(SourceReport::InDoubt)
                && world.was_given()
                && world.destination.qemu_died
        }),
    ]
}

fn of_the_operator() -> Vec<Property<HandOver>> {
    vec![
        Property::sometimes("the operator has to wait", |model, world: &World| {
            world.waits_for_operator() && super::operator::choices(world, &model.0).is_empty()
        }),
        Property::sometimes("the operator resumes what was in doubt", |_, world: &World| {
            world.operator == Decision::Done(Resolution::Resume)
                && world.source.report == Some(SourceReport::InDoubt)
        }),
        Property::sometimes("the operator discards what was in doubt", |_, world: &World| {
            world.operator == Decision::Done(Resolution::Discard)
                && world.source.report == Some(SourceReport::InDoubt)
                && !world.operator_conts
        }),
        Property::sometimes("the operator lets the VM go on there", |_, world: &World| {
            world.operator == Decision::Done(Resolution::Discard) && world.operator_conts
        }),
        Property::sometimes("the operator ends the destination QEMU", |_, world: &World| {
            world.operator == Decision::Done(Resolution::Resume) && world.operator_ends
        }),
    ]
}

/// Those that make sense for this setup.
pub(super) fn properties(setup: &Setup) -> Vec<Property<HandOver>> {
    let mut properties = always();
    if setup.flaw.is_some() || !setup.faults {
        return properties;
    }
    properties.extend(sometimes());
    if setup.operator == Operator::Careful {
        properties.extend(of_the_operator());
    }
    if setup.verify {
        properties.push(Property::sometimes(
            "the stream was damaged, QEMU has loaded it, and the VM stays",
            |model, world: &World| world.stream.differs && ended(model, world, SourceReport::Stays),
        ));
    }
    if setup.ran {
        properties.push(Property::sometimes("the VM stays, and does not go on", |_, world: &World| {
            world.source.report == Some(SourceReport::StillPaused)
        }));
    }
    if setup.operator == Operator::Absent {
        properties.push(Property::sometimes("a doubt stays", |model, world: &World| {
            ended(model, world, SourceReport::InDoubt)
        }));
    }
    properties
}
