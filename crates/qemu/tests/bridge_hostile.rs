//! Bridges whose peer does not keep to the protocol.

mod bridges;

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::{Duration, Instant};

use bridges::{Destination, PATIENCE, Source, config};
use pagewarp_codec::{EncodedBatch, EncodingSet};
use pagewarp_engine::error::MigrationError;
use pagewarp_engine::transport::TcpAcceptor;
use pagewarp_qemu::bridge::{BridgeConfig, Endpoint};
use pagewarp_qemu::protocol::frame::{FrameReader, FrameWriter, HEADER_LEN, Kind};
use pagewarp_qemu::protocol::hello::{Credit, Hello, Purpose, Terms, encode_ack};
use pagewarp_qemu::protocol::meta::{self, After, Form, LiteralForm, PageTable};
use pagewarp_qemu::protocol::{MAX_MESSAGE, MAX_REASON};
use pagewarp_qemu::segment::Segment;
use tempfile::TempDir;

const TERMS: Terms =
    Terms { encodings: EncodingSet::ALL, zstd: true, verify: false, direct: false, history_slots: 10 };

/// One end of a connection between bridges.
struct Peer {
    stream: TcpStream,
    writer: FrameWriter,
    reader: FrameReader,
}

impl Peer {
    fn new(stream: TcpStream) -> Peer {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Peer { stream, writer: FrameWriter::default(), reader: FrameReader::default() }
    }

    fn frame(&mut self, kind: Kind, body: &[u8]) -> Vec<u8> {
        [&self.writer.header(kind, body, 0)[..], body].concat()
    }

    fn send(&mut self, kind: Kind, body: &[u8]) {
        let frame = self.frame(kind, body);
        self.stream.write_all(&frame).unwrap();
    }

    fn receive(&mut self) -> (Kind, Vec<u8>) {
        let mut header = [0; HEADER_LEN];
        self.stream.read_exact(&mut header).unwrap();
        let seen = self.reader.header(&header).unwrap();
        let mut body = vec![0; seen.meta_len];
        self.stream.read_exact(&mut body).unwrap();
        self.stream.read_exact(&mut vec![0; seen.payload_len]).unwrap();
        (seen.kind, body)
    }
}

/// A destination bridge that has agreed with us.
fn agreed() -> (Destination, Peer, TempDir) {
    let dir = TempDir::new().unwrap();
    let destination = Destination::start(Endpoint::Unix(dir.path().join("far")), config());
    let mut peer = Peer::new(TcpStream::connect(destination.address).unwrap());
    peer.send(Kind::Hello, &hello(7));
    assert_eq!(peer.receive().0, Kind::HelloAck);
    (destination, peer, dir)
}

fn segment(literal: &[u8], after: &[After]) -> Vec<u8> {
    let mut segment = Segment::default();
    segment.push_literal(literal);
    // Plain ones wait for none.
    let form = if after.is_empty() { Form::Plain } else { Form::Encoded };
    let table = PageTable { form, after: after.to_vec(), ..PageTable::default() };
    let empty = EncodedBatch { plain_hash: pagewarp_codec::plain_hash(&[]), ..EncodedBatch::default() };
    let mut out = Vec::new();
    meta::encode(&segment, &table, &empty, LiteralForm::Lz4, &mut out);
    out
}

#[test]
fn a_segment_of_nothing_is_refused() {
    let (destination, mut peer, _dir) = agreed();
    peer.send(Kind::Segment, &segment(b"", &[]));
    let (kind, text) = peer.receive();
    assert_eq!(kind, Kind::Error, "{}", String::from_utf8_lossy(&text));
    assert!(matches!(destination.join(), Err(MigrationError::Peer(_))));
}

/// All wait for one that never comes: they must not fill the memory, nor may looking for one whose turn it is take for ever.
#[test]
fn segments_that_cannot_be_decoded_are_not_taken_without_end() {
    let (destination, mut peer, _dir) = agreed();
    let waiting = segment(b"x", &[After { connection: 1, segment: 0 }]);
    peer.stream.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
    let mut count = 0;
    loop {
        let frame = peer.frame(Kind::Segment, &waiting);
        match peer.stream.write_all(&frame) {
            Ok(()) => count += 1,
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            Err(e) => panic!("{e}"),
        }
        assert!(count < 2_000_000, "there is no end to what it takes");
    }
    destination.control.cancel();
    assert!(matches!(destination.join(), Err(MigrationError::Cancelled)));
}

