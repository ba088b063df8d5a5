//! Who gets through, and what those hear who do not.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::thread;

use pagewarp_engine::transport::{Acceptor, Connector};
use pagewarp_net::tls::certs::{LabError, LabSet, make};
use pagewarp_net::tls::{FileNames, TlsDir, TlsError};

use crate::support::{CLIENT, Ca, MOMENT, PATIENCE, SERVER, Set, When, connect, refused};

mod support;

fn says(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "`{word}` is missing in: {message}");
    }
}

#[test]
fn both_ends_know_who_the_other_one_is() {
    let set = Set::new(&Ca::new());
    let acceptor = set.acceptor(&[]);
    let address = acceptor.local_addr().unwrap();
    for host in ["localhost", "127.0.0.1"] {
        let connector = set.connector(address, host);
        let (near, far) = connect(&acceptor, &connector);
        let (server, client) = (near.peer_identity().unwrap(), far.peer_identity().unwrap());
        says(&server, &["localhost", "SHA-256 "]);
        says(&client, &["source.example", "common source.example", "SHA-256 "]);
        let (_, again) = connect(&acceptor, &connector);
        assert_eq!(again.peer_identity().unwrap(), client, "it is the same certificate");
        assert!(near.round_trip().is_some());
    }
    // Another certificate with the same names is another peer.
    let ca = Ca::new();
    let other = Set::new(&ca);
    let acceptor = other.acceptor(&[]);
    let connector = other.connector(acceptor.local_addr().unwrap(), "localhost");
    let first = connect(&acceptor, &connector).1.peer_identity();
    other.client(ca.sign(&["source.example"], CLIENT, When::Now));
    let connector = other.connector(acceptor.local_addr().unwrap(), "localhost");
    assert_ne!(connect(&acceptor, &connector).1.peer_identity(), first);
}

#[test]
fn a_destination_that_cannot_be_trusted_is_not() {
    let ca = Ca::new();
    let set = Set::new(&ca);
    let check = |host: &str, words: &[&str]| {
        let acceptor = set.acceptor(&[]);
        let message = refused(&acceptor, &set.connector(acceptor.local_addr().unwrap(), host));
        says(&message, &["the certificate of the destination"]);
        says(&message, words);
    };
    check("db1.example", &["not for `db1.example`", "`localhost`", "`127.0.0.1`", "--tls-hostname"]);
    check("127.0.0.9", &["not for `127.0.0.9`"]);
    set.server(ca.sign(&["localhost"], SERVER, When::Past));
    check("localhost", &["expired at ", "the clock of this host says"]);
    set.server(ca.sign(&["localhost"], SERVER, When::Future));
    check("localhost", &["not valid before ", "the clock of this host says"]);
    set.server(ca.sign(&["localhost"], CLIENT, When::Now));
    check("localhost", &["not meant for a TLS server"]);
    set.server(ca.sign(&[], SERVER, When::Now));
    check("localhost", &["no alternative names"]);
    let stranger = Ca::new();
    set.server(stranger.sign(&["localhost"], SERVER, When::Now));
    let acceptor = set.acceptor(&[]);
    let message = refused(&acceptor, &set.connector(acceptor.local_addr().unwrap(), "localhost"));
    says(&message, &["the certificate of the destination", "CA", "ca-cert.pem"]);
}

#[test]
fn a_source_that_is_not_trusted_hears_why() {
    let ca = Ca::new();
    let set = Set::new(&ca);
    let check = |words: &[&str]| {
        let acceptor = set.acceptor(&[]);
        let message = refused(&acceptor, &set.connector(acceptor.local_addr().unwrap(), "localhost"));
        says(&message, &["the destination", "client-cert.pem"]);
        says(&message, words);
    };
    set.client(ca.sign(&["source.example"], CLIENT, When::Past));
    check(&["expired or is not valid yet"]);
    set.client(ca.sign(&["source.example"], CLIENT, When::Future));
    check(&["expired or is not valid yet"]);
    set.client(ca.sign(&["source.example"], SERVER, When::Now));
    check(&["meant for the end"]);
    // Of another CA with another name, and of one with the same name.
    set.client(Ca::new().sign(&["source.example"], CLIENT, When::Now));
    check(&[]);
    let lab = Set::new(&ca);
    let names = LabSet { hosts: vec!["localhost".into()], client: "c".into(), days: 1 };
    make(lab.dir.path(), &names, true).unwrap();
    let text = |name| fs::read_to_string(lab.path(name)).unwrap();
    set.client((text(FileNames::CLIENT_CERT), text(FileNames::CLIENT_KEY)));
    check(&["does not trust the CA"]);
}

