//! Peers that break the rules below the protocol: those of connections that outlast a loss of the network, and of TLS. What the library makes of each is tested in
//! `crates/net/tests/hostile.rs`; here the program says it.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use pagewarp_cli::exit::Exit;
use pagewarp_engine::transport::{Acceptor, Connector, Stream, TcpAcceptor};
use pagewarp_kvm::control::VmState;
use pagewarp_wire::{Hello, Message, Role};

use crate::receiver::{Receiver, soon};
use crate::support::peer::{Peer, SESSION};
use crate::support::{PATIENCE, Rig};
use crate::way::{RESUME, Way, Ways};
use crate::{BOUND, PEER_TIMEOUT, WAITED, each};

/// An opening of docs/link-protocol.md.
fn opening(wish: u8, name: u8, received: u64) -> Vec<u8> {
    let mut bytes = b"PWLK\x01".to_vec();
    bytes.extend([wish, 0, 0]);
    bytes.extend([name; 16]);
    bytes.extend(received.to_le_bytes());
    bytes.extend(u32::MAX.to_le_bytes());
    bytes.extend([0; 4]);
    bytes
}

/// Its answer: go on.
fn go(received: u64) -> Vec<u8> {
    let mut bytes = b"PWLK\x01\0\0\0".to_vec();
    bytes.extend(received.to_le_bytes());
    bytes.extend(60_000u32.to_le_bytes());
    bytes.extend([0; 4]);
    bytes
}

/// The header of a piece.
fn piece(kind: u8, value: u64) -> Vec<u8> {
    let mut bytes = vec![kind, 0, 0, 0];
    bytes.extend(value.to_le_bytes());
    bytes
}

/// What a hostile destination does with a connection, the exit code of `send`, and what it says.
type DestinationCase = (&'static str, fn(&mut dyn Stream), Exit, &'static str);

const DESTINATIONS: [DestinationCase; 9] = [
    ("is a web server", |s| say(s, b"HTTP/1.1 400 Bad Request\r\n\r\n"), Exit::Peer, "--resume-timeout 0"),
    ("drips its answer", |s| drip(s, &go(0)), Exit::Link, "no answer to a new connection"),
    (
        "knows of no connection",
        |s| say(s, &[&b"PWLK\x01\x01"[..], &[0; 18]].concat()),
        Exit::Peer,
        "as if it were an old one",
    ),
    ("has received what was not sent", |s| say(s, &go(9)), Exit::Peer, "as if it were an old one"),
    ("sends pieces of no kind", |s| say(s, &[go(0), piece(7, 1)].concat()), Exit::Peer, "where a piece"),
    ("sends pieces of nothing", |s| say(s, &[go(0), piece(0, 0)].concat()), Exit::Peer, "where a piece"),
    ("sends pieces of 4 EiB", |s| say(s, &[go(0), piece(0, 1 << 62)].concat()), Exit::Peer, "where a piece"),
    (
        "confirms what was not sent",
        |s| say(s, &[go(0), piece(1, 1 << 40)].concat()),
        Exit::Peer,
        "1099511627776 bytes confirmed",
    ),
    ("breaks and does not come back", |s| say(s, &go(0)), Exit::Link, "could not be mended in 1s"),
];

fn say(stream: &mut dyn Stream, bytes: &[u8]) {
    let _ = stream.read(&mut [0; 40]);
    let _ = stream.write_all(bytes);
}

fn drip(stream: &mut dyn Stream, bytes: &[u8]) {
    let _ = stream.read(&mut [0; 40]);
    for byte in bytes {
        if stream.write_all(&[*byte]).is_err() {
            return;
        }
        thread::sleep(Duration::from_millis(500));
    }
}

