//! Peers that send what they must not: garbage, damage, too much, the wrong thing, or nothing.
//!
//! Both ends must say in one line what they saw, in bounded time and memory, and the VM must not notice.

mod support;

use std::fs::File;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use pagewarp_cli::demo::machine::Machine;
use pagewarp_cli::exit::Exit;
use pagewarp_cli::units::ByteSize;
use pagewarp_engine::report::SourceReport;
use pagewarp_kvm::control::VmState;
use pagewarp_testkit::rng::SplitMix64;
use pagewarp_wire::{Accept, Ack, ErrorCode, Hello, Kind, Message, Role};
use tempfile::TempDir;

use support::peer::{Peer, SESSION, header, offer};
use support::process::MemoryWatch;
use support::proxy::{Harm, Plan, Proxy};
use support::{PROGRAM, Rig, have_kvm, one_error, wait_for};

/// How long either end waits for a silent peer here.
const PEER_TIMEOUT: &str = "1500ms";
/// What a process may use for a migration that never gets anywhere, in bytes.
const MEMORY_BOUND: u64 = 64 << 20;

/// A `pagewarp receive` that is watched closely. Killed when dropped.
struct Receiver {
    child: Child,
    address: String,
    log: PathBuf,
    console: PathBuf,
    memory: MemoryWatch,
    dir: TempDir,
}

