//! VMs of QEMU that move through bridges that speak TLS. Takes root, because of the network namespaces.

mod support;

use std::process::Command;

use pagewarp_cli::exit::Exit;
use pagewarp_qemu::bridge::{DestinationBridgeReport, SourceBridgeReport};
use pagewarp_qemu::qmp::check::{self, Seen, Wish};

use support::PROGRAM;
use support::qemu::{Host, Hosts, Process, address, text};
use support::wait_for;

/// Makes certificates for the destination's end.
fn certs(hosts: &Hosts, there: &Host, name: &str) -> String {
    let dir = hosts.path(name);
    let host = address(there.end).to_string();
    let made = Command::new(PROGRAM).arg("certs").arg(&dir).args(["--host", &host]).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    text(&dir).to_owned()
}

/// Starts something that listens, and tells where.
fn listen(hosts: &mut Hosts, there: &Host, words: &[&str]) -> (Process, String) {
    let place = format!("{}:0", address(there.end));
    let options = ["--backend", "cpu", "--json", "--listen", &place];
    let mut process = hosts.run(there.end, &[words, &options].concat());
    let line = process.wait_line("where it listens", |line| line.starts_with("waiting for a "));
    let to = line.split_whitespace().find(|word| word.contains(':')).unwrap().to_owned();
    (process, to)
}

#[test]
fn qemu_migrate_goes_over_tls_and_says_who_is_not_trusted() {
    let mut hosts = Hosts::boot(128, 1000, 1_000_000_000);
    let mut there = hosts.fresh();
    let (tls, other) = (certs(&hosts, &there, "tls"), certs(&hosts, &there, "other"));
    let qmp = there.qemu.qmp();
    let words =
        ["qemu", "receive", "--qmp", text(&qmp), "--tls-dir", &tls, "--allow-peer", "pagewarp-source"];
    let (receiving, to) = listen(&mut hosts, &there, &words);
    let here = hosts.here.qemu.qmp();
    let migrate = ["qemu", "migrate", "--qmp", text(&here), "--to", &to, "--backend", "cpu", "--json"];
    for (options, words) in [
        (&["--tls-dir", &other][..], &["no trusted connection", "the CA", "the VM stays here"][..]),
        (&["--tls-dir", &tls, "--tls-hostname", "dst.example"], &["not for `dst.example`"]),
        (&["--plaintext"], &["speaks TLS", "--tls-dir"]),
    ] {
        let sent = hosts.run(hosts.here.end, &[&migrate[..], options].concat()).wait();
        assert_eq!(sent.code, Some(Exit::Peer as i32), "{}", sent.stderr);
        for word in words {
            assert!(sent.error().contains(word), "no `{word}` in: {}", sent.stderr);
        }
    }
    // QEMU by itself would not encrypt anything.
    let direct = ["--tls-dir", &tls, "--route", "direct"];
    let sent = hosts.run(hosts.here.end, &[&migrate[..], &direct].concat()).wait();
    assert_eq!(sent.code, Some(Exit::Usage as i32), "{}", sent.stderr);
    assert!(sent.error().contains("encrypted"), "{}", sent.stderr);
    hosts.stayed(&mut there);
    let sent =
        hosts.run(hosts.here.end, &[&migrate[..], &["--tls-dir", &tls, "--multifd", "2"]].concat()).wait();
    let received = receiving.wait();
    assert_eq!(sent.code, Some(0), "source: {}\ndestination: {}", sent.stderr, received.stderr);
    assert_eq!(received.code, Some(0), "{}", received.stderr);
    hosts.moved(there);
}

#[test]
fn a_bridge_by_hand_goes_over_tls() {
    let mut hosts = Hosts::boot(128, 1000, 1_000_000_000);
    let mut there = hosts.fresh();
    let tls = certs(&hosts, &there, "tls");
    let wish = Wish::default();
    let vm = &mut hosts.here.watch;
    check::source(&Seen::ask(vm).unwrap(), &wish).unwrap().apply(vm).unwrap();
    let vm = &mut there.watch;
    check::destination(&Seen::ask(vm).unwrap(), &wish).unwrap().apply(vm).unwrap();
    let (near, far) = (hosts.path("near"), hosts.path("far"));
    let words = ["bridge", "destination", "--unix", text(&far), "--tls-dir", &tls, "--once"];
    let (destination, to) = listen(&mut hosts, &there, &words);
    let words = ["bridge", "source", "--unix", text(&near), "--connect", &to, "--tls-dir", &tls, "--once"];
    let mut source = hosts.run(hosts.here.end, &[&words[..], &["--backend", "cpu", "--json"]].concat());
    source.wait_line("that it listens", |line| line.starts_with("waiting for QEMU"));
    there.watch.migrate_incoming(&format!("unix:{}", far.display())).unwrap();
    hosts.here.watch.migrate(&format!("unix:{}", near.display())).unwrap();
    let (source, destination) = (source.wait(), destination.wait());
    assert_eq!((source.code, destination.code), (Some(0), Some(0)), "{source:?}\n{destination:?}");
    wait_for("the destination to run the VM", || there.runs().then_some(()));
    hosts.moved(there);
    let source: SourceBridgeReport = serde_json::from_str(&source.stdout).unwrap();
    let destination: DestinationBridgeReport = serde_json::from_str(&destination.stdout).unwrap();
    assert!(source.complete && destination.complete);
}
