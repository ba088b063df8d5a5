//! Sources that misbehave towards `pagewarp bridge destination`, one after another, and a good one in the end.

use std::io::Read;
use std::os::unix::net::UnixListener;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use pagewarp_codec::{EncodedBatch, Encoding, Lz4BlockEncoder, plain_hash};
use pagewarp_qemu::protocol::frame::Kind;
use pagewarp_qemu::protocol::hello::{Credit, Purpose};
use pagewarp_qemu::protocol::meta::{self, After, Form, LiteralForm, PageTable};
use pagewarp_qemu::segment::Segment;
use pagewarp_wire::cursor::put_varint;

use crate::BOUND;
use crate::bridge::{Bridge, BridgePeer, announced, hello};
use crate::receiver::soon;
use crate::support::PATIENCE;
use crate::way::{RESUME, Way, Ways};

/// What streams begin with. Nothing else ever comes through.
const HEAD: &[u8] = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc";

/// Bytes as they are.
fn literal(bytes: &[u8]) -> Vec<u8> {
    let mut segment = Segment::default();
    segment.push_literal(bytes);
    let none = EncodedBatch { plain_hash: plain_hash(&[]), ..EncodedBatch::default() };
    let mut out = Vec::new();
    meta::encode(&segment, &PageTable::default(), &none, LiteralForm::Plain, &mut out);
    out
}

/// A segment of pages in this form and encoding, with these slots.
fn pages(form: Form, encoding: Encoding, slots: &[Option<u32>], after: &[After]) -> Vec<u8> {
    let mut segment = Segment::default();
    slots.iter().for_each(|_| segment.push_page(None, &[0; 4096]));
    let len = encoding.fixed_len().unwrap_or(100) as u16;
    let encoded = EncodedBatch {
        encodings: vec![encoding; slots.len()],
        lens: vec![len; slots.len()],
        payload: Vec::new(),
        plain_hash: 7,
    };
    let table = PageTable { form, slots: slots.to_vec(), after: after.to_vec() };
    let mut out = Vec::new();
    meta::encode(&segment, &table, &encoded, LiteralForm::Plain, &mut out);
    out
}

/// A plain segment whose operations and literals were written by hand.
fn by_hand(ops: &[u64], literals: &[u8]) -> Vec<u8> {
    let mut out = vec![Form::Plain as u8];
    out.extend(plain_hash(&[]).to_le_bytes());
    put_varint(&mut out, 0);
    put_varint(&mut out, ops.len() as u64);
    ops.iter().for_each(|&op| put_varint(&mut out, op));
    out.extend(literals);
    out
}

/// Literals in this form of compression.
fn packed(tag: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![tag];
    put_varint(&mut out, bytes.len() as u64);
    [out, bytes.to_vec()].concat()
}

/// A frame of zstd of about this length, which makes 128 KiB of each four bytes.
fn zstd_bomb(len: usize) -> Vec<u8> {
    // No checksum and no content size; a window of 128 KiB; blocks that say one byte so many times.
    let head = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x38];
    let block = (128u32 << 10) << 3 | 1 << 1;
    let block = [&block.to_le_bytes()[..3], b"x"].concat();
    let blocks = (len - head.len()) / block.len();
    head.into_iter().chain(block.repeat(blocks)).collect()
}

/// Blocks of LZ4 that make 1 MiB of a few kilobytes.
fn lz4_bomb() -> Vec<u8> {
    let mut out = Vec::new();
    assert!(Lz4BlockEncoder::new().encode(&vec![0; 1 << 20], &mut out));
    out
}

/// What a hostile source does after its hello, and what the bridge says.
type Case = (&'static str, fn(&mut BridgePeer), &'static str);

