//! The commands that a migration takes, with types.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType};
use serde_json::{Map, Value, json};

use super::client::{Qmp, QmpError, QmpEvent, Version};

/// What the machine is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RunState {
    /// QEMU's name of it: `running`, `paused`, `inmigrate`, `postmigrate`, …
    pub status: String,
    /// Whether the vCPUs run.
    pub running: bool,
}

/// How a migration is doing. Versions of QEMU differ in what they tell; what they leave out is `None`, or 0 for a counter.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MigrationStatus {
    /// QEMU's name of it: `none`, `setup`, `active`, `completed`, `failed`, `cancelled`, …
    pub status: String,
    /// Time since the start.
    pub total_ms: Option<u64>,
    /// How long the guest stood still; known by the source only, a little after the end: see [`Vm::ended_migration`].
    pub downtime_ms: Option<u64>,
    /// How long the guest would stand still if it was stopped now.
    pub expected_downtime_ms: Option<u64>,
    /// How long the preparations took.
    pub setup_ms: Option<u64>,
    /// Why it failed.
    pub error_desc: Option<String>,
    /// Why this machine cannot be migrated.
    pub blocked_reasons: Vec<String>,
    /// Whether a destination waits at a socket for its source. QEMU then gives an address and no status.
    pub is_listening: bool,
    /// Guest memory; the source tells it.
    pub ram: Option<RamStatus>,
}

/// How far guest memory is. QEMU counts before the bridge compresses.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RamStatus {
    /// Bytes sent.
    pub transferred: u64,
    /// Bytes to send, as of the last look at what is dirty.
    pub remaining: u64,
    /// Bytes of guest memory.
    pub total: u64,
    /// Pages of zeros sent.
    pub duplicate: u64,
    /// Whole pages sent.
    pub normal: u64,
    /// Pages that the guest dirties a second.
    pub dirty_pages_rate: u64,
    /// Megabits a second.
    pub mbps: f64,
    /// How often the dirty log was read.
    pub dirty_sync_count: u64,
    /// Bytes of a page.
    pub page_size: u64,
}

impl MigrationStatus {
    /// Reads an answer to `query-migrate`, which is empty where there never was a migration.
    pub fn of(answer: &Value) -> MigrationStatus {
        let number = |key: &str| answer.get(key).and_then(Value::as_u64);
        let text = |key: &str| answer.get(key).and_then(Value::as_str).map(str::to_owned);
        let addresses = answer.get("socket-address").and_then(Value::as_array);
        let reasons = answer.get("blocked-reasons").and_then(Value::as_array);
        MigrationStatus {
            status: text("status").unwrap_or_else(|| "none".to_owned()),
            total_ms: number("total-time"),
            downtime_ms: number("downtime"),
            expected_downtime_ms: number("expected-downtime"),
            setup_ms: number("setup-time"),
            error_desc: text("error-desc"),
            blocked_reasons: reasons
                .into_iter()
                .flatten()
                .filter_map(Value::as_str)
                .map(str::to_owned)
                .collect(),
            is_listening: addresses.is_some_and(|list| !list.is_empty()),
            ram: answer.get("ram").map(RamStatus::of),
        }
    }

    /// Whether there is a migration under way, in whatever phase, on whichever side.
    pub fn is_under_way(&self) -> bool {
        !matches!(self.status.as_str(), "none" | "completed" | "failed" | "cancelled")
    }
}

impl RamStatus {
    fn of(ram: &Value) -> RamStatus {
        let number = |key: &str| ram.get(key).and_then(Value::as_u64).unwrap_or(0);
        RamStatus {
            transferred: number("transferred"),
            remaining: number("remaining"),
            total: number("total"),
            duplicate: number("duplicate"),
            normal: number("normal"),
            dirty_pages_rate: number("dirty-pages-rate"),
            mbps: ram.get("mbps").and_then(Value::as_f64).unwrap_or(0.0),
            dirty_sync_count: number("dirty-sync-count"),
            page_size: number("page-size"),
        }
    }
}

/// A virtual machine: a QEMU process, over its monitor.
#[derive(Debug)]
pub struct Vm {
    qmp: Qmp,
}

impl Vm {
    /// Connects to the QMP socket at `path`. `timeout` holds for connecting and then for each command.
    pub fn connect(path: impl AsRef<Path>, timeout: Duration) -> Result<Vm, QmpError> {
        Ok(Vm { qmp: Qmp::connect(path, timeout)? })
    }

