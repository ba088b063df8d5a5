//! What the tests of endurance and of failures share: a VM that moves between real processes, and ways to disturb it.

#![allow(dead_code, reason = "each test binary uses its own part")]

pub(crate) mod gate;
pub(crate) mod peer;
pub(crate) mod process;
pub(crate) mod proxy;
pub(crate) mod qemu;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pagewarp_cli::backend::{BackendName, adapters};
use pagewarp_cli::demo::guest::GuestWatch;
use pagewarp_cli::demo::host::kvm_works;
use pagewarp_cli::demo::machine::{BootConfig, Extras, Machine};
use pagewarp_cli::units::ByteSize;
use pagewarp_engine::report::SourceReport;
use pagewarp_gpu::AdapterKind;
use pagewarp_guest::{GuestConfig, Report, Workload, WriteRate};
use pagewarp_kvm::control::{Status, VmState};
use tempfile::TempDir;

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_pagewarp");
/// How long anything may take that must happen. Generous: test hosts are busy, and no time is measured with it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);
/// Memory that even a slow host's guest fills or checks in a second.
const BYTES_PER_S: u64 = 16 << 20;
/// How often a state is looked at.
const LOOK: Duration = Duration::from_millis(5);
/// Short, so that little time is spent waiting for the guest's word.
const REPORT_MS: u64 = 100;
/// MiB that the guest checks a second: a sweep over the small VMs of these tests takes a fraction of a second.
const VERIFY_MIB_S: u64 = 1024;

/// Whether there is a KVM to test with. Without one the test fails, unless the environment says that it may go without having run.
pub(crate) fn have_kvm(test: &str) -> bool {
    if kvm_works() {
        return true;
    }
    assert!(
        std::env::var_os("PAGEWARP_ALLOW_NO_KVM").is_some_and(|value| value == "1"),
        "{test} needs /dev/kvm, which cannot be opened: load kvm_intel or kvm_amd and join the group that owns it, \
         or set PAGEWARP_ALLOW_NO_KVM=1 to go without this test"
    );
    eprintln!("\n*** NOT RUN: {test}: /dev/kvm cannot be opened ***\n");
    false
}

/// The variable that makes the GPU of a `pagewarp` process fail, see docs/testing.md.
pub(crate) const GPU_FAULTS: &str = "PAGEWARP_GPU_FAULTS";

/// The device in software, as `--backend` calls it. Fails with what to install if there is none.
pub(crate) fn software_gpu() -> String {
    let found = adapters().into_iter().find(|adapter| adapter.kind() == AdapterKind::Software);
    let found = found.expect(
        "no Vulkan device in software: apt-get install mesa-vulkan-drivers libvulkan1; is VK_ICD_FILENAMES or VK_DRIVER_FILES set?",
    );
    format!("gpu:{}", found.index())
}

/// A setting from the environment, or its default.
pub(crate) fn setting<T: std::str::FromStr>(name: &str, default: T) -> T {
    match std::env::var(name) {
        Ok(text) => {
            text.parse().unwrap_or_else(|_| panic!("{name} is set to `{text}`, which does not parse"))
        }
        Err(_) => default,
    }
}

/// The directory of the build, where figures are left.
pub(crate) fn target_dir() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("it is target/tmp")
}

/// A VM with the built-in guest, in one process at a time.
pub(crate) struct Rig {
    dir: TempDir,
    /// The process that has the VM.
    pub(crate) here: Machine,
    pub(crate) guest: GuestWatch,
    processes: u32,
    /// How long the guest may take to fill or to check its memory, and a migration to move it.
    patience: Duration,
}

impl Rig {
    /// Boots the guest and waits until it is in its stride.
    pub(crate) fn boot(memory: ByteSize, pages_per_s: u64) -> Rig {
        Rig::boot_filled(memory, pages_per_s, None, BackendName::Auto)
    }

    /// Boots the guest with contents in so many percent of its memory, in a process that has this backend.
    pub(crate) fn boot_filled(
        memory: ByteSize,
        pages_per_s: u64,
        fill_percent: Option<u8>,
        backend: BackendName,
    ) -> Rig {
        Rig::boot_by(Path::new(PROGRAM), memory, pages_per_s, fill_percent, backend)
    }

