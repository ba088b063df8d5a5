//! A connection that is up behaves like any other.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pagewarp_engine::transport::{Acceptor, Connector, Stream};

use crate::support::{Ca, MOMENT, PATIENCE, Set, pair};

mod support;

/// Bytes that are different everywhere.
fn fill(seed: u64, bytes: &mut [u8]) {
    let mut x = seed | 1;
    for chunk in bytes.chunks_mut(8) {
        x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        chunk.copy_from_slice(&x.to_le_bytes()[..chunk.len()]);
    }
}

/// Sends so many bytes, in pieces of all sizes, and then the end.
fn send(mut stream: Box<dyn Stream>, seed: u64, total: usize) {
    let mut bytes = vec![0; total];
    fill(seed, &mut bytes);
    let mut left = &bytes[..];
    let mut size = 1;
    while !left.is_empty() {
        let (now, later) = left.split_at(size.min(left.len()));
        let pieces: Vec<_> = now.chunks(4096).map(IoSlice::new).collect();
        let mut pieces = &pieces[..];
        let mut sent = 0;
        while sent < now.len() {
            sent += stream.write_vectored(pieces).unwrap();
            pieces = &pieces[..0];
            if sent < now.len() {
                stream.write_all(&now[sent..]).unwrap();
                sent = now.len();
            }
        }
        left = later;
        size = (size * 3 + 1) % 3_000_000 + 1;
    }
    stream.flush().unwrap();
}

fn receive(stream: &mut dyn Stream, seed: u64, total: usize) {
    let mut expected = vec![0; total];
    fill(seed, &mut expected);
    let mut got = vec![0; total];
    let (mut at, mut size) = (0, 1);
    while at < total {
        let end = (at + size).min(total);
        let (first, second) = got[at..end].split_at_mut((end - at) / 3);
        let mut slices = [IoSliceMut::new(first), IoSliceMut::new(&mut []), IoSliceMut::new(second)];
        let n = stream.read_vectored(&mut slices).unwrap();
        assert!(n > 0, "it ended after {at} of {total} bytes");
        at += n;
        size = (size * 5 + 3) % 500_000 + 1;
    }
    assert!(got == expected, "other bytes arrived");
}

#[test]
fn bytes_arrive_in_both_directions_at_once() {
    const TOTAL: usize = 48 << 20;
    let (near, far) = pair();
    thread::scope(|scope| {
        for (end, ours, theirs) in [(near, 1, 2), (far, 2, 1)] {
            let writing = end.try_clone_stream().unwrap();
            scope.spawn(move || send(writing, ours, TOTAL));
            scope.spawn(move || {
                let mut end = end;
                receive(&mut *end, theirs, TOTAL);
            });
        }
    });
}

#[test]
fn a_reader_that_waits_keeps_no_writer_waiting() {
    let (near, mut far) = pair();
    let mut reading = near.try_clone_stream().unwrap();
    let mut writing = near.try_clone_stream().unwrap();
    let reader = thread::spawn(move || {
        let mut byte = [0];
        reading.read_exact(&mut byte).map(|()| byte[0])
    });
    thread::sleep(Duration::from_millis(100));
    writing.write_all(&[7; 100_000]).unwrap();
    let mut got = vec![0; 100_000];
    far.read_exact(&mut got).unwrap();
    assert!(!reader.is_finished());
    far.write_all(b"x").unwrap();
    assert_eq!(reader.join().unwrap().unwrap(), b'x');
}

#[test]
fn an_end_in_order_is_told_from_one_that_is_not() {
    let (near, mut far) = pair();
    let mut clone = near.try_clone_stream().unwrap();
    clone.write_all(b"bye").unwrap();
    drop(near);
    assert!(!far.is_hung_up(), "there is a handle left");
    clone.shutdown().unwrap();
    let mut got = Vec::new();
    far.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"bye");
    assert!(far.is_hung_up());
    // The last handle says so as well.
    let (mut near, mut far) = pair();
    near.write_all(b"bye").unwrap();
    drop(near);
    got.clear();
    far.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"bye");
    // A reset is none.
    let (mut near, mut far) = pair();
    near.write_all(b"bye").unwrap();
    let mut byte = [0];
    far.read_exact(&mut byte).unwrap();
    near.reset().unwrap();
    drop(near);
    got.clear();
    far.read_to_end(&mut got).unwrap_err();
}

/// Passes bytes on from one to the other until it is told to stop.
fn relay(from: &TcpStream, to: &TcpStream) {
    let (mut from, mut to) = (from, to);
    let mut bytes = [0; 4096];
    while let Ok(n) = from.read(&mut bytes) {
        if n == 0 || to.write_all(&bytes[..n]).is_err() {
            return;
        }
    }
}

