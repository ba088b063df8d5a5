//! Connections that outlast the ones they are made of, over real TCP that is cut.

#[path = "support/cutter.rs"]
mod cutter;

use std::io::{ErrorKind, IoSlice, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use cutter::Cutter;
use pagewarp_engine::transport::{Acceptor, Connector, Stream, TcpAcceptor, TcpConnector};
use pagewarp_net::lasting::{LastingAcceptor, LastingConnector};

/// Longer than anything here takes, even on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(120);

fn acceptor() -> (LastingAcceptor, SocketAddr) {
    let tcp = TcpAcceptor::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = tcp.local_addr().unwrap();
    (LastingAcceptor::new(Box::new(tcp), PATIENCE).unwrap(), address)
}

fn connector(address: SocketAddr, patience: Duration) -> LastingConnector {
    let tcp = TcpConnector { address, timeout: Duration::from_secs(20) };
    LastingConnector::new(Arc::new(tcp), patience)
}

/// A connection through a relay, from both ends.
fn through(acceptor: &LastingAcceptor, connector: &LastingConnector) -> (Box<dyn Stream>, Box<dyn Stream>) {
    let near = connector.connect().unwrap();
    (near, acceptor.accept(PATIENCE).unwrap())
}

/// Byte `at` of a stream that does not repeat for long.
fn byte(at: usize) -> u8 {
    (at ^ (at >> 8) ^ (at >> 17)) as u8
}

fn send(mut stream: Box<dyn Stream>, len: usize, step: usize) -> Box<dyn Stream> {
    let mut at = 0;
    while at < len {
        let bytes: Vec<u8> = (at..len.min(at + step)).map(byte).collect();
        let (first, second) = bytes.split_at(bytes.len() / 3);
        let n = stream.write_vectored(&[IoSlice::new(first), IoSlice::new(second)]).unwrap();
        at += n;
    }
    stream
}

fn receive(stream: Box<dyn Stream>, len: usize, step: usize) -> Box<dyn Stream> {
    receive_watched(stream, len, step, |_| {})
}

/// As `receive`, and tells how far it is.
fn receive_watched(
    mut stream: Box<dyn Stream>,
    len: usize,
    step: usize,
    mut watch: impl FnMut(usize),
) -> Box<dyn Stream> {
    let mut bytes = vec![0; step];
    let mut at = 0;
    while at < len {
        let most = step.min(len - at);
        let n = stream.read(&mut bytes[..most]).unwrap();
        assert!(n > 0, "the end after {at} bytes");
        for (i, &seen) in bytes[..n].iter().enumerate() {
            assert_eq!(seen, byte(at + i), "byte {}", at + i);
        }
        at += n;
        watch(at);
    }
    stream
}

#[test]
fn nothing_is_lost_repeated_or_out_of_order_however_often_it_breaks() {
    let (acceptor, address) = acceptor();
    let cutter = Cutter::new(address);
    let connector = connector(cutter.address(), PATIENCE);
    let (near, far) = through(&acceptor, &connector);
    const DOWN: usize = 48 << 20;
    const UP: usize = 1 << 20;
    const CUTS: usize = 8;
    thread::scope(|scope| {
        let handles = [
            (near.try_clone_stream().unwrap(), near.try_clone_stream().unwrap()),
            (far.try_clone_stream().unwrap(), far.try_clone_stream().unwrap()),
        ];
        let [(near_out, near_in), (far_out, far_in)] = handles;
        // Cut by what has arrived, not by the clock: a fast machine is done before a clock strikes.
        let mut cuts = 0;
        let cutter = &cutter;
        let cut_on_the_way = move |at: usize| {
            if at > (cuts + 1) * DOWN / (CUTS + 1) {
                cutter.cut(cuts % 2 == 0);
                cuts += 1;
            }
        };
        let threads = [
            scope.spawn(move || send(near_out, DOWN, 300_000)),
            scope.spawn(move || receive_watched(far_in, DOWN, 100_000, cut_on_the_way)),
            scope.spawn(move || send(far_out, UP, 700)),
            scope.spawn(move || receive(near_in, UP, 64)),
        ];
        for thread in threads {
            thread.join().unwrap();
        }
    });
    let seen = connector.interruptions();
    assert!(seen.breaks > 0 && seen.sent_again_bytes > 0, "{seen:?}");
    // In the end there is nothing left, and both ends say so.
    cutter.refuse(false);
    near.shutdown().unwrap();
    let mut far = far;
    assert_eq!(far.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_writer_needs_nobody_who_reads_on_its_side() {
    let (acceptor, address) = acceptor();
    let connector = connector(address, PATIENCE);
    let (near, far) = through(&acceptor, &connector);
    // More than may be on its way at a time.
    const LEN: usize = 80 << 20;
    let receiver = thread::spawn(move || receive(far, LEN, 1 << 20));
    let mut near = send(near, LEN, 1 << 20);
    let mut far = receiver.join().unwrap();
    // What came meanwhile is read later.
    far.write_all(b"and back").unwrap();
    let mut back = [0; 8];
    near.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"and back");
    assert_eq!(connector.interruptions().breaks, 0);
}

#[test]
fn a_connection_that_breaks_while_nobody_uses_it_is_mended_when_somebody_does() {
    let (acceptor, address) = acceptor();
    let cutter = Cutter::new(address);
    let connector = connector(cutter.address(), PATIENCE);
    let (mut near, mut far) = through(&acceptor, &connector);
    near.write_all(b"one").unwrap();
    far.read_exact(&mut [0; 3]).unwrap();
    cutter.cut(true);
    assert!(far.wait_readable(PATIENCE).unwrap());
    let reader = thread::spawn(move || {
        let mut two = [0; 3];
        far.read_exact(&mut two).unwrap();
        far.write_all(&two).unwrap();
        far
    });
    near.write_all(b"two").unwrap();
    let mut two = [0; 3];
    near.read_exact(&mut two).unwrap();
    assert_eq!(&two, b"two");
    drop(reader.join().unwrap());
}

#[test]
fn a_broken_connection_has_not_hung_up_until_it_is_given_up() {
    let (acceptor, address) = acceptor();
    let cutter = Cutter::new(address);
    let connector = connector(cutter.address(), PATIENCE);
    let (mut near, far) = through(&acceptor, &connector);
    assert!(!far.is_hung_up());
    cutter.refuse(true);
    cutter.cut(false);
    let asker = thread::spawn(move || (far.is_hung_up(), far));
    thread::sleep(Duration::from_millis(300));
    assert!(!asker.is_finished(), "it waits for the connection to be mended");
    cutter.refuse(false);
    near.write_all(b"x").unwrap();
    let (hung_up, far) = asker.join().unwrap();
    assert!(!hung_up);
    // What is on its way when the source gives up must not be delivered: it has hung up though there is more to read.
    near.write_all(&[7; 100_000]).unwrap();
    near.reset().unwrap();
    let start = Instant::now();
    while !far.is_hung_up() {
        assert!(start.elapsed() < PATIENCE);
        thread::sleep(Duration::from_millis(5));
    }
    assert!(start.elapsed() < PATIENCE / 2, "the source has told that it is over");
}

#[test]
fn an_end_in_order_is_an_end_at_once_in_both_directions() {
    let (acceptor, address) = acceptor();
    let connector = connector(address, PATIENCE);
    for from_source in [true, false] {
        let (near, far) = through(&acceptor, &connector);
        let (mut ending, mut other) = if from_source { (near, far) } else { (far, near) };
        ending.write_all(b"last words").unwrap();
        ending.shutdown().unwrap();
        let mut words = Vec::new();
        other.read_to_end(&mut words).unwrap();
        assert_eq!(words, b"last words");
        assert!(other.is_hung_up());
        assert!(ending.write_all(b"more").is_err());
    }
}

#[test]
fn patience_comes_to_an_end() {
    let (acceptor, address) = acceptor();
    let cutter = Cutter::new(address);
    let connector = connector(cutter.address(), Duration::from_secs(1));
    let (mut near, mut far) = through(&acceptor, &connector);
    cutter.refuse(true);
    cutter.cut(true);
    // The destination takes over the patience of the source.
    let reader = thread::spawn(move || far.read(&mut [0]).unwrap_err());
    let error = loop {
        if let Err(error) = near.write_all(&[0; 1000]) {
            break error;
        }
    };
    assert!(error.to_string().contains("could not be mended in 1s"), "{error}");
    assert!(reader.join().unwrap().to_string().contains("could not be mended"));
    assert!(near.write_all(b"x").is_err(), "it stays so");
}

#[test]
fn a_destination_hears_of_a_connection_that_was_given_up() {
    let (acceptor, address) = acceptor();
    let cutter = Cutter::new(address);
    let connector = connector(cutter.address(), PATIENCE);
    let (mut near, mut far) = through(&acceptor, &connector);
    connector.limit_outage(Some(Duration::from_millis(300)));
    cutter.refuse(true);
    cutter.cut(true);
    near.read(&mut [0]).unwrap_err();
    // The network is there again when the source closes what is left of the migration. The destination has all of its patience still.
    cutter.refuse(false);
    let since = Instant::now();
    drop(near);
    let error = far.read(&mut [0]).unwrap_err();
    assert!(error.to_string().contains("given the migration up"), "{error}");
    assert!(since.elapsed() < PATIENCE / 2);
}

#[test]
fn the_patience_of_a_destination_can_be_limited_for_a_while() {
    let (acceptor, address) = acceptor();
    let cutter = Cutter::new(address);
    let connector = connector(cutter.address(), PATIENCE);
    let (near, mut far) = through(&acceptor, &connector);
    cutter.refuse(true);
    cutter.cut(true);
    let since = Instant::now();
    // He waits already when it becomes less.
    let reader = thread::spawn(move || far.read(&mut [0]).unwrap_err());
    thread::sleep(Duration::from_millis(300));
    acceptor.limit_outage(Some(Duration::from_millis(400)));
    let error = reader.join().unwrap();
    assert!(error.to_string().contains("could not be mended in 400ms"), "{error}");
    assert!(since.elapsed() < PATIENCE / 2);
    drop(near);
    // The next migration has all of it again.
    acceptor.limit_outage(None);
    cutter.refuse(false);
    let (mut near, mut far) = through(&acceptor, &connector);
    cutter.refuse(true);
    cutter.cut(true);
    // Whoever waits for it notices the break, and how long it lasts.
    let reader = thread::spawn(move || far.read_exact(&mut [0]).map(|()| far).unwrap());
    thread::sleep(Duration::from_secs(1));
    assert!(!reader.is_finished());
    cutter.refuse(false);
    near.write_all(b"x").unwrap();
    drop(reader.join().unwrap());
}

#[test]
fn patience_can_be_limited_for_a_while() {
    let (acceptor, address) = acceptor();
    let cutter = Cutter::new(address);
    let connector = connector(cutter.address(), PATIENCE);
    let (mut near, far) = through(&acceptor, &connector);
    connector.limit_outage(Some(Duration::from_millis(300)));
    cutter.refuse(true);
    cutter.cut(true);
    let error = near.read(&mut [0]).unwrap_err();
    assert!(error.to_string().contains("could not be mended in 300ms"), "{error}");
    drop((near, far));
    // The next migration has all of it again.
    cutter.refuse(false);
    let (mut near, mut far) = through(&acceptor, &connector);
    cutter.refuse(true);
    cutter.cut(true);
    let writer = thread::spawn(move || far.write_all(b"x").map(|()| far).unwrap());
    thread::sleep(Duration::from_millis(700));
    cutter.refuse(false);
    near.read_exact(&mut [0]).unwrap();
    drop(writer.join().unwrap());
}

#[test]
fn a_destination_that_has_given_up_is_not_asked_again() {
    let (acceptor, address) = acceptor();
    let cutter = Cutter::new(address);
    let connector = connector(cutter.address(), PATIENCE);
    let (mut near, far) = through(&acceptor, &connector);
    cutter.cut(true);
    drop(far);
    let error = near.read(&mut [0]).unwrap_err();
    assert!(error.to_string().contains("given the migration up"), "{error}");
}

#[test]
fn a_destination_that_is_gone_is_not_waited_for() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let connector = connector(listener.local_addr().unwrap(), PATIENCE);
    let server = thread::spawn(move || {
        let mut far = listener.accept().unwrap().0;
        far.read_exact(&mut [0; 40]).unwrap();
        far.write_all(&go()).unwrap();
        // It dies without a word, as if it was killed.
    });
    let mut near = connector.connect().unwrap();
    server.join().unwrap();
    let since = Instant::now();
    let another = thread::scope(|scope| {
        let another = scope.spawn(|| connector.connect().err().unwrap());
        let error = near.read(&mut [0]).unwrap_err();
        assert!(error.to_string().contains("nobody listens"), "{error}");
        another.join().unwrap()
    });
    assert_eq!(another.kind(), ErrorKind::ConnectionRefused);
    assert!(since.elapsed() < PATIENCE / 2);
    // Nor is a further connection tried for longer than anybody wants it.
    let asked = std::cell::Cell::new(0);
    let wanted = || asked.replace(asked.get() + 1) < 3;
    assert!(connector.connect_while(&wanted).is_err());
}

#[test]
fn ordinary_connections_are_taken_as_they_are() {
    let (acceptor, address) = acceptor();
    for begin in [&b"PWQB and more"[..], b"PWL", b"x"] {
        let mut near = TcpStream::connect(address).unwrap();
        near.write_all(begin).unwrap();
        near.shutdown(std::net::Shutdown::Write).unwrap();
        let far = acceptor.accept(PATIENCE).unwrap();
        let mut reading = far.try_clone_stream().unwrap();
        let mut seen = Vec::new();
        reading.read_to_end(&mut seen).unwrap();
        assert_eq!(seen, begin);
        far.try_clone_stream().unwrap().write_all(b"back").unwrap();
        far.shutdown().unwrap();
        seen.clear();
        near.read_to_end(&mut seen).unwrap();
        assert_eq!(seen, b"back");
    }
}

/// An opening as in `docs/link-protocol.md`.
fn opening(wish: u8, name: u8, received: u64) -> Vec<u8> {
    let mut bytes = b"PWLK\x01".to_vec();
    bytes.extend([wish, 0, 0]);
    bytes.extend([name; 16]);
    bytes.extend(received.to_le_bytes());
    bytes.extend(10_000u32.to_le_bytes());
    bytes.extend([0; 4]);
    bytes
}

/// The answer to it, of a destination that has received nothing.
fn go() -> Vec<u8> {
    let mut answer = b"PWLK\x01\0\0\0".to_vec();
    answer.extend(0u64.to_le_bytes());
    answer.extend(60_000u32.to_le_bytes());
    answer.extend([0; 4]);
    answer
}

fn ask(address: SocketAddr, opening: &[u8]) -> (TcpStream, Vec<u8>) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(opening).unwrap();
    let mut answer = vec![0; 24];
    let n = stream.read(&mut answer).unwrap_or(0);
    answer.truncate(n);
    (stream, answer)
}

