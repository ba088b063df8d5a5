//! Endurance: one VM migrates back and forth many times, and a bigger one while the memory of both processes is watched.
//!
//! Whether nothing is lost is asserted; how long things take is printed, and written to `target/soak.json`. docs/robustness.md
//! tells how to run more and bigger.

mod support;

use std::sync::{Mutex, PoisonError};

use pagewarp_cli::demo::host::HostInfo;
use pagewarp_cli::units::{ByteSize, Rate};
use pagewarp_engine::report::SourceReport;
use pagewarp_guest::GuestConfig;
use pagewarp_testkit::shaper::{LinkConfig, LinkShaper};
use serde_json::{Value, json};

use support::process::MemoryWatch;
use support::{Rig, have_kvm, setting, target_dir};

/// The tests of this file would disturb each other's figures.
static ALONE: Mutex<()> = Mutex::new(());

/// The guest's own measure of the pause and ours may differ by this; printed, not asserted.
const PAUSE_TOLERANCE_MS: f64 = 20.0;
/// What a migrator may use beside the history.
const MEMORY_ALLOWANCE_BYTES: u64 = 256 << 20;

fn write_rate() -> u64 {
    let pagewarp_guest::WriteRate::PagesPerS(default) = GuestConfig::default().write_rate else {
        unreachable!("the default is a rate")
    };
    setting("PAGEWARP_SOAK_RATE", default)
}

/// The link of all migrations: `none` or a rate.
fn link_rate() -> Option<u64> {
    match setting("PAGEWARP_SOAK_LINK", "1Gbit".to_owned()).as_str() {
        "none" => None,
        rate => Some(rate.parse::<Rate>().expect("PAGEWARP_SOAK_LINK is `none` or a rate").bytes_per_s * 8),
    }
}

/// Moves the VM to a fresh process over this link, and watches the memory of both.
fn hop(rig: &mut Rig, options: &[&str]) -> (SourceReport, [MemoryWatch; 2]) {
    let (there, address) = rig.receiver();
    let config = LinkConfig { rate_bits_per_s: link_rate(), ..LinkConfig::default() };
    let link = LinkShaper::start(address.parse().unwrap(), config).unwrap();
    let watches = [&rig.here, &there].map(|machine| MemoryWatch::start(machine.status().unwrap().pid));
    let downtime = setting("PAGEWARP_SOAK_DOWNTIME_MS", 5000).to_string();
    let always = ["--verify", "--json", "--downtime-ms", &downtime];
    let sent = rig.send(&link.address().to_string(), &[&always, options].concat()).wait();
    assert_eq!(
        sent.code,
        Some(0),
        "{}\nsource: {}\ndestination: {}",
        sent.stderr,
        Rig::log(&rig.here),
        Rig::log(&there)
    );
    let report: SourceReport = serde_json::from_str(&sent.stdout).unwrap();
    assert_eq!(report.verified, Some(true), "every page must be the same on both sides");
    rig.moved(there);
    (report, watches)
}

