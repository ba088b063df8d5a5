//! `pagewarp qemu migrate --verify`: what was written into the destination QEMU is what was read from the source QEMU, or the VM stays. Takes root, because of the
//! network namespaces.

mod support;

use pagewarp_cli::exit::Exit;

use support::gate::{Frame, Gate, Pass};
use support::qemu::{Hosts, SLOW, bridge_of};

const STEADY: u64 = 3_000;

/// The destination says once that it has written something else on a connection of QEMU, after so many times at which it has not.
fn differs(hosts: &mut Hosts, number: usize, mut after: u32, options: &[&str]) {
    let mut there = hosts.fresh();
    hosts.here.forget_events();
    let (receiving, to) = hosts.receive(&there, &[]);
    let asked = move |frame: &Frame<'_>| {
        if !frame.is_credit(number) || after == 0 {
            return Pass::Yes;
        }
        after -= 1;
        if after == 0 { Pass::Damaged } else { Pass::Yes }
    };
    let gate = Gate::start(&hosts.net, hosts.here.end, &to, asked);
    let sending = hosts.migrate(&gate.address.to_string(), &[&["--verify"], options].concat());
    let (sent, received) = (sending.wait(), receiving.wait());
    println!("source: {}\ndestination: {}", sent.error(), received.error());
    assert_eq!(sent.code, Some(Exit::Differs as i32), "{}", sent.stderr);
    let error = sent.error();
    for words in ["differs", &format!("connection {number} of QEMU"), "the VM stays here"] {
        assert!(error.contains(words), "no `{words}` in: {error}");
    }
    assert_eq!(received.code, Some(Exit::Peer as i32), "{}", received.stderr);
    support::wait_for("the destination QEMU to be ended", || there.qemu.has_ended().then_some(()));
    hosts.stayed(&mut there);
}

#[test]
fn a_vm_that_would_differ_stays_and_one_that_does_not_moves() {
    let mut hosts = Hosts::boot(64, STEADY, SLOW);
    differs(&mut hosts, 0, 1, &[]);
    differs(&mut hosts, 0, 20, &[]);
    differs(&mut hosts, 1, 3, &["--multifd", "2"]);
    for options in [&["--verify"][..], &["--verify", "--multifd", "2"]] {
        let report = hosts.hop(options);
        assert_eq!((report.verified, bridge_of(&report).verified), (Some(true), Some(true)));
        assert!(report.verify_ms.is_some_and(|took| took <= report.downtime_ms), "{report:?}");
    }
    let report = hosts.hop(&[]);
    assert_eq!((report.verified, report.verify_ms, bridge_of(&report).verified), (None, None, None));
}