#[test]
fn what_nobody_can_mean_is_refused_and_harms_nobody() {
    let (acceptor, address) = acceptor();
    let over = |answer: &[u8]| answer.len() == 24 && answer[5] == 1;
    // Silent ones, and ones that stop half way, keep nobody out.
    let silent: Vec<_> = (0..100).map(|_| TcpStream::connect(address).unwrap()).collect();
    let mut half = TcpStream::connect(address).unwrap();
    half.write_all(&opening(0, 1, 0)[..20]).unwrap();
    assert!(over(&ask(address, &opening(1, 2, 0)).1), "a name that nobody has");
    assert!(over(&ask(address, &opening(2, 2, 0)).1));
    for (at, value) in [(4, 9), (5, 9), (6, 1), (24, 1), (39, 1)] {
        let mut bytes = opening(0, 3, 0);
        bytes[at] = value;
        assert!(ask(address, &bytes).1.is_empty(), "byte {at}");
    }
    let (_first, answer) = ask(address, &opening(0, 4, 0));
    assert!(!over(&answer));
    let mut far = acceptor.accept(PATIENCE).unwrap();
    assert!(over(&ask(address, &opening(0, 4, 0)).1), "a name that somebody has");
    // More was received than was sent: that is no mistake of the network, and the connection is not continued.
    let (mut second, answer) = ask(address, &opening(1, 4, 1));
    assert!(!over(&answer), "the number comes with the answer");
    let mut rest = Vec::new();
    let _ = second.read_to_end(&mut rest);
    assert!(rest.is_empty(), "{rest:?}");
    // A right one is.
    let (mut third, answer) = ask(address, &opening(1, 4, 0));
    assert!(!over(&answer));
    third.write_all(&[0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, b'!']).unwrap();
    let mut seen = [0];
    far.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"!");
    // But pieces must make sense.
    third.write_all(&[9; 12]).unwrap();
    assert_eq!(far.read(&mut seen).unwrap_err().kind(), ErrorKind::InvalidData);
    drop(silent);
}