#[test]
fn a_cancelled_destination_ends_though_the_source_does_not_listen() {
    let (destination, peer, dir) = agreed();
    let qemu = UnixListener::bind(dir.path().join("far")).unwrap();
    let mut sending = Peer { stream: peer.stream.try_clone().unwrap(), ..peer };
    sending.send(Kind::Segment, &segment(b"QEVM", &[]));
    let (mut far, _) = qemu.accept().unwrap();
    // The way back fills, as nobody reads it.
    far.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
    while far.write(&[0; 1 << 16]).is_ok() {}
    destination.control.cancel();
    assert!(matches!(destination.join(), Err(MigrationError::Cancelled)));
}

/// A source bridge and its QEMU, and the connection on which it expects a destination bridge to have agreed.
fn source(terms: Option<Terms>) -> (Source, UnixStream, Peer, TempDir) {
    source_with(config(), terms)
}

fn source_with(config: BridgeConfig, terms: Option<Terms>) -> (Source, UnixStream, Peer, TempDir) {
    let dir = TempDir::new().unwrap();
    let near = dir.path().join("near");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let source = Source::start(Endpoint::Unix(near.clone()), listener.local_addr().unwrap(), config);
    let qemu = UnixStream::connect(near).unwrap();
    let mut peer = Peer::new(listener.accept().unwrap().0);
    assert_eq!(peer.receive().0, Kind::Hello);
    if let Some(terms) = terms {
        peer.send(Kind::HelloAck, &encode_ack(terms));
    }
    (source, qemu, peer, dir)
}

/// What the destination says that it has written is believed only if it has the hash of what was read.
#[test]
fn what_was_written_must_be_what_was_read() {
    const HEAD: &[u8] = b"QEVM\0\0\0\x03";
    let verifying = || BridgeConfig { verify: true, ..config() };
    let credit = |hash| {
        let credit = Credit { delivered_bytes: HEAD.len() as u64, stream_hash: hash, ..Credit::default() };
        credit.encode()
    };
    let read = pagewarp_wire::state_hash(HEAD);
    for hash in [read, read ^ 1, 0] {
        let (source, mut qemu, mut peer, _dir) =
            source_with(verifying(), Some(Terms { verify: true, ..TERMS }));
        qemu.write_all(HEAD).unwrap();
        assert_eq!(peer.receive().0, Kind::Segment);
        peer.send(Kind::Credit, &credit(hash));
        if hash != read {
            let error = source.join().unwrap_err();
            assert!(
                matches!(&error, MigrationError::Differs(what) if what.starts_with("connection 0 of QEMU, between byte 0 and byte 8")),
                "{error}"
            );
            // Nothing that is still on its way may be delivered.
            assert!(peer.stream.read(&mut [0]).map_or(true, |n| n == 0));
            continue;
        }
        // The same once more, and then back again.
        peer.send(Kind::Credit, &credit(hash));
        peer.send(Kind::Credit, &Credit { stream_hash: hash, ..Credit::default() }.encode());
        assert!(source.join().is_err());
    }
    let (source, ..) = source_with(verifying(), Some(TERMS));
    let error = source.join().unwrap_err();
    assert!(matches!(&error, MigrationError::Refused(why) if why.contains("--verify")), "{error}");
}

/// Also where nothing else is due any more, so that the end would be a good one.
#[test]
fn what_differs_at_the_very_end_makes_it_no_good_end() {
    // Without a return path: a header, the end of all sections, and an empty description.
    const STREAM: &[u8] = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc\0\x06\0\0\0\0";
    let config = BridgeConfig { verify: true, ..config() };
    for flip in [0, 1] {
        let (source, mut qemu, mut peer, _dir) =
            source_with(config.clone(), Some(Terms { verify: true, ..TERMS }));
        qemu.write_all(STREAM).unwrap();
        drop(qemu);
        while peer.receive().0 == Kind::Segment {}
        let hash = pagewarp_wire::state_hash(STREAM) ^ flip;
        let last = Credit { delivered_bytes: STREAM.len() as u64, stream_hash: hash, ..Credit::default() };
        peer.send(Kind::Credit, &last.encode());
        if flip == 0 {
            peer.send(Kind::ReverseEnd, &[]);
            drop(peer);
            assert_eq!(source.join().unwrap().verified, Some(true));
        } else {
            assert!(matches!(source.join(), Err(MigrationError::Differs(_))));
        }
    }
}

