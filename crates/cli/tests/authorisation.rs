//! What receivers take, and whom: only VMs and sources that they were told to, one at a time, and at little cost whoever else connects.

#[path = "../../net/tests/support/mod.rs"]
mod pki;
#[path = "../../net/tests/support/relay.rs"]
mod relay;
#[path = "authorisation/running.rs"]
mod running;
#[path = "authorisation/strangers.rs"]
mod strangers;
mod support;

use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use pagewarp_cli::demo::machine::{Extras, Machine};
use pagewarp_cli::exit::Exit;
use pagewarp_cli::units::ByteSize;
use pagewarp_guest::{GuestConfig, Workload, WriteRate};
use pagewarp_testkit::qemu::{Qemu, QemuConfig};
use pagewarp_wire::{Hello, Kind, Message, Role};

use running::{FakeDestination, certs, destination_bridge, source_bridge, start};
use strangers::visit;
use support::peer::{Peer, SESSION, offer};
use support::process::Process;
use support::qemu::text;
use support::{PROGRAM, Rig, Sent, have_kvm, wait_for};

const SMALL: ByteSize = ByteSize(64 << 20);
/// The name that the VMs of the harness have in QEMU.
const QEMU_NAME: &str = "pagewarp-test";
const UUID: &str = "3fa1c1de-7d40-4a3b-8d0c-1d2e3f405162";

fn says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "no `{word}` in: {text}");
    }
}

fn refused(sent: &Sent, words: &[&str]) {
    assert_eq!(sent.code, Some(Exit::Peer as i32), "{}", sent.stderr);
    says(sent.error(), words);
}

#[test]
fn a_receiver_takes_no_vm_but_those_that_it_was_told_to() {
    if !have_kvm("VMs by name") {
        return;
    }
    let mut rig = Rig::boot(SMALL, 1000);
    let (there, address) = rig.receiver_with(&Extras::args(["--allow-vm", "db1", "--allow-vm", "db2"]));
    let sent = rig.send(&address, &[]).wait();
    refused(&sent, &["the peer refused", "the VM `demo`", "--allow-vm"]);
    assert!(!sent.stderr.contains("db1"), "whom it would take is nobody else's business: {}", sent.stderr);
    rig.stayed(&there);
    assert!(there.status().unwrap().listening.is_some(), "it goes on waiting");
    drop(there);

    // Whoever comes with another VM first keeps nobody else out.
    let (there, address) = rig.receiver_with(&Extras::args(["--allow-vm", Machine::NAME]));
    for _ in 0..3 {
        let mut peer = Peer::connect(&address).greeted();
        peer.say(&Message::Offer(offer(512)));
        says(&peer.hear_error(), &["the VM `intruder`", "--allow-vm"]);
    }
    says(&Rig::log(&there), &["turned a source away", "`intruder`"]);
    let sent = rig.send(&address, &["--verify"]).wait();
    assert_eq!(sent.code, Some(0), "{}", sent.stderr);
    rig.moved(there);
    rig.here.stop();
}

#[test]
fn a_receiver_takes_one_vm_and_says_so_to_others() {
    if !have_kvm("one VM at a time") {
        return;
    }
    let mut rig = Rig::boot(SMALL, 1000);
    let (there, address) = rig.receiver();
    // Slow enough to be met on its way.
    let mut sending = rig.send(&address, &["--bandwidth", "2MB/s", "--resume-timeout", "60"]);
    rig.wait_state("the migration", |status| status.progress.as_ref().is_some_and(|p| p.wire_bytes > 0));
    for _ in 0..3 {
        let mut late = Peer::connect(&address);
        late.say(&Message::Hello(Hello::new(Role::Control, SESSION)));
        says(&late.hear_error(), &["busy with another migration"]);
    }
    let second = Rig::boot(SMALL, 1000);
    let sent = second.send(&address, &[]).wait();
    refused(&sent, &["the peer refused", "busy with another migration", "on a port of its own"]);
    assert!(!sending.has_ended(), "nobody else has disturbed it");
    rig.command(&["cancel", Machine::NAME]).unwrap();
    assert_eq!(sending.wait().code, Some(Exit::Cancelled as i32));
    rig.stayed(&there);

    // Once a VM is here, nobody is listened to.
    let (there, address) = rig.receiver();
    assert_eq!(rig.send(&address, &[]).wait().code, Some(0));
    rig.moved(there);
    wait_for("the port to be closed", || TcpStream::connect(&address).is_err().then_some(()));
    rig.here.stop();
    second.here.stop();
}

