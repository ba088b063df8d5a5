//! Follows the source QEMU through its migration, to its end.

use std::time::{Duration, Instant, SystemTime};

use pagewarp_engine::control::MigrationControl;
use pagewarp_engine::error::MigrationError;
use pagewarp_engine::metrics::ms;
use pagewarp_engine::report::{Phase, Progress};
use serde_json::{Map, Value};
use tracing::debug;

use super::ManageError;
use super::link::Incoming;
use super::switchover::{Seen, Switchover};
use crate::bridge::SourceBridge;
use crate::protocol::control::Message;
use crate::qmp::{MigrationStatus, QmpError, Version, Vm};

/// How often QEMU is asked how it is doing.
const POLL: Duration = Duration::from_millis(100);
/// How long a single wait for QEMU takes.
const LOOK: Duration = Duration::from_millis(20);
/// Since this version QEMU can be told the rate at which the rest will go.
const SWITCHOVER_BANDWIDTH: Version = Version::new(8, 2);
/// What it is told by.
const BANDWIDTH: &str = "avail-switchover-bandwidth";
/// What an older QEMU is told instead.
const DOWNTIME: &str = "downtime-limit";
/// How long QEMU may take to end a migration whose connections are gone, or that was cancelled.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// Follows the source QEMU.
pub(super) struct Driver<'a> {
    pub(super) vm: &'a mut Vm,
    pub(super) incoming: &'a Incoming,
    pub(super) control: &'a MigrationControl,
    pub(super) bridge: &'a SourceBridge<'a>,
    pub(super) bridge_progress: &'a MigrationControl,
    pub(super) started: Instant,
    /// When the guest was stopped, by our clock and as QEMU says.
    pub(super) stopped: Option<(Instant, Option<SystemTime>)>,
    /// What was known when the rates were computed last: when, and the wire bytes.
    pub(super) last: Option<(Instant, u64)>,
    pub(super) memory_bytes: u64,
    pub(super) switchover: Switchover,
    /// What QEMU was told last.
    pub(super) told: u64,
    /// Whether the VM runs, or would if it was not stopped for the migration.
    pub(super) runs: bool,
}

/// The parameters of QEMU that a migration changes, as they are now: whoever set them finds them so afterwards, however it ended.
pub(super) fn parameters_to_restore(
    seen: &Map<String, Value>,
    plan: &Map<String, Value>,
) -> Map<String, Value> {
    let changed = plan.keys().map(String::as_str).chain([BANDWIDTH]);
    changed.filter_map(|key| Some((key.to_owned(), seen.get(key)?.clone()))).collect()
}

