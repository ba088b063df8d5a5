//! `pagewarp qemu` says no: wrong settings, wrong states and wrong peers. Nobody is hurt, and the same processes then migrate. Takes root,
//! because of the network namespaces.

mod support;

use pagewarp_cli::exit::Exit;

use support::Sent;
use support::qemu::{Hosts, PLAIN, SLOW, address, text};

fn refused(sent: &Sent, exit: Exit, words: &[&str]) {
    assert_eq!(sent.code, Some(exit as i32), "{}", sent.stderr);
    let error = sent.error();
    for word in words {
        assert!(error.contains(word), "no `{word}` in: {error}");
    }
    assert_eq!(sent.stdout, "");
}

#[test]
fn a_migration_that_cannot_work_is_not_started() {
    let mut hosts = Hosts::boot(64, 1000, 1_000_000_000);
    let mut there = hosts.fresh();
    let (receiving, to) = hosts.receive(&there, &[]);

    hosts.here.turn_on("xbzrle");
    let sent = hosts.migrate(&to, &[]).wait();
    refused(&sent, Exit::Environment, &["`xbzrle`", "migrate-set-capabilities"]);
    hosts.here.watch.set_capabilities([("xbzrle", false)]).unwrap();

    hosts.here.turn_on("postcopy-ram");
    let sent = hosts.migrate(&to, &[]).wait();
    refused(&sent, Exit::Environment, &["`postcopy-ram`", "lost on both sides"]);
    hosts.here.watch.set_capabilities([("postcopy-ram", false)]).unwrap();

    hosts.here.set("multifd-compression", "zlib");
    let sent = hosts.migrate(&to, &["--multifd", "2"]).wait();
    refused(&sent, Exit::Environment, &["`multifd-compression`", "\"zlib\"", "\"none\""]);
    hosts.here.set("multifd-compression", "none");

    hosts.here.set("tls-creds", "tls0");
    let sent = hosts.migrate(&to, &[]).wait();
    refused(&sent, Exit::Environment, &["`tls-creds`", "\"tls0\""]);
    hosts.here.set("tls-creds", "");

    let qmp = hosts.here.qemu.qmp();
    let nowhere = hosts.path("nowhere");
    let words = ["qemu", "migrate", "--qmp", text(&nowhere), "--to", &to];
    let sent = hosts.run(hosts.here.end, &[&words, &PLAIN[..]].concat()).wait();
    refused(&sent, Exit::Environment, &["cannot connect to a QMP socket", text(&nowhere), "-qmp unix:"]);

    let words = ["qemu", "migrate", "--qmp", text(&qmp), "--to", "10.99.0.2:1"];
    let sent = hosts.run(hosts.here.end, &[&words, &PLAIN[..]].concat()).wait();
    refused(&sent, Exit::Link, &["10.99.0.2:1", "refused"]);
    let words = ["qemu", "resolve", "--qmp", text(&qmp), "--discard"];
    let sent = hosts.run(hosts.here.end, &words).wait();
    refused(&sent, Exit::Environment, &["\"running\"", "not in doubt"]);
    let words = ["qemu", "receive", "--qmp", text(&qmp), "--listen", "127.0.0.1:0"];
    let sent = hosts.run(hosts.here.end, &[&words, &PLAIN[..]].concat()).wait();
    refused(&sent, Exit::Environment, &["\"running\"", "-incoming defer"]);
    let words = ["qemu", "migrate", "--qmp", text(&qmp), "--to", &to, "--multifd", "0"];
    assert_eq!(hosts.run(hosts.here.end, &words).wait().code, Some(Exit::Usage as i32));

    // Neither decision, or both.
    for words in
        [&["qemu", "resolve", "--qmp", "x"][..], &["qemu", "resolve", "--qmp", "x", "--resume", "--discard"]]
    {
        assert_eq!(hosts.run(hosts.here.end, words).wait().code, Some(Exit::Usage as i32), "{words:?}");
    }

    // None of this has disturbed the destination that waits, nor the VM.
    assert_eq!(there.state().unwrap().status, "inmigrate");
    let sent = hosts.migrate(&to, &[]).wait();
    let received = receiving.wait();
    assert_eq!((sent.code, received.code), (Some(0), Some(0)), "{}{}", sent.stderr, received.stderr);
    hosts.moved(there);
}