#[test]
fn a_destination_bridge_takes_one_migration_at_a_time_and_no_more_than_it_was_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let far = FakeDestination::listen(dir.join("far"));
    let (destination, to) = destination_bridge(dir, &[PROGRAM], &far, &["--max-sessions", "2"]);
    let (first, near) = source_bridge(dir, "first", to, &["--once"]);
    let passing = far.begin(&near);
    let (second, other) = source_bridge(dir, "second", to, &["--once"]);
    let qemu = std::os::unix::net::UnixStream::connect(&other).unwrap();
    refused(&second.wait(), &["the peer refused", "busy with another migration", "one at a time"]);
    drop(qemu);
    passing.finish();
    assert_eq!(first.wait().code, Some(0));
    // The next one is served, and it is the last.
    let (third, near) = source_bridge(dir, "third", to, &["--once"]);
    far.begin(&near).finish();
    assert_eq!(third.wait().code, Some(0));
    let ended = destination.wait();
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(TcpStream::connect(to).is_err());
}

/// A small QEMU that needs no CPU time.
fn qemu_config(args: &[&str]) -> QemuConfig {
    let guest = GuestConfig {
        workload: Workload::Kv,
        write_rate: WriteRate::PagesPerS(100),
        report_ms: 100,
        ..GuestConfig::default()
    };
    QemuConfig { args: args.iter().map(|arg| (*arg).to_owned()).collect(), ..QemuConfig::new(32, guest) }
}

fn booted(config: &QemuConfig) -> Qemu {
    let mut qemu = config.start();
    qemu.wait_for("the guest", |event| matches!(event, pagewarp_guest::Event::Report(_)).then_some(()));
    qemu
}

fn qemu_receive(dir: &Path, name: &str, qemu: &Qemu, options: &[&str]) -> (Process, SocketAddr) {
    let qmp = qemu.qmp();
    let words = ["qemu", "receive", "--qmp", text(&qmp), "--listen", "127.0.0.1:0", "--backend", "cpu"];
    let mut receiving = start(dir, name, &[&words[..], options].concat());
    let to = receiving.listening();
    (receiving, to)
}

fn qemu_migrate(dir: &Path, qemu: &Qemu, to: SocketAddr, options: &[&str]) -> Sent {
    let (qmp, to) = (qemu.qmp(), to.to_string());
    let words = ["qemu", "migrate", "--qmp", text(&qmp), "--to", &to, "--backend", "cpu"];
    start(dir, "migrate", &[&words[..], options].concat()).wait()
}

#[test]
fn qemu_receive_takes_vms_by_name_or_uuid() {
    let dir = tempfile::tempdir().unwrap();
    let config = qemu_config(&["-uuid", UUID]);
    let other = booted(&qemu_config(&[]));
    let mut here = booted(&config);
    let there = QemuConfig { incoming: true, ..config.clone() }.start();
    let upper = UUID.to_uppercase();
    let (receiving, to) =
        qemu_receive(dir.path(), "first", &there, &["--allow-vm", &upper, "--allow-vm", "db1"]);
    // One with another UUID, and a name that is not named.
    let sent = qemu_migrate(dir.path(), &other, to, &[]);
    refused(&sent, &["the peer refused", QEMU_NAME, "--allow-vm", "the VM stays here"]);
    assert!(!sent.stderr.contains("db1") && !sent.stderr.contains(&upper), "{}", sent.stderr);
    says(&receiving.stderr(), &["turned a source away", QEMU_NAME]);
    // The one that waits takes who is right.
    let sent = qemu_migrate(dir.path(), &here, to, &[]);
    let received = receiving.wait();
    assert_eq!((sent.code, received.code), (Some(0), Some(0)), "{}\n{}", sent.stderr, received.stderr);
    assert!(!here.has_ended());

    let there = QemuConfig { incoming: true, ..qemu_config(&[]) }.start();
    let (receiving, to) = qemu_receive(dir.path(), "second", &there, &["--allow-vm", QEMU_NAME]);
    let sent = qemu_migrate(dir.path(), &other, to, &[]);
    assert_eq!((sent.code, receiving.wait().code), (Some(0), Some(0)), "{}", sent.stderr);
}

