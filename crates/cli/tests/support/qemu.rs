//! A VM that moves between QEMU processes at both ends of a link, and `pagewarp` processes beside them.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pagewarp_guest::{Event, GuestConfig, Report, Workload, WriteRate};
use pagewarp_qemu::bridge::SourceBridgeReport;
use pagewarp_qemu::manage::QemuReport;
use pagewarp_qemu::qmp::{MigrationStatus, QmpError, RunState, Vm};
use pagewarp_testkit::netns::{End, NetPair};
use pagewarp_testkit::qemu::{Machine, Qemu, QemuConfig};
use rustix::process::Signal;
use serde_json::{Map, Value};
use tempfile::TempDir;

pub(crate) use super::process::Process;
use super::process::signal;
use super::{GPU_FAULTS, PROGRAM, REPORT_MS, VERIFY_MIB_S, have_kvm, wait_for, without_patience};

/// What most of these tests let the link carry. Slow enough for a migration to have moments that can be hit.
pub(crate) const SLOW: u64 = 300_000_000;
/// A QEMU that has not answered for so long never will.
const HANGS: Duration = Duration::from_secs(10);
/// What bridges are told that compute on the CPU.
pub(crate) const PLAIN: [&str; 3] = ["--plaintext", "--backend", "cpu"];
/// Words that keep a migration from its switch-over, if the guest writes [`BUSY`] pages a second.
pub(crate) const ENDLESS: [&str; 2] = ["--downtime-ms", "1"];
/// Pages written a second by a guest whose migration takes several epochs.
pub(crate) const BUSY: u64 = 100_000;

/// A QEMU and the end of the link where it is.
pub(crate) struct Host {
    pub(crate) qemu: Qemu,
    /// A monitor of its own, because `pagewarp` occupies the one at `qemu.qmp()`.
    pub(crate) watch: Vm,
    pub(crate) end: End,
    /// Whether it has ended, or hangs: QEMU 7.2 does so as a destination whose multifd connections end at the wrong moment
    /// (`multifd_recv_sync_main` waits for threads that are gone).
    lost: bool,
}

impl Host {
    /// What the machine is doing; `None`: its QEMU has ended or hangs.
    pub(crate) fn state(&mut self) -> Option<RunState> {
        self.ask(Vm::status)
    }

    fn ask<T>(&mut self, question: impl FnOnce(&mut Vm) -> Result<T, QmpError>) -> Option<T> {
        self.lost |= self.qemu.has_ended();
        if self.lost {
            return None;
        }
        let answer = question(&mut self.watch);
        self.lost = answer.is_err();
        answer.ok()
    }

    pub(crate) fn runs(&mut self) -> bool {
        self.state().is_some_and(|state| state.running)
    }

    /// How its migration is doing; as if there never was one, where QEMU has ended.
    pub(crate) fn migration(&mut self) -> MigrationStatus {
        let none = MigrationStatus { status: "none".to_owned(), ..MigrationStatus::default() };
        self.ask(Vm::migration).unwrap_or(none)
    }

    /// Waits until its QEMU is neither migrating nor about to end or resume after that.
    pub(crate) fn settle(&mut self) -> Option<RunState> {
        self.settle_unless("")
    }

    /// The same for a destination whose `pagewarp` is gone: its QEMU may wait for a source that never comes.
    pub(crate) fn settle_alone(&mut self) -> Option<RunState> {
        self.settle_unless("setup")
    }

    fn settle_unless(&mut self, waiting: &str) -> Option<RunState> {
        wait_for("QEMU to end its migration", || {
            let migration = self.migration();
            if migration.is_under_way() && migration.status != waiting {
                return None;
            }
            let state = self.state();
            let passing = state.as_ref().is_some_and(|state| state.status == "finish-migrate");
            (!passing).then_some(state)
        })
    }

    pub(crate) fn last_report(&self) -> Option<Report> {
        self.qemu.serial().iter().rev().find_map(|line| report(line.event.as_ref()?))
    }

    /// Turns a migration capability on.
    pub(crate) fn turn_on(&mut self, capability: &str) {
        self.watch.set_capabilities([(capability, true)]).unwrap();
    }

    pub(crate) fn set(&mut self, parameter: &str, value: impl Into<Value>) {
        let parameters = Map::from_iter([(parameter.to_owned(), value.into())]);
        self.watch.set_parameters(parameters).unwrap();
    }

    /// Forgets what happened before a migration.
    pub(crate) fn forget_events(&mut self) {
        while self.watch.next_event(Duration::ZERO).unwrap().is_some() {}
    }

