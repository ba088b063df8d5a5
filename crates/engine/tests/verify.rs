//! Both ends compare all guest memory before the hand-over: a VM whose memory differs stays on the source.

mod support;

use std::time::Duration;

use pagewarp_codec::Page;
use pagewarp_engine::error::MigrationError;
use pagewarp_engine::vm::SourceVm;
use pagewarp_testkit::memory_vm::{MemoryDestination, MemoryVm, Moment};
use pagewarp_testkit::probe::Step;

use support::{Lab, Outcome};

fn vm() -> MemoryVm {
    MemoryVm::new(&[1000, 77], 1)
}

fn lab(vm: MemoryVm) -> Lab {
    let mut lab = Lab::new(vm);
    lab.source_config.verify = true;
    lab
}

/// A page from `from` on that is not zero, and so is written at the destination.
fn page_in_use(region: u32, from: u64) -> u64 {
    let vm = vm();
    let mut page = [Page::ZERO];
    (from..)
        .find(|&number| {
            vm.memory().read(region, number, &mut page).expect("the region has a page that is not zero");
            page[0] != Page::ZERO
        })
        .expect("there is no end to numbers")
}

/// The source has refused, for this reason, and the destination knows why. What is wrong with the memory here is nothing that the next
/// migration would have.
#[track_caller]
fn assert_refused(outcome: Outcome, pages: &str) {
    let (sent, received) = outcome.assert_stayed();
    println!("source: {sent}\ndestination: {received}");
    for error in [sent, received] {
        assert!(matches!(error, MigrationError::Differs(what) if what == pages), "{error}");
    }
    let destination = outcome.destination.probe();
    assert_eq!(destination.calls(Step::Run), 0, "nobody tells the VM to run there");
    let again = lab(outcome.vm).run();
    assert_eq!(again.assert_migrated().verified, Some(true));
}

#[test]
fn a_flipped_bit_at_the_destination_keeps_the_vm_on_the_source() {
    for pipeline in [true, false] {
        for (region, from) in [(0, 0), (0, 900), (1, 42)] {
            let page = page_in_use(region, from);
            let mut lab = lab(vm());
            lab.source_config.pipeline = pipeline;
            lab.source_config.connections = 2;
            lab.destination = MemoryDestination::new(&lab.vm.probe()).flip(region, page);
            assert_refused(lab.run(), &format!("1 of 1077 pages: page {page} of `ram{region}`"));
        }
    }
}

/// The same without verifying: what the digests are for.
#[test]
fn without_verifying_nobody_notices() {
    let mut lab = Lab::new(vm());
    lab.destination = MemoryDestination::new(&lab.vm.probe()).flip(1, page_in_use(1, 42));
    let outcome = lab.run();
    assert_eq!(outcome.sent.as_ref().unwrap().verified, None);
    assert!(outcome.destination.probe().is_running());
}

/// The hashes of batches cannot find this: what was sent arrives, but it was not all.
#[test]
fn a_write_that_the_dirty_log_does_not_see_keeps_the_vm_on_the_source() {
    let mut at_last = true;
    let vm = vm().script(move |moment, guest| {
        if moment == Moment::Pause && std::mem::take(&mut at_last) {
            for page in 0..6 {
                guest.write_unseen(1, 10 * page, &Page([7; 4096]));
            }
        }
    });
    let named = ["page 0", "page 10", "page 20", "page 30"].map(|page| format!("{page} of `ram1`"));
    assert_refused(lab(vm).run(), &format!("6 of 1077 pages: {} and more", named.join(", ")));
}

#[test]
fn a_vm_that_differs_and_does_not_go_on_is_whole_and_paused() {
    let mut lab = lab(vm());
    lab.vm.probe().fail(Step::Resume);
    lab.destination = MemoryDestination::new(&lab.vm.probe()).flip(0, page_in_use(0, 5));
    let outcome = lab.run();
    let sent = outcome.sent.unwrap_err();
    assert!(
        matches!(&sent, MigrationError::StillPaused { reason, .. } if matches!(**reason, MigrationError::Differs(_))),
        "{sent}"
    );
    assert_eq!(outcome.vm.probe().ledger().running(), 0);
}

#[test]
fn memory_that_cannot_be_read_fails_the_migration_on_either_side() {
    // A quiet VM is read once for the estimate, once to be sent, and once more to be compared; the destination reads it to compare only.
    let reads = {
        let outcome = lab(vm()).run();
        outcome.sent.as_ref().unwrap();
        (outcome.vm.probe().calls(Step::Read), outcome.destination.probe().calls(Step::Read))
    };
    for at_source in [true, false] {
        let lab = lab(vm());
        let (probe, last) = match at_source {
            true => (lab.vm.probe(), reads.0 - 1),
            false => (lab.destination.probe(), reads.1 - 1),
        };
        probe.fail_nth(Step::Read, last);
        let outcome = lab.run();
        let (sent, received) = outcome.assert_stayed();
        let (here, there) = if at_source { (sent, received) } else { (received, sent) };
        assert!(matches!(here, MigrationError::Vm(_)), "{here}");
        assert!(matches!(there, MigrationError::PeerReports(_)), "{there}");
    }
}

/// It would never end, or end with a downtime that nobody wants: better to say so before anything is sent.
#[test]
fn a_downtime_that_is_too_short_for_verifying_is_refused_at_once() {
    let mut lab = lab(vm());
    lab.source_config.downtime_limit = Duration::from_millis(1);
    let outcome = lab.run();
    let (sent, _) = outcome.assert_stayed();
    assert!(matches!(sent, MigrationError::NotConverged(why) if why.contains("without verifying")), "{sent}");
    let probe = outcome.vm.probe();
    assert_eq!((probe.calls(Step::LogStart), probe.calls(Step::Pause)), (0, 0));
}

#[test]
fn both_ends_say_how_long_it_took() {
    let outcome = lab(vm()).run();
    let report = outcome.assert_migrated();
    let there = report.destination.as_ref().unwrap().verify_ms.unwrap();
    assert!(report.verify_ms.unwrap() > 0.0 && there > 0.0);
    assert!(report.verify_ms.unwrap() < report.downtime_ms);
    let outcome = Lab::new(vm()).run();
    let report = outcome.assert_migrated();
    assert_eq!((report.verify_ms, report.destination.as_ref().unwrap().verify_ms), (None, None));
}
