//! What is stored: every single run, and on what it ran.

use pagewarp_cli::demo::host::HostInfo;
use pagewarp_cli::units::Rate;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::args::{Args, Load};
use crate::mode::Mode;

/// The priority of the vCPUs' threads.
pub(crate) const VCPU_NICE: i32 = 10;

/// All of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The command line.
    pub(crate) command: Vec<String>,
    pub(crate) host: Host,
    pub(crate) qemu_version: String,
    pub(crate) settings: Settings,
    pub(crate) runs: Vec<Run>,
}

/// The machine, which plays both hosts.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Host {
    #[serde(flatten)]
    pub(crate) info: HostInfo,
    /// The load average of the last minute at the start: 0 on an otherwise idle machine.
    pub(crate) load_average: f64,
}

impl Host {
    pub(crate) fn of(info: HostInfo) -> Host {
        let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let load_average = text.split_whitespace().next().and_then(|word| word.parse().ok());
        Host { info, load_average: load_average.unwrap_or(0.0) }
    }
}

/// What holds for all runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Settings {
    pub(crate) memory_bytes: u64,
    /// Absent: what suits the workload.
    pub(crate) fill_percent: Option<u8>,
    pub(crate) downtime_limit_ms: u64,
    pub(crate) limit_s: f64,
    pub(crate) history: String,
    pub(crate) compression: String,
    /// At most the VM's memory.
    pub(crate) xbzrle_cache_bytes: u64,
    pub(crate) multifd_channels: u8,
    pub(crate) repeat: u32,
    pub(crate) vcpu_nice: i32,
}

impl Settings {
    pub(crate) fn of(args: &Args) -> Settings {
        Settings {
            memory_bytes: args.memory.0,
            fill_percent: args.fill,
            downtime_limit_ms: args.downtime_ms,
            limit_s: args.limit.as_secs_f64(),
            history: args.history.to_string(),
            compression: args.compression(),
            xbzrle_cache_bytes: args.xbzrle_cache.0.min(args.memory.0),
            multifd_channels: args.channels,
            repeat: args.repeat,
            vcpu_nice: VCPU_NICE,
        }
    }
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    /// The VM runs on the destination, and its memory is as it was.
    Completed,
    /// It was given up while the guest still ran on the source.
    DidNotConverge,
    /// Anything else.
    Failed,
}

/// One migration. What could not be measured is `null`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Run {
    pub(crate) workload: String,
    pub(crate) pages_per_s: u64,
    pub(crate) link_bits_per_s: u64,
    pub(crate) mode: Mode,
    /// From 0.
    pub(crate) repetition: u32,
    pub(crate) started_unix_s: u64,
    pub(crate) qemu_version: String,
    pub(crate) outcome: Outcome,
    pub(crate) error: Option<String>,
    /// From the command to the RESUME of the destination QEMU.
    pub(crate) total_ms: Option<f64>,
    /// From the command to the end of the measurement, also where the VM did not move.
    pub(crate) elapsed_ms: f64,
    /// From the STOP of the source QEMU to the RESUME of the destination QEMU.
    pub(crate) downtime_ms: Option<f64>,
    /// As the source QEMU reports it.
    pub(crate) qemu_downtime_ms: Option<u64>,
    /// The longest pause that the guest saw when it moved, by its own clock.
    pub(crate) guest_pause_ms: Option<f64>,
    /// What its clock lost against the host's: a pause that it did not see. Errors of some milliseconds come from the serial port.
    pub(crate) guest_clock_lost_ms: Option<f64>,
    /// From the source to the destination, as the interface counts.
    pub(crate) wire_bytes: Option<u64>,
    /// From the destination to the source.
    pub(crate) wire_back_bytes: Option<u64>,
    pub(crate) cpu: Option<Cpu>,
    /// How often the source QEMU read the dirty log.
    pub(crate) epochs: Option<u64>,
    pub(crate) check: Option<Check>,
    /// The most memory each pagewarp process had at once (VmHWM).
    pub(crate) peak_rss_bytes: Option<Sides>,
    /// The answer of the source QEMU to `query-migrate` at the end, or before it was cancelled.
    pub(crate) query_migrate: Option<Value>,
    /// The report of `pagewarp qemu migrate`.
    pub(crate) pagewarp_migrate: Option<Value>,
    /// The report of `pagewarp qemu receive`.
    pub(crate) pagewarp_receive: Option<Value>,
}

/// CPU time without vCPUs.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Cpu {
    pub(crate) source_qemu_ms: f64,
    pub(crate) destination_qemu_ms: f64,
    pub(crate) source_pagewarp_ms: f64,
    pub(crate) destination_pagewarp_ms: f64,
}

impl Cpu {
    pub(crate) fn total_ms(&self) -> f64 {
        self.source_qemu_ms
            + self.destination_qemu_ms
            + self.source_pagewarp_ms
            + self.destination_pagewarp_ms
    }
}

/// What the guest found when it looked at its memory on the destination.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Check {
    pub(crate) sweeps: u64,
    pub(crate) errors: u64,
}

/// One value of each host.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Sides {
    pub(crate) source: u64,
    pub(crate) destination: u64,
}

impl Run {
    /// A run of which nothing is known yet.
    pub(crate) fn new(mode: Mode, load: &Load, link: Rate, repetition: u32, started_unix_s: u64) -> Run {
        Run {
            workload: load.workload.name().to_owned(),
            pages_per_s: load.pages_per_s,
            link_bits_per_s: link.bytes_per_s * 8,
            mode,
            repetition,
            started_unix_s,
            qemu_version: String::new(),
            outcome: Outcome::Failed,
            error: None,
            total_ms: None,
            elapsed_ms: 0.0,
            downtime_ms: None,
            qemu_downtime_ms: None,
            guest_pause_ms: None,
            guest_clock_lost_ms: None,
            wire_bytes: None,
            wire_back_bytes: None,
            cpu: None,
            epochs: None,
            check: None,
            peak_rss_bytes: None,
            query_migrate: None,
            pagewarp_migrate: None,
            pagewarp_receive: None,
        }
    }

    /// Of the link.
    pub(crate) fn link_rate(&self) -> Rate {
        Rate { bytes_per_s: self.link_bits_per_s / 8 }
    }

    /// In one line, for whoever watches.
    pub(crate) fn summary(&self) -> String {
        match self.outcome {
            Outcome::Completed => format!(
                "{:.2} s, downtime {:.0} ms, {} MiB, {} epochs",
                self.total_ms.unwrap_or(0.0) / 1000.0,
                self.downtime_ms.unwrap_or(0.0),
                self.wire_bytes.unwrap_or(0) >> 20,
                self.epochs.unwrap_or(0)
            ),
            Outcome::DidNotConverge => {
                let epochs = self.epochs.unwrap_or(0);
                format!("did not converge in {:.0} s and {epochs} epochs", self.elapsed_ms / 1000.0)
            }
            Outcome::Failed => format!("FAILED: {}", self.error.as_deref().unwrap_or("for no known reason")),
        }
    }
}