    /// The same over a connection that is there already; `path` is for messages.
    pub(crate) fn over(stream: UnixStream, path: &Path, timeout: Duration) -> Result<Vm, QmpError> {
        Ok(Vm { qmp: Qmp::over(stream, path, timeout)? })
    }

    /// The connection, for other commands.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// QEMU's version.
    pub fn version(&self) -> Version {
        self.qmp.version()
    }

    /// The next event; `None`: none came in time.
    pub fn next_event(&mut self, timeout: Duration) -> Result<Option<QmpEvent>, QmpError> {
        self.qmp.next_event(timeout)
    }

    /// What the machine is doing.
    pub fn status(&mut self) -> Result<RunState, QmpError> {
        let answer = self.ask("query-status")?;
        let status = answer.get("status").and_then(Value::as_str).ok_or(missing("query-status", "status"))?;
        let running =
            answer.get("running").and_then(Value::as_bool).ok_or(missing("query-status", "running"))?;
        Ok(RunState { status: status.to_owned(), running })
    }

    /// The name the machine was given, if any.
    pub fn name(&mut self) -> Result<Option<String>, QmpError> {
        Ok(self.ask("query-name")?.get("name").and_then(Value::as_str).map(str::to_owned))
    }

    /// The UUID of the machine; all zeros if it was given none.
    pub fn uuid(&mut self) -> Result<String, QmpError> {
        let answer = self.ask("query-uuid")?;
        answer.get("UUID").and_then(Value::as_str).map(str::to_owned).ok_or(missing("query-uuid", "UUID"))
    }

    /// The memory of the machine, in bytes.
    pub fn memory_bytes(&mut self) -> Result<u64, QmpError> {
        let answer = self.ask("query-memory-size-summary")?;
        let base = answer.get("base-memory").and_then(Value::as_u64);
        let base = base.ok_or(missing("query-memory-size-summary", "base-memory"))?;
        // Absent where memory cannot be plugged.
        let plugged = answer.get("plugged-memory").and_then(Value::as_u64).unwrap_or(0);
        Ok(base.saturating_add(plugged))
    }

    /// How the last or current migration is doing, on either side.
    pub fn migration(&mut self) -> Result<MigrationStatus, QmpError> {
        Ok(MigrationStatus::of(&self.ask("query-migrate")?))
    }

    /// How the migration of a source went that is over by its events or by [`migration`](Vm::migration). QEMU (seen with 7.2) says so a little
    /// before it works out the downtime, which until then is 0; what comes after is that it leaves the state `finish-migrate`. That is waited
    /// for, but no longer than `timeout`.
    pub fn ended_migration(&mut self, timeout: Duration) -> Result<MigrationStatus, QmpError> {
        let start = Instant::now();
        while self.status()?.status == "finish-migrate" && start.elapsed() < timeout {
            thread::sleep(Duration::from_millis(1));
        }
        self.migration()
    }

    /// The migration capabilities that this QEMU has, and which are on.
    pub fn capabilities(&mut self) -> Result<BTreeMap<String, bool>, QmpError> {
        let command = "query-migrate-capabilities";
        let answer = self.ask(command)?;
        let list = answer.as_array().ok_or(missing(command, "list of capabilities"))?;
        let pair = |entry: &Value| {
            Some((entry.get("capability")?.as_str()?.to_owned(), entry.get("state")?.as_bool()?))
        };
        list.iter().map(pair).collect::<Option<_>>().ok_or(missing(command, "name and state of a capability"))
    }

    /// Turns capabilities on and off.
    pub fn set_capabilities<'a>(
        &mut self,
        capabilities: impl IntoIterator<Item = (&'a str, bool)>,
    ) -> Result<(), QmpError> {
        let list: Vec<Value> = capabilities
            .into_iter()
            .map(|(capability, state)| json!({ "capability": capability, "state": state }))
            .collect();
        if list.is_empty() {
            return Ok(());
        }
        self.tell("migrate-set-capabilities", json!({ "capabilities": list }))
    }

    /// The migration parameters.
    pub fn parameters(&mut self) -> Result<Map<String, Value>, QmpError> {
        match self.ask("query-migrate-parameters")? {
            Value::Object(parameters) => Ok(parameters),
            _ => Err(missing("query-migrate-parameters", "object of parameters")),
        }
    }