#[test]
fn a_limit_of_the_caller_is_kept() {
    let (acceptor, address) = acceptor();
    let connector = connector(address, PATIENCE);
    let (mut near, far) = through(&acceptor, &connector);
    near.set_timeouts(Some(Duration::from_millis(100)), Some(Duration::from_millis(100))).unwrap();
    let error = near.read(&mut [0]).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
    // Nobody reads at the other end.
    let error = loop {
        if let Err(error) = near.write_all(&[0; 1 << 20]) {
            break error;
        }
    };
    assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
    drop(far);
}

#[test]
fn a_limit_of_the_caller_is_kept_however_often_the_connection_breaks() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let connector = connector(listener.local_addr().unwrap(), PATIENCE);
    // Takes whatever comes, says that it has none of it, and breaks each connection on which nothing more comes.
    thread::spawn(move || {
        for far in listener.incoming() {
            let mut far = far.unwrap();
            if far.read_exact(&mut [0; 40]).and_then(|()| far.write_all(&go())).is_ok() {
                far.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
                while far.read(&mut vec![0; 1 << 20]).is_ok_and(|n| n > 0) {}
            }
            let _ = Stream::reset(&far);
        }
    });
    let mut near = connector.connect().unwrap();
    near.set_timeouts(None, Some(Duration::from_secs(1))).unwrap();
    let since = Instant::now();
    let bytes = vec![0; 1 << 20];
    let error = loop {
        if let Err(error) = near.write_all(&bytes) {
            break error;
        }
    };
    assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
    assert!(since.elapsed() < PATIENCE / 2, "{:?}", since.elapsed());
}