    /// The same, by something that becomes the program in the end.
    pub(crate) fn boot_by(
        program: &Path,
        memory: ByteSize,
        pages_per_s: u64,
        fill_percent: Option<u8>,
        backend: BackendName,
    ) -> Rig {
        let dir = tempfile::Builder::new().prefix("pagewarp-test-").tempdir().unwrap();
        let guest = GuestConfig {
            workload: Workload::Kv,
            write_rate: WriteRate::PagesPerS(pages_per_s),
            report_ms: REPORT_MS,
            verify_mib_s: Some(VERIFY_MIB_S),
            fill_percent,
            ..GuestConfig::default()
        };
        let config = BootConfig { memory, vcpus: 1, cmdline: guest.cmdline(), backend };
        let mut here = Machine::boot(program, dir.path(), "p0", &config).unwrap();
        let mut guest = GuestWatch::new(here.console()).unwrap();
        let patience = PATIENCE + Duration::from_secs(memory.0 / BYTES_PER_S);
        let ready = here.wait_for("the guest to be ready", patience, |_| {
            guest.poll()?;
            Ok(guest.last().is_some().then_some(()))
        });
        ready.unwrap();
        let mut rig = Rig { dir, here, guest, processes: 1, patience };
        rig.goes_on();
        rig
    }

    /// A fresh process that waits for a VM, and where it listens.
    pub(crate) fn receiver(&mut self) -> (Machine, String) {
        self.receiver_with(&Extras::default())
    }

    /// The same, of a process that is told more.
    pub(crate) fn receiver_with(&mut self, extras: &Extras) -> (Machine, String) {
        self.receiver_by(Path::new(PROGRAM), extras).unwrap()
    }

    /// The same, by something that becomes the program in the end, if it does.
    pub(crate) fn receiver_by(
        &mut self,
        program: &Path,
        extras: &Extras,
    ) -> anyhow::Result<(Machine, String)> {
        let role = format!("p{}", self.processes);
        self.processes += 1;
        let mut there = Machine::receive_with(program, self.dir.path(), &role, extras)?;
        let address = there.listening()?;
        Ok((there, address))
    }

    /// Where consoles, logs and control sockets are.
    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What the process of a machine wrote to standard error. `Machine` puts its log beside the console.
    pub(crate) fn log(machine: &Machine) -> String {
        std::fs::read_to_string(machine.console().with_extension("log")).unwrap()
    }

    /// Starts `pagewarp send`. A VM that is compared may stand still for long, unless the options say otherwise: hosts of tests are busy.
    pub(crate) fn send(&self, to: &str, options: &[&str]) -> Sending {
        let is_open = options.contains(&"--verify") && !options.contains(&"--downtime-ms");
        let downtime = is_open.then_some(["--downtime-ms", "5000"]);
        let path = |name: &str| self.dir.path().join(format!("send.{name}"));
        let (stdout, stderr) = (path("out"), path("err"));
        let child = Command::new(PROGRAM)
            .arg("--run-dir")
            .arg(self.here.run_dir())
            .args(["send", Machine::NAME, "--to", to])
            .args(without_patience(options))
            .args(downtime.iter().flatten())
            .stdin(Stdio::null())
            .stdout(File::create(&stdout).unwrap())
            .stderr(File::create(&stderr).unwrap())
            .spawn()
            .unwrap();
        Sending { child, stdout, stderr, patience: self.patience }
    }

    /// Runs another command on the VM and returns what it wrote to standard error.
    pub(crate) fn command(&self, words: &[&str]) -> Result<String, String> {
        let done =
            Command::new(PROGRAM).arg("--run-dir").arg(self.here.run_dir()).args(words).output().unwrap();
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        if done.status.success() { Ok(said) } else { Err(said) }
    }

    pub(crate) fn state(&self) -> VmState {
        self.here.status().unwrap().state
    }

    /// Waits until the process that has the VM is in a state that `wanted` likes.
    pub(crate) fn wait_state(&self, what: &str, mut wanted: impl FnMut(&Status) -> bool) -> Status {
        wait_for(what, || self.here.status().ok().filter(&mut wanted))
    }

    /// Waits until the guest has reported a few times and checked all its memory, and that it found nothing wrong.
    pub(crate) fn goes_on(&mut self) -> Report {
        self.guest.mark().unwrap();
        self.is_well()
    }

    fn is_well(&mut self) -> Report {
        let sweeps = self.guest.last().map_or(0, |report| report.sweeps);
        let guest = &mut self.guest;
        // The first sweep that ends may have begun before.
        let alive = self.here.wait_for("the guest to go on", self.patience, |_| {
            guest.poll()?;
            let checked = guest.last().is_some_and(|report| report.sweeps >= sweeps + 2);
            Ok((guest.reports() >= 3 && checked || !guest.problems().is_empty()).then_some(()))
        });
        alive.unwrap_or_else(|error| panic!("{error:#}\nthe log:\n{}", Rig::log(&self.here)));
        assert_eq!(self.guest.problems(), [""; 0]);
        let last = *self.guest.last().unwrap();
        assert_eq!(last.errors, 0);
        last
    }