#[test]
fn a_destination_that_cannot_work_refuses() {
    let mut hosts = Hosts::boot(64, 1000, SLOW);
    // Before anybody comes.
    let mut there = hosts.fresh();
    there.turn_on("xbzrle");
    let qmp = there.qemu.qmp();
    let words = ["qemu", "receive", "--qmp", text(&qmp), "--listen", "127.0.0.1:0"];
    let received = hosts.run(there.end, &[&words, &PLAIN[..]].concat()).wait();
    refused(&received, Exit::Environment, &["`xbzrle`"]);
    assert_eq!(there.state().unwrap().status, "inmigrate");
    there.watch.set_capabilities([("xbzrle", false)]).unwrap();
    // After somebody has come.
    let (receiving, to) = hosts.receive(&there, &[]);
    there.set("multifd-compression", "zlib");
    let sent = hosts.migrate(&to, &["--multifd", "2"]).wait();
    refused(&sent, Exit::Peer, &["`multifd-compression`"]);
    refused(&receiving.wait(), Exit::Environment, &["`multifd-compression`"]);
    hosts.stayed(&mut there);

    // One that listens already.
    let mut there = hosts.fresh();
    let listening = format!("unix:{}", hosts.path("listening").display());
    there.watch.migrate_incoming(&listening).unwrap();
    let qmp = there.qemu.qmp();
    let words = ["qemu", "receive", "--qmp", text(&qmp), "--listen", "127.0.0.1:0"];
    let received = hosts.run(there.end, &[&words, &PLAIN[..]].concat()).wait();
    refused(&received, Exit::Environment, &["-incoming defer"]);
    hosts.hop(&[]);
}

#[test]
fn the_two_kinds_of_commands_do_not_mix() {
    let mut hosts = Hosts::boot(64, 1000, 1_000_000_000);
    let (end, there_end) = (hosts.here.end, hosts.there());
    // `migrate` towards a bridge.
    let listen = format!("{}:7001", address(there_end));
    let unix = hosts.path("destination");
    let words = ["bridge", "destination", "--listen", &listen, "--unix", text(&unix)];
    let mut bridge = hosts.run(there_end, &[&words, &PLAIN[..]].concat());
    bridge.wait_line("that it waits", |line| line.starts_with("waiting for a source bridge"));
    let sent = hosts.migrate(&listen, &[]).wait();
    refused(&sent, Exit::Peer, &["`pagewarp qemu receive`"]);
    assert!(hosts.here.runs() && !bridge.has_ended());
    bridge.signal(rustix::process::Signal::TERM);
    assert_eq!(bridge.wait().code, Some(0));

    // A bridge towards `receive`.
    let there = hosts.fresh();
    let (receiving, to) = hosts.receive(&there, &[]);
    let unix = hosts.path("source");
    let words = ["bridge", "source", "--unix", text(&unix), "--connect", &to, "--once"];
    let mut bridge = hosts.run(end, &[&words, &PLAIN[..]].concat());
    bridge.wait_line("that it waits", |line| line.starts_with("waiting for QEMU on"));
    hosts.here.watch.migrate(&format!("unix:{}", unix.display())).unwrap();
    refused(&bridge.wait(), Exit::Peer, &["`pagewarp qemu migrate`"]);
    assert_eq!(hosts.here.settle().unwrap().status, "running");

    // The one that waits takes who is right.
    let sent = hosts.migrate(&to, &[]).wait();
    assert_eq!((sent.code, receiving.wait().code), (Some(0), Some(0)), "{}", sent.stderr);
    hosts.moved(there);
}
