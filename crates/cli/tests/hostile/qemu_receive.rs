//! Sources that misbehave on the control connection of `pagewarp qemu receive`. Those who never say what they want are turned away, and the next one is heard; those who
//! have are left, and the QEMU that waited for their VM is ended and never ran anything.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pagewarp_cli::exit::Exit;
use pagewarp_guest::GuestConfig;
use pagewarp_qemu::protocol::control::{Message, Prepare, Route};
use pagewarp_qemu::protocol::frame::Kind;
use pagewarp_qemu::protocol::hello::Purpose;
use pagewarp_testkit::qemu::{Qemu, QemuConfig};

use crate::bridge::{BridgePeer, announced};
use crate::receiver::soon;
use crate::support::process::peak_bytes;
use crate::support::{PROGRAM, have_kvm, one_error, wait_for};
use crate::way::{Way, Ways};
use crate::{BOUND, each};

/// What the process may use, with the program itself, in bytes.
const MEMORY_BOUND: u64 = 64 << 20;

/// A QEMU that waits for a VM, and a `pagewarp qemu receive` beside it. Killed when dropped.
struct Receiving {
    child: Child,
    address: String,
    log: PathBuf,
    qemu: Qemu,
}

impl Receiving {
    fn start(options: &[&str]) -> Receiving {
        let config = QemuConfig { incoming: true, ..QemuConfig::new(64, GuestConfig::default()) };
        let qemu = config.start();
        let log = qemu.dir().join("receive.log");
        let child = Command::new(PROGRAM)
            .args(["qemu", "receive", "--listen", "127.0.0.1:0", "--backend", "cpu", "--qmp"])
            .arg(qemu.qmp())
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let address = wait_for("it to listen", || {
            let text = std::fs::read_to_string(&log).unwrap();
            let mut lines = text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
            let line = lines.find_map(|line| line.strip_prefix("waiting for a VM on "))?;
            line.split_whitespace().next().map(str::to_owned)
        });
        Receiving { child, address, log, qemu }
    }

