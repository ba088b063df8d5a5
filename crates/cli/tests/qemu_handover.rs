//! The hand-over of `pagewarp qemu`, disturbed at moments that a proxy knows: whatever is lost then, the VM runs on one side at most, both sides
//! say what they know, and what they advise works. Takes root, because of the network namespaces.

mod support;

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use pagewarp_cli::exit::Exit;
use rustix::process::Signal;

use support::Sent;
use support::gate::{Frame, Gate, Pass};
use support::process::signal;
use support::qemu::{BUSY, ENDLESS, Host, Hosts, Migration, Moment, Outcome, Process, SLOW, text};

/// Disturbed migrations do not wait long for a peer that is gone.
const HASTY: [&str; 2] = ["--peer-timeout", "3"];
const STEADY: u64 = 3_000;

/// A migration through a gate.
struct Through {
    there: Host,
    receiving: Process,
    sending: Process,
    _gate: Gate,
}

/// Starts a migration; `asked` is asked about each frame, and gets the processes of the destination's QEMU and of `receive`.
fn through(
    hosts: &mut Hosts,
    options: &[&str],
    mut asked: impl FnMut(&Frame<'_>, [u32; 2]) -> Pass + Send + 'static,
) -> Through {
    let there = hosts.fresh();
    hosts.here.forget_events();
    let (receiving, to) = hosts.receive(&there, &HASTY);
    let pids = [there.qemu.pid(), receiving.pid()];
    let gate = Gate::start(&hosts.net, hosts.here.end, &to, move |frame| asked(frame, pids));
    let sending = hosts.migrate(&gate.address.to_string(), &[&HASTY[..], options].concat());
    Through { there, receiving, sending, _gate: gate }
}

/// How many locks QEMU processes hold on a file: those of open files, in /proc/locks.
fn locks(path: &Path) -> usize {
    let inode = format!(":{} ", std::fs::metadata(path).unwrap().ino());
    let locks = std::fs::read_to_string("/proc/locks").unwrap();
    locks.lines().filter(|line| line.contains("OFDLCK") && line.contains(&inode)).count()
}

#[test]
fn a_source_that_goes_on_after_the_destination_was_complete_has_its_images() {
    let mut hosts = Hosts::boot_with_disk(64, STEADY, SLOW);
    let image = hosts.path("image");
    assert!(locks(&image) > 0, "QEMU locks no images here: nothing is tested");
    // The destination has loaded everything and the source never hears of it. Nobody is there to end the destination QEMU.
    let Through { mut there, receiving, sending, _gate } =
        through(&mut hosts, &[], |frame, [_, receiving]| {
            if !frame.is_loaded() {
                return Pass::Yes;
            }
            signal(receiving, Signal::STOP);
            Pass::Cut
        });
    let sent = sending.wait();
    assert_eq!(sent.code, Some(Exit::Link as i32), "{}", sent.stderr);
    assert_eq!(hosts.here.settle().unwrap().status, "running");
    assert_eq!(there.settle().unwrap().status, "paused");
    // Where it does not get its images back, QEMU 7.2 complains and runs the VM nevertheless.
    assert!(!hosts.here.qemu.errors().contains("lock"), "{}", hosts.here.qemu.errors());
    assert!(locks(&image) > 0);
    receiving.signal(Signal::CONT);
    let received = receiving.wait();
    assert_eq!(received.code, Some(Exit::Link as i32), "{}", received.stderr);
    hosts.stayed(&mut there);
    assert!(locks(&image) > 0);
    hosts.hop(&[]);
    assert!(locks(&image) > 0);
}

/// Both sides are in doubt, and say so.
fn in_doubt(sent: &Sent) {
    assert_eq!(sent.code, Some(Exit::InDoubt as i32), "{}", sent.stderr);
    let error = sent.error();
    assert!(error.contains("--resume") && error.contains("--discard"), "{error}");
}

/// Carries a decision out on the source.
fn resolve(hosts: &mut Hosts, decision: &str) {
    let qmp = hosts.here.qemu.qmp();
    let done = hosts.run(hosts.here.end, &["qemu", "resolve", "--qmp", text(&qmp), decision]).wait();
    assert_eq!(done.code, Some(0), "{}", done.stderr);
}

#[test]
fn a_commit_that_is_lost_leaves_the_source_in_doubt() {
    let mut hosts = Hosts::boot_with_disk(64, STEADY, SLOW);
    let Through { mut there, receiving, sending, _gate } =
        through(&mut hosts, &[], |frame, _| if frame.is_message("commit") { Pass::Cut } else { Pass::Yes });
    let (sent, received) = (sending.wait(), receiving.wait());
    in_doubt(&sent);
    // Without a commit the destination has no doubt.
    assert_eq!(received.code, Some(Exit::Link as i32), "{}", received.stderr);
    support::wait_for("the destination to be ended", || there.qemu.has_ended().then_some(()));
    assert_eq!(hosts.here.settle().unwrap().status, "postmigrate");
    resolve(&mut hosts, "--resume");
    hosts.stayed(&mut there);
    assert!(locks(&hosts.path("image")) > 0);
    hosts.hop(&[]);
}

#[test]
fn a_confirmation_that_is_lost_leaves_the_source_in_doubt() {
    let mut hosts = Hosts::boot(64, STEADY, SLOW);
    let Through { mut there, receiving, sending, _gate } =
        through(&mut hosts, &[], |frame, _| if frame.is_message("running") { Pass::Cut } else { Pass::Yes });
    let (sent, received) = (sending.wait(), receiving.wait());
    in_doubt(&sent);
    assert_eq!(received.code, Some(0), "{}", received.stderr);
    assert!(there.runs());
    assert_eq!(hosts.here.settle().unwrap().status, "postmigrate");
    resolve(&mut hosts, "--discard");
    support::wait_for("the source to be ended", || hosts.here.qemu.has_ended().then_some(()));
    hosts.moved(there);
    hosts.hop(&[]);
}

#[test]
fn a_destination_qemu_that_does_not_answer_after_the_commit_is_left_alone() {
    let mut hosts = Hosts::boot(64, STEADY, SLOW);
    let Through { mut there, receiving, sending, _gate } = through(&mut hosts, &[], |frame, [qemu, _]| {
        if frame.is_message("commit") {
            signal(qemu, Signal::STOP);
        }
        Pass::Yes
    });
    let (sent, received) = (sending.wait(), receiving.wait());
    in_doubt(&sent);
    in_doubt(&received);
    assert!(!there.qemu.has_ended());
    // It was told to run the VM, and may have forgotten that when `receive` hung up: in doubt means that an operator looks.
    signal(there.qemu.pid(), Signal::CONT);
    assert_ne!(hosts.resolve(there), Outcome::Stayed);
    hosts.hop(&[]);
}

#[test]
fn a_destination_qemu_that_dies_after_the_commit_leaves_both_sides_in_doubt() {
    let mut hosts = Hosts::boot_with_disk(64, STEADY, SLOW);
    let Through { mut there, receiving, sending, _gate } = through(&mut hosts, &[], |frame, [qemu, _]| {
        if frame.is_message("commit") {
            signal(qemu, Signal::KILL);
        }
        Pass::Yes
    });
    let (sent, received) = (sending.wait(), receiving.wait());
    in_doubt(&sent);
    in_doubt(&received);
    resolve(&mut hosts, "--resume");
    hosts.stayed(&mut there);
    hosts.hop(&[]);
}

/// A VM that has arrived paused has not run there; then somebody lets it go on.
fn arrived_paused(hosts: &mut Hosts, mut there: Host) {
    assert_eq!(there.settle().unwrap().status, "paused");
    assert_eq!(hosts.here.settle().unwrap().status, "postmigrate");
    assert!(there.qemu.serial().is_empty());
    there.watch.cont().unwrap();
    hosts.moved(there);
}

#[test]
fn a_paused_vm_is_paused_at_the_destination_too() {
    let mut hosts = Hosts::boot_with_disk(64, STEADY, SLOW);
    hosts.here.watch.stop().unwrap();
    let Migration { there, receiving, sending } = hosts.begin(&HASTY);
    let (sent, received) = (sending.wait(), receiving.wait());
    assert_eq!((sent.code, received.code), (Some(0), Some(0)), "{}{}", sent.stderr, received.stderr);
    assert!(sent.stdout.contains("paused there"), "{}", sent.stdout);
    assert!(received.stderr.contains("is paused here"), "{}", received.stderr);
    // It has its images nevertheless.
    assert!(locks(&hosts.path("image")) > 0);
    arrived_paused(&mut hosts, there);

    // Paused on the way.
    let mut migration = hosts.begin(&[&HASTY[..], &ENDLESS].concat());
    hosts.here.wait_moment(Moment::Early, &mut migration.sending);
    hosts.here.watch.stop().unwrap();
    let Migration { there, receiving, sending } = migration;
    let (sent, received) = (sending.wait(), receiving.wait());
    assert_eq!((sent.code, received.code), (Some(0), Some(0)), "{}{}", sent.stderr, received.stderr);
    arrived_paused(&mut hosts, there);
    hosts.hop(&[]);
}

#[test]
fn a_paused_vm_that_stays_is_not_run() {
    let mut hosts = Hosts::boot(64, STEADY, SLOW);
    hosts.here.watch.stop().unwrap();
    hosts.here.forget_events();
    let Through { mut there, receiving, sending, _gate } =
        through(&mut hosts, &[], |frame, _| if frame.is_loaded() { Pass::Cut } else { Pass::Yes });
    let (sent, received) = (sending.wait(), receiving.wait());
    for end in [&sent, &received] {
        assert_eq!(end.code, Some(Exit::Link as i32), "{}", end.stderr);
    }
    assert!(!hosts.here.settle().unwrap().running);
    while let Some(event) = hosts.here.watch.next_event(Duration::ZERO).unwrap() {
        assert_ne!(event.name, "RESUME");
    }
    support::wait_for("the destination to be ended", || there.qemu.has_ended().then_some(()));
    hosts.here.watch.cont().unwrap();
    hosts.stayed(&mut there);
}

#[test]
fn the_migration_parameters_are_afterwards_what_they_were() {
    let mut hosts = Hosts::boot(64, BUSY, SLOW);
    for (parameter, value) in [
        ("downtime-limit", 777),
        ("max-bandwidth", 123 << 20),
        ("multifd-channels", 7),
        ("cpu-throttle-initial", 11),
    ] {
        hosts.here.set(parameter, value);
    }
    let before = hosts.here.watch.parameters().unwrap();
    let multifd = ["--multifd", "2"];

    // Cancelled.
    let mut migration = hosts.begin(&[&HASTY[..], &ENDLESS, &multifd].concat());
    hosts.here.wait_moment(Moment::Late, &mut migration.sending);
    assert_ne!(hosts.here.watch.parameters().unwrap(), before);
    migration.sending.signal(Signal::INT);
    let Migration { mut there, receiving, sending } = migration;
    assert_eq!(sending.wait().code, Some(Exit::Cancelled as i32));
    receiving.wait();
    hosts.stayed(&mut there);
    assert_eq!(hosts.here.watch.parameters().unwrap(), before);

    // Failed.
    let mut migration = hosts.begin(&[&HASTY[..], &ENDLESS].concat());
    hosts.here.wait_moment(Moment::Late, &mut migration.sending);
    migration.receiving.signal(Signal::KILL);
    let Migration { mut there, sending, .. } = migration;
    assert_ne!(sending.wait().code, Some(0));
    there.kill();
    hosts.stayed(&mut there);
    assert_eq!(hosts.here.watch.parameters().unwrap(), before);

    // Moved.
    let Migration { there, receiving, sending } = hosts.begin(&multifd);
    let (sent, received) = (sending.wait(), receiving.wait());
    assert_eq!((sent.code, received.code), (Some(0), Some(0)), "{}{}", sent.stderr, received.stderr);
    assert_eq!(hosts.here.watch.parameters().unwrap(), before);
    hosts.moved(there);
}

#[test]
fn a_bridge_that_does_not_end_does_not_keep_the_commands_from_ending() {
    let mut hosts = Hosts::boot(64, STEADY, SLOW);
    let Through { there, receiving, sending, _gate } =
        through(&mut hosts, &[], |frame, _| if frame.is_main_end() { Pass::Never } else { Pass::Yes });
    let (sent, received) = (sending.wait(), receiving.wait());
    assert_eq!((sent.code, received.code), (Some(0), Some(0)), "{}{}", sent.stderr, received.stderr);
    assert!(sent.stderr.contains("the bridge did not end"), "{}", sent.stderr);
    hosts.moved(there);
    hosts.hop(&[]);
}

#[test]
fn a_source_qemu_that_dies_is_told_as_such() {
    let mut hosts = Hosts::boot(64, BUSY, SLOW);
    let mut migration = hosts.begin(&[&HASTY[..], &ENDLESS].concat());
    hosts.here.wait_moment(Moment::Late, &mut migration.sending);
    hosts.here.kill();
    let Migration { mut there, receiving, sending } = migration;
    let (sent, received) = (sending.wait(), receiving.wait());
    assert_eq!(sent.code, Some(Exit::Environment as i32), "{}", sent.stderr);
    assert!(sent.error().contains("it ended or was killed"), "{}", sent.stderr);
    assert_eq!(received.code, Some(Exit::Peer as i32), "{}", received.stderr);
    assert!(received.error().contains("the source gave up"), "{}", received.stderr);
    support::wait_for("the destination to be ended", || there.qemu.has_ended().then_some(()));
    assert!(there.qemu.serial().is_empty(), "an incomplete VM has run");
}

#[test]
fn a_destination_qemu_that_hangs_is_killed() {
    let mut hosts = Hosts::boot(64, BUSY, SLOW);
    let mut migration = hosts.begin(&[&HASTY[..], &ENDLESS].concat());
    hosts.here.wait_moment(Moment::Late, &mut migration.sending);
    let Migration { mut there, receiving, sending } = migration;
    signal(there.qemu.pid(), Signal::STOP);
    sending.signal(Signal::INT);
    let (sent, received) = (sending.wait(), receiving.wait());
    assert_eq!(sent.code, Some(Exit::Cancelled as i32), "{}", sent.stderr);
    assert_eq!(received.code, Some(Exit::Peer as i32), "{}", received.stderr);
    assert!(received.stderr.contains("was killed"), "{}", received.stderr);
    support::wait_for("the destination to be gone", || there.qemu.has_ended().then_some(()));
    hosts.stayed(&mut there);
    hosts.hop(&[]);
}
