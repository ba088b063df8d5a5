//! What somebody hears who has proved nothing, certificates that are renewed, and destinations that are not one.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use pagewarp_engine::transport::{Acceptor, Connector, OneDestination, Stream, TcpAcceptor, TcpConnector};
use pagewarp_net::lasting::{LastingAcceptor, LastingConnector};
use pagewarp_net::tls::{FileNames, TlsAcceptor, TlsConnector};
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::version::TLS13;
use rustls::{ClientConfig, ClientConnection, RootCertStore};

use crate::relay::Relay;
use crate::support::{CLIENT, Ca, PATIENCE, SERVER, Set, When, connect, refused};

#[path = "support/relay.rs"]
mod relay;
mod support;

/// A client of some other program, with this certificate or none. Returns what it was told inside TLS, and how that ended.
fn probe(address: SocketAddr, ca: &Ca, pair: Option<(String, String)>) -> (Vec<u8>, String) {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.pem().as_bytes()).unwrap()).unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match pair {
        None => builder.with_no_client_auth(),
        Some((cert, key)) => {
            let cert = CertificateDer::from_pem_slice(cert.as_bytes()).unwrap();
            let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
            builder.with_client_auth_cert(vec![cert], key).unwrap()
        }
    };
    config.alpn_protocols = vec![b"pagewarp/1".to_vec()];
    let mut tls = ClientConnection::new(Arc::new(config), "localhost".try_into().unwrap()).unwrap();
    let mut socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut told = Vec::new();
    let ended = rustls::Stream::new(&mut tls, &mut socket).read_to_end(&mut told);
    (told, ended.map_or_else(|error| error.to_string(), |_| "in order".to_owned()))
}

#[test]
fn whoever_has_proved_nothing_hears_nothing() {
    let ca = Ca::new();
    let set = Set::new(&ca);
    let acceptor = set.acceptor(&[]);
    let address = acceptor.local_addr().unwrap();
    let strangers = || {
        [
            None,
            Some(Ca::new().sign(&["source.example"], CLIENT, When::Now)),
            Some(ca.sign(&["source.example"], CLIENT, When::Past)),
        ]
    };
    let done = AtomicBool::new(false);
    let ask = || strangers().map(|pair| probe(address, &ca, pair));
    let all = thread::scope(|scope| {
        // One after another: whether a session is under way makes no difference.
        let asking = scope.spawn(|| {
            let before = ask();
            let near = set.connector(address, "localhost").connect().unwrap();
            let during = ask();
            done.store(true, SeqCst);
            drop(near);
            [before, during]
        });
        let mut accepted = Vec::new();
        while !done.load(SeqCst) && !asking.is_finished() {
            accepted.extend(acceptor.accept(Duration::from_millis(50)).ok());
        }
        assert_eq!(accepted.len(), 1, "nobody but the source is accepted");
        asking.join().unwrap()
    });
    let [before, during] = all;
    assert_eq!(before, during);
    for (told, ended) in before {
        assert_eq!(told, b"", "{ended}");
        // An alert of TLS, and no word of pagewarp.
        assert!(ended.contains("alert"), "{ended}");
    }
}

#[test]
fn certificates_are_renewed_between_migrations() {
    let ca = Ca::new();
    let set = Set::new(&ca);
    let acceptor = LastingAcceptor::new(Box::new(set.acceptor(&["source.example"])), PATIENCE).unwrap();
    let address: SocketAddr = acceptor.local().parse().unwrap();
    let connector = LastingConnector::new(Arc::new(set.connector(address, "localhost")), PATIENCE);
    let both = || {
        thread::scope(|scope| {
            let near = scope.spawn(|| connector.connect().unwrap());
            let far = acceptor.accept(PATIENCE).unwrap();
            let near = near.join().unwrap();
            (near.peer_identity().unwrap(), far.peer_identity().unwrap())
        })
    };
    let first = both();
    set.server(ca.sign(&["localhost"], SERVER, When::Now));
    set.client(ca.sign(&["source.example", "renewed.example"], CLIENT, When::Now));
    assert_eq!(both(), first, "not before somebody says that it is time");
    acceptor.renew();
    connector.renew();
    let second = both();
    assert_ne!(second.0, first.0);
    assert!(second.1.contains("renewed.example"), "{second:?}");
    assert_eq!(both(), second);

    // A key that does not belong to it, half a file, none: what there was before goes on.
    let (cert, key) = ca.sign(&["localhost"], SERVER, When::Now);
    let spoil: [&dyn Fn(); 3] = [
        &|| set.write(FileNames::SERVER_CERT, &cert),
        &|| set.write(FileNames::SERVER_CERT, &cert[..cert.len() / 2]),
        &|| fs::remove_file(set.path(FileNames::SERVER_CERT)).unwrap(),
    ];
    for spoil in spoil {
        spoil();
        acceptor.renew();
        acceptor.renew();
        assert_eq!(both(), second);
    }
    set.server((cert, key));
    acceptor.renew();
    let third = both();
    assert_ne!(third.0, second.0);

    // Another CA, by renaming a file: what it has not signed is not welcome any more.
    let other = Ca::new();
    set.write("new.pem", &other.pem());
    fs::rename(set.path("new.pem"), set.path(FileNames::CA_CERT)).unwrap();
    acceptor.renew();
    let error = thread::scope(|scope| {
        let near = scope.spawn(|| connector.connect().err().expect("a refusal"));
        while !near.is_finished() {
            assert!(acceptor.accept(Duration::from_millis(50)).is_err());
        }
        near.join().unwrap().to_string()
    });
    assert!(error.contains("client-cert.pem"), "{error}");
}

