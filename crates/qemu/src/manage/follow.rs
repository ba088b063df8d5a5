//! Follows the source QEMU through its migration, to its end.

use std::time::{Duration, Instant, SystemTime};

use pagewarp_engine::control::MigrationControl;
use pagewarp_engine::metrics::ms;
use pagewarp_engine::report::{Phase, Progress};
use pagewarp_engine::transport::{Connector, OUTAGE_WHILE_PAUSED};
use serde_json::{Map, Value};
use tracing::debug;

use super::ManageError;
use super::blame::Signs;
use super::link::Incoming;
use super::switchover::{Seen, Switchover};
use crate::bridge::SourceBridge;
use crate::qmp::{MigrationStatus, QmpError, QmpEvent, Version, Vm};

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
/// How long an answer of QEMU is waited for, and nothing else seen meanwhile.
const ANSWER: Duration = Duration::from_secs(1);
/// How long QEMU may take to end a migration whose connections are gone, or that was cancelled.
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// Follows the source QEMU.
pub(super) struct Driver<'a> {
    pub(super) vm: &'a mut Vm,
    pub(super) incoming: &'a Incoming,
    pub(super) control: &'a MigrationControl,
    pub(super) connector: &'a dyn Connector,
    /// Absent on the direct route.
    pub(super) bridge: Option<&'a SourceBridge<'a>>,
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
    /// What went wrong.
    pub(super) signs: Signs,
    /// Since when QEMU has not answered, and for how long that may be.
    pub(super) silent: Option<Instant>,
    pub(super) patience: Duration,
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
    /// Follows QEMU until it has ended the migration. Whether it has completed it is told by [`signs`](Driver::signs): there are none then.
    ///
    /// # Errors
    ///
    /// Those of a monitor that is gone, or whose QEMU has not answered for too long.
    pub(super) fn run(&mut self) -> Result<(), ManageError> {
        let timeout = self.vm.qmp().set_timeout(ANSWER);
        let ended = self.follow();
        self.vm.qmp().set_timeout(timeout);
        ended
    }

    fn follow(&mut self) -> Result<(), ManageError> {
        let mut polled = Instant::now();
        let mut off: Option<Instant> = None;
        loop {
            self.signs.cancelled |= self.control.is_cancelled();
            if let Some(news) = self.incoming.next(Duration::ZERO) {
                self.signs.hear(news);
            }
            if self.signs.any() && off.is_none() {
                off = Some(Instant::now());
                self.cancel();
            }
            if let Some(event) = self.vm.next_event(LOOK)?
                && self.note(&event)
            {
                return Ok(());
            }
            if off.is_some_and(|since| since.elapsed() > END_TIMEOUT) {
                return Ok(());
            }
            if polled.elapsed() >= POLL {
                polled = Instant::now();
                let answer = self.vm.migration();
                if let Some(status) = self.in_time(answer)? {
                    self.show(&status);
                    if self.stopped.is_none() && status.status == "active" {
                        self.limit(&status)?;
                    }
                }
            }
        }
    }

    /// Notes what QEMU tells. Returns whether the migration has ended.
    fn note(&mut self, event: &QmpEvent) -> bool {
        match (event.name.as_str(), event.migration_status()) {
            ("STOP", _) => self.stop(event.at),
            ("RESUME", _) => {
                self.stopped = None;
                self.limit_outage(None);
                self.runs = true;
            }
            (_, Some("completed")) => return true,
            // If we did not cancel, somebody else did.
            (_, Some(status @ ("cancelled" | "failed"))) => {
                let reason = self.vm.migration().unwrap_or_default().error_desc;
                let told = match status {
                    "cancelled" => "somebody cancelled it in its monitor",
                    _ => "it does not say why",
                };
                // Whatever else ends it makes it fail.
                let is_cancelled = self.bridge.is_none() && status == "cancelled";
                self.signs.by_itself = is_cancelled && !self.signs.any();
                self.signs.qemu = Some(reason.unwrap_or_else(|| told.into()));
                return true;
            }
            _ => {}
        }
        false
    }

    /// An answer of QEMU. `None`: none in time, as while it is busy with a long switch-over. That is no failure, unless it lasts for too long.
    fn in_time<T>(&mut self, answer: Result<T, QmpError>) -> Result<Option<T>, ManageError> {
        match answer {
            Ok(answer) => {
                self.silent = None;
                Ok(Some(answer))
            }
            Err(QmpError::TimedOut { command, .. }) => {
                let since = self.silent.get_or_insert_with(Instant::now);
                let waited = since.elapsed();
                if waited < self.patience {
                    return Ok(None);
                }
                Err(QmpError::TimedOut { command, waited }.into())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The guest was stopped: for the switch-over, or by somebody who wants it to stand still, also at the destination.
    fn stop(&mut self, at: Option<SystemTime>) {
        // The news may have waited behind the answer to a question. QEMU runs on this host, by the same clock.
        let ago = at.and_then(|at| at.elapsed().ok()).unwrap_or_default().min(self.started.elapsed());
        let since = Instant::now() - ago;
        if self.vm.status().is_ok_and(|state| state.status == "paused") {
            self.runs = false;
            return;
        }
        self.stopped = Some((since, at));
        self.limit_outage(Some(OUTAGE_WHILE_PAUSED));
        self.control.update(|progress| progress.phase = Phase::Switchover);
    }

    /// How long the network may be lost from now on. On the direct route it may not, as long as QEMU migrates: see [`Route::Direct`](super::Route::Direct).
    fn limit_outage(&self, most: Option<Duration>) {
        if self.bridge.is_some() {
            self.connector.limit_outage(most);
        }
    }

    /// Tells QEMU when to stop the guest, which it cannot tell by itself behind a bridge.
    fn limit(&mut self, status: &MigrationStatus) -> Result<(), ManageError> {
        let Some(bridge) = self.bridge else { return Ok(()) };
        let epoch = status.ram.as_ref().map_or(0, |ram| ram.dirty_sync_count);
        let bytes = self.bridge_progress.progress().guest_bytes;
        let held_back = bridge.held_back();
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
        let answer = match self.vm.set_parameters(parameters) {
            // It may have ended meanwhile, which the event tells.
            Err(QmpError::Refused { .. }) => Ok(()),
            other => other,
        };
        self.in_time(answer).map(drop)
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
        let (guest_bytes, wire) = match self.bridge {
            Some(_) => {
                let bridge = self.bridge_progress.progress();
                (bridge.guest_bytes, bridge.wire_bytes)
            }
            None => (ram.transferred, ram.transferred),
        };
        let now = Instant::now();
        let rate = self.last.map(|(then, before)| {
            wire.saturating_sub(before) as f64 / now.duration_since(then).as_secs_f64()
        });
        self.last = Some((now, wire));
        let page = ram.page_size.max(1);
        let outage = self.connector.outage();
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
                guest_bytes,
                wire_bytes: wire,
                elapsed_ms: ms(self.started.elapsed()),
                wire_bytes_per_s: rate.unwrap_or(0.0),
                dirty_pages_per_s: ram.dirty_pages_rate as f64,
                // QEMU says the limit until it has an estimate, for which it needs this rate (`migration_update_counters`).
                estimated_downtime_ms: status
                    .expected_downtime_ms
                    .filter(|_| ram.dirty_pages_rate > 0)
                    .map(|ms| ms as f64),
                ..Progress::default()
            };
            progress.set_outage(outage);
        });
    }
}

#[cfg(test)]
mod tests;
