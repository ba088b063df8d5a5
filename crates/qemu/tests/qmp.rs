//! Two QEMU processes under the commands of this crate, without the bridge: they migrate to each other directly.

use std::time::{Duration, Instant, SystemTime};

use pagewarp_guest::{Event, GuestConfig, Report, Workload, WriteRate};
use pagewarp_qemu::qmp::check::{self, Seen, Wish};
use pagewarp_qemu::qmp::{QmpError, Version, Vm};
use pagewarp_testkit::netns::{End, NetPair};
use pagewarp_testkit::qemu::{Machine, Qemu, QemuConfig};
use serde_json::json;

/// How long anything may take on a busy machine before the test gives up.
const PATIENCE: Duration = Duration::from_secs(120);

/// A source that runs its workload and a destination that waits, both connected to.
struct Pair {
    source: Qemu,
    destination: Qemu,
    source_vm: Vm,
    destination_vm: Vm,
}

impl Pair {
    fn start(machine: Machine, net: Option<&NetPair>) -> Pair {
        let guest = GuestConfig {
            workload: Workload::Kv,
            write_rate: WriteRate::PagesPerS(2000),
            report_ms: 200,
            ..GuestConfig::default()
        };
        let netns = |end| net.map(|net| net.name(end).to_owned());
        let config = QemuConfig { machine, netns: netns(End::Source), ..QemuConfig::new(256, guest) };
        let mut source = config.start();
        let destination = QemuConfig { incoming: true, netns: netns(End::Destination), ..config }.start();
        source.wait_for("the first report", report);
        let source_vm = Vm::connect(source.qmp(), PATIENCE).unwrap();
        let destination_vm = Vm::connect(destination.qmp(), PATIENCE).unwrap();
        Pair { source, destination, source_vm, destination_vm }
    }

    /// Tells both what they need to know for `wish`.
    fn prepare(&mut self, wish: &Wish) {
        let seen = Seen::ask(&mut self.source_vm).unwrap();
        check::source(&seen, wish).unwrap().apply(&mut self.source_vm).unwrap();
        let seen = Seen::ask(&mut self.destination_vm).unwrap();
        check::destination(&seen, wish).unwrap().apply(&mut self.destination_vm).unwrap();
    }

    /// Starts the migration over a Unix socket.
    fn migrate(&mut self) {
        self.migrate_over(&format!("unix:{}", self.destination.dir().join("migration").display()));
    }

    fn migrate_over(&mut self, uri: &str) {
        self.destination_vm.migrate_incoming(uri).unwrap();
        self.source_vm.migrate(uri).unwrap();
    }
}

fn report(event: &Event) -> Option<Report> {
    match event {
        Event::Report(report) => Some(*report),
        _ => None,
    }
}

/// Events up to the end of a migration: when each first came, by name, and the statuses.
struct Course {
    events: Vec<(String, Option<SystemTime>)>,
    statuses: Vec<String>,
}

impl Course {
    fn follow(vm: &mut Vm) -> Course {
        let mut course = Course { events: Vec::new(), statuses: Vec::new() };
        let deadline = Instant::now() + PATIENCE;
        while !course
            .statuses
            .last()
            .is_some_and(|last| ["completed", "failed", "cancelled"].contains(&last.as_str()))
        {
            let left = deadline.saturating_duration_since(Instant::now());
            let event =
                vm.next_event(left).unwrap().unwrap_or_else(|| panic!("no end after {:?}", course.statuses));
            course.statuses.extend(event.migration_status().map(str::to_owned));
            course.events.push((event.name, event.at));
        }
        course
    }

    fn at(&self, name: &str) -> SystemTime {
        let (_, at) = self.events.iter().find(|(event, _)| event == name).unwrap_or_else(|| {
            panic!("no {name} among {:?}", self.events);
        });
        at.expect("QEMU's clock works")
    }
}

