//! What a migration of a QEMU tells about itself. Units are in the names.

use serde::{Deserialize, Serialize};

use super::route::RouteReport;
use crate::bridge::{DestinationBridgeReport, SourceBridgeReport};
use crate::protocol::control::{DestinationSide, Route};

/// What the source tells, of both sides.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct QemuReport {
    /// The VM's name in QEMU, or its UUID.
    pub name: String,
    /// The version of the source QEMU.
    pub qemu_version: String,
    /// Whether the VM runs on the destination. One that was paused stays so.
    pub runs: bool,
    /// Connections for pages beside the main one; 0: QEMU sends everything over one connection.
    pub multifd_channels: u8,
    /// From the command to the news that the VM runs on the destination.
    pub total_ms: f64,
    /// From the event STOP of the source QEMU to the news that the VM runs on the destination, by the clock of the source.
    pub downtime_ms: f64,
    /// From the event STOP of the source QEMU to the event RESUME of the destination QEMU: right if the clocks of both hosts agree.
    pub stop_to_resume_ms: Option<f64>,
    /// The limit that was asked for.
    pub downtime_limit_ms: f64,
    /// The downtime as the source QEMU reports it.
    pub qemu_downtime_ms: Option<u64>,
    /// The total time as the source QEMU reports it.
    pub qemu_total_ms: Option<u64>,
    /// Bytes that the source QEMU sent, as it reports them.
    pub qemu_transferred_bytes: u64,
    /// Pages of zeros that the source QEMU sent.
    pub qemu_zero_pages: u64,
    /// Whole pages that the source QEMU sent.
    pub qemu_normal_pages: u64,
    /// How often the source QEMU read the dirty log: the number of epochs.
    pub epochs: u64,
    /// Bytes of guest memory.
    pub memory_bytes: u64,
    /// CPU time of the source QEMU's threads other than vCPUs, during the migration; absent if that could not be told.
    pub qemu_cpu_ms: Option<f64>,
    /// Whether what was written into the destination QEMU is what was read from this one, before the hand-over; absent if nobody asked.
    pub verified: Option<bool>,
    /// How long the hand-over waited for that, beyond the end of QEMU's migration.
    pub verify_ms: Option<f64>,
    /// How QEMU's stream travelled.
    pub route: RouteReport,
    /// The source bridge's account; absent on the direct route.
    pub bridge: Option<SourceBridgeReport>,
    /// The destination's own account; absent if it did not arrive.
    pub destination: Option<DestinationSide>,
}

/// What the destination tells.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct QemuReceiveReport {
    /// The VM's name in the source QEMU, or its UUID.
    pub name: String,
    /// The version of the destination QEMU.
    pub qemu_version: String,
    /// Whether the VM runs. One that was paused stays so.
    pub runs: bool,
    /// From the first connection to the VM running here.
    pub total_ms: f64,
    /// CPU time of QEMU's threads other than vCPUs, during the migration; absent if that could not be told.
    pub qemu_cpu_ms: Option<f64>,
    /// How QEMU's stream travelled.
    pub route: Route,
    /// The bridge's account; absent on the direct route, and if the source was gone before it ended the session.
    pub bridge: Option<DestinationBridgeReport>,
}

/// What a VM is called: its name, its UUID, or neither.
pub(super) fn name_of(name: Option<String>, uuid: String) -> String {
    let has_uuid = uuid.chars().any(|c| c != '0' && c != '-');
    name.unwrap_or_else(|| if has_uuid { uuid } else { "a VM without name and UUID".into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_has_a_name_a_uuid_or_neither() {
        let uuid = "00000000-0000-0000-0000-0000000000a0";
        assert_eq!(name_of(Some("db".into()), uuid.into()), "db");
        assert_eq!(name_of(None, uuid.into()), uuid);
        assert_eq!(name_of(None, uuid.replace('a', "0")), "a VM without name and UUID");
    }
}
