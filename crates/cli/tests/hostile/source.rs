//! Sources that misbehave between their hello and the moment in which their offer is accepted, towards `pagewarp receive`.

use std::time::{Duration, Instant};

use pagewarp_cli::exit::Exit;
use pagewarp_wire::{ErrorCode, Hello, Message, Role};

use crate::each;
use crate::receiver::Receiver;
use crate::support::peer::{Peer, SESSION, header, offer};
use crate::way::{Way, Ways};

/// What a hostile source does after its hello, the exit code, and what the receiver says.
type Case = (&'static str, fn(&mut Peer), Exit, &'static str);

const CASES: [Case; 22] = [
    ("hangs up", |peer| peer.hang_up(), Exit::Link, "the peer closed the connection"),
    ("is silent", |_| (), Exit::Link, "the peer was silent"),
    (
        "drips its offer",
        |peer| {
            let frame = peer.frame(&Message::Offer(offer(512)));
            peer.drip(&frame, Duration::from_millis(100));
        },
        Exit::Link,
        "the peer was silent",
    ),
    (
        "pings for ever and offers nothing",
        |peer| {
            for id in 0..1000 {
                peer.say(&Message::Ping { id });
                std::thread::sleep(Duration::from_millis(20));
                if !peer.is_connected() {
                    return;
                }
            }
        },
        Exit::Link,
        "the peer was silent",
    ),
    ("sends an offer with a flipped bit", |peer| damaged(peer, 70), Exit::Peer, "checksum"),
    ("sends a header with a flipped bit", |peer| damaged(peer, 8), Exit::Peer, "checksum"),
    ("loses its place", |peer| damaged(peer, 0), Exit::Peer, "bad magic"),
    (
        "hangs up in the middle of an offer",
        |peer| {
            let frame = peer.frame(&Message::Offer(offer(512)));
            peer.raw(&frame[..frame.len() / 2]);
            peer.hang_up();
        },
        Exit::Link,
        "the peer closed the connection",
    ),
    ("announces 4 GiB", |peer| peer.raw(&header(3, 1, u32::MAX, u32::MAX)), Exit::Peer, "too large"),
    ("announces a payload", |peer| peer.raw(&header(21, 1, u32::MAX, 8)), Exit::Peer, "too large"),
    ("sends an unknown frame", |peer| peer.raw(&header(200, 1, 0, 0)), Exit::Peer, "unknown frame kind"),
    ("sends pages here", |peer| peer.raw(&header(6, 1, 200, 100)), Exit::Peer, "does not travel"),
    ("commits at once", |peer| peer.say(&Message::Commit), Exit::Peer, "unexpected Commit"),
    (
        "begins an epoch at once",
        |peer| peer.say(&Message::EpochStart { epoch: 0, pages: 1 }),
        Exit::Peer,
        "unexpected EpochStart",
    ),
    ("greets again", |peer| peer.say(&hello()), Exit::Peer, "unexpected Hello"),
    ("is a destination", |peer| peer.raw(&header(13, 1, 0, 0)), Exit::Peer, "Ready does not travel"),
    (
        "repeats a frame",
        |peer| {
            let frame = peer.frame(&Message::Ping { id: 1 });
            peer.raw(&[frame.clone(), frame].concat());
        },
        Exit::Peer,
        "out of sequence",
    ),
    (
        "offers more than is allowed",
        |peer| peer.say(&Message::Offer(offer(1 << 20))),
        Exit::Usage,
        "takes at most 1073741824",
    ),
    (
        "offers a machine that makes no sense",
        |peer| peer.say(&Message::Offer(offer(512))),
        Exit::Environment,
        "machine",
    ),
    ("says that it failed", |peer| peer.say(&its_error("gone\nmad\u{1b}[2J")), Exit::Peer, "gone mad"),
    (
        "cancels",
        |peer| peer.say(&Message::Cancel { reason: "second thoughts".into() }),
        Exit::Peer,
        "second thoughts",
    ),
    ("answers what nobody asked", |peer| peer.say(&Message::Pong { id: 7 }), Exit::Peer, "Pong"),
];

fn hello() -> Message {
    Message::Hello(Hello::new(Role::Control, SESSION))
}

pub(crate) fn its_error(message: &str) -> Message {
    Message::Error { code: ErrorCode::Internal, message: message.into() }
}

/// Sends an offer with one bit flipped.
fn damaged(peer: &mut Peer, at: usize) {
    let mut frame = peer.frame(&Message::Offer(offer(512)));
    frame[at] ^= 0x10;
    peer.raw(&frame);
}

#[test]
fn a_receiver_names_what_a_hostile_source_did_and_ends() {
    let ways = Ways::new();
    let all = Way::BOTH.into_iter().flat_map(|way| CASES.map(|case| (way, case)));
    each(all, |(way, (case, act, exit, says))| {
        let name = format!("a source that {case} ({way:?})");
        let receiver = Receiver::with(&ways.options(way));
        let mut peer = ways.connect(way, &receiver.address).greeted();
        let since = Instant::now();
        act(&mut peer);
        // Whoever is still there to hear it is told why.
        let told = peer.hear_error();
        let (code, error) = receiver.failed(&name, since);
        println!("{name}: {error}");
        assert_eq!(code, exit as i32, "{name}: {error}");
        assert!(error.contains(says), "{name}: expected `{says}` in: {error}");
        assert!(!error.contains('\u{1b}'), "{name}: control characters of the peer reach the terminal");
        if exit == Exit::Peer && !["says that it failed", "cancels"].contains(&case) {
            assert!(told.contains(says), "{name}: the source was told `{told}`");
        }
    });
}