impl Driver<'_> {
    /// Waits until the source QEMU has completed the migration.
    pub(super) fn run(&mut self) -> Result<(), ManageError> {
        let mut polled = Instant::now();
        let mut off: Option<(Instant, ManageError)> = None;
        loop {
            if self.control.is_cancelled() && off.is_none() {
                off = Some((Instant::now(), MigrationError::Cancelled.into()));
                self.cancel();
            }
            match self.incoming.next(Duration::ZERO) {
                Some(Ok(Message::Failed { reason })) if off.is_none() => {
                    off = Some((Instant::now(), MigrationError::PeerReports(reason).into()));
                    self.cancel();
                }
                Some(Err(error)) if off.is_none() => {
                    off = Some((Instant::now(), error.into()));
                    self.cancel();
                }
                _ => {}
            }
            if let Some(event) = self.vm.next_event(LOOK)? {
                if event.name == "STOP" {
                    self.stop(event.at);
                } else if event.name == "RESUME" {
                    self.stopped = None;
                    self.runs = true;
                }
                match event.migration_status() {
                    Some("completed") if off.is_none() => return Ok(()),
                    // It was cancelled or failed too late for QEMU, and not too late for us: nothing was committed.
                    Some("completed" | "cancelled" | "failed") => {
                        let reason = self.vm.migration().unwrap_or_default().error_desc;
                        return Err(match off {
                            Some((_, why)) => why,
                            None => ManageError::Qemu {
                                side: "the source",
                                reason: reason.unwrap_or_else(|| {
                                    "its connection ended; what the destination and the bridges say tells why".into()
                                }),
                            },
                        });
                    }
                    _ => {}
                }
            }
            if let Some((since, _)) = &off
                && since.elapsed() > END_TIMEOUT
                && let Some((_, why)) = off
            {
                return Err(why);
            }
            if polled.elapsed() >= POLL {
                polled = Instant::now();
                let status = self.vm.migration()?;
                self.show(&status);
                if self.stopped.is_none() && status.status == "active" {
                    self.limit(&status)?;
                }
            }
        }
    }

    /// The guest was stopped: for the switch-over, or by somebody who wants it to stand still, also at the destination.
    fn stop(&mut self, at: Option<SystemTime>) {
        if self.vm.status().is_ok_and(|state| state.status == "paused") {
            self.runs = false;
            return;
        }
        self.stopped = Some((Instant::now(), at));
        self.control.update(|progress| progress.phase = Phase::Switchover);
    }

    /// Tells QEMU when to stop the guest.
    fn limit(&mut self, status: &MigrationStatus) -> Result<(), ManageError> {
        let epoch = status.ram.as_ref().map_or(0, |ram| ram.dirty_sync_count);
        let bytes = self.bridge_progress.progress().guest_bytes;
        let held_back = self.bridge.held_back();
        self.switchover.observe(Seen { at: Instant::now(), epoch, bytes, held_back });
        let (key, value) = if self.vm.version() >= SWITCHOVER_BANDWIDTH {
            // 0 leaves it to QEMU.
            (BANDWIDTH, self.switchover.sustained().map_or(0, |rate| rate as u64))
        } else {
            (DOWNTIME, self.switchover.limit_ms())
        };
        // Small changes are not worth a command.
        if value.abs_diff(self.told) * 20 <= self.told {
            return Ok(());
        }
        self.told = value;
        let parameters = Map::from_iter([(key.to_owned(), value.into())]);
        match self.vm.set_parameters(parameters) {
            // It may have ended meanwhile, which the event tells.
            Ok(()) | Err(QmpError::Refused { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// QEMU may have ended already, which the event tells.
    fn cancel(&mut self) {
        if let Err(error) = self.vm.cancel() {
            debug!(%error, "cancelling");
        }
    }

    fn show(&mut self, status: &MigrationStatus) {
        let Some(ram) = &status.ram else { return };
        self.memory_bytes = ram.total;
        let bridge = self.bridge_progress.progress();
        let (now, wire) = (Instant::now(), bridge.wire_bytes);
        let rate =
            self.last.map(|(then, before)| (wire - before) as f64 / now.duration_since(then).as_secs_f64());
        self.last = Some((now, wire));
        let page = ram.page_size.max(1);
        self.control.update(|progress| {
            let epoch = ram.dirty_sync_count.saturating_sub(1) as u32;
            let left = ram.remaining / page;
            // QEMU tells what is left, and reads the dirty log anew between epochs: the first value seen is the size of the epoch.
            let epoch_pages = if epoch == progress.epoch && progress.epoch_pages >= left {
                progress.epoch_pages
            } else {
                left
            };
            let epoch_pages = if epoch == 0 { ram.total / page } else { epoch_pages };
            *progress = Progress {
                phase: if self.stopped.is_some() { Phase::Switchover } else { Phase::Precopy },
                epoch,
                epoch_pages,
                epoch_pages_done: epoch_pages.saturating_sub(left),
                memory_pages: ram.total / page,
                guest_bytes: bridge.guest_bytes,
                wire_bytes: wire,
                elapsed_ms: ms(self.started.elapsed()),
                wire_bytes_per_s: rate.unwrap_or(0.0),
                dirty_pages_per_s: ram.dirty_pages_rate as f64,
                estimated_downtime_ms: status.expected_downtime_ms.map(|ms| ms as f64),
            };
        });
    }
}
