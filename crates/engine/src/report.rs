//! What a migration tells about itself: progress while it runs, a report when it ends. Units are in the names.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::metrics::ms;
use crate::transport::{Interruptions, Outage};

/// What one stage did. Times are summed over its threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StageReport {
    /// Threads of the stage.
    pub threads: u32,
    /// Working; for `send` and `receive` this includes the time the link took.
    pub busy_ms: f64,
    /// Waiting for a device that computes for the stage.
    pub device_wait_ms: f64,
    /// Waiting for something to do.
    pub blocked_in_ms: f64,
    /// Waiting for a buffer or for room in the next stage's queue.
    pub blocked_out_ms: f64,
    /// CPU time of the stage's threads.
    pub cpu_ms: f64,
    /// Bytes that came in.
    pub bytes_in: u64,
    /// Bytes that went out.
    pub bytes_out: u64,
}

/// Use of one encoding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EncodingReport {
    /// Pages written this way.
    pub pages: u64,
    /// Their payload bytes.
    pub bytes: u64,
}

/// One epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EpochReport {
    /// Pages sent.
    pub pages: u64,
    /// Payload bytes of these pages, frames aside.
    pub payload_bytes: u64,
    /// How long it took.
    pub duration_ms: f64,
    /// Pages that were dirty at its end.
    pub dirty_pages: u64,
    /// The downtime estimated at its end; absent for the last epoch.
    pub estimated_downtime_ms: Option<f64>,
}

/// What the destination did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DestinationReport {
    /// The VM's name.
    pub name: String,
    /// The backend that decoded.
    pub backend: String,
    /// From the first connection to the VM running here.
    pub total_ms: f64,
    /// Loading the device state.
    pub load_state_ms: f64,
    /// Digesting guest memory while the VM was paused; absent if nobody asked.
    pub verify_ms: Option<f64>,
    /// Plain bytes of all pages received.
    pub guest_bytes: u64,
    /// Bytes received on all connections.
    pub wire_bytes: u64,
    /// CPU time of all migration threads.
    pub cpu_ms: f64,
    /// `receive`, `deserialize`, `restore`.
    pub stages: BTreeMap<String, StageReport>,
    /// The busiest stage.
    pub bound_by: String,
    /// Why the CPU had to take over from the backend, if it had to.
    pub fallback: Option<String>,
    /// Batches that the backend left or rejected and the CPU decoded.
    pub fallback_batches: u64,
    /// Batches that the CPU decoded because the backend's device was busy.
    pub spilled_batches: u64,
    /// Anonymous memory of the process at its highest, in bytes (guest memory is not anonymous).
    pub peak_anonymous_bytes: u64,
}

/// What the source did, and what the destination said of itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SourceReport {
    /// The VM's name.
    pub name: String,
    /// The backend that encoded.
    pub backend: String,
    /// Data connections.
    pub connections: u32,
    /// Whether the stages worked at once.
    pub pipeline: bool,
    /// The encodings both sides agreed on.
    pub allowed_encodings: String,
    /// From the first connection to the VM running on the destination.
    pub total_ms: f64,
    /// From the pause of the VM to the news that it runs on the destination.
    pub downtime_ms: f64,
    /// The limit that was asked for.
    pub downtime_limit_ms: f64,
    /// Plain bytes of all pages sent.
    pub guest_bytes: u64,
    /// Bytes sent on all connections.
    pub wire_bytes: u64,
    /// CPU time of all migration threads.
    pub cpu_ms: f64,
    /// `copy`, `serialize`, `send`.
    pub stages: BTreeMap<String, StageReport>,
    /// The busiest stage.
    pub bound_by: String,
    /// Use of each encoding, by name.
    pub encodings: BTreeMap<String, EncodingReport>,
    /// One entry per epoch, the last one sent while paused.
    pub epochs: Vec<EpochReport>,
    /// Whether every page digest agreed, before the hand-over; absent if nobody asked.
    pub verified: Option<bool>,
    /// How long the paused VM waited for that: from the moment when all pages were at the destination to the end of the comparison.
    pub verify_ms: Option<f64>,
    /// Why the CPU had to take over from the backend, if it had to.
    pub fallback: Option<String>,
    /// Batches that the backend left and the CPU encoded again.
    pub fallback_batches: u64,
    /// Batches that the CPU encoded because the backend's device was busy.
    pub spilled_batches: u64,
    /// Pages that arrived damaged and were sent again.
    pub resent_pages: u64,
    /// Memory of the history in use at the end, in bytes.
    pub history_bytes: u64,
    /// Anonymous memory of the process at its highest, in bytes (guest memory is not anonymous).
    pub peak_anonymous_bytes: u64,
    /// Breaks of connections, and what it cost to mend them.
    #[serde(default)]
    pub interruptions: Interruptions,
    /// The destination's own account.
    pub destination: Option<DestinationReport>,
}

/// Where a migration is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Connecting and agreeing.
    #[default]
    Connecting,
    /// The VM runs on the source and its memory is sent.
    Precopy,
    /// The VM is paused; the last epoch and the device state are sent.
    Switchover,
    /// The right to run the VM has been given away; waiting for the news that it runs.
    Committed,
    /// The VM runs on the destination.
    Done,
    /// The migration ended without moving the VM.
    Failed,
}

/// A snapshot of a migration that is under way.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Progress {
    /// Where it is.
    pub phase: Phase,
    /// The epoch, from 0.
    pub epoch: u32,
    /// Pages of this epoch.
    pub epoch_pages: u64,
    /// Pages of this epoch that have been sent (received, on the destination).
    pub epoch_pages_done: u64,
    /// Pages of guest memory.
    pub memory_pages: u64,
    /// Plain bytes of all pages so far.
    pub guest_bytes: u64,
    /// Bytes on all connections so far.
    pub wire_bytes: u64,
    /// Time since the start.
    pub elapsed_ms: f64,
    /// Bytes a second on all connections, lately.
    pub wire_bytes_per_s: f64,
    /// Pages the guest dirties a second, as of the last epoch.
    pub dirty_pages_per_s: f64,
    /// The downtime to be expected if it switched over at the end of the last epoch.
    pub estimated_downtime_ms: Option<f64>,
    /// For how long a connection has been lost that is tried to be opened again; absent if none is.
    pub outage_ms: Option<f64>,
    /// For how long that is tried.
    pub outage_limit_ms: Option<f64>,
}

impl Progress {
    /// Notes whether a connection is lost.
    pub fn set_outage(&mut self, outage: Option<Outage>) {
        self.outage_ms = outage.map(|outage| ms(outage.lasts));
        self.outage_limit_ms = outage.map(|outage| ms(outage.most));
    }
}