/// There is no `--max-memory` for QEMU's VMs, because this holds.
#[test]
fn a_destination_qemu_takes_no_vm_that_is_larger_than_it_was_started_for() {
    let dir = tempfile::tempdir().unwrap();
    let here = booted(&QemuConfig { memory_mib: 64, ..qemu_config(&[]) });
    let mut there = QemuConfig { incoming: true, ..qemu_config(&[]) }.start();
    let (receiving, to) = qemu_receive(dir.path(), "receive", &there, &[]);
    let sent = qemu_migrate(dir.path(), &here, to, &["--multifd", "2"]);
    let received = receiving.wait();
    println!("source: {}\ndestination: {}", sent.error(), received.error());
    assert_eq!(sent.code, Some(Exit::Peer as i32), "{}", sent.stderr);
    says(sent.error(), &["the VM stays here"]);
    assert_eq!(received.code, Some(Exit::Peer as i32), "{}", received.stderr);
    wait_for("the QEMU that was given something else to end", || there.has_ended().then_some(()));
}

#[test]
fn strangers_cost_a_receiver_little_and_keep_no_source_out() {
    if !have_kvm("strangers") {
        return;
    }
    let certs_at = tempfile::tempdir().unwrap();
    let tls = certs(&certs_at.path().join("tls"));
    let mut rig = Rig::boot(SMALL, 1000);
    for options in [&[][..], &["--tls-dir", &tls]] {
        let (there, address) = rig.receiver_with(&Extras::args(options));
        let to: SocketAddr = address.parse().unwrap();
        let pid = there.status().unwrap().pid;
        let what = format!("receive {}", options.join(" "));
        let sent = visit(&what, to, pid, || {
            rig.send(&address, &[&["--resume-timeout", "60"], options].concat()).wait()
        });
        assert_eq!(sent.code, Some(0), "{what}: {}\n{}", sent.stderr, Rig::log(&there));
        rig.moved(there);
    }
    rig.here.stop();
}

#[test]
fn strangers_cost_a_destination_bridge_little_and_keep_no_source_out() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let tls = certs(&dir.join("tls"));
    let limited = ["sh", "-c", "ulimit -n 64; exec \"$0\" \"$@\"", PROGRAM];
    for (number, options) in [&[][..], &["--tls-dir", &tls]].into_iter().enumerate() {
        for (by, how) in [(&[PROGRAM][..], ""), (&limited, "with 64 descriptors")] {
            let what = format!("bridge destination {} {how}", options.join(" "));
            let far = FakeDestination::listen(dir.join(format!("far{number}{}", by.len())));
            let (destination, to) = destination_bridge(dir, by, &far, options);
            let pass = || {
                let (source, near) = source_bridge(dir, "source", to, &[options, &["--once"]].concat());
                far.begin(&near).finish();
                source.wait()
            };
            let sent = if how.is_empty() {
                visit(&what, to, destination.pid(), pass)
            } else {
                // They take all that there is, for a while. It must outlive that.
                visit(&what, to, destination.pid(), || ());
                std::thread::sleep(Duration::from_secs(6));
                pass()
            };
            assert_eq!(sent.code, Some(0), "{what}: {}\n{}", sent.stderr, destination.stderr());
            assert_eq!(destination.stop().code, Some(0), "{what}");
        }
    }
}