#[test]
fn credits_for_more_than_was_sent_end_the_session() {
    let (source, mut qemu, mut peer, _dir) = source(Some(TERMS));
    qemu.write_all(b"QEVM\0\0\0\x03").unwrap();
    assert_eq!(peer.receive().0, Kind::Segment);
    let huge = Credit {
        delivered_bytes: 4,
        received_bytes: u64::MAX,
        decode_ns: u64::MAX,
        decoded_pages: u64::MAX,
        restore_ns: u64::MAX,
        stream_hash: u64::MAX,
    };
    // What can be counted is, whatever it is; what cannot be true is not believed.
    for n in 0..20u64 {
        let credit = if n % 2 == 0 { huge } else { Credit { delivered_bytes: 4, ..Credit::default() } };
        peer.send(Kind::Credit, &credit.encode());
        thread::sleep(Duration::from_millis(10));
    }
    peer.send(Kind::Credit, &Credit { delivered_bytes: 9, ..huge }.encode());
    assert!(matches!(source.join(), Err(MigrationError::Peer(_))));
}

#[test]
fn a_long_reason_is_believed_in_part() {
    let reason = "\u{1}".repeat(MAX_MESSAGE);
    let (source_bridge, _qemu, mut peer, _dir) = source(None);
    peer.send(Kind::Error, reason.as_bytes());
    match source_bridge.join() {
        Err(MigrationError::Refused(why)) => assert_eq!(why.len(), MAX_REASON),
        other => panic!("{other:?}"),
    }
    let (source_bridge, _qemu, mut peer, _dir) = source(Some(TERMS));
    peer.send(Kind::Error, reason.as_bytes());
    match source_bridge.join() {
        Err(MigrationError::PeerReports(why)) => assert_eq!(why.len(), MAX_REASON),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_source_that_waits_for_an_answer_can_be_cancelled() {
    let (source, _qemu, _peer, _dir) = source(None);
    source.control.cancel();
    assert!(matches!(source.join(), Err(MigrationError::Cancelled)));
}

/// Nobody says a word, and somebody says one now and then: others are served all the same.
#[test]
fn silent_connections_delay_no_source() {
    let dir = TempDir::new().unwrap();
    let destination = Destination::start(Endpoint::Unix(dir.path().join("far")), config());
    let silent: Vec<_> = (0..20).map(|_| TcpStream::connect(destination.address).unwrap()).collect();
    (&silent[3]).write_all(b"PWQB").unwrap();
    let mut peer = Peer::new(TcpStream::connect(destination.address).unwrap());
    peer.send(Kind::Hello, &Hello { session: [7; 16], purpose: Purpose::Bridge(0), terms: TERMS }.encode());
    assert_eq!(peer.receive().0, Kind::HelloAck);
    drop(peer);
    assert!(destination.join().is_err());
}

fn hello(session: u8) -> Vec<u8> {
    Hello { session: [session; 16], purpose: Purpose::Bridge(0), terms: TERMS }.encode()
}

#[test]
fn what_is_left_of_sources_that_are_gone_is_passed_over() {
    let dir = TempDir::new().unwrap();
    let acceptor = TcpAcceptor::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = acceptor.local_addr().unwrap();
    // It went while it waited to be accepted.
    let mut gone = Peer::new(TcpStream::connect(address).unwrap());
    gone.send(Kind::Hello, &hello(1));
    drop(gone);
    let destination = Destination::on(acceptor, Endpoint::Unix(dir.path().join("far")), config(), 2);
    let ask = |session| {
        let mut peer = Peer::new(TcpStream::connect(address).unwrap());
        peer.send(Kind::Hello, &hello(session));
        let (kind, body) = peer.receive();
        (kind == Kind::HelloAck, String::from_utf8_lossy(&body).into_owned())
    };
    let (agreed, text) = ask(2);
    assert!(agreed, "{text}");
    let start = Instant::now();
    // The session may take a moment to end.
    while start.elapsed() < Duration::from_millis(300) {
        assert!(!ask(2).0, "it is over");
        thread::sleep(Duration::from_millis(20));
    }
    while !ask(1).0 {
        assert!(start.elapsed() < PATIENCE, "a new session is served");
    }
    assert!(destination.join().is_err());
}