    /// Waits for a moment of a migration that this QEMU is the source of.
    pub(crate) fn wait_moment(&mut self, moment: Moment, sending: &mut Process) {
        let mut stopped = false;
        wait_for(&format!("the moment {moment:?}"), || {
            assert!(!sending.has_ended(), "it ended before {moment:?}: {}", sending.stderr());
            if moment == Moment::Switchover {
                while let Some(event) = self.watch.next_event(super::LOOK).unwrap() {
                    stopped |= event.name == "STOP";
                }
                return stopped.then_some(());
            }
            let status = self.migration();
            // A guest that hardly got to write leaves nothing to send: no further epoch comes then, but the migration goes on for as long as is wanted.
            if status.status == "pre-switchover" {
                return Some(());
            }
            // Otherwise it is that of the migration before.
            let epochs =
                status.ram.filter(|_| status.status == "active").map_or(0, |ram| ram.dirty_sync_count);
            let least = if moment == Moment::Early { 1 } else { 3 };
            (epochs >= least).then_some(())
        });
    }

    /// Ends its QEMU as an operator or a crash would.
    pub(crate) fn kill(&mut self) {
        if !self.qemu.has_ended() {
            signal(self.qemu.pid(), Signal::KILL);
            wait_for("QEMU to be gone", || self.qemu.has_ended().then_some(()));
        }
    }
}

impl Drop for Host {
    /// Tells more about a test that fails.
    fn drop(&mut self) {
        if std::thread::panicking() {
            let ended = self.qemu.has_ended();
            let said = self.qemu.errors();
            println!("QEMU {} at {:?}, ended: {ended}, said: {said}", self.qemu.pid(), self.end);
        }
    }
}

/// When something happens to a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    /// In the first epoch.
    Early,
    /// In a later epoch.
    Late,
    /// The VM has been stopped.
    Switchover,
}

/// Who encodes or decodes.
#[derive(Clone, Debug)]
pub(crate) struct Computing {
    /// As `--backend` calls it.
    pub(crate) backend: String,
    /// What goes wrong with its GPU, see docs/testing.md.
    pub(crate) faults: Option<String>,
}

impl Default for Computing {
    fn default() -> Computing {
        Computing { backend: "cpu".into(), faults: None }
    }
}

impl Computing {
    fn options(&self) -> [&str; 3] {
        ["--plaintext", "--backend", &self.backend]
    }

    fn variable(&self) -> Option<(&str, &str)> {
        self.faults.as_deref().map(|faults| (GPU_FAULTS, faults))
    }
}

/// Two ends of a link, and a VM at one of them.
pub(crate) struct Hosts {
    /// The QEMU that has the VM.
    pub(crate) here: Host,
    config: QemuConfig,
    number: u32,
    dir: TempDir,
    // Last: what runs in its namespaces must have ended.
    pub(crate) net: NetPair,
}

impl Hosts {
    /// Boots a VM at the source's end and waits until it is in its stride.
    pub(crate) fn boot(memory_mib: u64, pages_per_s: u64, rate_bits_per_s: u64) -> Hosts {
        Hosts::boot_machine(Machine::Microvm, memory_mib, pages_per_s, rate_bits_per_s)
    }

    pub(crate) fn boot_machine(
        machine: Machine,
        memory_mib: u64,
        pages_per_s: u64,
        rate_bits_per_s: u64,
    ) -> Hosts {
        Hosts::boot_with(machine, memory_mib, guest(pages_per_s), rate_bits_per_s, |_| vec![])
    }

    /// Boots a VM with contents in so many percent of its memory.
    pub(crate) fn boot_filled(
        memory_mib: u64,
        pages_per_s: u64,
        fill_percent: u8,
        rate_bits_per_s: u64,
    ) -> Hosts {
        let guest = GuestConfig { fill_percent: Some(fill_percent), ..guest(pages_per_s) };
        Hosts::boot_with(Machine::Microvm, memory_mib, guest, rate_bits_per_s, |_| vec![])
    }

    /// Boots a VM with a disk, an image that only one QEMU at a time may use.
    pub(crate) fn boot_with_disk(memory_mib: u64, pages_per_s: u64, rate_bits_per_s: u64) -> Hosts {
        Hosts::boot_with(Machine::Microvm, memory_mib, guest(pages_per_s), rate_bits_per_s, |dir| {
            let image = dir.join("image");
            File::create(&image).unwrap().set_len(1 << 20).unwrap();
            let drive =
                format!("if=none,id=disk,format=raw,cache=none,file.locking=on,file={}", image.display());
            ["-drive", &drive, "-device", "virtio-blk-device,drive=disk"].map(str::to_owned).to_vec()
        })
    }

