//! QEMU processes that run the built-in guest: sources, and destinations that wait for a migration.
//!
//! The harness knows nothing of QMP but the path of the socket, [`Qemu::qmp`], so that whoever tests a client of it can use the harness.
//!
//! ```no_run
//! use pagewarp_guest::{Event, GuestConfig};
//! use pagewarp_testkit::qemu::QemuConfig;
//!
//! let config = QemuConfig::new(256, GuestConfig::default());
//! let mut source = config.start();
//! let destination = QemuConfig { incoming: true, ..config }.start();
//! source.wait_for("the workload", |event| matches!(event, Event::Ready(_)).then_some(()));
//! // Migrate through source.qmp() and destination.qmp().
//! ```

mod cpu;
mod serial;

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use pagewarp_guest::{ELF, Event, GuestConfig};
use tempfile::TempDir;

use serial::Serial;
pub use serial::SerialLine;

const QEMU: &str = "qemu-system-x86_64";
/// How long anything may take on a busy machine before the test gives up.
const PATIENCE: Duration = Duration::from_secs(120);

/// What hardware QEMU plays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Machine {
    /// Hardly any devices, and the guest is up at once.
    #[default]
    Microvm,
    /// What most VMs are: more devices and RAM blocks, among them those of the firmware, which takes seconds here to start the guest.
    Pc,
    /// As [`Pc`](Machine::Pc), with a newer chipset.
    Q35,
}

/// How to start a QEMU. Both sides of a migration must agree on everything but `incoming` and `netns`.
#[derive(Clone, Debug)]
pub struct QemuConfig {
    /// The hardware.
    pub machine: Machine,
    /// Guest memory.
    pub memory_mib: u64,
    /// What the guest does.
    pub guest: GuestConfig,
    /// Whether it waits for a migration (`-incoming defer`) and not run the guest.
    pub incoming: bool,
    /// The network namespace to run in.
    pub netns: Option<String>,
    /// More arguments.
    pub args: Vec<String>,
}

impl QemuConfig {
    /// A source.
    pub fn new(memory_mib: u64, guest: GuestConfig) -> QemuConfig {
        QemuConfig {
            machine: Machine::default(),
            memory_mib,
            guest,
            incoming: false,
            netns: None,
            args: vec![],
        }
    }

    /// Starts QEMU and waits until its QMP socket is there. Panics, with what QEMU said, where it does not start.
    pub fn start(&self) -> Qemu {
        Qemu::start(self)
    }
}

/// A running QEMU; killed when dropped, or when this process dies.
#[derive(Debug)]
pub struct Qemu {
    child: Child,
    serial: Arc<Serial>,
    /// Lines up to here have been waited for.
    seen: usize,
    dir: TempDir,
}

impl Qemu {
    fn start(config: &QemuConfig) -> Qemu {
        let dir = TempDir::new().expect("a temporary directory");
        let errors = File::create(dir.path().join("stderr")).expect("a file for what QEMU complains about");
        let mut command = command(config, dir.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(errors);
        let serial = Arc::new(Serial::default());
        let (started, child) = channel();
        let lines = Arc::clone(&serial);
        // The signal at the parent's death that `setpriv` asks for comes at the death of the thread that started the process. This one
        // lives until QEMU closes its serial port.
        thread::spawn(move || {
            let mut spawned = command.spawn();
            let stdout = spawned.as_mut().ok().and_then(|child| child.stdout.take());
            // The receiver waits for it.
            let _ = started.send(spawned);
            if let Some(stdout) = stdout {
                lines.read(stdout);
            }
        });
        let child = child.recv().expect("the thread says how it went").unwrap_or_else(|e| {
            panic!("QEMU's wrapper does not start ({e}); on Debian: apt-get install util-linux iproute2")
        });
        let mut qemu = Qemu { child, serial, seen: 0, dir };
        qemu.wait_for_monitor();
        qemu
    }

    /// The socket is bound before QEMU listens on it, so only a connection says that it is ready.
    fn wait_for_monitor(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while UnixStream::connect(self.qmp()).is_err() {
            if let Some(status) = self.child.try_wait().expect("asking for QEMU's end") {
                panic!(
                    "{QEMU} ended at once ({status}): {}; where it is missing, on Debian: apt-get install qemu-system-x86",
                    self.errors()
                );
            }
            assert!(Instant::now() < deadline, "QEMU opens no QMP socket: {}", self.errors());
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// The path of the QMP socket.
    pub fn qmp(&self) -> PathBuf {
        self.dir.path().join("qmp")
    }

    /// A directory of this QEMU's own, for sockets and files; it goes with it.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What QEMU wrote to its standard error so far.
    pub fn errors(&self) -> String {
        fs::read_to_string(self.dir.path().join("stderr")).unwrap_or_default()
    }

    /// Whether QEMU has ended by itself.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("asking for QEMU's end").is_some()
    }

    /// Everything on the serial port so far.
    pub fn serial(&self) -> Vec<SerialLine> {
        self.serial.lines()
    }

    /// Waits for the first event after those already waited for of which `pick` makes something. Corruption and faults on the way, silence
    /// and the end of QEMU fail the test.
    pub fn wait_for<T>(&mut self, what: &str, mut pick: impl FnMut(&Event) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let Some(line) = self.serial.wait(self.seen, deadline) else {
                let lines: Vec<String> = self.serial().into_iter().map(|line| line.text).collect();
                panic!("waited in vain for {what}; the guest said {lines:#?}, and QEMU {:?}", self.errors());
            };
            self.seen += 1;
            let Some(event) = &line.event else { continue };
            if let Some(picked) = pick(event) {
                return picked;
            }
            assert!(
                !matches!(event, Event::Corrupt(_) | Event::Fault(_)),
                "{event:?} while waiting for {what}"
            );
        }
    }

    /// Processor time of everything but the vCPUs since the start, threads that have ended included: what QEMU itself works.
    pub fn cpu_time_without_vcpus(&self) -> Duration {
        cpu::without_vcpus(self.pid())
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command(config: &QemuConfig, dir: &Path) -> Command {
    let elf = dir.join("guest.elf");
    fs::write(&elf, ELF).expect("writing the guest's image");
    let machine = match config.machine {
        Machine::Microvm => "microvm,pit=on,pic=on,rtc=off,isa-serial=on,x-option-roms=off",
        Machine::Pc => "pc",
        Machine::Q35 => "q35",
    };
    let mut command = match &config.netns {
        Some(netns) => {
            // `ip` becomes the process that it runs, and so does `setpriv`: the process here is QEMU in the end.
            let mut command = Command::new("ip");
            command.args(["netns", "exec", netns, "setpriv"]);
            command
        }
        None => Command::new("setpriv"),
    };
    command
        .args(["--pdeathsig", "KILL", QEMU])
        // Where there is no KVM, emulation does it too.
        .args(["-M", machine, "-accel", "kvm", "-accel", "tcg", "-m", &config.memory_mib.to_string()])
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"])
        // Named threads tell the vCPUs from the rest.
        .args(["-name", "pagewarp-test,debug-threads=on"])
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", dir.join("qmp").display()))
        .arg("-kernel")
        .arg(elf)
        .args(["-append", &config.guest.cmdline()])
        .args(if config.incoming { &["-incoming", "defer"][..] } else { &[] })
        .args(&config.args);
    command
}
