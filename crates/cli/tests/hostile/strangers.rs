//! Those who are no source at all: turned away, and the migration that comes after them succeeds.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use pagewarp_cli::demo::machine::Extras;
use pagewarp_engine::transport::{Connector, speaks_tls};
use pagewarp_testkit::rng::SplitMix64;
use pagewarp_wire::{Hello, Message, Role};

use crate::BOUND;
use crate::receiver::soon;
use crate::support::peer::{Peer, SESSION, header};
use crate::support::process::peak_bytes;
use crate::support::{PATIENCE, Rig, wait_for};
use crate::way::{Way, Ways};

/// Port scanners, browsers and lost clients: turned away, and the migration that comes after them succeeds.
pub(crate) fn strangers(rig: &mut Rig) {
    let (there, address) = rig.receiver();
    let mut rng = SplitMix64::new(1);
    let mut noise = vec![0; 1 << 20];
    rng.fill(&mut noise);
    let strangers: [(&str, &[u8]); 6] = [
        ("a browser", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nand then some more to fill a header"),
        ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 and then some more to fill a whole header"),
        ("noise", &noise),
        ("another version's frame", &header(1, 0, 1 << 20, 1 << 20)),
        ("the middle of a migration", &header(6, 9, 100, 100)),
        ("half a header", &header(1, 0, 30, 30)[..20]),
    ];
    for (who, bytes) in strangers {
        let mut peer = Peer::connect(&address);
        peer.raw(bytes);
        if who == "half a header" {
            peer.hang_up();
        }
        // Nobody is left hanging on an open connection.
        let heard = peer.hear_error();
        match who {
            // The only one that is told more: it may be a source with --tls-dir.
            "TLS" => assert!(heard.contains("--tls-dir"), "{heard}"),
            _ => assert_eq!(heard, "", "{who}"),
        }
    }
    let mut lost = Peer::connect(&address);
    lost.say(&Message::Hello(Hello::new(Role::Data { index: 0 }, SESSION)));
    assert!(lost.hear_error().contains("no migration is under way"));
    // Some that neither speak nor leave; the source has to wait for its turn, no more.
    let _scanner = Peer::connect(&address);
    let turned_away = || Rig::log(&there).matches("turned a connection away").count();
    wait_for("the log to tell of them", || (turned_away() >= 7).then_some(()));
    let sent = rig.send(&address, &["--verify"]).wait();
    assert_eq!(sent.code, Some(0), "{}", sent.stderr);
    rig.moved(there);
}

/// The first bytes of a TLS handshake whose client speaks nothing newer than this: a record with a hello of one suite, and no extensions.
fn client_hello(version: [u8; 2]) -> Vec<u8> {
    let mut hello = version.to_vec();
    hello.extend([7; 32]);
    // No session to resume, one cipher suite (ECDHE-RSA with AES-128-GCM), no compression.
    hello.extend([0, 0, 2, 0xc0, 0x2f, 1, 0]);
    let len = hello.len() as u8;
    [&[22, 3, 1, 0, len + 4, 1, 0, 0, len][..], &hello].concat()
}

/// What somebody does who is to speak TLS, and what he hears of it: an alert, or nothing at all.
type Handshake = (&'static str, fn(&mut TcpStream), bool);

const HANDSHAKES: [Handshake; 7] = [
    ("garbage", |stream| say(stream, b"GET / HTTP/1.1\r\n\r\n"), true),
    ("frames", |stream| say(stream, &header(1, 0, 24, 24)), true),
    ("TLS 1.2", |stream| say(stream, &client_hello([3, 3])), true),
    ("TLS 1.0", |stream| say(stream, &client_hello([3, 1])), true),
    ("a record that is too long", |stream| say(stream, &[22, 3, 1, 0xff, 0xff, 1, 0, 0]), true),
    (
        "a handshake that ends in the middle",
        |stream| {
            say(stream, &client_hello([3, 3])[..20]);
            let _ = stream.shutdown(std::net::Shutdown::Both);
        },
        false,
    ),
    (
        "a handshake that drips",
        |stream| {
            let hello = client_hello([3, 3]);
            for byte in [&hello[..3], &[0x40], &hello[4..]].concat().iter().cycle().take(2000) {
                if stream.write_all(&[*byte]).is_err() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        },
        false,
    ),
];

fn say(stream: &mut TcpStream, bytes: &[u8]) {
    let _ = stream.write_all(bytes);
}

/// Those who do not come to the end of a TLS handshake, and those whom their certificate does not help.
pub(crate) fn handshakes(rig: &mut Rig, ways: &Ways) {
    let extras = Extras::args(["--tls-dir", ways.dir(), "--allow-peer", "source.example"]);
    let (there, address) = rig.receiver_with(&extras);
    let pid = there.status().unwrap().pid;
    for (case, act, has_alert) in HANDSHAKES {
        let mut stream = TcpStream::connect(&address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let since = Instant::now();
        act(&mut stream);
        let mut heard = Vec::new();
        let _ = stream.read_to_end(&mut heard);
        soon(since, BOUND + Duration::from_secs(1), case);
        assert_eq!(speaks_tls(&heard), has_alert, "{case}: {heard:?}");
    }
    // Of the right CA, and not allowed.
    let error = ways.other_tls(&address).connect().err().unwrap().to_string();
    assert!(error.contains("--allow-peer"), "{error}");
    for words in ["does not speak TLS", "TLS 1.3", "intruder.example"] {
        // Whoever is turned away may hear it before the log does.
        wait_for(&format!("`{words}` in the log"), || Rig::log(&there).contains(words).then_some(()));
    }
    // Some that are still at it.
    let _dripping: Vec<_> = (0..20).map(|_| TcpStream::connect(&address).unwrap()).collect();
    let peak = peak_bytes(pid);
    assert!(peak <= 96 << 20, "{} MiB", peak >> 20);
    let sent = rig.send(&address, &[&["--verify"][..], &ways.options(Way::Protected)].concat()).wait();
    assert_eq!(sent.code, Some(0), "{}", sent.stderr);
    rig.moved(there);
}