#[test]
fn strangers_cost_qemu_receive_little_and_keep_no_source_out() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let tls = certs(&dir.join("tls"));
    for options in [&[][..], &["--tls-dir", &tls]] {
        let config = qemu_config(&[]);
        let here = booted(&config);
        let there = QemuConfig { incoming: true, ..config }.start();
        let (receiving, to) = qemu_receive(dir, "receive", &there, options);
        let what = format!("qemu receive {}", options.join(" "));
        let sent = visit(&what, to, receiving.pid(), || qemu_migrate(dir, &here, to, options));
        let received = receiving.wait();
        assert_eq!(
            (sent.code, received.code),
            (Some(0), Some(0)),
            "{what}: {}\n{}",
            sent.stderr,
            received.stderr
        );
    }
}

/// Whoever says nothing that is meant for a receiver is told nothing.
#[test]
fn strangers_hear_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let far = FakeDestination::listen(dir.join("far"));
    let (bridge, to_bridge) = destination_bridge(dir, &[PROGRAM], &far, &[]);
    let there = QemuConfig { incoming: true, ..qemu_config(&[]) }.start();
    let (receiving, to_qemu) = qemu_receive(dir, "receive", &there, &[]);
    let run_dir = dir.join("run");
    let words = ["receive", "--listen", "127.0.0.1:0", "--console", "none", "--name", "secret"];
    let mut vm = start(dir, "vm", &[&["--run-dir", text(&run_dir)], &words[..]].concat());
    for to in [to_bridge, to_qemu, vm.listening()] {
        for said in [
            &b""[..],
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\nand more than a header of any protocol has",
            &[0; 64],
        ] {
            let mut stranger = TcpStream::connect(to).unwrap();
            stranger.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            std::io::Write::write_all(&mut stranger, said).unwrap();
            let _ = stranger.shutdown(Shutdown::Write);
            let mut heard = Vec::new();
            // It may be reset.
            let _ = std::io::Read::read_to_end(&mut stranger, &mut heard);
            assert_eq!(heard, b"", "{}", String::from_utf8_lossy(&heard));
        }
    }
    assert_eq!(bridge.stop().code, Some(0));
    for receiver in [receiving, vm] {
        assert_eq!(receiver.stop().code, Some(Exit::Cancelled as i32));
    }
}

#[test]
fn a_bridge_uses_renewed_certificates_without_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    // A link, so that a whole set takes the place of another at once.
    let tls = text(&dir.join("tls")).to_owned();
    let put = |set: &str| {
        certs(&dir.join(set));
        std::os::unix::fs::symlink(set, dir.join("next")).unwrap();
        std::fs::rename(dir.join("next"), &tls).unwrap();
    };
    put("first");
    let far = FakeDestination::listen(dir.join("far"));
    // Says when it has read files again.
    let options = ["--tls-dir", &tls, "--allow-peer", "alice", "-v"];
    let renewed = |destination: &mut Process, times: usize| {
        wait_for("it to use the new files", || {
            assert!(!destination.has_ended(), "{}", destination.stderr());
            (destination.stderr().matches("are used from now on").count() >= times).then_some(())
        });
    };
    let (mut destination, to) = destination_bridge(dir, &[PROGRAM], &far, &options);
    let (source, near) = source_bridge(dir, "source", to, &["--tls-dir", &tls, "--json"]);
    let mut passed = 0;
    let mut pass = || {
        far.begin(&near).finish();
        passed += 1;
        // Until then what comes next would be taken for a part of this one.
        source.wait_reports(passed);
    };
    pass();
    // Another CA, and other certificates, for both: neither would trust the old ones of the other.
    put("second");
    renewed(&mut destination, 1);
    pass();
    let key = dir.join("tls/server-key.pem");
    let good = std::fs::read(&key).unwrap();
    std::fs::write(&key, "no key").unwrap();
    destination.wait_line("that the key is of no use", |line| {
        line.contains("cannot be used") && line.contains("server-key.pem")
    });
    pass();
    std::fs::write(&key, good).unwrap();
    renewed(&mut destination, 2);
    pass();
    for bridge in [source, destination] {
        let ended = bridge.stop();
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    }
}

