//! The network is lost in the middle of a migration and comes back: the migration goes on, and hardly anything is sent twice. The link is one between two
//! network namespaces that goes down, so this takes root, and the VMs need /dev/kvm.
//!
//! `PAGEWARP_OUTAGE_S` sets for how many seconds the link is down.

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pagewarp_cli::backend::BackendName;
use pagewarp_cli::demo::machine::{Extras, Machine};
use pagewarp_cli::units::ByteSize;
use pagewarp_engine::report::{Phase, SourceReport};
use pagewarp_engine::transport::Interruptions;
use pagewarp_kvm::control::Request;
use pagewarp_qemu::manage::QemuReport;
use pagewarp_testkit::netns::{End, NetPair};
use rustix::process::Signal;
use tempfile::TempDir;

use support::process::Process;
use support::qemu::{Hosts, Migration, Moment, bridge_of};
use support::{PROGRAM, Rig, Sending, have_kvm, setting, wait_for};

const RATE: u64 = 300_000_000;
const PAGES_PER_S: u64 = 2_000;
/// What may be sent a second time, as a part of everything.
const TWICE_PERCENT: u64 = 5;
/// Patience that no test waits for.
const FOR_EVER: [&str; 2] = ["--resume-timeout", "3000"];

/// How long the link is down. Longer than the 6 s after which the kernel gives a connection up.
fn outage() -> Duration {
    Duration::from_secs(setting("PAGEWARP_OUTAGE_S", 10))
}

fn resume_timeout() -> String {
    (outage().as_secs() + 60).to_string()
}

fn hardly_anything_twice(kind: &str, interruptions: Interruptions, wire_bytes: u64) {
    let Interruptions { breaks, outage_ms, sent_again_bytes } = interruptions;
    let percent = 100.0 * sent_again_bytes as f64 / wire_bytes as f64;
    println!(
        "{kind}: down for {:?}; {breaks} breaks, {outage_ms} ms over all connections, {sent_again_bytes} of {wire_bytes} bytes sent again ({percent:.2} %)",
        outage()
    );
    assert!(breaks > 0, "the connections did not notice");
    assert!(sent_again_bytes * 100 < wire_bytes * TWICE_PERCENT, "{percent} %");
}