/// Destinations of whom every connection is like that.
pub(crate) fn hostile_links_to_a_source(rig: &mut Rig, ways: &Ways, way: Way) {
    for (case, act, exit, says) in DESTINATIONS {
        let name = format!("a destination that {case} ({way:?})");
        let tcp = TcpAcceptor::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = tcp.local_addr().unwrap().to_string();
        let (acceptor, mut options): (Box<dyn Acceptor>, _) = match way {
            Way::Plain => (Box::new(tcp), vec![]),
            Way::Protected => (Box::new(ways.tls_acceptor(tcp)), vec!["--tls-dir", ways.dir()]),
        };
        let acting = thread::spawn(move || {
            let mut stream = acceptor.accept(PATIENCE).unwrap();
            act(&mut *stream);
            if case == "breaks and does not come back" {
                // Nobody listens any more when it has.
                drop(acceptor);
            } else {
                let _ = io::copy(&mut stream, &mut io::sink());
            }
        });
        options.extend(["--resume-timeout", RESUME, "--peer-timeout", PEER_TIMEOUT]);
        let since = Instant::now();
        let sent = rig.send(&address, &options).wait();
        // One that drips is waited for for 5 s, and the bound is for what follows.
        soon(since, if exit == Exit::Peer { BOUND } else { 2 * BOUND }, &name);
        let error = sent.error();
        println!("{name}: {error}");
        assert_eq!(sent.code, Some(exit as i32), "{name}: {error}");
        assert!(error.contains(says), "{name}: expected `{says}` in: {error}");
        assert_eq!(rig.state(), VmState::Running, "{name}");
        acting.join().unwrap();
    }
}

/// What somebody does who is to speak TLS, and what `send` says.
type Handshake = (&'static str, fn(TcpStream), Exit, &'static str);

