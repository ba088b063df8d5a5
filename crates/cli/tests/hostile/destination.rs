//! Destinations that misbehave towards `pagewarp send`. The VM goes on, whatever they do.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use pagewarp_cli::demo::machine::Machine;
use pagewarp_cli::exit::Exit;
use pagewarp_kvm::control::VmState;
use pagewarp_wire::{Accept, Ack, HEADER_LEN, Kind, Message, Offer};

use crate::receiver::soon;
use crate::source::its_error;
use crate::support::Rig;
use crate::support::peer::{Peer, header};
use crate::support::process::MemoryWatch;
use crate::way::{Ear, Way, Ways};
use crate::{BOUND, PEER_TIMEOUT, WAITED};

/// What the process of a VM of 64 MiB may use over all cases, without the guest and files, and with them: the history that it fills, and a few batches.
const MEMORY_BOUND: u64 = 256 << 20;
const WHOLE_BOUND: u64 = 384 << 20;

/// What a hostile destination does with the connections that come, the exit code of `send`, and what it says.
type Case = (&'static str, fn(&Ear), Exit, &'static str);

const CASES: [Case; 25] = [
    ("hangs up", |ear| ear.peer().hang_up(), Exit::Link, "closed the connection"),
    ("is silent", |ear| ear.peer().drain(), Exit::Link, "the peer was silent"),
    (
        "is a web server",
        |ear| answer(ear, b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"),
        Exit::Peer,
        "bad magic",
    ),
    ("stops in the middle of a header", |ear| answer(ear, b"PGWP\x01"), Exit::Link, "the peer was silent"),
    (
        "drips its answer",
        |ear| {
            let mut peer = ear.peer();
            let bytes = peer.frame(&Message::HelloAck { version: 1 });
            peer.drip(&bytes, Duration::from_millis(200));
        },
        Exit::Link,
        "the peer was silent",
    ),
    ("announces 4 GiB", |ear| answer(ear, &header(2, 0, u32::MAX, u32::MAX)), Exit::Peer, "too large"),
    (
        "announces a huge report",
        |ear| accepted(ear, |p| p.raw(&header(15, 2, 1 << 30, 1 << 30))),
        Exit::Peer,
        "too large",
    ),
    ("speaks another version", |ear| say(ear, &Message::HelloAck { version: 99 }), Exit::Peer, "unsupported"),
    (
        "accepts before it is asked",
        |ear| say(ear, &Message::Accept(accept())),
        Exit::Peer,
        "unexpected Accept",
    ),
    ("refuses in red", |ear| say(ear, &its_error("no\r\n\u{1b}[31mroom")), Exit::Peer, "refused"),
    (
        "accepts encodings that nobody offered",
        |ear| offered(ear, |p| p.say(&Message::Accept(Accept { encodings: 0xffff, ..accept() }))),
        Exit::Peer,
        "the encodings accepted",
    ),
    (
        "accepts batches that nobody offered",
        |ear| offered(ear, |p| p.say(&Message::Accept(Accept { max_batch_pages: 4096, ..accept() }))),
        Exit::Peer,
        "the batch size accepted",
    ),
    ("runs the VM at once", |ear| offered(ear, |p| p.say(&running())), Exit::Peer, "unexpected Running"),
    (
        "never answers a data connection",
        |ear| {
            offered(ear, |p| {
                p.say(&Message::Accept(accept()));
                let _silent = ear.peer();
                p.drain();
            });
        },
        Exit::Link,
        "the peer was silent",
    ),
    ("takes no data", |ear| accepted(ear, chat), Exit::Link, "took no data"),
    ("is ready too early", |ear| accepted(ear, |p| p.say(&Message::Ready)), Exit::Peer, "unexpected Ready"),
    ("runs the VM too early", |ear| accepted(ear, |p| p.say(&running())), Exit::Peer, "unexpected Running"),
    (
        "sends what a source sends",
        |ear| accepted(ear, |p| p.raw(&header(14, 2, 0, 0))),
        Exit::Peer,
        "Commit does not travel",
    ),
    (
        "finishes epochs that nobody began",
        |ear| accepted(ear, |p| p.say(&Message::EpochDone { epoch: 7 })),
        Exit::Peer,
        "epoch of EpochDone",
    ),
    (
        "has damage in epochs that nobody began",
        |ear| {
            let damaged = Message::Damaged { epoch: 7, region: 0, pages: vec![1], reason: "so".into() };
            accepted(ear, |p| p.say(&damaged));
        },
        Exit::Peer,
        "epoch",
    ),
    (
        "acknowledges what was never sent",
        |ear| {
            let ack = Ack { batches: 1 << 40, wire_bytes: 1 << 50, pages: 1 << 50 };
            accepted(ear, |p| p.say(&Message::Ack(ack)));
        },
        Exit::Peer,
        "an Ack for 1125899906842624 pages",
    ),
    (
        "takes back what it acknowledged",
        |ear| {
            accepted(ear, |p| {
                for wire_bytes in [5, 4] {
                    p.say(&Message::Ack(Ack { wire_bytes, ..Ack::default() }));
                }
            });
        },
        Exit::Peer,
        "malformed Ack",
    ),
    ("goes silent in the middle", |ear| accepted(ear, |_| ()), Exit::Link, "the peer was silent"),
    (
        "floods questions and hears no answer",
        |ear| {
            accepted(ear, |p| {
                for id in 0.. {
                    p.say(&Message::Ping { id });
                    if !p.is_connected() {
                        break;
                    }
                }
            });
        },
        Exit::Link,
        "took no data",
    ),
    // Nothing of this is silence, so that the VM would stand still for ever.
    (
        "takes everything and is never ready",
        |ear| played(ear, Kind::Ready),
        Exit::Peer,
        "it was to get ready",
    ),
];

/// Those after which nobody but the operator can tell where the VM is.
const IN_DOUBT: [Case; 3] = [
    ("goes silent after the commit", |ear| played(ear, Kind::Running), Exit::InDoubt, "it was to run the VM"),
    ("refuses after the commit", |ear| after_commit(ear, |p| p.say(&its_error("no"))), Exit::InDoubt, "no"),
    (
        "hangs up after the commit",
        |ear| after_commit(ear, |p| p.hang_up()),
        Exit::InDoubt,
        "closed the connection",
    ),
];

fn accept() -> Accept {
    Accept { encodings: 0x7f, history_slots: 0, max_batch_pages: 256 }
}

fn running() -> Message {
    Message::Running { report: b"{}".to_vec() }
}

/// Answers the first connection with these bytes and then listens until the source hangs up.
fn answer(ear: &Ear, bytes: &[u8]) {
    let mut peer = ear.peer();
    peer.raw(bytes);
    peer.drain();
}

fn say(ear: &Ear, message: &Message) {
    let mut peer = ear.peer();
    peer.say(message);
    peer.drain();
}

/// Goes on properly up to the offer.
fn offered(ear: &Ear, act: impl FnOnce(&mut Peer)) {
    let mut peer = ear.peer();
    peer.hear_offer();
    act(&mut peer);
    peer.drain();
}

/// Goes on properly up to the first batch, of which it reads nothing.
fn accepted(ear: &Ear, act: impl FnOnce(&mut Peer)) {
    offered(ear, |peer| {
        peer.say(&Message::Accept(accept()));
        let mut data = ear.peer();
        data.say(&Message::HelloAck { version: 1 });
        act(peer);
        peer.drain();
    });
}

/// Shows that it is alive until the source hangs up, and does nothing else.
fn chat(peer: &mut Peer) {
    let mut id = 0;
    while peer.is_connected() {
        peer.say(&Message::Ping { id });
        id += 1;
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// Does everything properly, but throws the pages away, up to the moment in which it would have to say this; instead of which it chats.
fn played(ear: &Ear, instead_of: Kind) {
    properly(ear, instead_of, chat);
}

fn after_commit(ear: &Ear, act: fn(&mut Peer)) {
    properly(ear, Kind::Running, |peer| {
        act(peer);
        peer.drain();
    });
}

fn properly(ear: &Ear, instead_of: Kind, act: impl FnOnce(&mut Peer)) {
    accepted_with_data(ear, |control, data| {
        let mut hearing = control.handle();
        let control = Mutex::new(control);
        let say = |message: &Message| control.lock().unwrap().say(message);
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // A whole epoch may take long to come, and it is alive.
            scope.spawn(|| {
                while !is_over.load(Relaxed) {
                    say(&Message::Ping { id: 0 });
                    std::thread::sleep(Duration::from_millis(100));
                }
            });
            let mut done = 0;
            loop {
                match hearing.hear().unwrap().0 {
                    Kind::EpochStart => {
                        assert!(data.hear_until(Kind::Barrier).is_some());
                        say(&Message::EpochDone { epoch: done });
                        done += 1;
                    }
                    Kind::Prepare if instead_of == Kind::Ready => break,
                    Kind::Prepare => say(&Message::Ready),
                    Kind::Commit => break,
                    _ => {}
                }
            }
            is_over.store(true, Relaxed);
        });
        act(control.into_inner().unwrap());
    });
}

fn accepted_with_data(ear: &Ear, act: impl FnOnce(&mut Peer, &mut Peer)) {
    let mut control = ear.peer();
    control.hear_offer();
    control.say(&Message::Accept(accept()));
    let mut data = ear.peer();
    assert_eq!(data.hear().unwrap().0, Kind::Hello);
    data.say(&Message::HelloAck { version: 1 });
    act(&mut control, &mut data);
}

/// One case; returns what `send` said.
fn run(rig: &mut Rig, ways: &Ways, way: Way, (case, act, exit, says): Case) {
    let name = format!("a destination that {case} ({way:?})");
    let ear = ways.listen(way);
    let address = ear.address.clone();
    let acting = std::thread::spawn(move || act(&ear));
    let options = [&["--peer-timeout", PEER_TIMEOUT][..], &ways.options(way)].concat();
    let since = Instant::now();
    let sent = rig.send(&address, &options).wait();
    // These wait for a peer that is silent, or for twice as long for one that gets nothing done, and the bound is for what follows.
    let waits = exit != Exit::Peer || says.contains("it was to");
    // A flood ends when the source has had enough of it, which is when everything in between is full.
    let floods = if case.starts_with("floods") { 3 } else { 0 };
    soon(since, BOUND * (1 + floods) + if waits { WAITED } else { Duration::ZERO }, &name);
    let error = sent.error();
    println!("{name}: {error}");
    assert_eq!(sent.code, Some(exit as i32), "{name}: {error}");
    assert!(error.contains(says), "{name}: expected `{says}` in: {error}");
    assert!(!error.contains('\u{1b}'), "{name}: control characters of the peer reach the terminal");
    acting.join().unwrap_or_else(|_| panic!("{name}: the hostile destination itself failed"));
}

/// Every case.
pub(crate) fn hostile_destinations(rig: &mut Rig, ways: &Ways, way: Way) {
    let memory = MemoryWatch::start(rig.here.status().unwrap().pid);
    for case in CASES {
        run(rig, ways, way, case);
        assert_eq!(rig.state(), VmState::Running, "{}", case.0);
    }
    rig.goes_on();
    for case in IN_DOUBT {
        run(rig, ways, way, case);
        // None of these has run it, which is for an operator to know.
        assert_eq!(rig.state(), VmState::InDoubt, "{}", case.0);
        rig.command(&["resolve", Machine::NAME, "--resume"]).unwrap();
        rig.goes_on();
    }
    let (peak, whole) = (memory.peak(), memory.peak_of_all());
    println!(
        "the source used up to {} MiB of memory, {} MiB with the guest and all",
        peak >> 20,
        whole >> 20
    );
    assert!(peak <= MEMORY_BOUND && whole <= WHOLE_BOUND, "{} MiB, {} MiB", peak >> 20, whole >> 20);
}

/// One that shows that it builds the VM, for ever, can be left.
pub(crate) fn a_destination_that_never_accepts_can_be_left(rig: &mut Rig, ways: &Ways, way: Way) {
    let ear = ways.listen(way);
    let address = ear.address.clone();
    let acting = std::thread::spawn(move || offered(&ear, chat));
    let mut sending = rig.send(&address, &[&["--peer-timeout", "30"][..], &ways.options(way)].concat());
    rig.wait_state("a migration", |status| status.state == VmState::Migrating);
    std::thread::sleep(Duration::from_millis(500));
    assert!(!sending.has_ended(), "it waits");
    let since = Instant::now();
    rig.command(&["cancel", Machine::NAME]).unwrap();
    let sent = sending.wait();
    soon(since, BOUND, "a cancel");
    assert_eq!(sent.code, Some(Exit::Cancelled as i32), "{}", sent.stderr);
    assert_eq!(rig.state(), VmState::Running);
    acting.join().unwrap();
}

/// What the VM of the rig is offered with.
pub(crate) fn offer_of(rig: &Rig, ways: &Ways) -> Offer {
    let ear = ways.listen(Way::Plain);
    let sending = rig.send(&ear.address, &[]);
    let mut peer = ear.peer();
    let offer = peer.hear_offer();
    assert!(offer.machine.len() > HEADER_LEN);
    peer.hang_up();
    assert_ne!(sending.wait().code, Some(0));
    offer
}