fn migrates(machine: Machine, wish: &Wish) {
    let mut pair = Pair::start(machine, None);
    pair.prepare(wish);
    pair.migrate();
    let source = Course::follow(&mut pair.source_vm);
    let destination = Course::follow(&mut pair.destination_vm);
    assert_eq!(source.statuses, ["setup", "active", "completed"]);
    assert_eq!(destination.statuses.last().map(String::as_str), Some("completed"));
    let downtime = destination.at("RESUME").duration_since(source.at("STOP")).expect("one clock, in order");

    let status = pair.source_vm.ended_migration(PATIENCE).unwrap();
    assert_eq!(status.status, "completed");
    assert!(!status.is_under_way());
    // The source learns over the return path that the destination runs, so it cannot think that the guest stood still for less. Its
    // clock starts a little before the event.
    let reported = Duration::from_millis(status.downtime_ms.expect("known at the end"));
    assert!(reported + Duration::from_millis(1) >= downtime, "{reported:?} but {downtime:?}");
    assert!(status.total_ms.unwrap() >= status.downtime_ms.unwrap());
    let ram = status.ram.expect("the source counts");
    assert_eq!((ram.remaining, ram.page_size), (0, 4096));
    assert!(ram.total >= 256 << 20 && ram.normal > 10_000 && ram.dirty_sync_count >= 2, "{ram:?}");

    assert_eq!(pair.source_vm.status().unwrap().status, "postmigrate");
    assert!(pair.destination_vm.status().unwrap().running);
    let refusal = check::source(&Seen::ask(&mut pair.source_vm).unwrap(), wish).unwrap_err();
    assert!(matches!(refusal, check::Refusal::SourceState { .. }), "{refusal}");

    // The guest goes on where it stopped: reports keep counting, and it has looked at all of its memory more than once since.
    let before =
        pair.source.serial().iter().rev().find_map(|line| report(line.event.as_ref()?)).expect("reports");
    let first = pair.destination.wait_for("a report", report);
    assert!(first.seq == before.seq + 1 || first.seq == before.seq + 2, "{before:?} {first:?}");
    let checked = pair
        .destination
        .wait_for("two sweeps", |event| report(event).filter(|r| r.sweeps >= first.sweeps + 2));
    assert_eq!(checked.errors, 0);
    assert!(checked.ops > before.ops);
    let pauses = pair.destination.serial().into_iter().filter_map(|line| match line.event? {
        Event::Pause(pause) => Some(pause.us),
        _ => None,
    });
    let longest = pauses.max().map_or(Duration::ZERO, Duration::from_micros);
    println!(
        "{machine:?} {wish:?}: STOP to RESUME {downtime:?}, QEMU says {reported:?}, the guest {longest:?}"
    );
    assert!(pair.source.cpu_time_without_vcpus() > Duration::ZERO);
    pair.source_vm.quit().unwrap();
}

#[test]
fn a_vm_migrates() {
    migrates(Machine::Microvm, &Wish::default());
}

#[test]
fn a_vm_with_a_bios_migrates_over_many_connections() {
    migrates(Machine::Pc, &Wish { multifd: std::num::NonZeroU8::new(3), ..Wish::default() });
}

