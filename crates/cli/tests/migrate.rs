//! VMs that move between processes: the built-in guest, through the binary, as a user would do it. They need /dev/kvm.

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use pagewarp_cli::backend::BackendName;
use pagewarp_cli::demo::guest::{GuestWatch, REPORT_MS};
use pagewarp_cli::demo::machine::{BootConfig, Machine};
use pagewarp_cli::exit::{Exit, exit_of};
use pagewarp_cli::units::ByteSize;
use pagewarp_guest::{GuestConfig, Workload, WriteRate};
use pagewarp_kvm::control::{MigrateOptions, VmState};
use pagewarp_testkit::shaper::{LinkConfig, LinkShaper};

const PROGRAM: &str = env!("CARGO_BIN_EXE_pagewarp");
/// Generous: test hosts are busy. Nothing is measured here.
const PATIENCE: Duration = Duration::from_secs(120);

fn boot(dir: &Path, rate: WriteRate) -> (Machine, GuestWatch) {
    let guest = GuestConfig {
        workload: Workload::Kv,
        write_rate: rate,
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
    assert!(watch.is_ready());
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

/// Waits until the process says that its VM runs: it does so a moment after the guest's first instruction.
fn runs(machine: &mut Machine) {
    machine
        .wait_for("the VM to run", PATIENCE, |machine| {
            Ok((machine.status()?.state == VmState::Running).then_some(()))
        })
        .unwrap();
}

fn options() -> MigrateOptions {
    MigrateOptions { verify: true, ..MigrateOptions::default() }
}

#[test]
fn a_vm_moves_twice_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (mut here, mut guest) = boot(dir.path(), WriteRate::PagesPerS(2000));
    for hop in 1..=2 {
        let mut there = Machine::receive(Path::new(PROGRAM), dir.path(), &format!("hop{hop}")).unwrap();
        let address = there.listening().unwrap();
        let report = here.migrate(&address, options(), |_| ()).unwrap();
        assert_eq!(report.verified, Some(true));
        assert!(report.epochs.len() >= 2, "live: at least one epoch before the pause");
        assert!(report.wire_bytes < report.guest_bytes, "compressed");
        guest.hop(there.console()).unwrap();
        goes_on(&mut there, &mut guest);
        assert!(guest.hop_pause_ms().is_some());
        runs(&mut there);
        here.wait_for_end();
        here = there;
    }
    here.stop();
}

#[test]
fn a_destination_that_dies_leaves_the_vm_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let (mut source, mut guest) = boot(dir.path(), WriteRate::PagesPerS(2000));
    let mut destination = Machine::receive(Path::new(PROGRAM), dir.path(), "first").unwrap();
    // Slow enough that the death comes in the middle.
    let link = LinkShaper::start(
        destination.listening().unwrap().parse().unwrap(),
        LinkConfig::with_rate(40_000_000),
    )
    .unwrap();
    let mut killed = false;
    let error = source
        .migrate(&link.address().to_string(), options(), |progress| {
            if progress.wire_bytes > 1 << 20 && !killed {
                destination.kill();
                killed = true;
            }
        })
        .unwrap_err();
    assert!(killed, "the migration failed before: {error:#}");
    assert_eq!(exit_of(&error), Exit::Link, "{error:#}");
    goes_on(&mut source, &mut guest);

    // And it can still move.
    let mut second = Machine::receive(Path::new(PROGRAM), dir.path(), "second").unwrap();
    let address = second.listening().unwrap();
    assert_eq!(source.migrate(&address, options(), |_| ()).unwrap().verified, Some(true));
    guest.hop(second.console()).unwrap();
    goes_on(&mut second, &mut guest);
    second.stop();
}

#[test]
fn a_migration_that_does_not_converge_says_so_and_leaves_the_vm_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let (mut source, mut guest) = boot(dir.path(), WriteRate::PagesPerS(20_000));
    let mut destination = Machine::receive(Path::new(PROGRAM), dir.path(), "destination").unwrap();
    let link = LinkShaper::start(
        destination.listening().unwrap().parse().unwrap(),
        LinkConfig::with_rate(100_000_000),
    )
    .unwrap();
    let hopeless =
        MigrateOptions { encodings: "raw".into(), downtime_ms: 1, max_epochs: Some(2), ..options() };
    let error = source.migrate(&link.address().to_string(), hopeless, |_| ()).unwrap_err();
    assert_eq!(exit_of(&error), Exit::NotConverged, "{error:#}");
    goes_on(&mut source, &mut guest);
    source.stop();
}

fn pagewarp(run_dir: &Path, args: &[&str]) -> Output {
    Command::new(PROGRAM).arg("--run-dir").arg(run_dir).args(args).output().unwrap()
}

#[test]
fn the_commands_work_on_a_running_vm() {
    let dir = tempfile::tempdir().unwrap();
    let (source, _) = boot(dir.path(), WriteRate::PagesPerS(1000));
    let mut destination = Machine::receive(Path::new(PROGRAM), dir.path(), "destination").unwrap();
    let run_dir = source.run_dir();

    let status = pagewarp(run_dir, &["status", "--json"]);
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(status[0]["state"], "running");
    assert_eq!(status[0]["memory_bytes"], 64 << 20);

    let nothing = pagewarp(run_dir, &["cancel", Machine::NAME]);
    assert_eq!(nothing.status.code(), Some(Exit::Failure as i32));
    assert!(String::from_utf8_lossy(&nothing.stderr).contains("no migration"), "{nothing:?}");
    assert!(
        !pagewarp(run_dir, &["resolve", Machine::NAME, "--resume"]).status.success(),
        "nothing is in doubt"
    );

    let twice = Command::new(PROGRAM)
        .arg("--run-dir")
        .arg(run_dir)
        .args(["run", "--name", Machine::NAME, "--kernel", "builtin", "--memory", "64M"])
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&twice.stderr).contains("choose another"), "{twice:?}");

    // A trace is there however a migration ends, in the directory of whoever asked for it.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let asked = tempfile::tempdir().unwrap();
    let sent = Command::new(PROGRAM)
        .current_dir(asked.path())
        .arg("--run-dir")
        .arg(run_dir)
        .args(["send", Machine::NAME, "--to", &closed, "--trace", "trace.json"])
        .output()
        .unwrap();
    assert_eq!(sent.status.code(), Some(Exit::Link as i32), "{sent:?}");
    let trace: serde_json::Value =
        serde_json::from_slice(&std::fs::read(asked.path().join("trace.json")).unwrap()).unwrap();
    assert_eq!(trace["traceEvents"][0]["args"]["name"], "source");

    // And one that cannot be written is said, and no more.
    let to = destination.listening().unwrap();
    let nowhere = "/nonexistent/trace.json";
    let sent =
        pagewarp(run_dir, &["send", Machine::NAME, "--to", &to, "--verify", "--json", "--trace", nowhere]);
    assert_eq!(sent.status.code(), Some(0), "{sent:?}");
    let said = String::from_utf8_lossy(&sent.stderr);
    assert!(said.contains("warning: cannot write the trace to `/nonexistent/trace.json`"), "{said}");
    let report: serde_json::Value = serde_json::from_slice(&sent.stdout).unwrap();
    assert_eq!(report["verified"], true);
    runs(&mut destination);
}
