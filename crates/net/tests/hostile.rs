//! Peers that break the rules of lasting connections, at either end, with TLS below and without.

use std::io::{self, ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use pagewarp_engine::error::MigrationError;
use pagewarp_engine::transport::{Acceptor, Connector, Stream, TcpAcceptor, TcpConnector};
use pagewarp_net::lasting::{LastingAcceptor, LastingConnector};
use pagewarp_net::tls::TlsConnector;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use crate::support::{CLIENT, Ca, PATIENCE, Set, When};

mod support;

/// Within so long everything ends in an error, but for what is waited for longer on purpose.
const BOUND: Duration = Duration::from_secs(5);
/// How long a connection may be broken here.
const MENDING: Duration = Duration::from_secs(1);

/// What lies below.
struct Below {
    /// With certificates of two sources, if with TLS.
    sets: Option<[Set; 2]>,
}

impl Below {
    fn both() -> [Below; 2] {
        let ca = Ca::new();
        let sets = [Set::new(&ca), Set::new(&ca)];
        sets[1].client(ca.sign(&["thief.example"], CLIENT, When::Now));
        [Below { sets: None }, Below { sets: Some(sets) }]
    }

    fn name(&self) -> &'static str {
        if self.sets.is_some() { "TLS" } else { "plain" }
    }

    fn listen(&self) -> (Box<dyn Acceptor>, SocketAddr) {
        let tcp = TcpAcceptor::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = tcp.local_addr().unwrap();
        match &self.sets {
            None => (Box::new(tcp), address),
            Some(sets) => {
                let server = sets[0].tls().server(Vec::new()).unwrap();
                (Box::new(pagewarp_net::tls::TlsAcceptor::new(tcp, server).unwrap()), address)
            }
        }
    }

    fn connector(&self, address: SocketAddr) -> Arc<dyn Connector> {
        match &self.sets {
            None => Arc::new(TcpConnector { address, timeout: PATIENCE }),
            Some(sets) => Arc::new(sets[0].connector(address, "localhost")),
        }
    }

    /// Somebody else whom the destination trusts.
    fn thief(&self, address: SocketAddr) -> Option<TlsConnector> {
        self.sets.as_ref().map(|sets| sets[1].connector(address, "localhost"))
    }

    fn acceptor(&self) -> (LastingAcceptor, SocketAddr) {
        let (below, address) = self.listen();
        (LastingAcceptor::new(below, PATIENCE).unwrap(), address)
    }
}

const OPEN: u8 = 0;
const RESUME: u8 = 1;
const ABANDON: u8 = 2;

/// An opening as in `docs/link-protocol.md`, of connection `number` of a group.
fn opening(wish: u8, number: u16, received: u64) -> Vec<u8> {
    let mut bytes = b"PWLK\x01".to_vec();
    bytes.extend([wish, 0, 0]);
    bytes.extend(b"fourteen bytes");
    bytes.extend(number.to_le_bytes());
    bytes.extend(received.to_le_bytes());
    bytes.extend((MENDING.as_millis() as u32).to_le_bytes());
    bytes.extend([0; 4]);
    bytes
}

fn go(received: u64) -> Vec<u8> {
    let mut bytes = b"PWLK\x01\0\0\0".to_vec();
    bytes.extend(received.to_le_bytes());
    bytes.extend(60_000u32.to_le_bytes());
    bytes.extend([0; 4]);
    bytes
}

const DATA: u8 = 0;
const CONFIRM: u8 = 1;
const CLOSE: u8 = 2;

fn piece(kind: u8, value: u64) -> Vec<u8> {
    let mut bytes = vec![kind, 0, 0, 0];
    bytes.extend(value.to_le_bytes());
    bytes
}

fn data(bytes: &[u8]) -> Vec<u8> {
    [piece(DATA, bytes.len() as u64), bytes.to_vec()].concat()
}

/// What is answered to these bytes on a new connection: *go* with so many bytes, *over*, or nothing.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Go(u64),
    Over,
    Nothing,
}