#[test]
fn the_same_vm_moves_many_times_and_loses_nothing() {
    if !have_kvm("soak") {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let memory: ByteSize = setting("PAGEWARP_SOAK_MEMORY", ByteSize(256 << 20));
    let rounds: u32 = setting("PAGEWARP_SOAK_ROUNDS", 10);
    let mut rig = Rig::boot(memory, write_rate());
    let first = *rig.guest.last().unwrap();
    let mut hops = Vec::new();
    for number in 1..=rounds {
        let before = *rig.guest.last().unwrap();
        let (report, _) = hop(&mut rig, &[]);
        let after = *rig.guest.last().unwrap();
        assert!(after.sweeps > before.sweeps && after.ops > before.ops && after.errors == 0, "{after:?}");
        let guest_pause_ms = rig.guest.hop_pause_ms().expect("the guest has reported since");
        let epochs = report.epochs.len();
        println!(
            "hop {number:3}: {:6.0} ms in all, downtime {:6.1} ms, guest's pause {guest_pause_ms:6.1} ms, {epochs} epochs, {} sweeps",
            report.total_ms, report.downtime_ms, after.sweeps
        );
        hops.push(json!({
            "hop": number,
            "total_ms": report.total_ms,
            "downtime_ms": report.downtime_ms,
            "guest_pause_ms": guest_pause_ms,
            "epochs": epochs,
            "guest_bytes": report.guest_bytes,
            "wire_bytes": report.wire_bytes,
            "verified": report.verified,
            "sweeps": after.sweeps,
            "errors": after.errors,
            "downtime_limit_ms": report.downtime_limit_ms,
        }));
    }
    let last = *rig.guest.last().unwrap();
    println!(
        "{rounds} hops, {} operations, {} sweeps, {} errors",
        last.ops - first.ops,
        last.sweeps,
        last.errors
    );
    publish(memory, hops);
    rig.here.stop();
}

/// Prints and writes the figures of the soak.
fn publish(memory: ByteSize, hops: Vec<Value>) {
    let figure = |hop: &Value, name: &str| hop[name].as_f64().unwrap();
    let within =
        hops.iter().filter(|hop| figure(hop, "downtime_ms") <= figure(hop, "downtime_limit_ms")).count();
    let differences: Vec<f64> =
        hops.iter().map(|hop| (figure(hop, "guest_pause_ms") - figure(hop, "downtime_ms")).abs()).collect();
    let largest = differences.iter().copied().fold(0.0, f64::max);
    let agree = differences.iter().filter(|&&difference| difference <= PAUSE_TOLERANCE_MS).count();
    println!(
        "downtime within limit: {within} of {}, largest |guest pause - downtime| = {largest:.1} ms ({agree} of {} within {PAUSE_TOLERANCE_MS} ms)",
        hops.len(),
        hops.len()
    );
    let report = json!({
        "host": HostInfo::detect(),
        "memory_bytes": memory.0,
        "link_bits_per_s": link_rate(),
        "pages_per_s": write_rate(),
        "downtime_within_limit": within,
        "pause_agrees": agree,
        "largest_pause_difference_ms": largest,
        "hops": hops,
    });
    let path = target_dir().join("soak.json");
    std::fs::write(&path, serde_json::to_string_pretty(&report).unwrap()).unwrap();
    println!("written to {}", path.display());
}

#[test]
fn the_migrator_keeps_to_its_memory() {
    if !have_kvm("the test of the migrator's memory") {
        return;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let memory: ByteSize = setting("PAGEWARP_MEMORY_TEST_MEMORY", ByteSize(512 << 20));
    let history: ByteSize = setting("PAGEWARP_MEMORY_TEST_HISTORY", ByteSize(128 << 20));
    let bound = history.0 + MEMORY_ALLOWANCE_BYTES;
    let mut rig = Rig::boot(memory, write_rate());
    for connections in ["1", "4"] {
        let options =
            ["--history", &history.to_string(), "--connections", connections, "--threads", connections];
        let (report, watches) = hop(&mut rig, &options);
        let reported = report.destination.as_ref().unwrap().peak_anonymous_bytes;
        let [source, destination] = watches.map(|watch| watch.peak());
        let mib = |bytes: u64| bytes >> 20;
        println!(
            "VM {memory}, history {history}, {connections} connections and threads: anonymous memory at its highest: \
             source {} MiB (reports {}), destination {} MiB (reports {}), bound {} MiB; history in use {} MiB",
            mib(source),
            mib(report.peak_anonymous_bytes),
            mib(destination),
            mib(reported),
            mib(bound),
            mib(report.history_bytes),
        );
        for (end, bytes) in [("source", source), ("destination", destination)] {
            assert!(bytes > 0 && bytes <= bound, "{end}: {} MiB, more than {} MiB", mib(bytes), mib(bound));
        }
        assert!(report.history_bytes <= history.0);
    }
    rig.here.stop();
}