#[test]
fn a_connection_that_is_cut_off_is_no_end() {
    let set = Set::new(&Ca::new());
    let acceptor = set.acceptor(&[]);
    let middle = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let connector = set.connector(middle.local_addr().unwrap(), "localhost");
    thread::scope(|scope| {
        let near = scope.spawn(|| connector.connect().unwrap());
        let here = middle.accept().unwrap().0;
        let there = TcpStream::connect(acceptor.local_addr().unwrap()).unwrap();
        let (a, b) = (here.try_clone().unwrap(), there.try_clone().unwrap());
        scope.spawn(move || relay(&a, &b));
        let (a, b) = (here.try_clone().unwrap(), there.try_clone().unwrap());
        scope.spawn(move || relay(&b, &a));
        let mut far = acceptor.accept(PATIENCE).unwrap();
        let mut near = near.join().unwrap();
        near.write_all(b"half of it").unwrap();
        let mut got = [0; 10];
        far.read_exact(&mut got).unwrap();
        // Somebody in between ends both directions in good order: of TCP, but not of TLS.
        there.shutdown(std::net::Shutdown::Both).unwrap();
        here.shutdown(std::net::Shutdown::Both).unwrap();
        assert_eq!(far.read(&mut got).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert!(far.is_hung_up());
        assert_eq!(near.read(&mut got).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    });
}

#[test]
fn what_was_tampered_with_is_refused() {
    let set = Set::new(&Ca::new());
    let acceptor = set.acceptor(&[]);
    let middle = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let connector = set.connector(middle.local_addr().unwrap(), "localhost");
    let spoil = AtomicBool::new(false);
    thread::scope(|scope| {
        let near = scope.spawn(|| connector.connect().unwrap());
        let here = middle.accept().unwrap().0;
        let there = TcpStream::connect(acceptor.local_addr().unwrap()).unwrap();
        let (a, b) = (here.try_clone().unwrap(), there.try_clone().unwrap());
        scope.spawn(move || relay(&b, &a));
        let (a, b) = (here.try_clone().unwrap(), there.try_clone().unwrap());
        let spoil = &spoil;
        scope.spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(n) = (&a).read(&mut bytes) {
                if spoil.load(Ordering::Acquire) && n > 6 {
                    bytes[n - 1] ^= 1;
                }
                if n == 0 || (&b).write_all(&bytes[..n]).is_err() {
                    return;
                }
            }
        });
        let mut far = acceptor.accept(PATIENCE).unwrap();
        let mut near = near.join().unwrap();
        spoil.store(true, Ordering::Release);
        near.write_all(b"a secret").unwrap();
        assert_eq!(far.read(&mut [0; 8]).unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(far.read(&mut [0; 8]).unwrap_err().kind(), io::ErrorKind::InvalidData);
        near.set_timeouts(Some(PATIENCE), None).unwrap();
        assert!(near.read(&mut [0; 8]).is_err(), "and the sender hears of it");
        let _ = (here.shutdown(std::net::Shutdown::Both), there.shutdown(std::net::Shutdown::Both));
    });
}

#[test]
fn waiting_sees_what_is_decrypted_already() {
    let (mut near, mut far) = pair();
    let start = Instant::now();
    assert!(!far.wait_readable(Duration::from_millis(20)).unwrap());
    assert!(start.elapsed() >= Duration::from_millis(20));
    near.write_all(b"two").unwrap();
    assert!(far.wait_readable(PATIENCE).unwrap());
    far.read_exact(&mut [0]).unwrap();
    // The socket is empty, but there is more.
    assert!(far.wait_readable(Duration::ZERO).unwrap());
    far.read_exact(&mut [0; 2]).unwrap();
    assert!(!far.wait_readable(Duration::ZERO).unwrap());
    drop(near);
    assert!(far.wait_readable(PATIENCE).unwrap(), "the end is something to read");
    assert_eq!(far.read(&mut [0]).unwrap(), 0);
}

#[test]
fn reads_and_writes_have_their_timeouts() {
    let (near, mut far) = pair();
    let mut near = near;
    let short = Some(Duration::from_millis(50));
    far.set_timeouts(short, None).unwrap();
    let kind = far.read(&mut [0]).unwrap_err().kind();
    assert!(matches!(kind, io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut));
    near.set_timeouts(None, short).unwrap();
    let kind = loop {
        if let Err(error) = near.write(&[0; 1 << 20]) {
            break error.kind();
        }
    };
    assert!(matches!(kind, io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut));
    // What was written half must not be followed by anything.
    assert_eq!(near.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    far.detect_death(PATIENCE).unwrap();
}

#[test]
fn a_shutdown_wakes_those_who_wait() {
    let (near, far) = pair();
    let (mut reading, mut writing) = (near.try_clone_stream().unwrap(), near.try_clone_stream().unwrap());
    let reader = thread::spawn(move || reading.read(&mut [0]).is_ok_and(|n| n > 0));
    let writer = thread::spawn(move || while writing.write(&[0; 1 << 16]).is_ok() {});
    thread::sleep(Duration::from_millis(200));
    let start = Instant::now();
    near.shutdown().unwrap();
    assert!(!reader.join().unwrap());
    writer.join().unwrap();
    assert!(start.elapsed() < PATIENCE);
    drop(far);
}

#[test]
fn a_connection_that_nobody_wants_any_more_is_given_up() {
    // It is accepted by the kernel, and nobody ever answers.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let set = Set::new(&Ca::new());
    let connector = set.connector(listener.local_addr().unwrap(), "localhost");
    let start = Instant::now();
    let error = connector.connect_while(&|| start.elapsed() < MOMENT).err().unwrap();
    assert_eq!(error.kind(), io::ErrorKind::Other);
    assert!(start.elapsed() < PATIENCE);
}