fn answer(stream: &mut dyn Stream) -> Answer {
    let mut bytes = [0; 24];
    match stream.read_exact(&mut bytes) {
        Ok(()) if bytes[5] == 0 => Answer::Go(u64::from_le_bytes(bytes[8..16].try_into().unwrap())),
        Ok(()) => Answer::Over,
        Err(_) => Answer::Nothing,
    }
}

fn ask(connector: &dyn Connector, bytes: &[u8]) -> (Box<dyn Stream>, Answer) {
    let mut stream = connector.connect().unwrap();
    stream.set_timeouts(Some(PATIENCE), Some(PATIENCE)).unwrap();
    let _ = stream.write_all(bytes);
    let answer = answer(&mut *stream);
    (stream, answer)
}

/// What the migration says of an error of a connection: a class, and words.
fn class(error: io::Error) -> (&'static str, String) {
    match MigrationError::of_connection("peer", "receiving", error) {
        MigrationError::Peer(what) => ("peer", what),
        MigrationError::Link { source, .. } => ("link", source.to_string()),
        other => ("other", other.to_string()),
    }
}

/// What a hostile source sends on a connection that is open, and what whoever reads at the destination is told: the class, and some words.
type Pieces = (&'static str, fn() -> Vec<u8>, &'static str, &'static str);

const PIECES: [Pieces; 8] = [
    ("no kind", || piece(3, 0), "peer", "where a piece"),
    ("reserved bytes", || vec![0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], "peer", "where a piece"),
    ("nothing", || piece(DATA, 0), "peer", "where a piece"),
    ("more than a piece may have", || piece(DATA, (4 << 20) + 1), "peer", "where a piece"),
    ("2⁶⁴ bytes", || piece(DATA, u64::MAX), "peer", "where a piece"),
    ("an end with a length", || piece(CLOSE, 1), "peer", "where a piece"),
    ("another protocol", || b"GET / HTTP/1.1\r\n\r\n".to_vec(), "peer", "where a piece"),
    ("confirmations that nothing was sent for", || piece(CONFIRM, 1 << 50), "peer", "bytes confirmed"),
];

#[test]
fn a_destination_says_what_is_wrong_with_a_piece() {
    for below in Below::both() {
        let (acceptor, address) = below.acceptor();
        let connector = below.connector(address);
        for (number, (case, bytes, kind, words)) in (0..).zip(PIECES) {
            let name = format!("{case} ({})", below.name());
            let (mut source, said) = ask(&*connector, &opening(OPEN, number, 0));
            assert_eq!(said, Answer::Go(0), "{name}");
            let mut far = acceptor.accept(PATIENCE).unwrap();
            far.set_timeouts(Some(PATIENCE), Some(PATIENCE)).unwrap();
            let since = Instant::now();
            source.write_all(&[data(b"x"), bytes()].concat()).unwrap();
            far.read_exact(&mut [0]).unwrap();
            // A confirmation is noticed by whoever writes, of whom there always is one: both ends say that they are alive.
            let error = loop {
                if case.starts_with("confirmations") {
                    let mut reading = far.try_clone_stream().unwrap();
                    thread::spawn(move || reading.read(&mut [0]));
                    thread::sleep(Duration::from_millis(50));
                    if let Err(error) = far.write_all(b"alive") {
                        break error;
                    }
                } else if let Err(error) = far.read(&mut [0]) {
                    break error;
                }
            };
            assert!(since.elapsed() < BOUND, "{name}");
            let (seen, why) = class(error);
            println!("{name}: {seen}: {why}");
            assert!(seen == kind && why.contains(words), "{name}: {seen}: {why}");
        }
    }
}

#[test]
fn openings_that_cannot_be_are_refused_and_the_connection_they_name_goes_on() {
    for below in Below::both() {
        let (acceptor, address) = below.acceptor();
        let connector = below.connector(address);
        let (mut source, said) = ask(&*connector, &opening(OPEN, 0, 0));
        assert_eq!(said, Answer::Go(0));
        let mut far = acceptor.accept(PATIENCE).unwrap();
        far.set_timeouts(Some(PATIENCE), Some(PATIENCE)).unwrap();
        source.write_all(&data(b"abc")).unwrap();
        far.read_exact(&mut [0; 3]).unwrap();
        far.write_all(b"12345").unwrap();
        let mut heard = [0; 12 + 5];
        source.read_exact(&mut heard).unwrap();
        assert_eq!(&heard[12..], b"12345");

        // Nobody has that name; it has been opened; no such wish; bytes that must not be.
        let mut wrong = opening(OPEN, 9, 0);
        wrong[39] = 1;
        for (bytes, expected) in [
            (opening(RESUME, 9, 0), Answer::Over),
            (opening(ABANDON, 9, 0), Answer::Over),
            (opening(OPEN, 0, 0), Answer::Over),
            (opening(OPEN, 8, 7), Answer::Nothing),
            (opening(7, 8, 0), Answer::Nothing),
            (wrong, Answer::Nothing),
        ] {
            let since = Instant::now();
            assert_eq!(ask(&*connector, &bytes).1, expected, "{bytes:02x?} ({})", below.name());
            assert!(since.elapsed() < BOUND);
        }
        // With TLS, whoever has stolen the name is not who has opened it.
        if let Some(thief) = below.thief(address) {
            for (wish, received) in [(RESUME, 5), (ABANDON, 0), (OPEN, 0)] {
                assert_eq!(ask(&thief, &opening(wish, 0, received)).1, Answer::Over, "wish {wish}");
            }
            source.write_all(&data(b"!")).unwrap();
            far.read_exact(&mut [0]).unwrap();
        }
        let received = 3 + u64::from(below.sets.is_some());
        // More than was sent, and no less than that.
        for impossible in [6, u64::MAX] {
            let (mut stream, said) = ask(&*connector, &opening(RESUME, 0, impossible));
            // Its own number comes with the answer, and then that connection ends. A second answer would be read as a piece.
            assert_eq!(said, Answer::Go(received));
            assert_eq!(answer(&mut *stream), Answer::Nothing);
        }
        // The connection is there for whoever has its name and says what can be: what was not received comes again.
        let (mut source, said) = ask(&*connector, &opening(RESUME, 0, 2));
        assert_eq!(said, Answer::Go(received));
        let mut again = [0; 12 + 3];
        source.read_exact(&mut again).unwrap();
        assert_eq!(&again[12..], b"345");
        // It has confirmed two bytes by that, and cannot take them back.
        let (_, said) = ask(&*connector, &opening(RESUME, 0, 1));
        assert_eq!(said, Answer::Go(received));
        let (mut source, said) = ask(&*connector, &opening(RESUME, 0, 5));
        assert_eq!(said, Answer::Go(received));
        source.write_all(&data(b"?")).unwrap();
        far.read_exact(&mut [0]).unwrap();
        // An opening that was recorded once says nothing that is true any more: its bytes are not taken again.
        let (mut replayed, said) = ask(&*connector, &[opening(OPEN, 0, 0), data(b"abc")].concat());
        assert_eq!(said, Answer::Over);
        let _ = replayed.read_to_end(&mut Vec::new());
        source.write_all(&data(b"z")).unwrap();
        let mut seen = [0];
        far.read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"z");
    }
}

