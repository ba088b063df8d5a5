//! The messages of the control socket: one JSON object a line, requests one way, events the other.
//!
//! A client sends one [`Request`] and reads [`Event`]s until one that [ends](Event::is_final) the answer; then it may send the
//! next. Everything but [`Request::Migrate`] and [`Request::Watch`] is answered by exactly one event.

use std::path::PathBuf;
use std::time::Duration;

use pagewarp_codec::{EncodingSet, SharedBackend};
use pagewarp_engine::config::{OnLimit, SourceConfig, default_threads};
use pagewarp_engine::report::{DestinationReport, Progress, SourceReport};
use serde::{Deserialize, Serialize};

/// What a client asks of a VM process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// How the VM is. Answer: [`Event::Status`].
    Status,
    /// Migrate the VM away. Answer: [`Event::Progress`] a few times a second, perhaps an [`Event::Warning`], then [`Event::Done`] or
    /// [`Event::Error`].
    ///
    /// The migration goes on if the client goes away meanwhile.
    Migrate {
        /// The destination, `HOST:PORT`.
        to: String,
        /// How.
        #[serde(default)]
        options: Box<MigrateOptions>,
    },
    /// Follow the migration that is under way, or hear how the last one ended. Answer: [`Event::Progress`] a few times a
    /// second, perhaps an [`Event::Warning`], then [`Event::Done`], [`Event::Received`] or [`Event::Error`].
    Watch,
    /// Cancel the migration that is under way. Answer: [`Event::Ok`], before it has taken effect.
    Cancel,
    /// Shut the VM down, as pulling its plug would. Answer: [`Event::Ok`].
    Stop,
    /// Stop the vCPUs. Answer: [`Event::Ok`], when they have stopped.
    Pause,
    /// Let the vCPUs go on. Answer: [`Event::Ok`].
    Resume,
    /// The last lines that the guest wrote to its serial port. Answer: [`Event::Console`].
    Console {
        /// At most this many.
        lines: usize,
    },
    /// Decide about a VM that a migration left paused: mostly one whose hand-over is in doubt, see [`VmState::InDoubt`]. Answer: [`Event::Ok`].
    Resolve {
        /// `true`: it runs nowhere else and never will, run it here; works for any paused VM. `false`: it runs on the destination, discard it
        /// here; only for a VM in doubt.
        resume: bool,
    },
}

/// What a VM process tells a client.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// Done as asked.
    Ok,
    /// How the VM is.
    Status(Box<Status>),
    /// Where the migration is.
    Progress(Progress),
    /// Something went wrong that is no reason for the migration to fail. How it ended comes next.
    Warning {
        /// For people: one line.
        message: String,
    },
    /// The last lines of the serial port, oldest first.
    Console {
        /// Without their line ends; bytes that are not UTF-8 are replaced.
        lines: Vec<String>,
    },
    /// The VM has been migrated away.
    Done(Box<SourceReport>),
    /// The VM has been received and runs here.
    Received(Box<DestinationReport>),
    /// It could not be done.
    Error {
        /// For programs: one of [`codes`].
        code: String,
        /// For people: one line.
        message: String,
    },
}

impl Event {
    /// Whether this event ends the answer to a request.
    pub fn is_final(&self) -> bool {
        !matches!(self, Event::Progress(_) | Event::Warning { .. })
    }

    /// An error event.
    pub fn error(code: &str, message: impl ToString) -> Event {
        Event::Error { code: code.to_owned(), message: message.to_string() }
    }
}

/// The values of [`Event::Error`]'s `code`. They don't change their meaning.
pub mod codes {
    use pagewarp_engine::error::MigrationError;

