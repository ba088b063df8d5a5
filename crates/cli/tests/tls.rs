//! VMs that move over TLS, and those that do not because somebody is not trusted. Through the binary; they need /dev/kvm.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use pagewarp_cli::backend::BackendName;
use pagewarp_cli::demo::guest::{GuestWatch, REPORT_MS};
use pagewarp_cli::demo::machine::{BootConfig, Extras, Machine};
use pagewarp_cli::exit::Exit;
use pagewarp_cli::units::ByteSize;
use pagewarp_guest::{GuestConfig, Workload, WriteRate};

const PROGRAM: &str = env!("CARGO_BIN_EXE_pagewarp");
/// Generous: test hosts are busy. Nothing is measured here.
const PATIENCE: Duration = Duration::from_secs(120);

fn boot(dir: &Path) -> (Machine, GuestWatch) {
    let guest = GuestConfig {
        workload: Workload::Kv,
        write_rate: WriteRate::PagesPerS(2000),
        report_ms: REPORT_MS,
        ..GuestConfig::default()
    };
    let config = BootConfig {
        memory: ByteSize(64 << 20),
        vcpus: 1,
        cmdline: guest.cmdline(),
        backend: BackendName::Auto,
    };
    let mut source = Machine::boot(Path::new(PROGRAM), dir, "source", &config).unwrap();
    let mut watch = GuestWatch::new(source.console()).unwrap();
    goes_on(&mut source, &mut watch);
    (source, watch)
}

/// Waits until the guest has reported a few times more, and checks that it found nothing wrong.
fn goes_on(machine: &mut Machine, watch: &mut GuestWatch) {
    watch.mark().unwrap();
    machine
        .wait_for("the guest to go on", PATIENCE, |_| {
            watch.poll()?;
            Ok((watch.reports() >= 4 || !watch.problems().is_empty()).then_some(()))
        })
        .unwrap();
    assert_eq!(watch.problems(), [""; 0]);
}

/// Makes certificates for 127.0.0.1.
fn certs(dir: &Path, client: &str) {
    let made = Command::new(PROGRAM)
        .arg("certs")
        .arg(dir)
        .args(["--host", "127.0.0.1", "--client", client, "--days", "2"])
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

fn receive(dir: &Path, role: &str, args: &[&str]) -> Machine {
    Machine::receive_with(Path::new(PROGRAM), dir, role, &Extras::args(args)).unwrap()
}

/// `pagewarp send`, with its exit code and what it said.
fn send(source: &Machine, to: &str, args: &[&str]) -> (Option<i32>, String) {
    let sent = Command::new(PROGRAM)
        .args(["send", Machine::NAME, "--to", to, "--verify"])
        .arg("--run-dir")
        .arg(source.run_dir())
        .args(args)
        .output()
        .unwrap();
    (sent.status.code(), String::from_utf8_lossy(&sent.stderr).into_owned())
}

fn refused((code, said): &(Option<i32>, String), exit: Exit, words: &[&str]) {
    assert_eq!(*code, Some(exit as i32), "{said}");
    for word in words {
        assert!(said.contains(word), "no `{word}` in: {said}");
    }
}

#[test]
fn a_vm_moves_over_tls_to_whom_it_trusts_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (tls, other) = (dir.path().join("tls"), dir.path().join("other"));
    certs(&tls, "alice");
    certs(&other, "mallory");
    let (tls, other) = (tls.to_str().unwrap(), other.to_str().unwrap());
    let (mut source, mut guest) = boot(dir.path());
    let mut there = receive(dir.path(), "there", &["--tls-dir", tls, "--allow-peer", "alice"]);
    let to = there.listening().unwrap();

    // Nobody but those who are trusted gets through, and all hear why. None of it harms the destination.
    refused(&send(&source, &to, &["--tls-dir", other]), Exit::Peer, &["no trusted connection", "the CA"]);
    refused(
        &send(&source, &to, &["--tls-dir", tls, "--tls-hostname", "db1.example"]),
        Exit::Peer,
        &["not for `db1.example`", "`127.0.0.1`", "--tls-hostname"],
    );
    refused(&send(&source, &to, &[]), Exit::Peer, &["it speaks TLS", "--tls-dir"]);
    refused(
        &send(&source, &to, &["--tls-dir", "/nonexistent/tls"]),
        Exit::Environment,
        &["/nonexistent/tls/ca-cert.pem", "pagewarp certs"],
    );
    refused(
        &send(&source, &to, &["--tls-dir", tls, "--plaintext"]),
        Exit::Usage,
        &["--tls-dir", "--plaintext", "cannot be used"],
    );
    goes_on(&mut source, &mut guest);

    let (code, said) = send(&source, &to, &["--tls-dir", tls, "--connections", "3"]);
    assert_eq!(code, Some(0), "{said}");
    guest.hop(there.console()).unwrap();
    goes_on(&mut there, &mut guest);

    // The way back, to a destination that wants somebody else, and to one that speaks no TLS.
    let mut picky = receive(dir.path(), "picky", &["--tls-dir", tls, "--allow-peer", "bob"]);
    let to = picky.listening().unwrap();
    refused(
        &send(&there, &to, &["--tls-dir", tls]),
        Exit::Peer,
        &["refused this host", "alice", "--allow-peer"],
    );
    let mut plain = receive(dir.path(), "plain", &[]);
    let to = plain.listening().unwrap();
    refused(&send(&there, &to, &["--tls-dir", tls]), Exit::Peer, &["does not speak TLS", "--tls-dir"]);
    goes_on(&mut there, &mut guest);
    there.stop();
}