#[test]
fn a_source_that_ends_without_saying_so_is_waited_for_as_long_as_it_said() {
    for below in Below::both() {
        let (acceptor, address) = below.acceptor();
        let connector = below.connector(address);
        for by_reset in [true, false] {
            let (mut source, _) = ask(&*connector, &opening(OPEN, u16::from(by_reset), 0));
            let mut far = acceptor.accept(PATIENCE).unwrap();
            source.write_all(&data(b"x")).unwrap();
            far.read_exact(&mut [0]).unwrap();
            let since = Instant::now();
            if by_reset { source.reset() } else { source.shutdown() }.unwrap();
            let (seen, why) = class(far.read(&mut [0]).unwrap_err());
            assert!(seen == "link" && why.contains("could not be mended in 1s"), "{seen}: {why}");
            assert!((MENDING..BOUND).contains(&since.elapsed()));
        }
    }
}

#[test]
fn openings_that_drip_or_do_not_come_are_ended() {
    for below in Below::both() {
        let (acceptor, address) = below.acceptor();
        let connector = below.connector(address);
        let mut dripping = connector.connect().unwrap();
        let mut silent = connector.connect().unwrap();
        let since = Instant::now();
        thread::scope(|scope| {
            scope.spawn(move || {
                for byte in opening(OPEN, 1, 0) {
                    if dripping.write_all(&[byte]).is_err() {
                        break;
                    }
                    thread::sleep(Duration::from_millis(300));
                }
                let _ = dripping.read(&mut [0]);
            });
            scope.spawn(move || silent.read(&mut [0]).map_or(0, |n| n));
            // Meanwhile others are served.
            let (_, said) = ask(&*connector, &opening(OPEN, 2, 0));
            assert_eq!(said, Answer::Go(0));
        });
        assert!(since.elapsed() < 2 * BOUND, "{}: {:?}", below.name(), since.elapsed());
        drop(acceptor);
    }
}