    /// The VM has not moved: it runs here, and `there` has never run it.
    pub(crate) fn stayed(&mut self, there: &Machine) -> Report {
        assert_eq!(self.state(), VmState::Running);
        let last = self.goes_on();
        assert_eq!(console_bytes(there), 0, "the guest ran on the destination: {}", Rig::log(there));
        if let Ok(status) = there.status() {
            assert_ne!(status.state, VmState::Running, "two processes say that they run the VM");
        }
        last
    }

    /// The VM runs in `there` now, and the process that had it has ended.
    pub(crate) fn moved(&mut self, there: Machine) -> Report {
        let mut old = std::mem::replace(&mut self.here, there);
        old.wait_for_end();
        assert!(old.status().is_err(), "the process that the VM left is still there: {}", Rig::log(&old));
        self.guest.hop(self.here.console()).unwrap();
        assert_eq!(self.wait_state("it to run", |status| status.state == VmState::Running).vcpus, 1);
        // Not `goes_on`: the first reports tell how long the guest's pause was.
        self.is_well()
    }

    /// Moves the VM to a fresh process, which must succeed, and compares every page.
    pub(crate) fn hop(&mut self, options: &[&str]) -> SourceReport {
        self.hop_to(&Extras::default(), options)
    }

    /// The same, to a process that is told more.
    pub(crate) fn hop_to(&mut self, extras: &Extras, options: &[&str]) -> SourceReport {
        let (there, address) = self.receiver_with(extras);
        let sent = self.send(&address, &[&["--verify", "--json"], options].concat()).wait();
        assert_eq!(
            sent.code,
            Some(0),
            "{}\nsource: {}\ndestination: {}",
            sent.stderr,
            Rig::log(&self.here),
            Rig::log(&there)
        );
        let report: SourceReport = serde_json::from_str(&sent.stdout).unwrap();
        assert_eq!(report.verified, Some(true));
        self.moved(there);
        report
    }
}

/// Options of a source for which a connection that breaks is a failure, unless they say otherwise: what is tested is what happens after one.
pub(crate) fn without_patience<'a>(options: &[&'a str]) -> Vec<&'a str> {
    let given = options.contains(&"--resume-timeout");
    let none: &[&str] = if given { &[] } else { &["--resume-timeout", "0"] };
    [options, none].concat()
}

/// Bytes that the guest has written to the console of this machine.
pub(crate) fn console_bytes(machine: &Machine) -> u64 {
    std::fs::metadata(machine.console()).unwrap().len()
}

/// Polls until `check` yields something.
pub(crate) fn wait_for<T>(what: &str, check: impl FnMut() -> Option<T>) -> T {
    wait_within(PATIENCE, what, check)
}

fn wait_within<T>(patience: Duration, what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(start.elapsed() < patience, "waited {} s for {what}, in vain", patience.as_secs());
        std::thread::sleep(LOOK);
    }
}

/// A `pagewarp send` under way. Killed when dropped.
pub(crate) struct Sending {
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
    patience: Duration,
}

/// How a `pagewarp send` ended.
#[derive(Debug)]
pub(crate) struct Sent {
    /// Exit code; `None` if a signal ended it.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Sending {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    pub(crate) fn wait(mut self) -> Sent {
        let status = wait_within(self.patience, "pagewarp send to end", || self.child.try_wait().unwrap());
        let read = |path| std::fs::read_to_string(path).unwrap();
        Sent { code: status.code(), stdout: read(&self.stdout), stderr: read(&self.stderr) }
    }
}

impl Sent {
    /// The one line that tells the error, which must be the last one.
    pub(crate) fn error(&self) -> &str {
        one_error(&self.stderr)
    }
}

/// The line of `stderr` that starts with `error:`. There must be exactly one, at the end.
pub(crate) fn one_error(stderr: &str) -> &str {
    let errors = stderr.lines().filter(|line| line.starts_with("error: ")).count();
    let last = stderr.lines().last().unwrap_or_default();
    assert!(errors == 1 && last.starts_with("error: "), "expected one line of error at the end:\n{stderr}");
    last
}

impl Drop for Sending {
    fn drop(&mut self) {
        // Fails only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
