//! Two QEMU processes that migrate through the bridge.

mod bridges;

use std::num::NonZeroU8;
use std::path::PathBuf;
use std::time::Instant;

use bridges::{Bridges, PATIENCE};
use pagewarp_guest::{Event, GuestConfig, Report, Workload, WriteRate};
use pagewarp_qemu::bridge::{
    BridgeConfig, Compression, DestinationBridgeReport, Endpoint, SourceBridgeReport,
};
use pagewarp_qemu::policy::Level;
use pagewarp_qemu::qmp::Vm;
use pagewarp_qemu::qmp::check::{self, Seen, Wish};
use pagewarp_testkit::qemu::{Machine, Qemu, QemuConfig};
use tempfile::TempDir;

/// A source that runs its workload, a destination that waits, and where their sockets are.
struct Pair {
    _source: Qemu,
    destination: Qemu,
    source_vm: Vm,
    destination_vm: Vm,
    dir: TempDir,
}

impl Pair {
    fn start(machine: Machine) -> Pair {
        let guest = GuestConfig {
            workload: Workload::Kv,
            write_rate: WriteRate::PagesPerS(2000),
            report_ms: 200,
            ..GuestConfig::default()
        };
        let config = QemuConfig { machine, ..QemuConfig::new(256, guest) };
        let mut source = config.start();
        let destination = QemuConfig { incoming: true, ..config }.start();
        source.wait_for("the first report", report);
        let source_vm = Vm::connect(source.qmp(), PATIENCE).unwrap();
        let destination_vm = Vm::connect(destination.qmp(), PATIENCE).unwrap();
        Pair { _source: source, destination, source_vm, destination_vm, dir: TempDir::new().unwrap() }
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn prepare(&mut self, wish: &Wish) {
        let seen = Seen::ask(&mut self.source_vm).unwrap();
        check::source(&seen, wish).unwrap().apply(&mut self.source_vm).unwrap();
        let seen = Seen::ask(&mut self.destination_vm).unwrap();
        check::destination(&seen, wish).unwrap().apply(&mut self.destination_vm).unwrap();
    }

    /// Waits for the end of the migration as the source sees it.
    fn end_of_migration(&mut self) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let event =
                self.source_vm.next_event(deadline.saturating_duration_since(Instant::now())).unwrap();
            let event = event.expect("the migration ends");
            if let Some(status @ ("completed" | "failed" | "cancelled")) = event.migration_status() {
                return status.to_owned();
            }
        }
    }

    /// The guest runs on the destination, and has looked at all of its memory since.
    fn check_guest(&mut self) {
        assert!(self.destination_vm.status().unwrap().running);
        assert_eq!(self.source_vm.status().unwrap().status, "postmigrate");
        let first = self.destination.wait_for("a report", report);
        let checked = self
            .destination
            .wait_for("two sweeps", |event| report(event).filter(|r| r.sweeps >= first.sweeps + 2));
        assert_eq!(checked.errors, 0);
    }
}

fn report(event: &Event) -> Option<Report> {
    match event {
        Event::Report(report) => Some(*report),
        _ => None,
    }
}

fn migrates(
    machine: Machine,
    wish: &Wish,
    change: impl Fn(&mut BridgeConfig),
) -> (SourceBridgeReport, DestinationBridgeReport) {
    let pair = Pair::start(machine);
    let (near, far) = (Endpoint::Unix(pair.socket("src")), Endpoint::Unix(pair.socket("dst")));
    migrates_between(pair, near, far, wish, change)
}

fn migrates_between(
    mut pair: Pair,
    near: Endpoint,
    far: Endpoint,
    wish: &Wish,
    change: impl Fn(&mut BridgeConfig),
) -> (SourceBridgeReport, DestinationBridgeReport) {
    pair.prepare(wish);
    let (to_near, at_far) = (near.to_string(), far.to_string());
    let bridges = Bridges::start(near, far, change);
    pair.destination_vm.migrate_incoming(&at_far).unwrap();
    let started = Instant::now();
    pair.source_vm.migrate(&to_near).unwrap();
    let (end, took) = (pair.end_of_migration(), started.elapsed());
    assert_eq!(end, "completed");
    let (source, destination) = bridges.join();
    let (source, destination) = (source.unwrap(), destination.unwrap());
    eprintln!("{took:?}\n{source:#?}\n{destination:#?}");
    pair.check_guest();
    assert!(source.complete && destination.complete);
    assert_eq!(source.stream_bytes, destination.stream_bytes);
    assert_eq!(
        source.passed_raw.len(),
        usize::from(source.passed_raw.contains_key(&0)),
        "{:?}",
        source.passed_raw
    );
    (source, destination)
}

#[test]
fn a_vm_migrates_over_one_connection() {
    let (source, _) = migrates(Machine::Microvm, &Wish::default(), |_| {});
    assert_eq!(source.connections, 1);
}

#[test]
fn a_vm_migrates_over_multifd() {
    let wish = Wish { multifd: NonZeroU8::new(2), ..Wish::default() };
    let (source, _) = migrates(Machine::Pc, &wish, |_| {});
    assert_eq!(source.connections, 3);
}

#[test]
fn every_level_of_compression_rebuilds_the_stream() {
    for level in Level::ALL {
        let (source, _) = migrates(Machine::Microvm, &Wish::default(), |config| {
            config.compression = Compression::Always(level);
        });
        let used = &source.levels[level.name()];
        assert_eq!(used.pages, source.pages, "{level:?}");
        let share = if level >= Level::Lz4 { 0.7 } else { 1.01 };
        assert!((source.wire_bytes as f64) < share * source.stream_bytes as f64, "{level:?}: {source:?}");
    }
}

#[test]
fn qemu_and_its_bridge_may_meet_on_loopback() {
    // Ports that were free a moment ago.
    let free = || {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        Endpoint::Tcp(listener.local_addr().unwrap())
    };
    let (near, far) = (free(), free());
    let wish = Wish { multifd: NonZeroU8::new(2), ..Wish::default() };
    let (source, _) = migrates_between(Pair::start(Machine::Microvm), near, far, &wish, |_| {});
    assert_eq!(source.connections, 3);
}