#[test]
fn whoever_is_not_there_or_busy_is_told_of_with_advice() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (source, near) = source_bridge(dir, "source", nobody, &["--once"]);
    let _qemu = std::os::unix::net::UnixStream::connect(&near).unwrap();
    let sent = source.wait();
    assert_eq!(sent.code, Some(Exit::Link as i32), "{}", sent.stderr);
    says(sent.error(), &["refused", "start `pagewarp bridge destination` there first", "firewall"]);

    if have_kvm("the advice of `send`") {
        let rig = Rig::boot(SMALL, 1000);
        let sent = rig.send(&nobody.to_string(), &["--resume-timeout", "60"]).wait();
        assert_eq!(sent.code, Some(Exit::Link as i32), "{}", sent.stderr);
        says(sent.error(), &["refused", "start `pagewarp receive` there first", "firewall"]);
        rig.here.stop();
    }

    // A monitor with a queue in front of it.
    let qmp = dir.join("qmp");
    let socket =
        rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM, None).unwrap();
    rustix::net::bind(&socket, &rustix::net::SocketAddrUnix::new(&qmp).unwrap()).unwrap();
    rustix::net::listen(&socket, 1).unwrap();
    let _queue: Vec<_> = (0..2).map(|_| std::os::unix::net::UnixStream::connect(&qmp).unwrap()).collect();
    let mut migrating =
        start(dir, "queue", &["qemu", "migrate", "--qmp", text(&qmp), "--to", &nobody.to_string()]);
    migrating
        .wait_line("that it waits", |line| line.contains("is busy") && line.contains("waiting up to 30s"));
    drop(migrating);
    drop(socket);
}

/// A relay, or a name with two addresses, in front of two hosts that both have a good certificate for it.
#[test]
fn a_vm_goes_to_one_host_alone() {
    if !have_kvm("two destinations behind one address") {
        return;
    }
    let ca = pki::Ca::new();
    let (one, other) = (pki::Set::new(&ca), pki::Set::new(&ca));
    let mut rig = Rig::boot(SMALL, 1000);
    let tls = text(one.dir.path()).to_owned();
    for patience in ["0", "60"] {
        let (first, to_first) = rig.receiver_with(&Extras::args(["--tls-dir", &tls]));
        let (second, to_second) = rig.receiver_with(&Extras::args(["--tls-dir", text(other.dir.path())]));
        let relay = relay::Relay::start(to_first.parse().unwrap(), 1, to_second.parse().unwrap());
        let to = relay.address.to_string();
        let sent = rig.send(&to, &["--tls-dir", &tls, "--resume-timeout", patience]).wait();
        refused(&sent, &["no trusted connection", "another host than the first one", "load balancer"]);
        rig.stayed(&first);
        rig.stayed(&second);
    }
    rig.here.stop();
}

/// A hello gets an answer from who is no TLS destination only; the kinds are for the compiler.
#[test]
fn the_first_word_of_a_source_is_answered() {
    let dir = tempfile::tempdir().unwrap();
    let run_dir = dir.path().join("run");
    let words = ["receive", "--listen", "127.0.0.1:0", "--console", "none"];
    let mut vm = start(dir.path(), "vm", &[&["--run-dir", text(&run_dir)], &words[..]].concat());
    let to = vm.listening().to_string();
    // Some who hold their tongue, and one that has not: nobody waits for the others.
    let _silent: Vec<_> = (0..8).map(|_| Peer::connect(&to)).collect();
    let mut source = Peer::connect(&to);
    let begun = std::time::Instant::now();
    source.say(&Message::Hello(Hello::new(Role::Control, SESSION)));
    assert_eq!(source.hear().unwrap().0, Kind::HelloAck);
    // Each of the silent ones would have taken 5 s of its own.
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    vm.stop();
}