#[test]
fn what_is_sent_again_in_part_is_followed_by_nothing() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    // More than the buffers of a connection hold that nobody reads, and less than may be on its way.
    const LEN: usize = 15 << 20;
    rustix::net::sockopt::set_socket_recv_buffer_size(&listener, 64 << 10).unwrap();
    let connector = connector(listener.local_addr().unwrap(), PATIENCE);
    let (broken, is_broken) = channel();
    let (limited, is_limited) = channel();
    let far = thread::spawn(move || {
        let open = || {
            let mut far = listener.accept().unwrap().0;
            far.read_exact(&mut [0; 40]).unwrap();
            far.write_all(&go()).unwrap();
            far
        };
        let mut first = open();
        let mut left = LEN;
        while left > 0 {
            let mut header = [0; 12];
            first.read_exact(&mut header).unwrap();
            let len = u64::from_le_bytes(header[4..].try_into().unwrap()) as usize;
            first.read_exact(&mut vec![0; len]).unwrap();
            left -= len;
        }
        Stream::reset(&first).unwrap();
        broken.send(()).unwrap();
        is_limited.recv().unwrap();
        open()
    });
    let mut near = connector.connect().unwrap();
    near.write_all(&vec![7; LEN]).unwrap();
    is_broken.recv().unwrap();
    // Less than the kernel waits before it takes that for a break.
    near.set_timeouts(None, Some(Duration::from_millis(300))).unwrap();
    limited.send(()).unwrap();
    let error = near.read(&mut [0]).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
    assert!(near.write_all(b"not after that").is_err());
    let mut far = far.join().unwrap();
    let mut rest = Vec::new();
    far.set_read_timeout(Some(PATIENCE)).unwrap();
    // The connection was ended, perhaps by a reset.
    let _ = far.read_to_end(&mut rest);
    assert!(!rest.ends_with(b"not after that"));
}

#[test]
fn the_connections_of_a_migration_have_a_group_in_common() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let connector = connector(listener.local_addr().unwrap(), PATIENCE);
    let named = |near: &mut Option<Box<dyn Stream>>| {
        thread::scope(|scope| {
            let far = scope.spawn(|| {
                let mut far = listener.accept().unwrap().0;
                let mut opening = [0; 40];
                far.read_exact(&mut opening).unwrap();
                far.write_all(&go()).unwrap();
                (opening[8..22].to_vec(), u16::from_le_bytes([opening[22], opening[23]]), far)
            });
            *near = Some(connector.connect().unwrap());
            far.join().unwrap()
        })
    };
    let (mut control, mut data, mut next) = (None, None, None);
    let (group, first, _control) = named(&mut control);
    let (same, second, _data) = named(&mut data);
    assert_eq!((&same, first, second), (&group, 0, 1));
    drop(control);
    drop(data);
    // The next migration has one of its own.
    let (other, number, _next) = named(&mut next);
    assert_eq!(number, 0);
    assert_ne!(other, group);
}