const HANDSHAKES: [Handshake; 5] = [
    ("speaks without TLS", |s| say(&mut { s }, b"PGWP and more"), Exit::Peer, "does not speak TLS"),
    // A hello of a server that has chosen TLS 1.2.
    (
        "speaks TLS 1.2",
        |s| {
            say(
                &mut { s },
                &[&[22, 3, 3, 0, 42, 2, 0, 0, 38, 3, 3][..], &[7; 32], &[0, 0xc0, 0x2f, 0]].concat(),
            );
        },
        Exit::Peer,
        "TLS",
    ),
    ("alerts", |s| say(&mut { s }, &[21, 3, 3, 0, 2, 2, 40]), Exit::Peer, "refused the TLS handshake"),
    ("hangs up", drop, Exit::Link, "it may not speak TLS"),
    (
        "drips",
        |s| drip(&mut { s }, &[22, 3, 3, 0x3f, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        Exit::Link,
        "too long for the TLS handshake",
    ),
];

pub(crate) fn hostile_handshakes_to_a_source(rig: &mut Rig, ways: &Ways) {
    for (case, act, exit, says) in HANDSHAKES {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let acting = thread::spawn(move || {
            let stream = listener.accept().unwrap().0;
            let mut rest = stream.try_clone().unwrap();
            act(stream);
            if case == "hangs up" {
                let _ = rest.shutdown(std::net::Shutdown::Both);
            }
            let _ = rest.read_to_end(&mut Vec::new());
        });
        let options = [&["--peer-timeout", PEER_TIMEOUT][..], &ways.options(Way::Protected)].concat();
        let since = Instant::now();
        let sent = rig.send(&address, &options).wait();
        soon(since, if exit == Exit::Peer { BOUND } else { BOUND + WAITED }, case);
        let error = sent.error();
        println!("a destination that {case}: {error}");
        assert_eq!(sent.code, Some(exit as i32), "{case}: {error}");
        assert!(error.contains(says), "{case}: expected `{says}` in: {error}");
        assert_eq!(rig.state(), VmState::Running, "{case}");
        acting.join().unwrap();
    }
}

/// What a hostile source does with a new connection. A `pagewarp receive` waits on, and serves who comes next.
type SourceCase = (&'static str, fn(&mut dyn Stream));

const SOURCES: [SourceCase; 9] = [
    ("opens, and says nothing more", |s| hear(s, &opening(0, 1, 0))),
    ("opens, and breaks off", |s| {
        hear(s, &opening(0, 1, 0));
        let _ = s.shutdown();
    }),
    ("drips its opening", |s| s_drip(s, &opening(0, 1, 0))),
    ("drips the head of a piece", |s| {
        hear(s, &opening(0, 1, 0));
        s_drip(s, &piece(0, 64));
    }),
    ("confirms for ever", |s| {
        hear(s, &opening(0, 1, 0));
        while s.write_all(&piece(1, 0)).is_ok() {
            thread::sleep(Duration::from_millis(100));
        }
    }),
    ("sends pieces of 4 EiB", |s| hear(s, &[opening(0, 1, 0), piece(0, 1 << 62)].concat())),
    ("resumes what it never had", |s| hear(s, &opening(1, 1, 1 << 40))),
    ("abandons what it never had", |s| hear(s, &opening(2, 1, 0))),
    ("wishes what cannot be", |s| hear(s, &opening(9, 1, 0))),
];

/// Says something and hears a part of the answer, if there is any.
fn hear(stream: &mut dyn Stream, bytes: &[u8]) {
    let _ = stream.write_all(bytes);
    let _ = stream.wait_readable(Duration::from_millis(500));
}

fn s_drip(stream: &mut dyn Stream, bytes: &[u8]) {
    for byte in bytes {
        if stream.write_all(&[*byte]).is_err() {
            return;
        }
        thread::sleep(Duration::from_millis(300));
    }
}

#[test]
fn a_receiver_serves_those_who_come_after_hostile_links() {
    let ways = Ways::new();
    let all = Way::BOTH.into_iter().flat_map(|way| SOURCES.map(|case| (way, case)));
    each(all, |(way, (case, act))| {
        let name = format!("a source that {case} ({way:?})");
        let options = match way {
            Way::Plain => vec!["--resume-timeout", "60"],
            Way::Protected => vec!["--resume-timeout", "60", "--tls-dir", ways.dir()],
        };
        let mut receiver = Receiver::with(&options);
        let mut hostile: Box<dyn Stream> = match way {
            Way::Plain => Box::new(TcpStream::connect(&receiver.address).unwrap()),
            Way::Protected => ways.tls(&receiver.address).connect().unwrap(),
        };
        let mut handle = hostile.try_clone_stream().unwrap();
        let acting = thread::spawn(move || act(&mut *hostile));
        thread::sleep(Duration::from_millis(300));
        // Somebody honest comes meanwhile.
        let since = Instant::now();
        let stream: Box<dyn Stream> = match way {
            Way::Plain => Box::new(TcpStream::connect(&receiver.address).unwrap()),
            Way::Protected => ways.stream(way, &receiver.address).unwrap(),
        };
        let honest = Peer::over(stream).greeted();
        soon(since, BOUND, &name);
        assert!(receiver.is_alive(), "{name}");
        // What the hostile one gets is turned away as well in time.
        let _ = handle.set_timeouts(Some(BOUND), Some(BOUND));
        let since = Instant::now();
        let _ = io::copy(&mut handle, &mut io::sink());
        soon(since, 2 * BOUND, &name);
        let since = Instant::now();
        honest.hang_up();
        let _ = handle.shutdown();
        acting.join().unwrap();
        let (code, error) = receiver.failed(&name, since);
        assert_eq!(code, Exit::Link as i32, "{name}: {error}");
    });
}

#[test]
fn a_stolen_name_of_a_connection_is_of_no_use_within_tls() {
    let ways = Ways::new();
    let receiver = Receiver::with(&["--resume-timeout", "60", "--tls-dir", ways.dir()]);
    let mut victim = ways.tls(&receiver.address).connect().unwrap();
    let ask = |stream: &mut dyn Stream, bytes: &[u8]| {
        stream.set_timeouts(Some(PATIENCE), Some(PATIENCE)).unwrap();
        stream.write_all(bytes).unwrap();
        let mut answer = [0; 24];
        stream.read_exact(&mut answer).unwrap();
        answer[5]
    };
    assert_eq!(ask(&mut *victim, &opening(0, 3, 0)), 0, "go");
    let hello = {
        let mut bytes = Vec::new();
        let hello = Message::Hello(Hello::new(Role::Control, SESSION));
        pagewarp_wire::FrameWriter::new().control(&hello, &mut bytes).unwrap();
        bytes
    };
    victim.write_all(&[piece(0, hello.len() as u64), hello].concat()).unwrap();
    victim.read_exact(&mut [0; 12]).unwrap();
    // Going on with it, giving it up, and opening it again, by somebody with another certificate of the same CA.
    for wish in [1, 2, 0] {
        let mut thief = ways.other_tls(&receiver.address).connect().unwrap();
        assert_eq!(ask(&mut *thief, &opening(wish, 3, 0)), 1, "over");
    }
    assert!(receiver.log().contains("somebody else wants to go on with a connection"), "{}", receiver.log());
    // It is there as it was: the owner breaks the rules, and is told so on it.
    let since = Instant::now();
    victim.write_all(&piece(7, 7)).unwrap();
    let (code, error) = receiver.failed("a victim", since);
    assert!(code == Exit::Peer as i32 && error.contains("where a piece"), "{error}");
}