#[test]
fn only_sources_that_are_allowed_are_accepted() {
    let ca = Ca::new();
    let set = Set::new(&ca);
    for allowed in ["source.example", "SOURCE.example", "common source.example"] {
        let acceptor = set.acceptor(&["other.example", allowed]);
        connect(&acceptor, &set.connector(acceptor.local_addr().unwrap(), "localhost"));
    }
    let acceptor = set.acceptor(&["other.example"]);
    let message = refused(&acceptor, &set.connector(acceptor.local_addr().unwrap(), "localhost"));
    says(&message, &["the destination refused this host", "source.example", "--allow-peer"]);
    assert!(!message.contains("other.example"), "who is allowed is nobody else's business: {message}");
}

#[test]
fn wrong_files_are_named() {
    let ca = Ca::new();
    let both = |set: &Set| {
        let tcp = pagewarp_engine::transport::TcpConnector {
            address: ([127, 0, 0, 1], 1).into(),
            timeout: PATIENCE,
        };
        let client = pagewarp_net::tls::TlsConnector::new(tcp, &set.tls(), "localhost").map(drop);
        (client, set.tls().server(Vec::new()).map(drop))
    };
    for (name, at_client, at_server) in [
        (FileNames::CA_CERT, true, true),
        (FileNames::SERVER_CERT, false, true),
        (FileNames::SERVER_KEY, false, true),
        (FileNames::CLIENT_CERT, true, false),
        (FileNames::CLIENT_KEY, true, false),
    ] {
        for content in [None, Some("nothing of use")] {
            let set = Set::new(&ca);
            match content {
                None => fs::remove_file(set.path(name)).unwrap(),
                Some(text) => set.write(name, text),
            }
            let (client, server) = both(&set);
            for (result, fails) in [(client, at_client), (server, at_server)] {
                assert_eq!(result.is_err(), fails, "{name}");
                if let Err(error) = result {
                    says(&error.to_string(), &[name]);
                    match content {
                        None => assert!(matches!(error, TlsError::File { .. }), "{error}"),
                        Some(_) => assert!(matches!(error, TlsError::Content { .. }), "{error}"),
                    }
                }
            }
        }
    }
    let set = Set::new(&ca);
    set.write(FileNames::SERVER_KEY, &ca.sign(&["x"], SERVER, When::Now).1);
    let error = set.tls().server(Vec::new()).unwrap_err();
    assert!(matches!(error, TlsError::Mismatch { .. }), "{error}");
    says(&error.to_string(), &["server-key.pem", "server-cert.pem"]);
    // libvirt's users have keys that a group can read.
    let set = Set::new(&ca);
    fs::set_permissions(set.path(FileNames::SERVER_KEY), fs::Permissions::from_mode(0o644)).unwrap();
    set.tls().server(Vec::new()).unwrap();
}

#[test]
fn plaintext_on_either_side_is_told_as_that() {
    let set = Set::new(&Ca::new());
    let acceptor = set.acceptor(&[]);
    let address = acceptor.local_addr().unwrap();
    let mut plain = TcpStream::connect(address).unwrap();
    plain.write_all(b"PGWP and more of a frame").unwrap();
    assert!(acceptor.accept(MOMENT).is_err());
    plain.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer);
    assert!(pagewarp_engine::transport::speaks_tls(&answer), "an alert: {answer:?}");
    assert!(answer.len() < 24, "and nothing else: {answer:?}");
    // A destination that speaks first, one that ends the connection, and one that takes no notice.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let connector = set.connector(listener.local_addr().unwrap(), "localhost");
    let answered = |answer: &[u8]| {
        thread::scope(|scope| {
            let near = scope.spawn(|| connector.connect().err().unwrap().to_string());
            let mut far = listener.accept().unwrap().0;
            far.write_all(answer).unwrap();
            let _ = far.read(&mut [0; 1024]);
            drop(far);
            near.join().unwrap()
        })
    };
    says(&answered(b"PGWP"), &["the destination does not speak TLS", "PGWP", "--tls-dir"]);
    says(&answered(b""), &["may not speak TLS", "--tls-dir"]);
}