impl Receiver {
    fn start() -> Receiver {
        let dir = tempfile::Builder::new().prefix("pagewarp-test-").tempdir().unwrap();
        let (log, console) = (dir.path().join("log"), dir.path().join("console"));
        let child = Command::new(PROGRAM)
            .arg("--run-dir")
            .arg(dir.path().join("run"))
            .args(["receive", "--name", Machine::NAME, "--listen", "127.0.0.1:0"])
            .args(["--peer-timeout", PEER_TIMEOUT, "--max-memory", "1G", "--console"])
            .arg(&console)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let address = wait_for("it to listen", || {
            let text = std::fs::read_to_string(&log).unwrap();
            // The end of a line that is still being written may be missing.
            let mut lines = text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
            lines.find_map(|line| line.strip_prefix("waiting for a VM on ")).map(str::to_owned)
        });
        let memory = MemoryWatch::start(child.id());
        Receiver { child, address, log, console, memory, dir }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits until it has ended, which it must have with one line of error and without having run anything. Returns its exit code and that line.
    fn failed(mut self, case: &str) -> (i32, String) {
        let status =
            wait_for(&format!("the receiver to give up ({case})"), || self.child.try_wait().unwrap());
        let log = self.log();
        let code = status.code().unwrap_or_else(|| panic!("{case}: killed by a signal: {status}; {log}"));
        assert!(code != 0, "{case}: a success: {log}");
        assert!(!log.contains("panicked"), "{case}: {log}");
        assert_eq!(std::fs::metadata(&self.console).map_or(0, |m| m.len()), 0, "{case}: a guest ran");
        let peak = self.memory.peak();
        assert!(peak <= MEMORY_BOUND, "{case}: {} MiB of memory", peak >> 20);
        (code, one_error(&log).to_owned())
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        // Fails only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = &self.dir;
    }
}

/// What a hostile source does after its hello, the exit code, and what the receiver says.
type SourceCase = (&'static str, fn(&mut Peer), Exit, &'static str);

const HOSTILE_SOURCES: [SourceCase; 18] = [
    ("hangs up", |peer| peer.hang_up(), Exit::Link, "the peer closed the connection"),
    ("is silent", |_| (), Exit::Link, "the peer was silent"),
    ("sends an offer with a flipped bit", |peer| damaged(peer, 70), Exit::Peer, "checksum"),
    ("sends a header with a flipped bit", |peer| damaged(peer, 8), Exit::Peer, "checksum"),
    ("loses its place", |peer| damaged(peer, 0), Exit::Peer, "bad magic"),
    (
        "hangs up in the middle of an offer",
        |peer| {
            let frame = peer.frame(&Message::Offer(offer(512)));
            peer.raw(&frame[..frame.len() / 2]);
            peer.hang_up();
        },
        Exit::Link,
        "the peer closed the connection",
    ),
    ("announces 4 GiB", |peer| peer.raw(&header(3, 1, u32::MAX, u32::MAX)), Exit::Peer, "too large"),
    ("announces a payload", |peer| peer.raw(&header(21, 1, u32::MAX, 8)), Exit::Peer, "too large"),
    ("sends an unknown frame", |peer| peer.raw(&header(200, 1, 0, 0)), Exit::Peer, "unknown frame kind"),
    ("sends pages here", |peer| peer.raw(&header(6, 1, 200, 100)), Exit::Peer, "does not travel"),
    ("commits at once", |peer| peer.say(&Message::Commit), Exit::Peer, "unexpected Commit"),
    (
        "begins an epoch at once",
        |peer| peer.say(&Message::EpochStart { epoch: 0, pages: 1 }),
        Exit::Peer,
        "unexpected EpochStart",
    ),
    ("greets again", |peer| peer.say(&hello()), Exit::Peer, "unexpected Hello"),
    (
        "repeats a frame",
        |peer| {
            let frame = peer.frame(&Message::Ping { id: 1 });
            peer.raw(&[frame.clone(), frame].concat());
        },
        Exit::Peer,
        "out of sequence",
    ),
    (
        "offers more than is allowed",
        |peer| peer.say(&Message::Offer(offer(1 << 20))),
        Exit::Usage,
        "takes at most 1073741824",
    ),
    ("says that it failed", |peer| peer.say(&its_error("gone\nmad\u{1b}[2J")), Exit::Peer, "gone mad"),
    (
        "cancels",
        |peer| peer.say(&Message::Cancel { reason: "second thoughts".into() }),
        Exit::Peer,
        "second thoughts",
    ),
    ("answers what nobody asked", |peer| peer.say(&Message::Pong { id: 7 }), Exit::Peer, "Pong"),
];

fn hello() -> Message {
    Message::Hello(Hello::new(Role::Control, SESSION))
}

fn its_error(message: &str) -> Message {
    Message::Error { code: ErrorCode::Internal, message: message.into() }
}

/// Sends an offer with one bit flipped.
fn damaged(peer: &mut Peer, at: usize) {
    let mut frame = peer.frame(&Message::Offer(offer(512)));
    frame[at] ^= 0x10;
    peer.raw(&frame);
}

#[test]
fn a_receiver_names_what_a_hostile_source_did_and_ends() {
    for (case, act, exit, says) in HOSTILE_SOURCES {
        let receiver = Receiver::start();
        let mut peer = Peer::greeted(&receiver.address);
        act(&mut peer);
        // Whoever is still there to hear it is told why.
        let told = peer.hear_error();
        let (code, error) = receiver.failed(case);
        println!("a source that {case}: {error}");
        assert_eq!(code, exit as i32, "{case}: {error}");
        assert!(error.contains(says), "{case}: expected `{says}` in: {error}");
        assert!(!error.contains('\u{1b}'), "{case}: control characters of the peer reach the terminal");
        if exit == Exit::Peer && !["says that it failed", "cancels"].contains(&case) {
            assert!(told.contains(says), "{case}: the source was told `{told}`");
        }
    }
}

/// What a hostile destination does with the connections that come, the exit code of `send`, and what it says.
type DestinationCase = (&'static str, fn(&TcpListener), Exit, &'static str);

const HOSTILE_DESTINATIONS: [DestinationCase; 19] = [
    ("hangs up", |l| Peer::accept(l).hang_up(), Exit::Link, "closed the connection"),
    ("is silent", |l| Peer::accept(l).drain(), Exit::Link, "the peer was silent"),
    (
        "is a web server",
        |l| answer(l, b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"),
        Exit::Peer,
        "bad magic",
    ),
    ("stops in the middle of a header", |l| answer(l, b"PGWP\x01"), Exit::Link, "the peer was silent"),
    ("announces 4 GiB", |l| answer(l, &header(2, 0, u32::MAX, u32::MAX)), Exit::Peer, "too large"),
    (
        "announces a huge report",
        |l| accepted(l, |p| p.raw(&header(15, 2, 1 << 30, 1 << 30))),
        Exit::Peer,
        "too large",
    ),
    ("speaks another version", |l| say(l, &Message::HelloAck { version: 99 }), Exit::Peer, "unsupported"),
    ("accepts before it is asked", |l| say(l, &Message::Accept(accept())), Exit::Peer, "unexpected Accept"),
    ("refuses in red", |l| say(l, &its_error("no\r\n\u{1b}[31mroom")), Exit::Peer, "refused"),
    (
        "accepts encodings that nobody offered",
        |l| offered(l, |p| p.say(&Message::Accept(Accept { encodings: 0xffff, ..accept() }))),
        Exit::Peer,
        "the encodings accepted",
    ),
    (
        "accepts batches that nobody offered",
        |l| offered(l, |p| p.say(&Message::Accept(Accept { max_batch_pages: 4096, ..accept() }))),
        Exit::Peer,
        "the batch size accepted",
    ),
    ("runs the VM at once", |l| offered(l, |p| p.say(&running())), Exit::Peer, "unexpected Running"),
    (
        "never answers a data connection",
        |l| {
            offered(l, |p| {
                p.say(&Message::Accept(accept()));
                let _silent = Peer::accept(l);
                p.drain();
            });
        },
        Exit::Link,
        "the peer was silent",
    ),
    ("takes no data", |l| accepted(l, chat), Exit::Link, "took no data"),
    ("is ready too early", |l| accepted(l, |p| p.say(&Message::Ready)), Exit::Peer, "unexpected Ready"),
    ("runs the VM too early", |l| accepted(l, |p| p.say(&running())), Exit::Peer, "unexpected Running"),
    (
        "finishes epochs that nobody began",
        |l| accepted(l, |p| p.say(&Message::EpochDone { epoch: 7 })),
        Exit::Peer,
        "epoch of EpochDone",
    ),
    (
        "takes back what it acknowledged",
        |l| {
            accepted(l, |p| {
                for batches in [5, 4] {
                    p.say(&Message::Ack(Ack { batches, ..Ack::default() }));
                }
            });
        },
        Exit::Peer,
        "malformed Ack",
    ),
    ("goes silent in the middle", |l| accepted(l, |_| ()), Exit::Link, "the peer was silent"),
];

fn accept() -> Accept {
    Accept { encodings: 0x7f, history_slots: 0, max_batch_pages: 256 }
}

fn running() -> Message {
    Message::Running { report: b"{}".to_vec() }
}

/// Answers the first connection with these bytes and then listens until the source hangs up.
fn answer(listener: &TcpListener, bytes: &[u8]) {
    let mut peer = Peer::accept(listener);
    peer.raw(bytes);
    peer.drain();
}

fn say(listener: &TcpListener, message: &Message) {
    let mut peer = Peer::accept(listener);
    peer.say(message);
    peer.drain();
}

/// Goes on properly up to the offer.
fn offered(listener: &TcpListener, act: impl FnOnce(&mut Peer)) {
    let mut peer = Peer::accept(listener);
    peer.say(&Message::HelloAck { version: 1 });
    while peer.hear().unwrap().0 != Kind::Offer {}
    act(&mut peer);
    peer.drain();
}

/// Goes on properly up to the first batch, of which it reads nothing.
fn accepted(listener: &TcpListener, act: impl FnOnce(&mut Peer)) {
    offered(listener, |peer| {
        peer.say(&Message::Accept(accept()));
        let mut data = Peer::accept(listener);
        data.say(&Message::HelloAck { version: 1 });
        act(peer);
        peer.drain();
    });
}

/// Shows that it is alive until the source hangs up, and does nothing else.
fn chat(peer: &mut Peer) {
    let mut id = 0;
    while peer.is_connected() {
        peer.say(&Message::Ping { id });
        id += 1;
        std::thread::sleep(Duration::from_millis(500));
    }
}

fn hostile_destinations(rig: &mut Rig) {
    let memory = MemoryWatch::start(rig.here.status().unwrap().pid);
    for (case, act, exit, says) in HOSTILE_DESTINATIONS {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let acting = std::thread::spawn(move || act(&listener));
        let sent = rig.send(&address, &["--peer-timeout", PEER_TIMEOUT]).wait();
        let error = sent.error();
        println!("a destination that {case}: {error}");
        assert_eq!(sent.code, Some(exit as i32), "{case}: {error}");
        assert!(error.contains(says), "{case}: expected `{says}` in: {error}");
        assert!(!error.contains('\u{1b}'), "{case}: control characters of the peer reach the terminal");
        assert_eq!(rig.state(), VmState::Running, "{case}");
        acting.join().unwrap_or_else(|_| panic!("{case}: the hostile destination itself failed"));
    }
    rig.goes_on();
    let peak = memory.peak();
    println!("the source used up to {} MiB of memory", peak >> 20);
    assert!(peak <= (512 + 256) << 20);
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let sent = rig.send(&nobody, &[]).wait();
    assert_eq!(sent.code, Some(Exit::Link as i32));
    assert!(sent.error().contains("refused"), "{}", sent.stderr);
}

/// Port scanners, browsers and lost clients: turned away, and the migration that comes after them succeeds.
fn strangers(rig: &mut Rig) {
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
    assert!(Rig::log(&there).matches("turned a connection away").count() >= 7, "{}", Rig::log(&there));
    let sent = rig.send(&address, &["--verify"]).wait();
    assert_eq!(sent.code, Some(0), "{}", sent.stderr);
    rig.moved(there);
}

/// Whatever a bad link does to the frames of a migration between two honest ends, both name it and the VM stays.
fn bad_links(rig: &mut Rig) {
    let plan = |connection, back, harm| Plan { connection, back, harm };
    let mut plans = vec![
        // The hello, the offer, and the answer to it.
        plan(0, false, Harm::Flip { at: 3, bit: 1 }),
        plan(0, false, Harm::Flip { at: 120, bit: 7 }),
        plan(0, false, Harm::Cut { at: 150 }),
        plan(0, true, Harm::Flip { at: 20, bit: 0 }),
        plan(0, true, Harm::Skip { at: 60, count: 3 }),
        // Frames that change places, and moments before the commit.
        plan(0, false, Harm::Swap(Kind::StateEnd)),
        plan(0, false, Harm::CutBefore(Kind::Prepare)),
        plan(0, true, Harm::Swap(Kind::EpochDone)),
        plan(0, true, Harm::CutBefore(Kind::Ready)),
        plan(1, false, Harm::Swap(Kind::Batch)),
        plan(1, false, Harm::Flip { at: 10, bit: 5 }),
    ];
    let mut rng = SplitMix64::new(7);
    let mut flips = Vec::new();
    for _ in 0..2 {
        // Within the first epoch, which is some megabytes long.
        let mut at = || 1000 + rng.below(1 << 20);
        flips.push(plan(1, false, Harm::Flip { at: at(), bit: 2 }));
        plans.push(plan(1, false, Harm::Skip { at: at(), count: 1 }));
        plans.push(plan(1, false, Harm::Insert { at: at(), bytes: vec![7; 5] }));
        plans.push(plan(1, false, Harm::Cut { at: at() }));
    }
    for plan in plans {
        let what = format!("{plan:?}");
        let mut receiver = Receiver::start();
        let hello = matches!(plan.harm, Harm::Flip { at: 3, .. });
        let proxy = Proxy::start(&receiver.address, plan);
        let sent = rig.send(&proxy.address.to_string(), &["--peer-timeout", PEER_TIMEOUT]).wait();
        assert!(proxy.done(), "{what}: never came to it: {}", sent.stderr);
        let error = sent.error();
        println!("{what}\n  source: {error}");
        let code = sent.code.unwrap();
        assert!([Exit::Peer as i32, Exit::Link as i32].contains(&code), "{what}: {code}: {error}");
        assert_eq!(rig.state(), VmState::Running, "{what}");
        drop(proxy);
        if hello {
            // Not a source at all as far as the receiver can tell: it waits on.
            assert!(receiver.is_alive() && receiver.log().contains("bad magic"), "{}", receiver.log());
            continue;
        }
        let (code, error) = receiver.failed(&what);
        println!("  destination: {error}");
        assert!(
            [Exit::Peer as i32, Exit::Link as i32, Exit::Failure as i32].contains(&code),
            "{what}: {code}: {error}"
        );
    }
    rig.goes_on();
    for flip in flips {
        flipped_bit(rig, flip);
    }
}

/// A bit flipped in a page costs sending its batch again; one in what is around the pages costs the migration. Neither damages the VM.
fn flipped_bit(rig: &mut Rig, plan: Plan) {
    let what = format!("{plan:?}");
    let (there, address) = rig.receiver();
    let proxy = Proxy::start(&address, plan);
    let options = ["--peer-timeout", PEER_TIMEOUT, "--verify", "--json"];
    let sent = rig.send(&proxy.address.to_string(), &options).wait();
    assert!(proxy.done(), "{what}: never came to it: {}", sent.stderr);
    match sent.code {
        Some(0) => {
            let report: SourceReport = serde_json::from_str(&sent.stdout).unwrap();
            println!("{what}\n  {} pages were sent again", report.resent_pages);
            assert_eq!(report.verified, Some(true));
            assert!(report.resent_pages > 0, "{what}: nobody noticed");
            rig.moved(there);
        }
        code => {
            println!("{what}\n  source: {}", sent.error());
            assert!([Some(Exit::Peer as i32), Some(Exit::Link as i32)].contains(&code), "{what}: {code:?}");
            rig.stayed(&there);
        }
    }
}

#[test]
fn a_vm_does_not_notice_hostile_peers() {
    if !have_kvm("hostile peers") {
        return;
    }
    let mut rig = Rig::boot(ByteSize(64 << 20), 5_000);
    hostile_destinations(&mut rig);
    bad_links(&mut rig);
    strangers(&mut rig);
    rig.hop(&[]);
    rig.here.stop();
}
