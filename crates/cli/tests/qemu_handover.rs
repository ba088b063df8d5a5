//! The hand-over of `pagewarp qemu`, disturbed at moments that a proxy knows: whatever is lost then, the VM runs on one side at most, both sides
//! say what they know, and what they advise works. Takes root, because of the network namespaces.

mod support;

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use pagewarp_cli::exit::Exit;
use rustix::process::Signal;

use support::gate::{Frame, Gate, Pass};
use support::process::signal;
use support::qemu::{Host, Hosts, Process, SLOW};

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