const CASES: [Case; 32] = [
    ("hangs up", |p| p.stream.shutdown().unwrap(), "the source ended the migration"),
    (
        "hangs up in the middle of a frame",
        |p| {
            let frame = p.frame(Kind::Segment, &literal(b"x"), &[]);
            p.raw(&frame[..frame.len() - 1]);
            p.stream.shutdown().unwrap();
        },
        "failed while receiving",
    ),
    ("loses its place", |p| p.raw(&[0; 24]), "bad magic"),
    ("sends an unknown frame", |p| p.raw(&announced(99, 1, 0, 0)), "unknown frame kind"),
    (
        "announces a meta of 4 GiB",
        |p| p.raw(&announced(3, 1, u32::MAX, 0)),
        "the meta of a frame is too large",
    ),
    (
        "announces a payload of 4 GiB",
        |p| p.raw(&announced(3, 1, 0, u32::MAX)),
        "the payload of a frame is too large",
    ),
    ("announces a payload where there is none", |p| p.raw(&announced(4, 1, 0, 1)), "too large"),
    ("does not count", |p| p.raw(&announced(3, 7, 20, 0)), "out of sequence"),
    (
        "repeats a frame",
        |p| {
            let frame = p.frame(Kind::Segment, &literal(HEAD), &[]);
            p.raw(&[frame.clone(), frame].concat());
        },
        "out of sequence",
    ),
    (
        "flips a bit",
        |p| {
            let mut frame = p.frame(Kind::Segment, &literal(HEAD), &[]);
            *frame.last_mut().unwrap() ^= 1;
            p.raw(&frame);
        },
        "checksum",
    ),
    ("greets again", |p| p.send(Kind::Hello, &hello(1, Purpose::Bridge(0))), "a Hello frame"),
    ("answers", |p| p.send(Kind::HelloAck, &[]), "a HelloAck frame"),
    ("gives credit", |p| p.send(Kind::Credit, &Credit::default().encode()), "a Credit frame"),
    ("sends what QEMU is to say", |p| p.send(Kind::Reverse, b"so"), "a Reverse frame"),
    ("commits here", |p| p.send(Kind::Control, br#"{"message":"commit","run":true}"#), "a Control frame"),
    ("sends nothing", |p| segment(p, &by_hand(&[], &[0]), &[]), "one of no bytes"),
    ("has a form that was not agreed on", |p| segment(p, &[9; 40], &[]), "the form of a segment"),
    (
        "has too many operations",
        |p| segment(p, &by_hand(&[8; 5000], &[0]), &[]),
        "the operations of a segment",
    ),
    (
        "has literals of 2⁴⁰ bytes",
        |p| segment(p, &by_hand(&[1 << 43], &[0]), &[]),
        "the count of an operation",
    ),
    (
        "has many literals of 256 KiB",
        |p| segment(p, &by_hand(&[(256 << 10) << 3; 4000], &[0]), &[]),
        "the bytes of a segment beside its pages",
    ),
    ("has a thousand pages", |p| segment(p, &by_hand(&[1000 << 3 | 2], &[0]), &[]), "the pages of a segment"),
    (
        "has a bomb of literals, LZ4",
        |p| {
            let bomb = [&[0x1f, b'x', 1, 0][..], &[255; 3000], &[0, 0x50], b"xxxxx"].concat();
            segment(p, &by_hand(&[100 << 3], &packed(1, &bomb)), &[]);
        },
        "compressed literals",
    ),
    (
        "has a bomb of literals, zstd",
        |p| segment(p, &by_hand(&[100 << 3], &packed(2, &zstd_bomb(200_000))), &[]),
        "compressed literals",
    ),
    (
        "has a bomb of pages, zstd",
        // 32 GiB.
        |p| segment(p, &pages(Form::Zstd, Encoding::Raw, &[None; 256], &[]), &zstd_bomb(1 << 20)),
        "a compressed payload",
    ),
    (
        "has a bomb of pages, LZ4",
        |p| segment(p, &pages(Form::Lz4, Encoding::Raw, &[None; 2], &[]), &lz4_bomb()),
        "a compressed payload",
    ),
    (
        "has a longer payload than pages",
        |p| segment(p, &pages(Form::Zstd, Encoding::Zero, &[None], &[]), &[0; 5000]),
        "the compressed payload of a segment is too large",
    ),
    (
        "has a bomb of a page",
        |p| {
            let page = [&[0x1f, b'x', 1, 0][..], &[255; 94], &[0, 0x00]].concat();
            segment(p, &pages(Form::Encoded, Encoding::Lz4, &[None], &[]), &page);
        },
        "damaged",
    ),
    (
        "has other pages than it says",
        |p| segment(p, &pages(Form::Encoded, Encoding::Raw, &[Some(1)], &[]), &[1; 4096]),
        "damaged",
    ),
    (
        "uses a slot twice",
        |p| segment(p, &pages(Form::Encoded, Encoding::Zero, &[Some(1), Some(1)], &[]), &[]),
        "slot 1 twice",
    ),
    (
        "uses slots that were not agreed on",
        |p| segment(p, &pages(Form::Encoded, Encoding::Zero, &[Some(10)], &[]), &[]),
        "the slot of a page",
    ),
    (
        "has a base nowhere",
        |p| segment(p, &pages(Form::Encoded, Encoding::Same, &[None], &[]), &[]),
        "the slot of the base",
    ),
    (
        "waits for itself",
        |p| {
            let after = [After { connection: 0, segment: 0 }];
            segment(p, &pages(Form::Encoded, Encoding::Zero, &[None], &after), &[]);
        },
        "a segment to wait for",
    ),
];

fn segment(peer: &mut BridgePeer, meta: &[u8], payload: &[u8]) {
    let frame = peer.frame(Kind::Segment, meta, payload);
    peer.raw(&frame);
}

/// A bridge, and somebody in the place of its QEMU who tells what each of its connections brought.
fn start(ways: &Ways, way: Way) -> (Bridge, String, Receiver<Vec<u8>>) {
    let options = [&["--peer-timeout", "2"][..], &ways.options(way)].concat();
    let mut bridge = Bridge::start(&["destination", "--listen", "127.0.0.1:0"], "far", &options);
    let qemu = UnixListener::bind(bridge.path("far")).unwrap();
    let line = bridge.line("waiting for a source bridge on ");
    let address = line.split_whitespace().next().unwrap().to_owned();
    let (to, brought) = channel();
    thread::spawn(move || {
        for stream in qemu.incoming() {
            let mut bytes = Vec::new();
            let _ = stream.unwrap().read_to_end(&mut bytes);
            if to.send(bytes).is_err() {
                return;
            }
        }
    });
    (bridge, address, brought)
}

#[test]
fn a_destination_bridge_names_what_hostile_sources_do_and_serves_the_next() {
    let ways = Ways::new();
    for way in Way::BOTH {
        let (mut bridge, address, brought) = start(&ways, way);
        strangers(&ways, way, &address);
        let connect = || BridgePeer::over(ways.stream(way, &address).unwrap());
        for (session, (case, act, says)) in (1..).zip(CASES) {
            let name = format!("a source that {case} ({way:?})");
            let mut peer = connect();
            let (kind, why) = peer.greet(session, Purpose::Bridge(0));
            assert_eq!(kind, Kind::HelloAck, "{name}: {why}");
            let since = Instant::now();
            act(&mut peer);
            let told = peer.last_word();
            let line = bridge.failed(&name, since);
            assert!(line.contains(says), "{name}: expected `{says}` in: {line}");
            if !case.starts_with("hangs up") {
                assert!(told.contains(says), "{name}: the source was told `{told}`");
            }
        }
        intruders(&ways, way, &address, &mut bridge);
        drop(connect());
        // All of them together have brought nothing into QEMU but what an honest source might have.
        while let Ok(bytes) = brought.recv_timeout(Duration::from_millis(100)) {
            assert!(HEAD.starts_with(&bytes), "{bytes:?}");
        }
        good(&mut connect(), 200, &brought);
        println!("{}", bridge.report());
        bridge.check_memory();
    }
}

/// A session from the beginning to its end.
fn good(peer: &mut BridgePeer, session: u8, brought: &Receiver<Vec<u8>>) {
    let (kind, why) = peer.greet(session, Purpose::Bridge(0));
    assert_eq!(kind, Kind::HelloAck, "{why}");
    segment(peer, &literal(HEAD), &[]);
    segment(peer, &literal(b" and all the rest"), &[]);
    peer.send(Kind::End, &[]);
    let bytes = brought.recv_timeout(PATIENCE).unwrap();
    assert_eq!(bytes, [HEAD, b" and all the rest"].concat());
    while peer.receive().is_some_and(|(kind, _)| kind != Kind::ReverseEnd) {}
}

/// Those who never say a hello.
fn strangers(ways: &Ways, way: Way, address: &str) {
    let cases: [(&str, &[u8]); 6] = [
        ("a browser", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        ("a record of TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 and then some more to fill it"),
        ("a hello of 4 GiB", &announced(1, 0, u32::MAX, 0)),
        ("a segment", &announced(3, 0, 20, 0)),
        ("a hello that is none", &[&announced(1, 0, 3, 0)[..], b"abc"].concat()),
        ("half a header", &announced(1, 0, 40, 0)[..11]),
    ];
    for (case, bytes) in cases {
        let mut peer = BridgePeer::over(ways.stream(way, address).unwrap());
        let since = Instant::now();
        peer.raw(bytes);
        if case == "half a header" {
            // It goes on one byte at a time, for longer than is waited.
            peer.drip(&[0; 100], Duration::from_millis(200));
        }
        let mut rest = Vec::new();
        let _ = peer.stream.read_to_end(&mut rest);
        soon(since, BOUND + Duration::from_secs(1), case);
    }
}

/// Others in the middle of a session, which goes on.
fn intruders(ways: &Ways, way: Way, address: &str, bridge: &mut Bridge) {
    let connect = || BridgePeer::over(ways.stream(way, address).unwrap());
    let mut main = connect();
    assert_eq!(main.greet(100, Purpose::Bridge(0)).0, Kind::HelloAck);
    let told = |mut peer: BridgePeer, session, purpose, words: &str| {
        let since = Instant::now();
        let (kind, why) = peer.greet(session, purpose);
        assert!(kind == Kind::Error && why.contains(words), "{way:?}: {why}");
        soon(since, BOUND, words);
    };
    told(connect(), 101, Purpose::Bridge(0), "busy with another migration");
    told(connect(), 101, Purpose::Control, "busy with another migration");
    told(connect(), 100, Purpose::Bridge(0), "a connection out of order");
    told(connect(), 100, Purpose::Bridge(9), "a connection out of order");
    told(connect(), 100, Purpose::Control, "a connection out of order");
    if way == Way::Protected {
        let thief = BridgePeer::over(ways.other_stream(address));
        told(thief, 100, Purpose::Bridge(1), "is not that of the session");
    }
    segment(&mut main, &literal(HEAD), &[]);
    assert_eq!(main.receive().map(|(kind, _)| kind), Some(Kind::Credit), "the session goes on");
    let since = Instant::now();
    drop(main);
    bridge.failed("a session with intruders", since);
    // It cannot be taken up again.
    told(connect(), 100, Purpose::Bridge(0), "this session is over");
    told(connect(), 102, Purpose::Control, "waits for the main connection of a bridge");
    told(connect(), 102, Purpose::Bridge(3), "waits for the main connection of a bridge");
}

/// A source that breaks off without a word is waited for, for as long as is said, and no longer.
#[test]
fn a_source_that_breaks_off_is_waited_for_as_long_as_is_said() {
    let ways = Ways::new();
    let (mut bridge, address, brought) = start(&ways, Way::Protected);
    let mut below = ways.tls_stream(&address);
    let mut opening = b"PWLK\x01\0\0\0".to_vec();
    opening.extend([5; 16]);
    opening.extend([0; 8]);
    opening.extend(u32::MAX.to_le_bytes());
    opening.extend([0; 4]);
    let mut peer = BridgePeer::over(below.try_clone_stream().unwrap());
    let hello = peer.frame(Kind::Hello, &hello(1, Purpose::Bridge(0)), &[]);
    let mut piece = vec![0; 4];
    piece.extend((hello.len() as u64).to_le_bytes());
    peer.raw(&[opening, piece, hello].concat());
    // The answer to the opening, and that to the hello in a piece.
    below.read_exact(&mut [0; 24 + 12]).unwrap();
    let since = Instant::now();
    below.reset().unwrap();
    let line = bridge.failed("a source that breaks off", since);
    assert!(line.contains(&format!("could not be mended in {RESUME}")), "{line}");
    good(&mut BridgePeer::over(ways.stream(Way::Protected, &address).unwrap()), 2, &brought);
}