#[test]
fn a_handshake_with_who_is_allowed_no_more_is_refused_after_a_renewal() {
    let ca = Ca::new();
    let set = Set::new(&ca);
    let acceptor = set.acceptor(&["source.example"]);
    let connector = set.connector(acceptor.local_addr().unwrap(), "localhost");
    connect(&acceptor, &connector);
    set.client(ca.sign(&["other.example"], CLIENT, When::Now));
    acceptor.renew();
    connector.renew();
    let said = refused(&acceptor, &connector);
    assert!(said.contains("--allow-peer"), "whom to allow is no matter of files: {said}");
}

/// Two destinations with certificates of one CA for one name, and a source.
fn two() -> (Arc<TlsAcceptor>, Arc<TlsAcceptor>, Set) {
    let ca = Ca::new();
    let (one, other) = (Set::new(&ca), Set::new(&ca));
    (Arc::new(one.acceptor(&[])), Arc::new(other.acceptor(&[])), one)
}

fn tls(set: &Set, address: SocketAddr) -> TlsConnector {
    TlsConnector::new(TcpConnector { address, timeout: PATIENCE }, &set.tls(), "localhost").unwrap()
}

#[test]
fn a_second_host_with_a_good_certificate_is_not_the_destination() {
    let (one, other, set) = two();
    let relay = Relay::start(one.local_addr().unwrap(), 1, other.local_addr().unwrap());
    let connector = tls(&set, relay.address);
    let destination = OneDestination::default();
    let far = thread::spawn(move || one.accept(PATIENCE).unwrap());
    let first = connector.connect().unwrap();
    destination.check(&*first).unwrap();
    destination.check(&*first).unwrap();
    let _far = far.join().unwrap();
    let far = thread::spawn(move || other.accept(PATIENCE).unwrap());
    let second = connector.connect().unwrap();
    let why = destination.check(&*second).unwrap_err().to_string();
    for word in ["another host than the first one", "load balancer", "SHA-256"] {
        assert!(why.contains(word), "{why}");
    }
    drop(far.join().unwrap());
}

#[test]
fn a_connection_goes_on_with_the_same_host_only() {
    let (one, other, set) = two();
    let one = LastingAcceptor::new(Box::new(Shared(one)), PATIENCE).unwrap();
    let there = other.clone();
    let elsewhere = LastingAcceptor::new(Box::new(Shared(there)), PATIENCE).unwrap();
    let first: SocketAddr = one.local().parse().unwrap();
    let relay = Relay::start(first, 1, other.local_addr().unwrap());
    let connector = LastingConnector::new(Arc::new(tls(&set, relay.address)), PATIENCE);
    let mut near = connector.connect().unwrap();
    let mut far = one.accept(PATIENCE).unwrap();
    near.write_all(b"page").unwrap();
    far.read_exact(&mut [0; 4]).unwrap();
    assert_eq!(connector.outage(), None);
    relay.cut();
    let error = near.read(&mut [0]).unwrap_err();
    let why = error.to_string();
    assert!(why.contains("somebody else than before") && why.contains("SHA-256"), "{why}");
    let nothing =
        elsewhere.accept(Duration::from_millis(100)).err().expect("nothing was said to the other one");
    assert_eq!(nothing.kind(), ErrorKind::TimedOut);
}

/// An acceptor that the test keeps a handle to.
struct Shared(Arc<TlsAcceptor>);

impl Acceptor for Shared {
    fn accept(&self, timeout: Duration) -> std::io::Result<Box<dyn Stream>> {
        self.0.accept(timeout)
    }

    fn local(&self) -> String {
        self.0.local()
    }
}

#[test]
fn an_outage_shows_while_it_lasts() {
    let tcp = TcpAcceptor::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let first = tcp.local_addr().unwrap();
    let acceptor = LastingAcceptor::new(Box::new(tcp), PATIENCE).unwrap();
    // Whoever comes again finds somebody who does not answer.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let relay = Relay::start(first, 1, silent.local_addr().unwrap());
    let connector = LastingConnector::new(
        Arc::new(TcpConnector { address: relay.address, timeout: PATIENCE }),
        Duration::from_secs(50),
    );
    let near = connector.connect().unwrap();
    let _far = acceptor.accept(PATIENCE).unwrap();
    assert_eq!(connector.outage(), None);
    relay.cut();
    let since = std::time::Instant::now();
    let outage = loop {
        if let Some(outage) = connector.outage() {
            break outage;
        }
        assert!(since.elapsed() < PATIENCE, "the break is never seen");
        thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(outage.most, Duration::from_secs(50));
    assert!(outage.lasts <= since.elapsed());
    near.shutdown().unwrap();
    assert_eq!(connector.outage(), None);
}
