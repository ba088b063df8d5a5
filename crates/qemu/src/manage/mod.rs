//! Migrations from beginning to end: both QEMU processes are told what to do, the bridge is put between them, or a bare connection, and the VM is handed over.
//!
//! The destination QEMU is kept from running the VM by itself. Only after the source QEMU has completed the migration, and so will never run the VM by
//! itself again, does the source say *commit*; only then is the destination QEMU told to run it. So the VM runs on one side at most,
//! whatever fails.

mod blame;
mod cpu;
mod destination;
#[cfg(test)]
mod fake;
mod follow;
mod handover;
mod link;
#[cfg(test)]
mod model;
mod process;
mod report;
mod resolve;
mod route;
mod source;
mod states;
mod switchover;
mod takeover;

use std::path::PathBuf;
use std::time::Duration;

use pagewarp_engine::available;
use pagewarp_engine::error::MigrationError;
use thiserror::Error;
use tracing::debug;

use crate::bridge::{BridgeConfig, Guest, default_history_bytes};
use crate::qmp::check::{Refusal, Wish};
use crate::qmp::{QmpError, Vm};

pub use crate::protocol::control::Route;
pub use destination::{Receiver, receive};
pub use report::{QemuReceiveReport, QemuReport};
pub use resolve::{Decision, resolve};
pub use route::{RouteReport, RouteWish};
pub use source::migrate;

/// What a caller decides.
#[derive(Clone)]
pub struct ManageConfig {
    /// The bridge of this host.
    pub bridge: BridgeConfig,
    /// Whether the bridge's history gets the size that suits the VM and this host, rather than what `bridge` says.
    pub history_follows_vm: bool,
    /// What the migration should be like. The destination takes it from the source.
    pub wish: Wish,
    /// Where the socket between QEMU and the bridge is made; both must be able to use it. `None`: a new directory that this user alone may use.
    pub socket_dir: Option<PathBuf>,
    /// How long QEMU, or the peer at the hand-over, is waited for.
    pub timeout: Duration,
    /// The VMs that the destination accepts, by name or UUID; none: any. A VM is what its source says it is.
    pub allowed_vms: Vec<String>,
    /// Whether the bridge is used. The source decides.
    pub route: RouteWish,
    /// Whether the source QEMU is ended once the VM runs on the destination.
    pub quit_source: bool,
}

impl ManageConfig {
    /// The defaults, with this bridge.
    pub fn new(bridge: BridgeConfig) -> ManageConfig {
        ManageConfig {
            bridge,
            history_follows_vm: true,
            wish: Wish::default(),
            socket_dir: None,
            timeout: Duration::from_secs(30),
            allowed_vms: Vec::new(),
            route: RouteWish::Auto,
            quit_source: false,
        }
    }

    /// The bridge for this VM. `guest` says where its memory is.
    fn bridge_for(&self, vm: &mut Vm, guest: fn(u64) -> Guest) -> Result<BridgeConfig, QmpError> {
        let mut bridge = self.bridge.clone();
        if self.history_follows_vm {
            let guest = guest(vm.memory_bytes()?);
            bridge.history_bytes = default_history_bytes(available::memory_bytes(), guest);
            debug!(bytes = bridge.history_bytes, ?guest, "the history");
        }
        Ok(bridge)
    }
}

/// Why a migration ended without moving the VM, or without being sure.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ManageError {
    /// The bridge, the link or the peer.
    #[error(transparent)]
    Migration(#[from] MigrationError),
    /// The monitor of the QEMU on this host.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// It cannot work.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// QEMU on this host gave up.
    #[error("{side} QEMU ended the migration: {reason}")]
    Qemu {
        /// `the source` or `the destination`.
        side: &'static str,
        /// What it said.
        reason: String,
    },
    /// This host lacks something.
    #[error("{0}")]
    Host(String),
    /// The right to run the VM was given away, and the news that it runs never came.
    #[error(
        "the hand-over was committed but the destination never confirmed that the VM runs: {reason}. The VM is kept paused here. Look at the \
         destination first (`query-status` in its monitor): if the VM runs there, end it here (`pagewarp qemu resolve --qmp {qmp} \
         --discard`); if it surely does not and never will, because its QEMU has ended or you have ended it, run it here (`pagewarp qemu resolve --qmp {qmp} --resume`)"
    )]
    InDoubt {
        /// What was seen.
        reason: String,
        /// The socket of the source QEMU.
        qmp: String,
    },
    /// Seen on the destination, which was given the right to run the VM: its QEMU never told that it does, and was left as it is.
    #[error(
        "the hand-over was committed, and whether the VM runs here is unknown: {reason}. QEMU was left as it is. Look at it (`query-status` in its monitor, \
         {qmp}): if the VM runs, end it at the source (`pagewarp qemu resolve --discard` there); if it is paused, let it go on here (`cont`), and end it at \
         the source; if this QEMU has ended without running it, or once you have ended it, run the VM at the source (`pagewarp qemu resolve --resume` there)"
    )]
    Unconfirmed {
        /// What was seen.
        reason: String,
        /// The socket of the destination QEMU.
        qmp: String,
    },
    /// The migration failed and the VM could not be resumed afterwards. It is whole, but paused, on the source.
    #[error(
        "{reason}; and the VM did not go on afterwards: {resume}. It is whole but paused here, and surely runs nowhere else: when what stands in \
         the way is gone, let it go on (`pagewarp qemu resolve --qmp {qmp} --resume`)"
    )]
    StillPaused {
        /// Why the migration failed.
        reason: Box<ManageError>,
        /// Why the VM could not be resumed.
        resume: QmpError,
        /// The socket of the source QEMU.
        qmp: String,
    },
}
