//! Destinations that misbehave towards `pagewarp bridge source`, one after another. QEMU sees its connection end each time, and goes on with the VM.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use pagewarp_codec::EncodingSet;
use pagewarp_qemu::protocol::frame::Kind;
use pagewarp_qemu::protocol::hello::{Credit, Terms, encode_ack};

use crate::bridge::{Bridge, BridgePeer, TERMS, announced, exists};
use crate::support::PATIENCE;
use crate::way::{Way, Ways};

/// What QEMU has said when the destination hears of it.
const HEAD: &[u8] = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc";

/// What a hostile destination does, and what the bridge says.
type Case = (&'static str, fn(&mut BridgePeer), &'static str);

/// In answer to the hello.
const GREETINGS: [Case; 13] = [
    ("hangs up", |p| p.stream.shutdown().unwrap(), "waiting for its answer"),
    ("is silent", |_| (), "waiting for its answer"),
    (
        "drips its answer",
        |p| {
            let frame = p.frame(Kind::HelloAck, &encode_ack(TERMS), &[]);
            p.drip(&frame, Duration::from_millis(150));
        },
        "waiting for its answer",
    ),
    ("is a web server", |p| p.raw(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "bad magic"),
    ("announces 4 GiB", |p| p.raw(&announced(2, 0, u32::MAX, 0)), "too large"),
    ("sends an unknown frame", |p| p.raw(&announced(99, 0, 0, 0)), "unknown frame kind"),
    ("begins with another frame", |p| p.send(Kind::Credit, &Credit::default().encode()), "expected HelloAck"),
    ("refuses in red", |p| p.send(Kind::Error, "no\r\n\u{1b}[31mroom".as_bytes()), "refused"),
    ("speaks another version", |p| p.send(Kind::HelloAck, &[9; 9]), "version"),
    (
        "agrees to nothing known",
        |p| {
            let mut ack = encode_ack(TERMS);
            ack[3] = 0x80;
            p.send(Kind::HelloAck, &ack);
        },
        "the encodings",
    ),
    (
        "agrees to more slots than were offered",
        |p| p.send(Kind::HelloAck, &encode_ack(Terms { history_slots: 1 << 27, ..TERMS })),
        "an agreement to",
    ),
    (
        "agrees to what was not offered",
        |p| p.send(Kind::HelloAck, &encode_ack(Terms { verify: true, ..TERMS })),
        "an agreement to",
    ),
    ("has no end of its answer", |p| p.raw(&announced(2, 0, 100, 0)[..23]), "waiting for its answer"),
];

/// Once it has agreed and has got the first segment.
const AGREED: [Case; 14] = [
    ("hangs up", |p| p.stream.shutdown().unwrap(), "receiving"),
    ("reports in red", |p| p.send(Kind::Error, "\u{1b}[31mgone".as_bytes()), "gone"),
    (
        "acknowledges what was never sent",
        |p| p.send(Kind::Credit, &credit(1 << 40)),
        "1099511627776 bytes delivered",
    ),
    (
        "takes back what it acknowledged",
        |p| {
            p.send(Kind::Credit, &credit(5));
            p.send(Kind::Credit, &credit(4));
        },
        "4 bytes delivered",
    ),
    ("has a credit of half its length", |p| p.send(Kind::Credit, &credit(5)[..20]), "Credit"),
    ("agrees again", |p| p.send(Kind::HelloAck, &encode_ack(TERMS)), "a HelloAck frame"),
    ("sends pages", |p| p.send(Kind::Segment, b"so"), "a Segment frame"),
    ("ends what is not its own", |p| p.send(Kind::End, &[]), "a End frame"),
    ("says that the VM runs", |p| p.send(Kind::Control, br#"{"message":"running"}"#), "a Control frame"),
    ("announces a huge answer of QEMU", |p| p.raw(&announced(6, 1, 1 << 20, 0)), "too large"),
    ("announces a payload", |p| p.raw(&announced(6, 1, 10, 10)), "too large"),
    (
        "repeats a frame",
        |p| {
            let frame = p.frame(Kind::Reverse, b"x", &[]);
            p.raw(&[frame.clone(), frame].concat());
        },
        "out of sequence",
    ),
    (
        "flips a bit",
        |p| {
            let mut frame = p.frame(Kind::Reverse, b"xyz", &[]);
            *frame.last_mut().unwrap() ^= 1;
            p.raw(&frame);
        },
        "checksum",
    ),
    (
        "floods QEMU, and then breaks the rules",
        |p| {
            for _ in 0..200 {
                p.send(Kind::Reverse, &[7; 60_000]);
            }
            p.send(Kind::End, &[]);
        },
        "a End frame",
    ),
];

fn credit(delivered_bytes: u64) -> Vec<u8> {
    Credit { delivered_bytes, ..Credit::default() }.encode()
}

#[test]
fn a_source_bridge_names_what_hostile_destinations_do_and_lets_qemu_go_on() {
    let ways = Ways::new();
    for way in Way::BOTH {
        let ear = ways.listen(way);
        let options = [&["--peer-timeout", "1500ms"][..], &ways.options(way)].concat();
        let words = ["source", "--connect", &ear.address];
        let mut bridge = Bridge::start(&words, "near", &options);
        bridge.line("waiting for QEMU on ");
        let near = bridge.path("near");
        exists(&near);
        let greetings = GREETINGS.map(|case| (false, case));
        for (agreed, (case, act, says)) in greetings.into_iter().chain(AGREED.map(|case| (true, case))) {
            let name = format!("a destination that {case} (agreed: {agreed}, {way:?})");
            let mut qemu = UnixStream::connect(&near).unwrap();
            qemu.set_read_timeout(Some(PATIENCE)).unwrap();
            qemu.write_all(HEAD).unwrap();
            let mut peer = BridgePeer::over(ear.stream());
            assert_eq!(peer.receive().unwrap().0, Kind::Hello, "{name}");
            if agreed {
                p_agree(&mut peer);
            }
            // It reads what the other QEMU says, as it should.
            let mut hearing = qemu.try_clone().unwrap();
            let heard = std::thread::spawn(move || {
                let mut heard = Vec::new();
                let _ = hearing.read_to_end(&mut heard);
                heard
            });
            let since = Instant::now();
            act(&mut peer);
            let line = bridge.failed(&name, since);
            assert!(line.contains(says), "{name}: expected `{says}` in: {line}");
            // Its connection has ended, so that the migration has failed for it, and it goes on with the VM.
            let heard = heard.join().unwrap();
            assert!(heard.iter().all(|byte| b"x7\x07".contains(byte)), "{name}: {heard:?}");
        }
        silent(&mut bridge, &ear, way);
        bridge.check_memory();
    }
}

fn p_agree(peer: &mut BridgePeer) {
    let few = Terms { encodings: EncodingSet::ALL, history_slots: 0, ..TERMS };
    peer.send(Kind::HelloAck, &encode_ack(few));
    assert_eq!(peer.receive().unwrap().0, Kind::Segment);
}

/// A destination that agrees and goes silent may be waiting for its QEMU. The VM runs meanwhile, and whoever cancels the migration of QEMU need not wait.
fn silent(bridge: &mut Bridge, ear: &crate::way::Ear, way: Way) {
    let mut qemu = UnixStream::connect(bridge.path("near")).unwrap();
    qemu.write_all(HEAD).unwrap();
    let mut peer = BridgePeer::over(ear.stream());
    assert_eq!(peer.receive().unwrap().0, Kind::Hello);
    p_agree(&mut peer);
    let since = Instant::now();
    drop(qemu);
    bridge.failed(&format!("a destination that is silent, and a QEMU that cancels ({way:?})"), since);
    // Nothing of what was under way may be delivered now.
    while peer.receive().is_some_and(|(kind, _)| kind != Kind::End) {}
}