    /// The request could not be understood.
    pub const BAD_REQUEST: &str = "bad-request";
    /// Something else is under way, or too many clients are connected.
    pub const BUSY: &str = "busy";
    /// The VM is not in a state in which that can be done.
    pub const WRONG_STATE: &str = "wrong-state";
    /// There is no migration to watch or to cancel.
    pub const NO_MIGRATION: &str = "no-migration";
    /// A value that cannot work.
    pub const CONFIG: &str = "config";
    /// The network, or a peer that went away.
    pub const LINK: &str = "link";
    /// The peer broke the protocol.
    pub const PEER: &str = "peer";
    /// The peer failed.
    pub const PEER_REPORTS: &str = "peer-reports";
    /// The peer does not want or cannot do what was offered.
    pub const REFUSED: &str = "refused";
    /// The peer is not trusted, or does not trust this host.
    pub const UNTRUSTED: &str = "untrusted";
    /// What TLS needs is not there on this host, or is of no use.
    pub const TLS: &str = "tls";
    /// The hypervisor on this host failed.
    pub const VM: &str = "vm";
    /// The backend on this host failed.
    pub const BACKEND: &str = "backend";
    /// The migration was cancelled.
    pub const CANCELLED: &str = "cancelled";
    /// The epoch or time limit was reached.
    pub const NOT_CONVERGED: &str = "not-converged";
    /// With `verify`: the memory at the destination is not what it is here. Nothing was handed over.
    pub const DIFFERS: &str = "differs";
    /// The hand-over was committed and never confirmed; the VM is kept paused.
    pub const IN_DOUBT: &str = "in-doubt";
    /// The migration failed and the VM could not be resumed: it is whole, but paused.
    pub const STILL_PAUSED: &str = "still-paused";
    /// The hand-over was committed and the VM does not start on this host, the destination.
    pub const START_FAILED: &str = "start-failed";
    /// A bug.
    pub const INTERNAL: &str = "internal";

    /// The code of an error of the engine.
    pub fn of(error: &MigrationError) -> &'static str {
        match error {
            MigrationError::Link { .. } => LINK,
            MigrationError::Untrusted { .. } => UNTRUSTED,
            MigrationError::Peer(_) | MigrationError::Damaged(_) => PEER,
            MigrationError::PeerReports(_) => PEER_REPORTS,
            MigrationError::Refused(_) => REFUSED,
            MigrationError::Vm(_) => VM,
            MigrationError::Backend(_) => BACKEND,
            MigrationError::Config(_) => CONFIG,
            MigrationError::Cancelled => CANCELLED,
            MigrationError::NotConverged(_) => NOT_CONVERGED,
            MigrationError::Differs(_) => DIFFERS,
            MigrationError::InDoubt(_) => IN_DOUBT,
            MigrationError::StillPaused { .. } => STILL_PAUSED,
            MigrationError::StartFailed(_) => START_FAILED,
            _ => INTERNAL,
        }
    }
}

/// What a VM process is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// The guest runs.
    Running,
    /// The guest is paused because somebody asked, or because it could not be resumed after a migration that failed.
    Paused,
    /// A migration away is under way.
    Migrating,
    /// A hand-over was committed and never confirmed: the guest is kept paused until [`Request::Resolve`] decides.
    InDoubt,
    /// Waiting for a VM, or receiving it.
    Receiving,
    /// The VM runs on the destination; this process is about to end.
    Migrated,
    /// The guest has shut down or was stopped; this process is about to end.
    Stopped,
}

/// How a VM process is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The VM's name.
    pub name: String,
    /// What it is doing.
    pub state: VmState,
    /// The process.
    pub pid: u32,
    /// Guest memory; 0 while nothing has been received.
    pub memory_bytes: u64,
    /// Virtual CPUs; 0 while nothing has been received.
    pub vcpus: u32,
    /// Since this process built the VM.
    pub uptime_ms: f64,
    /// Lines that the guest wrote to its serial port, here.
    pub serial_lines: u64,
    /// Bytes that the guest wrote to its serial port, here.
    pub serial_bytes: u64,
    /// Where it listens for a VM; only while receiving.
    pub listening: Option<String>,
    /// The migration under way, or else the last one.
    pub progress: Option<Progress>,
}

