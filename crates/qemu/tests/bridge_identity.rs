//! A migration belongs to one peer, where peers can be told from each other.

mod bridges;

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use bridges::{PATIENCE, config};
use pagewarp_codec::EncodingSet;
use pagewarp_engine::control::MigrationControl;
use pagewarp_engine::transport::{Acceptor, Stream, TcpAcceptor};
use pagewarp_qemu::bridge::{Awaited, DestinationBridge, Endpoint};
use pagewarp_qemu::protocol::frame::{FrameReader, FrameWriter, HEADER_LEN, Kind};
use pagewarp_qemu::protocol::hello::{Hello, Purpose, Terms};
use tempfile::TempDir;

/// An acceptor that knows whom each connection comes from, in this order; the last one comes again and again.
struct Knowing {
    inner: TcpAcceptor,
    peers: &'static [&'static str],
    count: AtomicUsize,
}

struct Known {
    inner: Box<dyn Stream>,
    peer: &'static str,
}

impl Acceptor for Knowing {
    fn accept(&self, timeout: Duration) -> io::Result<Box<dyn Stream>> {
        let inner = self.inner.accept(timeout)?;
        let number = self.count.fetch_add(1, Ordering::Relaxed).min(self.peers.len() - 1);
        Ok(Box::new(Known { inner, peer: self.peers[number] }))
    }

    fn local(&self) -> String {
        self.inner.local()
    }
}

impl Read for Known {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.inner.read(bytes)
    }
}

impl Write for Known {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.inner.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl Stream for Known {
    fn try_clone_stream(&self) -> io::Result<Box<dyn Stream>> {
        self.inner.try_clone_stream()
    }

    fn shutdown(&self) -> io::Result<()> {
        self.inner.shutdown()
    }

    fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> io::Result<()> {
        self.inner.set_timeouts(read, write)
    }

    fn peer_identity(&self) -> Option<Arc<str>> {
        Some(self.peer.into())
    }
}

/// Says hello as this connection of the session, and tells what the destination answers.
fn hello(address: SocketAddr, number: u16) -> (TcpStream, Kind, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let terms =
        Terms { encodings: EncodingSet::ALL, zstd: true, verify: false, direct: false, history_slots: 10 };
    let body = Hello { session: [7; 16], purpose: Purpose::Bridge(number), terms }.encode();
    let header = FrameWriter::default().header(Kind::Hello, &body, 0);
    stream.write_all(&[&header[..], &body].concat()).unwrap();
    let mut header = [0; HEADER_LEN];
    stream.read_exact(&mut header).unwrap();
    let seen = FrameReader::default().header(&header).unwrap();
    let mut body = vec![0; seen.meta_len];
    stream.read_exact(&mut body).unwrap();
    (stream, seen.kind, String::from_utf8_lossy(&body).into_owned())
}

fn refused((_stream, kind, why): (TcpStream, Kind, String), who: &str) {
    assert_eq!(kind, Kind::Error);
    assert!(
        why.contains(&format!("the certificate of this connection, {who}, is not that of the session")),
        "{why}"
    );
}

#[test]
fn all_connections_of_a_session_come_from_one_peer() {
    let dir = TempDir::new().unwrap();
    let inner = TcpAcceptor::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = inner.local_addr().unwrap();
    let acceptor =
        Knowing { inner, peers: &["mallory", "alice", "bob", "alice"], count: AtomicUsize::new(0) };
    let bridge = DestinationBridge::new(&acceptor, Endpoint::Unix(dir.path().join("far")), config());
    let awaited = Awaited { session: [7; 16], identity: Some("alice".into()) };
    let control = MigrationControl::new();
    thread::scope(|scope| {
        let result = scope.spawn(|| bridge.run(Some(&awaited), &control));
        // Who knows the session must also be who it was agreed with, at its first connection and at all others.
        refused(hello(address, 0), "mallory");
        let (_main, kind, why) = hello(address, 0);
        assert_eq!(kind, Kind::HelloAck, "{why}");
        refused(hello(address, 1), "bob");
        let (_second, kind, why) = hello(address, 1);
        assert_eq!(kind, Kind::HelloAck, "{why}");
        control.cancel();
        assert!(result.join().unwrap().is_err());
    });
}