/// What a hostile destination does with the first connection, and with all others, and what the source is told: the class, and some words.
type Destination = (&'static str, fn(&mut dyn Stream), fn(&mut dyn Stream), &'static str, &'static str);

const DESTINATIONS: [Destination; 15] = [
    (
        "is a web server",
        |s| say(s, b"HTTP/1.1 400 Bad Request\r\n\r\n"),
        gone,
        "peer",
        "in answer to an opening",
    ),
    ("is silent", |s| say(s, b""), gone, "link", "no answer to a new connection"),
    ("drips its answer", |s| drip(s, &go(0)), gone, "link", "no answer to a new connection"),
    ("hangs up", |s| drop(s.shutdown()), gone, "link", "unexpected end of file"),
    ("knows the connection", |s| say(s, &go(5)), gone, "peer", "as if it were an old one"),
    (
        "has a verdict of its own",
        |s| say(s, &[&b"PWLK\x01\x05"[..], &[0; 18]].concat()),
        gone,
        "peer",
        "verdict 5",
    ),
    ("has pieces of nothing", |s| say(s, &[go(0), piece(DATA, 0)].concat()), gone, "peer", "where a piece"),
    (
        "has pieces that are too long",
        |s| say(s, &[go(0), piece(DATA, 1 << 40)].concat()),
        gone,
        "peer",
        "where a piece",
    ),
    (
        "confirms what was not sent",
        |s| say(s, &[go(0), piece(CONFIRM, 1 << 40)].concat()),
        gone,
        "peer",
        "1099511627776 bytes confirmed",
    ),
    (
        "takes back what it confirmed",
        |s| {
            say(s, &go(0));
            let _ = s.read_exact(&mut [0; 12 + 1000]);
            let _ = s.write_all(&[piece(CONFIRM, 1000), data(b"."), piece(CONFIRM, 999)].concat());
        },
        gone,
        "peer",
        "999 bytes confirmed",
    ),
    (
        "goes on with what was not sent",
        broken,
        |s| say(s, &go(1 << 40)),
        "peer",
        "the other end has 1099511627776 bytes",
    ),
    (
        "goes on with less than it confirmed",
        |s| {
            say(s, &go(0));
            let _ = s.read_exact(&mut [0; 12 + 1000]);
            let _ = s.write_all(&[piece(CONFIRM, 1000), data(b".")].concat());
            thread::sleep(Duration::from_millis(300));
            let _ = s.reset();
        },
        |s| say(s, &go(5)),
        "peer",
        "the other end has 5 bytes",
    ),
    (
        "gives up in between",
        broken,
        |s| say(s, &[&b"PWLK\x01\x01"[..], &[0; 18]].concat()),
        "link",
        "given the migration up",
    ),
    ("never comes back", broken, |s| drop(s.shutdown()), "link", "could not be mended in 1s"),
    (
        "always comes back, and breaks before anything gets through",
        broken,
        |s| {
            say(s, &go(0));
            let _ = s.reset();
        },
        "link",
        "could not be mended in 1s",
    ),
];

/// Reads an opening and says this.
fn say(stream: &mut dyn Stream, bytes: &[u8]) {
    let _ = stream.read_exact(&mut [0; 40]);
    let _ = stream.write_all(bytes);
}

fn drip(stream: &mut dyn Stream, bytes: &[u8]) {
    let _ = stream.read_exact(&mut [0; 40]);
    for byte in bytes {
        if stream.write_all(&[*byte]).is_err() {
            return;
        }
        thread::sleep(Duration::from_millis(400));
    }
}

/// Is the last one.
fn gone(stream: &mut dyn Stream) {
    let _ = stream.shutdown();
}

/// Agrees, and breaks.
fn broken(stream: &mut dyn Stream) {
    say(stream, &go(0));
    let _ = stream.read_exact(&mut [0; 12]);
    let _ = stream.reset();
}

#[test]
fn a_source_says_what_is_wrong_with_its_destination() {
    for below in Below::both() {
        thread::scope(|scope| {
            // Most of their time is spent waiting.
            for (case, first, others, kind, words) in DESTINATIONS {
                let below = &below;
                scope.spawn(move || {
                    let name = format!("a destination that {case} ({})", below.name());
                    let (acceptor, address) = below.listen();
                    let is_over = Arc::new(AtomicBool::new(false));
                    let until = is_over.clone();
                    let hostile = thread::spawn(move || {
                        let mut kept = Vec::new();
                        let mut stream = acceptor.accept(PATIENCE).unwrap();
                        first(&mut *stream);
                        kept.push(stream);
                        while !until.load(SeqCst) {
                            if let Ok(mut stream) = acceptor.accept(MENDING / 10) {
                                others(&mut *stream);
                                kept.push(stream);
                            }
                        }
                    });
                    let connector = LastingConnector::new(below.connector(address), MENDING);
                    let since = Instant::now();
                    let error = talk(&connector).unwrap_err();
                    assert!(since.elapsed() < BOUND + MENDING, "{name}: {:?}", since.elapsed());
                    let (seen, why) = class(error);
                    println!("{name}: {seen}: {why}");
                    assert!(seen == kind && why.contains(words), "{name}: {seen}: {why}");
                    is_over.store(true, SeqCst);
                    hostile.join().unwrap();
                });
            }
        });
    }
}

/// Does what a source does, until that is of no use any more.
fn talk(connector: &LastingConnector) -> io::Result<()> {
    let mut stream = connector.connect()?;
    stream.set_timeouts(Some(BOUND), Some(BOUND))?;
    let mut reading = stream.try_clone_stream()?;
    let reader = thread::spawn(move || {
        loop {
            match reading.read(&mut [0; 100]) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error) => return Err(error),
            }
        }
    });
    loop {
        stream.write_all(&[1; 1000])?;
        if reader.is_finished() {
            return reader.join().unwrap();
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// Somebody who knows the CA and the protocol, and has no certificate of his own, or begins with what he may not.
#[test]
fn a_source_without_a_certificate_is_refused() {
    let ca = Ca::new();
    let set = Set::new(&ca);
    let acceptor = set.acceptor(&[]);
    let address = acceptor.local_addr().unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.pem().as_bytes()).unwrap()).unwrap();
    for protocol in ["pagewarp/1", "h2"] {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider);
        let config = config.with_protocol_versions(&[&rustls::version::TLS13]).unwrap();
        let mut config = config.with_root_certificates(roots.clone()).with_no_client_auth();
        config.alpn_protocols = vec![protocol.into()];
        let since = Instant::now();
        thread::scope(|scope| {
            let accepting = scope.spawn(|| acceptor.accept(MENDING));
            let name = "localhost".try_into().unwrap();
            let mut tls = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
            let mut tcp = std::net::TcpStream::connect(address).unwrap();
            tcp.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut stream = rustls::Stream::new(&mut tls, &mut tcp);
            // What he says at once, before he can know that he is refused, is not for anybody.
            let _ = stream.write_all(&opening(OPEN, 0, 0));
            let error = stream.read_exact(&mut [0]).unwrap_err().to_string();
            let alert = if protocol == "h2" { "NoApplicationProtocol" } else { "CertificateRequired" };
            assert!(error.contains(alert), "{error}");
            assert!(accepting.join().unwrap().is_err(), "nobody is accepted");
        });
        assert!(since.elapsed() < BOUND);
    }
}