/// How to migrate: [`SourceConfig`] in words that fit on a line of JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MigrateOptions {
    /// Data connections beside the control connection.
    pub connections: usize,
    /// Switch over when the estimated downtime fits this.
    pub downtime_ms: u64,
    /// At most this many bytes per second on all connections together.
    pub bandwidth_bytes_per_s: Option<u64>,
    /// The encodings to offer, as [`EncodingSet`] writes and parses them.
    pub encodings: String,
    /// Memory for page versions sent before, in bytes; 0 switches deltas off.
    pub history_bytes: u64,
    /// Whether the stages work at once.
    pub pipeline: bool,
    /// Pages in a batch.
    pub batch_pages: usize,
    /// Threads that serialize.
    pub serialize_threads: usize,
    /// Epochs before `on_limit` decides.
    pub max_epochs: Option<u32>,
    /// Time before `on_limit` decides.
    pub max_time_ms: Option<u64>,
    /// What to do at either limit.
    pub on_limit: OnLimit,
    /// Compare a digest of every page on both sides before the hand-over, while the VM is paused.
    pub verify: bool,
    /// Who computes encodings: `cpu`, `gpu`, `gpu:N`, or `auto` for the VM process's choice.
    pub backend: String,
    /// The instruction set that the backend is to use; absent: the best there is.
    pub simd: Option<String>,
    /// The file into which the VM process writes, at the end, who worked on which batch and when. Absolute: it is not the client's directory
    /// that counts.
    pub trace_file: Option<PathBuf>,
    /// How long a silent or stalled peer is waited for.
    pub peer_timeout_ms: u64,
    /// How long a connection that broke may take to be opened again; 0: a connection that breaks ends the migration, as it does where the program cannot open it again.
    pub resume_timeout_ms: u64,
    /// Allow a destination that is not on this host, although nothing is encrypted.
    pub plaintext: bool,
    /// Encrypt with TLS: the directory with the certificates. Absolute.
    // A process of an earlier version knows neither of these two, and need not as long as they are not used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_dir: Option<PathBuf>,
    /// The name that the destination's certificate has to have; absent: the host of the address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_hostname: Option<String>,
}

impl Default for MigrateOptions {
    fn default() -> Self {
        MigrateOptions {
            connections: 1,
            downtime_ms: 300,
            bandwidth_bytes_per_s: None,
            encodings: EncodingSet::ALL.to_string(),
            history_bytes: 512 << 20,
            pipeline: true,
            batch_pages: 256,
            serialize_threads: default_threads(),
            max_epochs: None,
            max_time_ms: Some(3_600_000),
            on_limit: OnLimit::default(),
            verify: false,
            backend: "auto".to_owned(),
            simd: None,
            trace_file: None,
            peer_timeout_ms: 30_000,
            resume_timeout_ms: 0,
            plaintext: false,
            tls_dir: None,
            tls_hostname: None,
        }
    }
}

impl MigrateOptions {
    /// The engine's form of these options. Fails with one line if `encodings` does not parse.
    pub fn source_config(&self, backend: SharedBackend) -> Result<SourceConfig, String> {
        Ok(SourceConfig {
            connections: self.connections,
            downtime_limit: Duration::from_millis(self.downtime_ms),
            bandwidth_bytes_per_s: self.bandwidth_bytes_per_s,
            encodings: self.encodings.parse().map_err(|e| format!("encodings: {e}"))?,
            history_bytes: self.history_bytes,
            pipeline: self.pipeline,
            batch_pages: self.batch_pages,
            serialize_threads: self.serialize_threads,
            max_epochs: self.max_epochs,
            max_time: self.max_time_ms.map(Duration::from_millis),
            on_limit: self.on_limit,
            verify: self.verify,
            peer_timeout: Duration::from_millis(self.peer_timeout_ms),
            ..SourceConfig::new(backend)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_events_are_one_line_and_come_back_equal() {
        let request = Request::Migrate { to: "127.0.0.1:1".into(), options: Box::default() };
        let line = serde_json::to_string(&request).unwrap();
        assert!(!line.contains('\n'));
        assert_eq!(serde_json::from_str::<Request>(&line).unwrap(), request);
        let event =
            Event::Progress(Progress { epoch: 3, estimated_downtime_ms: Some(1.5), ..Progress::default() });
        let line = serde_json::to_string(&event).unwrap();
        assert_eq!(serde_json::from_str::<Event>(&line).unwrap(), event);
        assert!(!event.is_final());
        assert!(!Event::Warning { message: "no space".into() }.is_final());
        assert!(Event::Ok.is_final());
    }

    #[test]
    fn options_may_be_left_out_but_not_misspelt() {
        let request: Request =
            serde_json::from_str(r#"{"request":"migrate","to":"h:1","options":{"connections":4}}"#).unwrap();
        let expected = MigrateOptions { connections: 4, ..MigrateOptions::default() };
        assert_eq!(request, Request::Migrate { to: "h:1".into(), options: Box::new(expected) });
        assert!(
            serde_json::from_str::<Request>(r#"{"request":"migrate","to":"h:1","options":{"connection":4}}"#)
                .is_err()
        );
    }
}
