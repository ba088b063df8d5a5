//! What a bridge tells about a session. Units are in the names.

use std::collections::BTreeMap;

use pagewarp_engine::metrics::StageMeter;
use pagewarp_engine::report::{EncodingReport, StageReport};
use pagewarp_engine::transport::Interruptions;
use serde::{Deserialize, Serialize};

/// The reports of stages, each with the number of its threads.
pub(crate) fn stages<const N: usize>(
    stages: [(&str, &StageMeter, usize); N],
) -> BTreeMap<String, StageReport> {
    stages
        .map(|(name, meter, threads)| {
            (name.to_owned(), StageReport { threads: threads as u32, ..meter.report() })
        })
        .into()
}

/// Use of one level of compression.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LevelReport {
    /// Segments with pages.
    pub segments: u64,
    /// Their pages.
    pub pages: u64,
    /// The bytes they became.
    pub wire_bytes: u64,
}

/// What the source bridge did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SourceBridgeReport {
    /// Whether the destination QEMU has confirmed, through the bridge, that it has the VM. Without a return path: whether the stream came to its end. `false` if
    /// everything was delivered but could not be read: then only QEMU can tell.
    pub complete: bool,
    /// The backend that encoded.
    pub backend: String,
    /// Connections of QEMU.
    pub connections: u32,
    /// From the first connection of QEMU to the end.
    pub total_ms: f64,
    /// Bytes that the source QEMU sent.
    pub stream_bytes: u64,
    /// Pages among them.
    pub pages: u64,
    /// Records of zero pages among them.
    pub zero_records: u64,
    /// Bytes sent to the destination bridge.
    pub wire_bytes: u64,
    /// Bytes a second that the link carried when it was full; absent if it never was.
    pub link_bytes_per_s: Option<f64>,
    /// CPU time of the bridge's threads.
    pub cpu_ms: f64,
    /// `copy`, `serialize`, `send`.
    pub stages: BTreeMap<String, StageReport>,
    /// The busiest stage.
    pub bound_by: String,
    /// How hard pages were compressed.
    pub levels: BTreeMap<String, LevelReport>,
    /// Use of each encoding; with the level `zstd` the bytes are those before it.
    pub encodings: BTreeMap<String, EncodingReport>,
    /// Memory of the history in use at the end, in bytes.
    pub history_bytes: u64,
    /// Why the CPU had to take over from the backend, if it had to.
    pub fallback: Option<String>,
    /// Segments that the CPU encoded because the backend's device was busy.
    pub spilled_batches: u64,
    /// Per connection, why it was not taken apart to its end; connections that were are not listed.
    pub passed_raw: BTreeMap<u16, String>,
    /// Whether what was written into the destination QEMU is what was read; absent if nobody asked.
    pub verified: Option<bool>,
    /// Breaks of connections, and what it cost to mend them.
    #[serde(default)]
    pub interruptions: Interruptions,
    /// Anonymous memory of the process at its end, in bytes.
    pub anonymous_bytes: u64,
}

/// What the destination bridge did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DestinationBridgeReport {
    /// Whether the source ended the session in order.
    pub complete: bool,
    /// The backend that decoded.
    pub backend: String,
    /// Connections of QEMU.
    pub connections: u32,
    /// From the first connection to the end.
    pub total_ms: f64,
    /// Bytes written into the destination QEMU.
    pub stream_bytes: u64,
    /// Bytes received from the source bridge.
    pub wire_bytes: u64,
    /// CPU time of the bridge's threads.
    pub cpu_ms: f64,
    /// `receive`, `deserialize`, `restore`.
    pub stages: BTreeMap<String, StageReport>,
    /// The busiest stage.
    pub bound_by: String,
    /// Why the CPU had to take over from the backend, if it had to.
    pub fallback: Option<String>,
    /// Segments that the CPU decoded because the backend's device was busy.
    pub spilled_batches: u64,
    /// Anonymous memory of the process at its end, in bytes.
    pub anonymous_bytes: u64,
}
