//! VM processes of the demo and of tests: children that are started, talked to, and never left behind.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use pagewarp_engine::report::{Progress, SourceReport};
use pagewarp_kvm::control::{Event, MigrateOptions, Request, Status};

use super::interrupt;
use crate::backend::BackendName;
use crate::units::ByteSize;
use crate::vm::Vm;

const POLL: Duration = Duration::from_millis(20);
/// A process that has not opened its control socket by then never will.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a process may take to end by itself before it is killed.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// What to boot.
#[derive(Clone, Debug)]
pub struct BootConfig {
    /// Guest memory.
    pub memory: ByteSize,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Command line of the built-in guest.
    pub cmdline: String,
    /// Who encodes for it: a process that computes on the CPU cannot take a device in software later.
    pub backend: BackendName,
}

/// What a destination is told besides what it always is.
#[derive(Clone, Debug, Default)]
pub struct Extras {
    /// More arguments.
    pub args: Vec<OsString>,
    /// More environment variables, with their values.
    pub env: Vec<(String, String)>,
}

impl Extras {
    /// These arguments.
    pub fn args<S: Into<OsString>>(args: impl IntoIterator<Item = S>) -> Extras {
        Extras { args: args.into_iter().map(Into::into).collect(), env: Vec::new() }
    }

    /// And this environment variable.
    pub fn with_env(mut self, name: &str, value: &str) -> Extras {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }
}

/// One process with a VM: the child that a user would have started by hand, with a run directory and a console file of its own.
#[derive(Debug)]
pub struct Machine {
    role: String,
    child: Child,
    run_dir: PathBuf,
    console: PathBuf,
    log: PathBuf,
}

impl Machine {
    /// The name of the VM, in the run directory of each machine.
    pub const NAME: &str = "demo";

    /// Boots the built-in guest. `role` names the process in messages and its files in `dir`.
    pub fn boot(program: &Path, dir: &Path, role: &str, config: &BootConfig) -> Result<Machine> {
        let mut command = Command::new(program);
        command
            .args(["run", "--name", Machine::NAME, "--kernel", "builtin"])
            .args(["--memory", &config.memory.to_string()])
            .args(["--vcpus", &config.vcpus.to_string()])
            .args(["--cmdline", &config.cmdline])
            .args(["--backend", &config.backend.to_string()])
            // On the source the guest leaves the CPU time that the migration wants: on a small host it would starve the stages, and the
            // scheduler would be measured. On the destination it runs when the migration is over.
            .args(["--vcpu-nice", "10"]);
        Machine::start(command, dir, role, &Extras::default())
    }

    /// Starts a destination on a port of its own. It listens when this returns: see [`Machine::listening`].
    pub fn receive(program: &Path, dir: &Path, role: &str) -> Result<Machine> {
        Machine::receive_with(program, dir, role, &Extras::default())
    }

    /// Starts a destination that is told more.
    pub fn receive_with(program: &Path, dir: &Path, role: &str, extras: &Extras) -> Result<Machine> {
        let mut command = Command::new(program);
        command.args(["receive", "--name", Machine::NAME, "--listen", "127.0.0.1:0", "--json"]);
        Machine::start(command, dir, role, extras)
    }

    fn start(mut command: Command, dir: &Path, role: &str, extras: &Extras) -> Result<Machine> {
        let run_dir = dir.join(role);
        std::fs::create_dir_all(&run_dir)
            .with_context(|| format!("cannot create `{}`", run_dir.display()))?;
        let console = dir.join(format!("{role}.console"));
        let log = dir.join(format!("{role}.log"));
        let log_file =
            std::fs::File::create(&log).with_context(|| format!("cannot create `{}`", log.display()))?;
        std::fs::File::create(&console).with_context(|| format!("cannot create `{}`", console.display()))?;
        command
            .arg("--run-dir")
            .arg(&run_dir)
            .arg("--console")
            .arg(&console)
            .args(&extras.args)
            .envs(extras.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log_file);
        let child =
            command.spawn().with_context(|| format!("cannot start {}", command.get_program().display()))?;
        let mut machine = Machine { role: role.to_owned(), child, run_dir, console, log };
        machine.wait_for("its control socket", START_TIMEOUT, |machine| {
            Ok(machine.vm().is_ok().then_some(()))
        })?;
        Ok(machine)
    }

    /// Where the guest's serial output goes.
    pub fn console(&self) -> &Path {
        &self.console
    }

    /// Its run directory: nobody else's sockets are there.
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// A new connection to its control socket.
    pub fn vm(&self) -> Result<Vm> {
        Vm::open(&self.run_dir, Machine::NAME)
    }

    /// How it is.
    pub fn status(&self) -> Result<Status> {
        match self.vm()?.ask(&Request::Status)? {
            Event::Status(status) => Ok(*status),
            other => bail!("the {} answered {other:?} to a status request", self.role),
        }
    }

    /// Where it listens for a VM.
    pub fn listening(&mut self) -> Result<String> {
        self.wait_for("it to listen", START_TIMEOUT, |machine| Ok(machine.status()?.listening))
    }

    /// Migrates the VM to a destination that listens at `to`.
    pub fn migrate(
        &self,
        to: &str,
        options: MigrateOptions,
        mut on_progress: impl FnMut(&Progress),
    ) -> Result<SourceReport> {
        let request = Request::Migrate { to: to.to_owned(), options: Box::new(options) };
        let on_event = |event: &Event| {
            if let Event::Progress(progress) = event {
                on_progress(progress);
            }
        };
        match self.vm()?.follow(&request, on_event)? {
            Event::Done(report) => Ok(*report),
            other => bail!("the {} answered {other:?} to a migration", self.role),
        }
    }

    /// Polls until `check` yields something; fails with the process's own words if it dies meanwhile.
    pub fn wait_for<T>(
        &mut self,
        what: &str,
        timeout: Duration,
        mut check: impl FnMut(&Machine) -> Result<Option<T>>,
    ) -> Result<T> {
        let start = Instant::now();
        loop {
            if let Some(found) = check(self)? {
                return Ok(found);
            }
            if let Some(status) = self.child.try_wait().context("cannot look after a child process")? {
                bail!(
                    "the {} process ended ({status}) while waiting for {what}: {}",
                    self.role,
                    self.last_words()
                );
            }
            interrupt::check()?;
            if start.elapsed() > timeout {
                bail!(
                    "waited {} s for {what} of the {}, in vain: {}",
                    timeout.as_secs(),
                    self.role,
                    self.last_words()
                );
            }
            sleep(POLL);
        }
    }

    /// Ends the process: with a request, and with force if that does not help.
    pub fn stop(mut self) {
        if let Ok(mut vm) = self.vm() {
            let _ = vm.ask(&Request::Stop);
        }
        self.wait_for_end();
    }

    /// Waits for a process that ends by itself, as a source does when its VM has moved.
    pub fn wait_for_end(&mut self) {
        let start = Instant::now();
        while start.elapsed() < END_TIMEOUT {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            sleep(POLL);
        }
    }

    /// Kills the process at once, as a crash of the host would.
    pub fn kill(&mut self) {
        // Fails only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// What it wrote to standard error last.
    fn last_words(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().filter(|line| !line.trim().is_empty()).take(3).collect();
        if lines.is_empty() {
            "it said nothing".to_owned()
        } else {
            lines.into_iter().rev().collect::<Vec<_>>().join("; ")
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.kill();
    }
}
