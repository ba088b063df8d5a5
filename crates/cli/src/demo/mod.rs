//! The demo: a VM migrates between two processes over a shaped link, in every mode. Tests build on the same parts.

pub mod guest;
pub mod host;
pub mod interrupt;
pub mod machine;
mod mode;
pub mod report;
mod synthetic;
mod virtual_machine;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use pagewarp_engine::config::OnLimit;
use pagewarp_engine::report::{Progress, StageReport};
use pagewarp_guest::GuestConfig;
use pagewarp_kvm::control::MigrateOptions;
use pagewarp_testkit::shaper::{LinkConfig, LinkShaper};

pub use mode::Mode;
use report::Run;

use crate::backend::BackendName;
use crate::trace::TraceFile;
use crate::units::{ByteSize, Rate};

/// What the output says where there is no KVM.
pub const SYNTHETIC_NOTE: &str = "NOTE: this was the synthetic guest (threads that write a shared memory), not a virtual machine. \
                                  The figures are those of the migration engine alone.";

/// What the output says where a device in software stood in for a GPU.
pub const SOFTWARE_NOTE: &str = "NOTE: the GPU of `pipelined-gpu` was a device in software. Its figures show that it works, not how fast a GPU is.";

/// A mode that takes this many times as long as one plain copy of the memory does is not going to converge.
const PATIENCE: f64 = 10.0;
/// But small memories and fast links get at least this long.
const MIN_PATIENCE: Duration = Duration::from_secs(30);
/// The rate that an unshaped link is assumed to have, for the same purpose.
const ASSUMED_BYTES_PER_S: u64 = 500_000_000;

/// What a demo migrates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestKind {
    /// The built-in guest, under KVM, between two processes.
    Builtin,
    /// Threads that write a shared memory, where there is no KVM; both ends in this process.
    Synthetic,
}

impl GuestKind {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            GuestKind::Builtin => "builtin",
            GuestKind::Synthetic => "synthetic",
        }
    }
}

/// What every migration of a demo has in common.
#[derive(Clone, Debug)]
pub struct Lab {
    /// The `pagewarp` program.
    pub program: PathBuf,
    /// What is migrated.
    pub kind: GuestKind,
    /// Guest memory.
    pub memory: ByteSize,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// What the guest does.
    pub guest: GuestConfig,
    /// The link's rate; `None`: as fast as loopback.
    pub link: Option<Rate>,
    /// The downtime limit.
    pub downtime_ms: u64,
    /// Data connections.
    pub connections: u32,
    /// Whether the memory of both sides is compared before the hand-over.
    pub verify: bool,
    /// The history budget.
    pub history: ByteSize,
    /// The GPU of the modes that need one.
    pub gpu: BackendName,
    /// Whether that is one in software: good for showing that it works, and for nothing else.
    pub gpu_in_software: bool,
}

impl Lab {
    /// Boots the guest, migrates it in this mode, and watches it on the other side. `on_step` hears what is being done. `traced` asks for
    /// a trace of both ends; there is none if neither could be started.
    ///
    /// # Errors
    ///
    /// What kept the migration from being tried. A migration that fails is a [`Run`] that did not converge.
    pub fn run(
        &self,
        mode: Mode,
        run: u32,
        traced: bool,
        on_step: &mut dyn FnMut(Step<'_>),
    ) -> Result<(Run, Option<TraceFile>)> {
        match self.kind {
            GuestKind::Builtin => virtual_machine::run(self, mode, run, traced, on_step),
            GuestKind::Synthetic => synthetic::run(self, mode, run, traced, on_step),
        }
    }

    /// Who computes encodings in this mode, on both sides.
    pub fn backend(&self, mode: Mode) -> BackendName {
        if mode.on_gpu() { self.gpu } else { BackendName::Cpu }
    }

    /// How long a migration may try to converge.
    pub fn time_limit(&self) -> Duration {
        let rate = self.link.map_or(ASSUMED_BYTES_PER_S, |rate| rate.bytes_per_s);
        Duration::from_secs_f64(PATIENCE * self.memory.0 as f64 / rate as f64).max(MIN_PATIENCE)
    }

    /// How to migrate in this mode.
    pub fn options(&self, mode: Mode) -> MigrateOptions {
        MigrateOptions {
            connections: self.connections as usize,
            downtime_ms: self.downtime_ms,
            encodings: mode.encodings().to_string(),
            history_bytes: self.history.0,
            pipeline: mode.pipeline(),
            max_time_ms: Some(self.time_limit().as_millis() as u64),
            // A device in software may never keep up with the guest, and nobody wants to know.
            on_limit: if mode.on_gpu() && self.gpu_in_software {
                OnLimit::StopAnyway
            } else {
                OnLimit::Cancel
            },
            verify: self.verify,
            backend: self.backend(mode).to_string(),
            ..MigrateOptions::default()
        }
    }

    /// The shaped link to a destination.
    pub fn link_to(&self, destination: std::net::SocketAddr) -> std::io::Result<LinkShaper> {
        let rate_bits_per_s = self.link.map(|rate| rate.bytes_per_s * 8);
        LinkShaper::start(destination, LinkConfig { rate_bits_per_s, ..LinkConfig::default() })
    }
}

/// What a demo is doing.
#[derive(Debug)]
pub enum Step<'a> {
    /// In a few words.
    Doing(&'a str),
    /// A migration is under way.
    Migrating(&'a Progress),
}

/// The link as a stage; `None` if it has no rate, and so no busy time.
pub fn link_stage(link: &LinkShaper, rate: Option<Rate>) -> Option<StageReport> {
    rate.map(|_| {
        let counters = link.there();
        StageReport {
            threads: 1,
            busy_ms: counters.busy.as_secs_f64() * 1000.0,
            bytes_in: counters.bytes,
            bytes_out: counters.bytes,
            ..StageReport::default()
        }
    })
}