    fn boot_with(
        machine: Machine,
        memory_mib: u64,
        guest: GuestConfig,
        rate_bits_per_s: u64,
        args: impl FnOnce(&Path) -> Vec<String>,
    ) -> Hosts {
        // Emulation would do, but the dirty log and the timing of KVM are what users have.
        have_kvm("a migration between QEMU processes");
        let net = NetPair::new(Some(rate_bits_per_s));
        let dir = tempfile::Builder::new().prefix("pagewarp-test-").tempdir().unwrap();
        let config = QemuConfig { machine, args: args(dir.path()), ..QemuConfig::new(memory_mib, guest) };
        let mut here = start(&config, &net, End::Source, dir.path().join("watch0"));
        here.qemu.wait_for("the first report", report);
        Hosts { here, config, number: 1, dir, net }
    }

    /// A fresh QEMU at the other end that waits for a migration.
    pub(crate) fn fresh(&mut self) -> Host {
        let config = QemuConfig { incoming: true, ..self.config.clone() };
        let number = self.next();
        start(&config, &self.net, self.there(), self.dir.path().join(format!("watch{number}")))
    }

    fn next(&mut self) -> u32 {
        self.number += 1;
        self.number
    }

    /// The end where the VM is not.
    pub(crate) fn there(&self) -> End {
        match self.here.end {
            End::Source => End::Destination,
            End::Destination => End::Source,
        }
    }

    /// A path for a socket.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts `pagewarp` at an end.
    pub(crate) fn run(&mut self, end: End, words: &[&str]) -> Process {
        self.run_with(end, words, None)
    }

    fn run_with(&mut self, end: End, words: &[&str], variable: Option<(&str, &str)>) -> Process {
        self.run_by(end, &[], words, variable)
    }

    /// The same, by a command that becomes the program in the end.
    pub(crate) fn run_by(
        &mut self,
        end: End,
        by: &[&str],
        words: &[&str],
        variable: Option<(&str, &str)>,
    ) -> Process {
        let number = self.next();
        let mut command = self.net.command(end, "setpriv");
        command.args(["--pdeathsig", "KILL"]).args(by).arg(PROGRAM).args(words).envs(variable);
        Process::start(command, &self.path(&number.to_string()))
    }

    /// Starts `pagewarp qemu receive` beside a destination, and tells where it listens.
    pub(crate) fn receive(&mut self, there: &Host, options: &[&str]) -> (Process, String) {
        self.receive_by(&Computing::default(), there, options)
    }

    /// The same, with this backend.
    pub(crate) fn receive_by(&mut self, by: &Computing, there: &Host, options: &[&str]) -> (Process, String) {
        let (qmp, listen) = (there.qemu.qmp(), format!("{}:0", address(there.end)));
        let words = ["qemu", "receive", "--qmp", text(&qmp), "--listen", &listen];
        let words = [&words[..], &by.options(), options].concat();
        let mut receiving = self.run_with(there.end, &words, by.variable());
        let line = receiving.wait_line("where it listens", |line| line.starts_with("waiting for a VM on "));
        let to = line.split_whitespace().nth(5).unwrap().to_owned();
        (receiving, to)
    }

    /// Starts `pagewarp qemu migrate` beside the VM.
    pub(crate) fn migrate(&mut self, to: &str, options: &[&str]) -> Process {
        self.migrate_by(&Computing::default(), to, options)
    }

    /// The same, with this backend.
    pub(crate) fn migrate_by(&mut self, by: &Computing, to: &str, options: &[&str]) -> Process {
        let qmp = self.here.qemu.qmp();
        let words = ["qemu", "migrate", "--qmp", text(&qmp), "--to", to];
        // What `auto` chooses depends on how fast the machine is.
        let route: &[&str] = if options.contains(&"--route") { &[] } else { &["--route", "bridge"] };
        let words = [&words[..], route, &by.options(), &without_patience(options)].concat();
        self.run_with(self.here.end, &words, by.variable())
    }

    /// A fresh destination, and a migration to it that has begun.
    pub(crate) fn begin(&mut self, options: &[&str]) -> Migration {
        let there = self.fresh();
        self.here.forget_events();
        let patience = options.iter().position(|word| *word == "--peer-timeout");
        let patience = patience.map_or(&[][..], |at| &options[at..at + 2]);
        let (receiving, to) = self.receive(&there, patience);
        let sending = self.migrate(&to, options);
        Migration { there, receiving, sending }
    }

    /// The VM has not moved: it runs here, has never run there, and has looked at all of its memory since.
    pub(crate) fn stayed(&mut self, there: &mut Host) {
        let state = self.here.settle();
        assert_eq!(state.map(|state| state.status).as_deref(), Some("running"));
        assert!(!there.runs(), "both run the VM");
        well(&mut self.here, None);
        assert!(!there.runs(), "both run the VM");
        assert!(there.qemu.serial().is_empty(), "the VM has run there: {:?}", there.qemu.serial());
    }