    /// Sets migration parameters; others stay as they are.
    pub fn set_parameters(&mut self, parameters: Map<String, Value>) -> Result<(), QmpError> {
        if parameters.is_empty() {
            return Ok(());
        }
        self.tell("migrate-set-parameters", Value::Object(parameters))
    }

    /// Gives QEMU a socket, which [`migrate`](Vm::migrate) and [`migrate_incoming`](Vm::migrate_incoming) know as `fd:NAME` then. A name that was given before stands for this one
    /// now.
    pub fn give_socket(&mut self, name: &str, socket: BorrowedFd<'_>) -> Result<(), QmpError> {
        self.qmp.execute_with("getfd", json!({ "fdname": name }), socket).map(drop)
    }

    /// Whether QEMU takes sockets: its monitor may be reached through somebody who passes no descriptors on, or something may forbid it to take any.
    pub fn takes_sockets(&mut self) -> Result<bool, QmpError> {
        const NAME: &str = "pagewarp-trial";
        let flags = SocketFlags::CLOEXEC;
        let Ok(socket) = rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)
        else {
            return Ok(false);
        };
        match self.give_socket(NAME, socket.as_fd()) {
            Ok(()) => self.take_back_socket(NAME).map(|()| true),
            Err(QmpError::Refused { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Takes a socket back that was given and never used.
    pub fn take_back_socket(&mut self, name: &str) -> Result<(), QmpError> {
        self.tell("closefd", json!({ "fdname": name }))
    }

    /// Makes a source send itself to `uri`. Returns when the migration has started.
    pub fn migrate(&mut self, uri: &str) -> Result<(), QmpError> {
        self.tell("migrate", json!({ "uri": uri }))
    }

    /// Makes a destination listen at `uri`.
    pub fn migrate_incoming(&mut self, uri: &str) -> Result<(), QmpError> {
        let mut arguments = json!({ "uri": uri });
        // So that a failed migration can be asked about. Before, QEMU always ends, with its reason on standard error.
        if self.version() >= Version::new(9, 1) {
            arguments["exit-on-error"] = Value::Bool(false);
        }
        self.tell("migrate-incoming", arguments)
    }

    /// Lets a source go on that pauses before the switchover (capability `pause-before-switchover`).
    pub fn migrate_continue(&mut self) -> Result<(), QmpError> {
        self.tell("migrate-continue", json!({ "state": "pre-switchover" }))
    }

    /// Cancels the migration of a source, if there is one. The guest runs on; the destination's QEMU is of no more use.
    pub fn cancel(&mut self) -> Result<(), QmpError> {
        self.tell("migrate_cancel", Value::Null)
    }

    /// Lets the vCPUs run.
    pub fn cont(&mut self) -> Result<(), QmpError> {
        self.tell("cont", Value::Null)
    }

    /// Stops the vCPUs.
    pub fn stop(&mut self) -> Result<(), QmpError> {
        self.tell("stop", Value::Null)
    }

    /// Ends the QEMU.
    pub fn quit(&mut self) -> Result<(), QmpError> {
        match self.tell("quit", Value::Null) {
            // It may be gone before its answer is out, and that is what was asked for.
            Err(QmpError::Gone { .. }) => Ok(()),
            other => other,
        }
    }

    /// The threads of the vCPUs, by the numbers they have on QEMU's host.
    pub fn vcpu_threads(&mut self) -> Result<Vec<u32>, QmpError> {
        let command = "query-cpus-fast";
        let answer = self.ask(command)?;
        let list = answer.as_array().ok_or(missing(command, "list of vCPUs"))?;
        let thread = |vcpu: &Value| u32::try_from(vcpu.get("thread-id")?.as_u64()?).ok();
        list.iter().map(thread).collect::<Option<_>>().ok_or(missing(command, "thread-id"))
    }

    fn ask(&mut self, command: &str) -> Result<Value, QmpError> {
        self.qmp.execute(command, Value::Null)
    }

    fn tell(&mut self, command: &str, arguments: Value) -> Result<(), QmpError> {
        self.qmp.execute(command, arguments).map(drop)
    }
}

fn missing(command: &str, expected: &'static str) -> QmpError {
    QmpError::Unexpected { command: command.to_owned(), expected }
}