/// A script that becomes the program at one end of the link. A destination listens there.
fn program_at(dir: &Path, net: &NetPair, end: End) -> PathBuf {
    let path = dir.join(net.name(end));
    let address = match end {
        End::Source => NetPair::SOURCE,
        End::Destination => NetPair::DESTINATION,
    };
    let script = format!(
        "#!/bin/bash\nargs=()\nfor arg; do\n[ \"$arg\" = 127.0.0.1:0 ] && arg={address}:0\nargs+=(\"$arg\")\ndone\n\
         exec ip netns exec {} {PROGRAM} \"${{args[@]}}\"\n",
        net.name(end)
    );
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// A VM, and a `receive` at the other end of a link that can be cut.
struct Apart {
    net: NetPair,
    rig: Rig,
    there: Machine,
    address: String,
    /// The programs of both are in it.
    _scripts: TempDir,
}

impl Apart {
    /// With these options of `receive`.
    fn boot(options: &[&str]) -> Apart {
        let net = NetPair::new(Some(RATE));
        let scripts = tempfile::tempdir().unwrap();
        let source = program_at(scripts.path(), &net, End::Source);
        let destination = program_at(scripts.path(), &net, End::Destination);
        let mut rig = Rig::boot_by(&source, ByteSize(512 << 20), PAGES_PER_S, Some(100), BackendName::Auto);
        let extras = Extras::args(options.iter().copied());
        let (there, address) = rig.receiver_by(&destination, &extras).unwrap();
        Apart { net, rig, there, address, _scripts: scripts }
    }
}

/// Waits until some of the VM's memory has been sent.
fn wait_middle(rig: &Rig, sending: &mut Sending) {
    let mut last = None;
    wait_for("the middle of the first epoch", || {
        let status = rig.here.status().ok();
        let progress = status.and_then(|status| status.progress);
        let is_there = progress
            .as_ref()
            .is_some_and(|progress| progress.phase == Phase::Precopy && progress.wire_bytes > 20 << 20);
        last = progress.or(last.take());
        assert!(is_there || !sending.has_ended(), "it ended before: {last:?}\n{}", Rig::log(&rig.here));
        is_there.then_some(())
    });
}

#[test]
fn a_migration_outlasts_the_loss_of_its_link() {
    if !have_kvm("a_migration_outlasts_the_loss_of_its_link") {
        return;
    }
    let Apart { net, mut rig, there, address, _scripts } = Apart::boot(&["--plaintext", "--backend", "cpu"]);
    let patience = resume_timeout();
    let options = ["--plaintext", "--backend", "cpu", "--json", "--verify", "--connections", "2"];
    let mut sending = rig.send(&address, &[&options[..], &["--resume-timeout", &patience]].concat());
    wait_middle(&rig, &mut sending);
    net.cut();
    std::thread::sleep(outage());
    net.heal();
    let sent = sending.wait();
    let logs = || format!("source: {}\ndestination: {}", Rig::log(&rig.here), Rig::log(&there));
    assert_eq!(sent.code, Some(0), "{}\n{}", sent.stderr, logs());
    let report: SourceReport = serde_json::from_str(&sent.stdout).unwrap();
    assert_eq!(report.verified, Some(true));
    rig.moved(there);
    hardly_anything_twice("native", report.interruptions, report.wire_bytes);
}

/// Nobody has to wait for the network in order to say that nobody waits any more.
#[test]
fn a_destination_can_be_ended_while_the_link_is_lost() {
    if !have_kvm("a_destination_can_be_ended_while_the_link_is_lost") {
        return;
    }
    let options = [&["--plaintext", "--peer-timeout", "3000"][..], &FOR_EVER].concat();
    let Apart { net, mut rig, there, address, _scripts } = Apart::boot(&options);
    let mut sending = rig.send(&address, &[&options[..], &["--json"]].concat());
    wait_middle(&rig, &mut sending);
    net.cut();
    wait_for("the destination to notice", || Rig::log(&there).contains(" lost (").then_some(()));
    there.vm().unwrap().ask(&Request::Stop).unwrap();
    wait_for("the destination to end", || there.status().is_err().then_some(()));
    net.heal();
    let sent = sending.wait();
    assert!(matches!(sent.code, Some(5 | 6)), "{sent:?}");
    rig.stayed(&there);
}

fn wait_middle_of_qemu(hosts: &mut Hosts, sending: &mut Process) {
    hosts.here.wait_moment(Moment::Early, sending);
    wait_for("some of the memory to be sent", || {
        let ram = hosts.here.migration().ram?;
        (ram.transferred > 64 << 20).then_some(())
    });
}

#[test]
fn a_destination_between_qemus_can_be_ended_while_the_link_is_lost() {
    let mut hosts = Hosts::boot_filled(256, PAGES_PER_S, 100, RATE);
    let mut there = hosts.fresh();
    hosts.here.forget_events();
    let (mut receiving, to) = hosts.receive(&there, &FOR_EVER);
    let mut sending = hosts.migrate(&to, &[&["--json"][..], &FOR_EVER].concat());
    wait_middle_of_qemu(&mut hosts, &mut sending);
    hosts.net.cut();
    receiving.wait_line("the loss", |line| line.contains(" lost ("));
    receiving.signal(Signal::INT);
    let received = receiving.wait();
    assert_eq!(received.code, Some(3), "{}", received.stderr);
    hosts.net.heal();
    let sent = sending.wait();
    assert!(matches!(sent.code, Some(5 | 6)), "{sent:?}");
    hosts.stayed(&mut there);
}

#[test]
fn a_migration_between_qemus_outlasts_the_loss_of_its_link() {
    for multifd in [&[][..], &["--multifd", "2"]] {
        let mut hosts = Hosts::boot_filled(256, PAGES_PER_S, 100, RATE);
        let there = hosts.fresh();
        hosts.here.forget_events();
        let patience = resume_timeout();
        let patience = ["--resume-timeout", &patience];
        let (receiving, to) = hosts.receive(&there, &patience);
        let sending = hosts.migrate(&to, &[&["--json"], multifd, &patience].concat());
        let mut migration = Migration { there, receiving, sending };
        wait_middle_of_qemu(&mut hosts, &mut migration.sending);
        hosts.net.cut();
        std::thread::sleep(outage());
        hosts.net.heal();
        let Migration { there, receiving, sending } = migration;
        let (sent, received) = (sending.wait(), receiving.wait());
        assert_eq!(sent.code, Some(0), "source: {}\ndestination: {}", sent.stderr, received.stderr);
        assert_eq!(received.code, Some(0), "{}", received.stderr);
        hosts.moved(there);
        let report: QemuReport = serde_json::from_str(&sent.stdout).unwrap();
        let bridge = bridge_of(&report);
        hardly_anything_twice("bridge", bridge.interruptions, bridge.wire_bytes);
    }
}