    /// The VM runs there, not here any more, and has looked at all of its memory since.
    pub(crate) fn moved(&mut self, mut there: Host) {
        assert!(there.runs(), "nobody runs the VM");
        let old = self.here.settle();
        assert!(old.is_none_or(|state| state.status == "postmigrate"), "both run the VM");
        let said = self.here.qemu.serial().len();
        let before = self.here.last_report();
        well(&mut there, before);
        assert!(!self.here.runs(), "both run the VM");
        // A line that was cut by the move may come when this QEMU ends, but no more than that.
        assert!(self.here.qemu.serial().len() <= said + 1, "the VM has run on both sides");
        self.here = there;
    }

    /// Does what the documentation says about a migration that ended somehow, with what is left of it: the VM runs on exactly one side then.
    /// Returns whether it moved.
    pub(crate) fn resolve(&mut self, mut there: Host) -> Outcome {
        self.here.settle();
        // A QEMU that nobody commands any more may still carry out what it was told last; after this it has.
        there.settle();
        if there.runs() {
            self.moved(there);
            return Outcome::Moved;
        }
        // It must not run the VM any more.
        there.kill();
        let state = self.here.settle().expect("the source lives").status;
        let outcome = if state == "postmigrate" {
            let qmp = self.here.qemu.qmp();
            let words = ["qemu", "resolve", "--qmp", text(&qmp), "--resume"];
            let done = self.run(self.here.end, &words).wait();
            assert_eq!(done.code, Some(0), "{}", done.stderr);
            Outcome::Resumed
        } else {
            Outcome::Stayed
        };
        self.stayed(&mut there);
        outcome
    }

    /// Moves the VM to a fresh QEMU, which must succeed.
    pub(crate) fn hop(&mut self, options: &[&str]) -> QemuReport {
        let Migration { there, receiving, sending } = self.begin(&[&["--json"], options].concat());
        let sent = sending.wait();
        let received = receiving.wait();
        assert_eq!(sent.code, Some(0), "source: {}\ndestination: {}", sent.stderr, received.stderr);
        assert_eq!(received.code, Some(0), "{}", received.stderr);
        self.moved(there);
        serde_json::from_str(&sent.stdout).unwrap()
    }
}

/// Where the VM is after a disturbed migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Outcome {
    /// It never left.
    Stayed,
    /// It has moved.
    Moved,
    /// It was paused, and `resolve --resume` let it go on.
    Resumed,
}

/// A migration under way.
pub(crate) struct Migration {
    pub(crate) there: Host,
    pub(crate) receiving: Process,
    pub(crate) sending: Process,
}

/// A guest that reports often and checks its memory fast.
fn guest(pages_per_s: u64) -> GuestConfig {
    GuestConfig {
        workload: Workload::Kv,
        write_rate: WriteRate::PagesPerS(pages_per_s),
        report_ms: REPORT_MS,
        verify_mib_s: Some(VERIFY_MIB_S),
        ..GuestConfig::default()
    }
}

fn start(config: &QemuConfig, net: &NetPair, end: End, watch: PathBuf) -> Host {
    let second = format!("unix:{},server=on,wait=off", watch.display());
    let args = [&config.args[..], &["-qmp".to_owned(), second]].concat();
    let qemu = QemuConfig { netns: Some(net.name(end).to_owned()), args, ..config.clone() }.start();
    // The harness waits for the first monitor, and this is the second.
    let watch = wait_for("the second monitor", || Vm::connect(&watch, HANGS).ok());
    Host { qemu, watch, end, lost: false }
}

/// Waits until the guest has checked all of its memory twice since `before`, or its last report. Corruption fails the test.
pub(crate) fn well(host: &mut Host, before: Option<Report>) -> Report {
    let last = host.last_report().or(before).expect("it has reported before");
    let checked = host.qemu.wait_for("two sweeps", |event| {
        report(event).filter(|r| r.seq > last.seq && r.sweeps >= last.sweeps + 2)
    });
    assert_eq!(checked.errors, 0);
    assert!(checked.ops > last.ops, "{last:?} {checked:?}");
    checked
}

fn report(event: &Event) -> Option<Report> {
    match event {
        Event::Report(report) => Some(*report),
        _ => None,
    }
}

pub(crate) fn address(end: End) -> std::net::Ipv4Addr {
    match end {
        End::Source => NetPair::SOURCE,
        End::Destination => NetPair::DESTINATION,
    }
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("paths of tests are text")
}

/// The source bridge's account.
pub(crate) fn bridge_of(report: &QemuReport) -> &SourceBridgeReport {
    report.bridge.as_ref().expect("the bridge's account")
}
