//! The hand-over of `pagewarp qemu`, checked exhaustively: [`states`](super::states), driven through every order of messages, broken connections, kills, QEMUs that die or
//! do not obey, and operators. docs/handover.md says what is covered.

#[path = "../../../../wire/tests/model/check.rs"]
mod check;
mod note;
mod operator;
mod properties;
mod setup;
mod world;

use check::{every_run_ends, holds, holds_but, is_caught};
use properties as p;
use setup::{Flaw, Operator, Setup};
use world::{DestinationQemu, HandOver, SourceReport};

#[test]
fn never_two_never_none() {
    holds("qemu", HandOver(Setup::new()));
}

#[test]
fn a_paused_vm_stays_paused() {
    holds("qemu, a paused VM", HandOver(Setup { ran: false, ..Setup::new() }));
}

#[test]
fn what_is_not_as_it_was_is_not_handed_over() {
    let setup = Setup { verify: true, ..Setup::new() };
    holds("qemu, verified", HandOver(setup));
    let flawed = Setup { flaw: Some(Flaw::CommitsInSpiteOfDifference), ..setup };
    is_caught("qemu, CommitsInSpiteOfDifference", HandOver(flawed), p::VERIFIED);
}

/// Nobody in between can keep the QEMUs from going on.
#[test]
fn never_two_never_none_on_the_direct_route() {
    for ran in [true, false] {
        holds("qemu, direct", HandOver(Setup { direct: true, ran, ..Setup::new() }));
    }
    let setup = Setup { direct: true, ..Setup::new() };
    for (flaw, property) in [
        (Flaw::ResumesAfterCommit, p::NEVER_TWO),
        (Flaw::CommitsBeforeCompletion, p::NEVER_TWO),
        (Flaw::RunsByItself, p::NEVER_TWO),
        (Flaw::EndsAfterCommit, p::NOBODY_ENDS_IT),
        (Flaw::LeavesTheStream, p::NEVER_NONE),
    ] {
        let flawed = Setup { flaw: Some(flaw), ..setup };
        is_caught(&format!("qemu, direct, {flaw:?}"), HandOver(flawed), property);
    }
}

#[test]
fn a_doubt_that_nobody_resolves_stays() {
    holds("qemu, no operator", HandOver(Setup { operator: Operator::Absent, ..Setup::new() }));
}

#[test]
fn every_run_without_faults_completes() {
    for (ran, qemu) in [(true, DestinationQemu::Running), (false, DestinationQemu::Loaded)] {
        let setup = Setup { ran, verify: true, faults: false, ..Setup::new() };
        every_run_ends("qemu, no faults", &HandOver(setup), |world| {
            world.source.report == Some(SourceReport::Moved) && world.destination.qemu == qemu
        });
    }
}

/// Whoever pauses the VM in the moment in which QEMU stops it for the switch-over is not heard: QEMU tells of one stop, and says then that it is switching over.
/// Nothing else comes of it.
#[test]
fn a_vm_that_is_paused_at_the_last_moment_may_run() {
    let setup = || HandOver(Setup { somebody_pauses: true, ..Setup::new() });
    is_caught("qemu, somebody pauses", setup(), p::PAUSED_STAYS_PAUSED);
    holds_but("qemu, somebody pauses", setup(), p::PAUSED_STAYS_PAUSED);
}

/// With this defect, the checker finds that the property is violated.
fn flawed(flaw: Flaw, property: &'static str) {
    is_caught(&format!("qemu, {flaw:?}"), HandOver(Setup { flaw: Some(flaw), ..Setup::new() }), property);
}

#[test]
fn a_source_that_takes_the_vm_back_is_caught() {
    flawed(Flaw::ResumesAfterCommit, p::NEVER_TWO);
    flawed(Flaw::CommitsAfterWriting, p::NEVER_TWO);
    flawed(Flaw::CommitsBeforeCompletion, p::NEVER_TWO);
}

#[test]
fn a_source_that_lets_go_too_early_is_caught() {
    flawed(Flaw::QuitsWithCommit, p::NEVER_NONE);
}

#[test]
fn a_destination_that_takes_the_vm_is_caught() {
    flawed(Flaw::RunsByItself, p::NEVER_TWO);
    flawed(Flaw::RunsWhenLoaded, p::NEVER_TWO);
}

#[test]
fn a_destination_that_does_not_take_what_it_was_given_is_caught() {
    flawed(Flaw::EndsAfterCommit, p::NOBODY_ENDS_IT);
    flawed(Flaw::EndsWhenUnconfirmed, p::NOBODY_ENDS_IT);
    flawed(Flaw::ConfirmsBeforeRunning, p::MOVED_IS_TRUE);
}

#[test]
fn a_paused_vm_that_runs_is_caught() {
    let setup = Setup { ran: false, flaw: Some(Flaw::RunsWhatWasPaused), ..Setup::new() };
    is_caught("qemu, RunsWhatWasPaused", HandOver(setup), p::PAUSED_STAYS_PAUSED);
}

#[test]
fn an_operator_who_does_not_wait_is_caught() {
    for operator in [Operator::Hasty, Operator::Sloppy, Operator::Eager] {
        let setup = Setup { operator, ..Setup::new() };
        is_caught(&format!("qemu, {operator:?} operator"), HandOver(setup), p::NEVER_TWO);
    }
}