    /// It ends soon, says this, and its QEMU ends with it and never ran anything.
    fn ends(&mut self, name: &str, since: Instant, exit: Exit, says: &str) {
        let status = wait_for(&format!("its end ({name})"), || self.child.try_wait().unwrap());
        // A better reason than a connection that ends is waited for for 5 s.
        soon(since, 2 * BOUND, name);
        let log = std::fs::read_to_string(&self.log).unwrap();
        let error = one_error(&log);
        println!("{name}: {error}");
        assert_eq!(status.code(), Some(exit as i32), "{name}: {log}");
        assert!(error.contains(says) && !error.contains('\u{1b}'), "{name}: expected `{says}` in: {error}");
        wait_for("its QEMU to end", || self.qemu.has_ended().then_some(()));
        assert!(self.qemu.serial().is_empty(), "{name}: the VM ran: {:?}", self.qemu.serial());
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        // Fails only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What somebody does.
type Act = fn(&mut BridgePeer);

/// What somebody says who never comes to what he wants.
const TURNED_AWAY: [(&str, Act); 6] = [
    ("takes a route that was not agreed on", |p| {
        let prepare = Prepare { uuid: "u".into(), route: Route::Direct, ..Prepare::default() };
        p.send(Kind::Control, &Message::Prepare(prepare).encode());
    }),
    ("commits at once", |p| p.send(Kind::Control, &Message::Commit { run: true }.encode())),
    ("says what makes no sense", |p| p.send(Kind::Control, b"{\"message\":\"dance\"}")),
    ("sends pages", |p| p.send(Kind::Segment, b"so")),
    ("announces 4 GiB", |p| p.raw(&announced(9, 1, u32::MAX, 0))),
    ("drips what it wants", |p| {
        let frame = p.frame(Kind::Control, &prepare(), &[]);
        p.drip(&frame, Duration::from_millis(200));
    }),
];

/// What a source does that has been prepared for, the exit code, and what is said of it.
type Case = (&'static str, Act, Exit, &'static str);

const CASES: [Case; 7] = [
    ("prepares again", |p| p.send(Kind::Control, &prepare()), Exit::Peer, "Prepare"),
    ("floods", |p| (0..40).for_each(|_| p.send(Kind::Control, &prepare())), Exit::Peer, "Prepare"),
    ("says what makes no sense", |p| p.send(Kind::Control, b"\xff"), Exit::Peer, "a control message"),
    ("sends pages", |p| p.send(Kind::Segment, b"so"), Exit::Peer, "a Segment frame on a control connection"),
    ("announces 4 GiB", |p| p.raw(&announced(9, 2, u32::MAX, 0)), Exit::Peer, "too large"),
    (
        "cancels in red",
        |p| p.send(Kind::Control, &Message::Cancel { reason: "\u{1b}[31mno".into() }.encode()),
        Exit::Peer,
        "the source gave up",
    ),
    ("hangs up", |p| p.stream.shutdown().unwrap(), Exit::Link, "without a word"),
];

fn prepare() -> Vec<u8> {
    let prepare =
        Prepare { uuid: "u".into(), qemu_version: "7.2.0".into(), was_running: true, ..Prepare::default() };
    Message::Prepare(prepare).encode()
}

#[test]
fn qemu_receive_names_what_hostile_sources_do_and_ends_its_qemu() {
    if !have_kvm("hostile sources of QEMU's VMs") {
        return;
    }
    let ways = Ways::new();
    let all = Way::BOTH.into_iter().flat_map(|way| CASES.map(|case| (way, case)));
    each(all, |(way, (case, act, exit, says))| {
        let name = format!("a source of `qemu receive` that {case} ({way:?})");
        let mut receiving = Receiving::start(&ways.options(way));
        let connect = || BridgePeer::over(ways.stream(way, &receiving.address).unwrap());
        if case == "hangs up" {
            for (what, act) in TURNED_AWAY {
                let mut peer = connect();
                assert_eq!(peer.greet(1, Purpose::Control).0, Kind::HelloAck, "{what}");
                let since = Instant::now();
                act(&mut peer);
                peer.last_word();
                // One that drips has 5 s.
                soon(since, 2 * BOUND, what);
            }
            let (kind, why) = connect().greet(2, Purpose::Bridge(0));
            assert!(kind == Kind::Error && why.contains("`pagewarp qemu migrate`"), "{why}");
        }
        let mut peer = connect();
        assert_eq!(peer.greet(3, Purpose::Control).0, Kind::HelloAck, "{name}");
        peer.send(Kind::Control, &prepare());
        let (kind, body) = peer.receive().expect("an answer");
        assert_eq!((kind, Message::decode(&body)), (Kind::Control, Ok(Message::Prepared)), "{name}");
        let peak = peak_bytes(receiving.child.id());
        let since = Instant::now();
        act(&mut peer);
        receiving.ends(&name, since, exit, says);
        assert!(peak <= MEMORY_BOUND, "{name}: {} MiB", peak >> 20);
    });
}

/// What somebody does who says that he measures the link.
const PROBES: [(&str, Act); 5] = [
    ("sends more than a probe is", |p| {
        let bytes = vec![0; 1 << 20];
        for _ in 0..40 {
            let frame = p.frame(Kind::Probe, &[], &bytes);
            p.raw(&frame);
        }
    }),
    ("announces 4 GiB", |p| p.raw(&announced(10, 1, 0, u32::MAX))),
    ("sends a message", |p| p.send(Kind::Control, &prepare())),
    ("promises bytes and sends none", |p| p.raw(&announced(10, 1, 0, 1 << 20))),
    ("drips", |p| {
        let frame = p.frame(Kind::Probe, &[], &[0; 200]);
        p.drip(&frame, Duration::from_millis(100));
    }),
];

#[test]
fn qemu_receive_survives_hostile_probes_and_gives_its_qemu_one_connection() {
    if !have_kvm("hostile sources of QEMU's VMs") {
        return;
    }
    let ways = Ways::new();
    each(Way::BOTH.into_iter(), |way| {
        let mut receiving = Receiving::start(&ways.options(way));
        let connect = || BridgePeer::over(ways.stream(way, &receiving.address).unwrap());
        for (what, act) in PROBES {
            let mut peer = connect();
            assert_eq!(peer.greet(1, Purpose::Probe).0, Kind::HelloAck, "{what}");
            let since = Instant::now();
            act(&mut peer);
            peer.last_word();
            soon(since, 2 * BOUND, what);
        }
        let (kind, why) = connect().greet(2, Purpose::Direct);
        assert!(kind == Kind::Error && why.contains("`pagewarp qemu migrate`"), "{why}");
        // One that is honest, up to what it has chosen.
        let mut peer = connect();
        assert_eq!(peer.greet_directly(3).0, Kind::HelloAck);
        let prepare = Prepare { uuid: "u".into(), route: Route::Direct, ..Prepare::default() };
        peer.send(Kind::Control, &Message::Prepare(prepare).encode());
        let (_, body) = peer.receive().expect("an answer");
        assert_eq!(Message::decode(&body), Ok(Message::Prepared));
        for (session, purpose, says) in [
            (4, Purpose::Direct, "busy with another migration"),
            (3, Purpose::Bridge(0), "the direct route"),
            (3, Purpose::Probe, "the direct route"),
        ] {
            let (kind, why) = connect().greet(session, purpose);
            assert!(kind == Kind::Error && why.contains(says), "{why}");
        }
        let peak = peak_bytes(receiving.child.id());
        let since = Instant::now();
        let mut direct = connect();
        let (kind, why) = direct.greet(3, Purpose::Direct);
        let says = match way {
            Way::Plain => {
                assert_eq!(kind, Kind::HelloAck, "{why}");
                // QEMU has its connection, and nobody else gets one.
                for (session, says) in [(4, "busy with another migration"), (3, "has one connection")] {
                    let (kind, why) = connect().greet(session, Purpose::Direct);
                    assert!(kind == Kind::Error && why.contains(says), "{why}");
                }
                // From here on this is said to QEMU.
                direct.raw(&[0; 4096]);
                "the destination QEMU"
            }
            Way::Protected => {
                assert!(kind == Kind::Error && why.contains("encrypted"), "{why}");
                "encrypted"
            }
        };
        receiving.ends(&format!("{way:?}"), since, Exit::Peer, says);
        assert!(peak <= MEMORY_BOUND, "{way:?}: {} MiB", peak >> 20);
    });
}
