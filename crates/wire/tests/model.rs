//! The hand-over, checked exhaustively: [`SourceState`](pagewarp_wire::SourceState), [`DestinationState`](pagewarp_wire::DestinationState) and what their
//! drivers ask them, in every order of sends, deliveries, broken connections, crashes and operators. docs/handover.md says what is covered.

#[path = "model/check.rs"]
mod check;
#[path = "model/letter.rs"]
mod letter;
#[path = "model/link.rs"]
mod link;
#[path = "model/operator.rs"]
mod operator;
#[path = "model/properties.rs"]
mod properties;
#[path = "model/setup.rs"]
mod setup;
#[path = "model/world.rs"]
mod world;

use check::{every_run_ends, holds, holds_but, is_caught};
use link::Transport;
use properties as p;
use setup::{Flaw, Operator, Setup};
use world::{HandOver, Report, Vm};

#[test]
fn never_two_never_none() {
    let setup = Setup { acks: 2, epochs: 2, verify: true, ..Setup::new() };
    holds("native, one data connection", HandOver(setup));
}

#[test]
fn a_doubt_that_nobody_resolves_stays() {
    let setup = Setup { operator: Operator::Absent, acks: 1, epochs: 2, ..Setup::new() };
    holds("native, no operator", HandOver(setup));
}

#[test]
fn damage_is_repaired_before_the_hand_over() {
    let setup = Setup { data: 2, damages: 1, epochs: 2, ..Setup::new() };
    holds("native, two data connections, a damaged batch", HandOver(setup));
}

#[test]
fn damage_upon_damage_is_repaired() {
    let setup = Setup { damages: 2, epochs: 2, operator: Operator::Absent, ..Setup::new() };
    holds("native, two damaged batches", HandOver(setup));
}

#[test]
fn a_connection_that_is_resumed_changes_nothing() {
    let setup = Setup { transport: Transport::Reconnecting, resumptions: 2, epochs: 1, ..Setup::new() };
    holds("native, reconnecting", HandOver(setup));
}

#[test]
fn every_run_without_faults_completes() {
    let setup =
        Setup { data: 2, damages: 1, epochs: 3, acks: 1, verify: true, faults: false, ..Setup::new() };
    every_run_ends("native, no faults", &HandOver(setup), |world| {
        world.source.report == Some(Report::Moved) && world.destination.vm == Vm::Running
    });
}

/// With this defect, the checker finds that the property is violated.
fn flawed(flaw: Flaw, property: &'static str) {
    flawed_in(Setup::new(), flaw, property);
}

fn flawed_in(setup: Setup, flaw: Flaw, property: &'static str) {
    is_caught(&format!("native, {flaw:?}"), HandOver(Setup { flaw: Some(flaw), ..setup }), property);
}

#[test]
fn a_source_that_takes_the_vm_back_is_caught() {
    flawed(Flaw::ResumesAfterCommit, p::NEVER_TWO);
    flawed(Flaw::CommitsAfterWriting, p::NEVER_TWO);
}

#[test]
fn a_source_that_does_not_wait_is_caught() {
    flawed(Flaw::CommitsWithoutReady, p::UNDERSTOOD);
    flawed(Flaw::ReleasesWithCommit, p::NO_CRASH_NO_LOSS);
}

#[test]
fn a_destination_that_takes_the_vm_is_caught() {
    flawed(Flaw::RunsWhenReady, p::NEVER_TWO);
    flawed(Flaw::RunsWhenLost, p::NEVER_TWO);
}

#[test]
fn a_destination_that_does_not_take_what_it_was_given_is_caught() {
    flawed(Flaw::GivesUpAfterCommit, p::THE_RIGHT_IS_USED);
    flawed(Flaw::GivesUpInTwoSteps, p::THE_RIGHT_IS_USED);
    flawed(Flaw::ConfirmsBeforeRunning, p::NO_CRASH_NO_LOSS);
}

#[test]
fn a_vm_without_all_its_pages_is_caught() {
    flawed_in(Setup { damages: 1, ..Setup::new() }, Flaw::ReadyInSpiteOfDamage, p::UNDERSTOOD);
}

#[test]
fn a_vm_with_other_memory_is_caught() {
    flawed_in(Setup { verify: true, ..Setup::new() }, Flaw::CommitsInSpiteOfDifference, p::VERIFIED);
}

#[test]
fn an_operator_who_does_not_wait_is_caught() {
    let operator = |operator| HandOver(Setup { operator, ..Setup::new() });
    // Commit may be on its way.
    is_caught("native, a hasty operator", operator(Operator::Hasty), p::NEVER_TWO);
    // It may not start.
    is_caught("native, a trusting operator", operator(Operator::Trusting), p::NO_CRASH_NO_LOSS);
}

#[test]
fn messages_that_come_twice_are_refused_and_change_nothing() {
    let setup = |transport| HandOver(Setup { transport, epochs: 1, ..Setup::new() });
    for transport in [Transport::Repeating, Transport::Forgetting] {
        is_caught(&format!("native, {transport:?}"), setup(transport), p::UNDERSTOOD);
        // All else holds nevertheless.
        holds_but(&format!("native, {transport:?}"), setup(transport), p::UNDERSTOOD);
    }
}