#[test]
fn a_lab_set_works_and_is_not_overwritten() {
    let place = tempfile::TempDir::new().unwrap();
    let dir = place.path().join("new/tls");
    let set = LabSet {
        hosts: vec!["localhost".into(), "127.0.0.1".into(), "[::1]".into()],
        client: "alice".into(),
        days: 3,
    };
    let files = make(&dir, &set, false).unwrap();
    assert_eq!(files.len(), 5);
    for file in &files {
        let mode = fs::metadata(file).unwrap().permissions().mode() & 0o777;
        let is_key = file.to_string_lossy().ends_with("-key.pem");
        assert_eq!(mode & 0o077 == 0, is_key, "{} has mode {mode:o}", file.display());
    }
    let before = fs::read(&files[0]).unwrap();
    fs::remove_file(&files[1]).unwrap();
    assert!(matches!(make(&dir, &set, false), Err(LabError::Exists(_))));
    assert_eq!(fs::read(&files[0]).unwrap(), before);
    assert!(!files[1].exists());
    make(&dir, &set, true).unwrap();
    assert_ne!(fs::read(&files[0]).unwrap(), before);
    let tls = TlsDir::new(&dir);
    let tcp = pagewarp_engine::transport::TcpAcceptor::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let acceptor =
        pagewarp_net::tls::TlsAcceptor::new(tcp, tls.server(vec!["alice".into()]).unwrap()).unwrap();
    for host in ["localhost", "127.0.0.1", "::1"] {
        let tcp = pagewarp_engine::transport::TcpConnector {
            address: acceptor.local_addr().unwrap(),
            timeout: PATIENCE,
        };
        let connector = pagewarp_net::tls::TlsConnector::new(tcp, &tls, host).unwrap();
        connect(&acceptor, &connector);
    }
}

#[test]
fn handshakes_that_do_not_get_on_keep_nobody_out() {
    let set = Set::new(&Ca::new());
    let acceptor = set.acceptor(&[]);
    let address = acceptor.local_addr().unwrap();
    let connector = set.connector(address, "localhost");
    let done = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        let drip = || {
            while !done.load(std::sync::atomic::Ordering::Acquire) {
                // Half of them say nothing, half begin a record and never end it.
                let all: Vec<_> = (0..40).map_while(|_| TcpStream::connect(address).ok()).collect();
                for stream in all.iter().step_by(2) {
                    let _ = (&*stream).write_all(&[22, 3, 1, 2]);
                }
                thread::sleep(std::time::Duration::from_millis(200));
            }
        };
        scope.spawn(drip);
        let good = scope.spawn(|| {
            // All come from the same address, so one may have to try again.
            let mut tries = 0;
            let result = loop {
                tries += 1;
                match connector.connect() {
                    Ok(stream) => break Some(stream),
                    Err(_) if tries < 100 => {}
                    Err(_) => break None,
                }
            };
            done.store(true, std::sync::atomic::Ordering::Release);
            result
        });
        let mut far = None;
        while far.is_none() && !good.is_finished() {
            far = acceptor.accept(MOMENT).ok();
        }
        let mut far = far.or_else(|| acceptor.accept(PATIENCE).ok()).expect("the good one");
        let mut near = good.join().unwrap().expect("it gets through");
        near.write_all(b"hello").unwrap();
        let mut hello = [0; 5];
        far.read_exact(&mut hello).unwrap();
        assert_eq!(&hello, b"hello");
    });
}