#[test]
fn a_cancelled_migration_leaves_the_source_running() {
    let mut pair = Pair::start(Machine::Microvm, None);
    pair.prepare(&Wish::default());
    // Slow enough never to be over before it is cancelled.
    let slow = json!({ "max-bandwidth": 1 << 20 }).as_object().unwrap().clone();
    pair.source_vm.set_parameters(slow).unwrap();
    pair.migrate();
    let status = pair.source_vm.migration().unwrap();
    assert!(status.is_under_way(), "{status:?}");
    let refusal = check::source(&Seen::ask(&mut pair.source_vm).unwrap(), &Wish::default()).unwrap_err();
    assert!(matches!(refusal, check::Refusal::UnderWay { .. }), "{refusal}");

    pair.source_vm.cancel().unwrap();
    let course = Course::follow(&mut pair.source_vm);
    assert_eq!(course.statuses.last().map(String::as_str), Some("cancelled"));
    assert!(course.events.iter().all(|(name, _)| name != "STOP"));
    assert!(pair.source_vm.status().unwrap().running);
    let last =
        pair.source.serial().iter().rev().find_map(|line| report(line.event.as_ref()?)).expect("reports");
    let later =
        pair.source.wait_for("a later report", |event| report(event).filter(|r| r.seq > last.seq + 1));
    assert_eq!(later.errors, 0);
    check::source(&Seen::ask(&mut pair.source_vm).unwrap(), &Wish::default()).unwrap();

    // Before 9.1 a destination ends with its migration; since, it stays and can be asked.
    if pair.destination_vm.version() < Version::new(9, 1) {
        let deadline = Instant::now() + PATIENCE;
        while !pair.destination.has_ended() {
            assert!(Instant::now() < deadline, "the destination waits for more");
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(matches!(pair.destination_vm.status(), Err(QmpError::Gone { .. })));
    } else {
        assert_eq!(
            Course::follow(&mut pair.destination_vm).statuses.last().map(String::as_str),
            Some("failed")
        );
    }
}

#[test]
fn a_vm_migrates_between_network_namespaces() {
    let net = NetPair::new(Some(2_000_000_000));
    let mut pair = Pair::start(Machine::Microvm, Some(&net));
    // The wrappers have become QEMU.
    let program = std::fs::read_link(format!("/proc/{}/exe", pair.source.pid())).unwrap();
    assert!(program.ends_with("qemu-system-x86_64"), "{program:?}");
    pair.prepare(&Wish::default());
    pair.migrate_over(&format!("tcp:{}:4444", NetPair::DESTINATION));
    let course = Course::follow(&mut pair.source_vm);
    assert_eq!(course.statuses.last().map(String::as_str), Some("completed"));
    let first = pair.destination.wait_for("a report", report);
    pair.destination.wait_for("two sweeps", |event| report(event).filter(|r| r.sweeps >= first.sweeps + 2));
}

#[test]
fn a_machine_says_what_it_is() {
    let config = QemuConfig::new(64, GuestConfig { workload: Workload::Idle, ..GuestConfig::default() });
    let qemu = config.start();
    let mut vm = Vm::connect(qemu.qmp(), PATIENCE).unwrap();
    assert!(vm.version() >= Version::new(6, 2), "{}", vm.version());
    assert_eq!(vm.name().unwrap().as_deref(), Some("pagewarp-test"));
    assert_eq!(vm.uuid().unwrap().len(), 36);
    assert_eq!(vm.migration().unwrap().status, "none");
    let threads = vm.vcpu_threads().unwrap();
    assert_eq!(threads.len(), 1);
    // The harness tells vCPUs by their threads' names.
    let name = std::fs::read_to_string(format!("/proc/{}/task/{}/comm", qemu.pid(), threads[0])).unwrap();
    assert!(name.starts_with("CPU "), "{name}");

    vm.stop().unwrap();
    assert_eq!(vm.status().unwrap().status, "paused");
    vm.cont().unwrap();
    assert_eq!(vm.next_event(PATIENCE).unwrap().unwrap().name, "STOP");
    assert_eq!(vm.next_event(PATIENCE).unwrap().unwrap().name, "RESUME");
    let refusal = check::destination(&Seen::ask(&mut vm).unwrap(), &Wish::default()).unwrap_err();
    assert!(matches!(refusal, check::Refusal::NotIncoming { .. }), "{refusal}");
    let refused = vm.migrate_incoming("unix:/nowhere").unwrap_err();
    assert!(matches!(refused, QmpError::Refused { .. }), "{refused}");

    let second = Vm::connect(qemu.qmp(), Duration::from_millis(200)).unwrap_err();
    assert!(matches!(second, QmpError::Busy { .. }), "{second}");
    vm.quit().unwrap();
}

#[test]
fn a_destination_that_listens_already_is_refused() {
    let config = QemuConfig::new(64, GuestConfig { workload: Workload::Idle, ..GuestConfig::default() });
    let qemu = QemuConfig { incoming: true, ..config }.start();
    let mut vm = Vm::connect(qemu.qmp(), PATIENCE).unwrap();
    check::destination(&Seen::ask(&mut vm).unwrap(), &Wish::default()).unwrap();
    vm.migrate_incoming(&format!("unix:{}", qemu.dir().join("migration").display())).unwrap();
    let refusal = check::destination(&Seen::ask(&mut vm).unwrap(), &Wish::default()).unwrap_err();
    assert!(matches!(refusal, check::Refusal::AlreadyListening { .. }), "{refusal}");
}
