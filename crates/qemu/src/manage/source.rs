//! The source's part.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use pagewarp_engine::control::MigrationControl;
use pagewarp_engine::error::MigrationError;
use pagewarp_engine::metrics::ms;
use pagewarp_engine::report::{Phase, Progress};
use pagewarp_engine::transport::{Connector, random_session};
use tempfile::TempDir;
use tracing::{debug, info, warn};

use super::cpu::Meter;
use super::handover::{commit, keep_running};
use super::link::{Incoming, Outgoing, read};
use super::report::QemuReport;
use super::switchover::Switchover;
use super::{ManageConfig, ManageError};
use crate::bridge::source::connect;
use crate::bridge::{Endpoint, SourceBridge, SourceBridgeReport};
use crate::protocol::control::{DestinationSide, Message, Prepare, Running};
use crate::protocol::hello::{Hello, Purpose};
use crate::qmp::check::{self, Seen};
use crate::qmp::{MigrationStatus, QmpError, Version, Vm};

/// How often QEMU is asked how it is doing.
const POLL: Duration = Duration::from_millis(100);
/// How long a single wait for QEMU or the peer takes.
const LOOK: Duration = Duration::from_millis(20);
/// Since this version QEMU can be told the rate at which the rest will go.
const SWITCHOVER_BANDWIDTH: Version = Version::new(8, 2);
/// How long QEMU may take to end a migration whose connections are gone, or that was cancelled.
const END_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the destination's account is waited for.
const REPORT_TIMEOUT: Duration = Duration::from_secs(10);

/// Migrates the VM of the QEMU whose monitor is at `qmp` to the `pagewarp qemu receive` that `connector` reaches.
///
/// On any error the VM runs on the source as before, but for [`ManageError::InDoubt`] and [`ManageError::StillPaused`], which say what to do.
pub fn migrate(
    qmp: &Path,
    connector: &dyn Connector,
    config: &ManageConfig,
    control: &MigrationControl,
) -> Result<QemuReport, ManageError> {
    let started = Instant::now();
    let mut vm = Vm::connect(qmp, config.timeout)?;
    let seen = Seen::ask(&mut vm)?;
    let was_running = seen.run.running;
    let plan = check::source(&seen, &config.wish)?;
    let uuid = vm.uuid()?;
    let name = vm.name()?;
    let session = random_session()?;
    let hello = Hello { session, purpose: Purpose::Control, terms: config.bridge.terms() };
    let (link, ..) = connect(connector, &hello, config.bridge.peer_timeout)?;
    let mut outgoing = Outgoing::new(link.sending);
    let (news, incoming) = Incoming::new();
    let stream = link.stream;
    let receiving = link.receiving;
    let prepare = Prepare {
        name: name.clone(),
        uuid: uuid.clone(),
        qemu_version: seen.version.to_string(),
        multifd: config.wish.multifd,
    };
    let (dir, path) = socket_path(config.socket_dir.as_deref(), "source")?;
    let bridge = SourceBridge::bind(Endpoint::Unix(path.clone()), connector, config.bridge.clone()).map_err(|error| {
        ManageError::Host(format!(
            "cannot make the socket {}: {error}; name a directory that QEMU and pagewarp can write to with --socket-dir",
            path.display()
        ))
    })?;
    let bridge_control = MigrationControl::new();
    let result = std::thread::scope(|scope| {
        scope.spawn(move || read(receiving, &news));
        let bridge = &bridge;
        let bridge_control = &bridge_control;
        let result = (|| {
            outgoing.send(&Message::Prepare(prepare))?;
            await_prepared(&incoming, config.timeout, control)?;
            let meter = Meter::start(&mut vm);
            plan.apply(&mut vm)?;
            let bridging = scope.spawn(move || bridge.run(session, bridge_control));
            vm.migrate(&format!("unix:{}", path.display()))?;
            let mut driver = Driver {
                vm: &mut vm,
                incoming: &incoming,
                control,
                bridge_progress: bridge_control,
                started,
                stopped: None,
                last: None,
                memory_bytes: 0,
                switchover: Switchover::new(config.wish.downtime_ms),
                told: None,
            };
            let ended = driver.run();
            let (stopped, mut memory_bytes) = (driver.stopped, driver.memory_bytes);
            if ended.is_err() {
                bridge_control.cancel();
            }
            if let Err(error) = ended {
                // The next migration may be somebody else's.
                let limit = serde_json::Map::from_iter([(
                    "downtime-limit".to_owned(),
                    config.wish.downtime_ms.into(),
                )]);
                let _ = vm.set_parameters(limit);
                let _ = outgoing.send(&Message::Cancel { reason: error.to_string() });
                return Err(match (bridging.join(), error) {
                    // What ended the bridge is most often why QEMU failed.
                    (Ok(Err(bridge)), ManageError::Qemu { .. })
                        if !matches!(bridge, MigrationError::Cancelled) =>
                    {
                        bridge.into()
                    }
                    (_, error) => error,
                });
            }
            control.update(|progress| progress.phase = Phase::Committed);
            let running = commit(&mut outgoing, &incoming, qmp, control, config.timeout)?;
            let (downtime, total) = (stopped.map(|(at, _)| at.elapsed()), started.elapsed());
            let bridge = match bridging.join() {
                Ok(Ok(report)) => report,
                Ok(Err(error)) => {
                    debug!(%error, "the bridge, after the VM was handed over");
                    SourceBridgeReport::default()
                }
                Err(_) => SourceBridgeReport::default(),
            };
            let destination = destination_side(&incoming);
            let status = vm.ended_migration(config.timeout).unwrap_or_default();
            let ram = status.ram.clone().unwrap_or_default();
            memory_bytes = memory_bytes.max(ram.total);
            let report = QemuReport {
                name: name.clone().unwrap_or_else(|| uuid.clone()),
                qemu_version: seen.version.to_string(),
                multifd_channels: config.wish.multifd.map_or(0, Into::into),
                total_ms: ms(total),
                downtime_ms: downtime.map_or(0.0, ms),
                stop_to_resume_ms: stop_to_resume(stopped.and_then(|(_, at)| at), running),
                downtime_limit_ms: config.wish.downtime_ms as f64,
                qemu_downtime_ms: status.downtime_ms,
                qemu_total_ms: status.total_ms,
                qemu_transferred_bytes: ram.transferred,
                qemu_zero_pages: ram.duplicate,
                qemu_normal_pages: ram.normal,
                epochs: ram.dirty_sync_count,
                memory_bytes,
                qemu_cpu_ms: meter.as_ref().and_then(Meter::elapsed_ms),
                bridge,
                destination,
            };
            control.update(|progress| progress.phase = Phase::Done);
            if config.quit_source
                && let Err(error) = vm.quit()
            {
                // The VM runs on the destination: this must not look like a failed migration, after which the source would go on.
                warn!(%error, "the source QEMU could not be ended: end it by hand, and never let it `cont`");
            }
            Ok(report)
        })();
        // Ends the threads that still wait.
        bridge_control.cancel();
        let _ = stream.shutdown();
        result
    });
    drop(dir);
    let result = result.map_err(|error| keep_running(&mut vm, was_running, qmp, error));
    if result.is_err() {
        control.update(|progress| progress.phase = Phase::Failed);
    }
    result
}

fn await_prepared(
    incoming: &Incoming,
    timeout: Duration,
    control: &MigrationControl,
) -> Result<(), ManageError> {
    let until = Instant::now() + timeout;
    loop {
        if control.is_cancelled() {
            return Err(MigrationError::Cancelled.into());
        }
        match incoming.next(LOOK) {
            Some(Ok(Message::Prepared)) => return Ok(()),
            Some(Ok(Message::Failed { reason })) => return Err(MigrationError::Refused(reason).into()),
            Some(Ok(message)) => {
                return Err(MigrationError::Peer(format!("{message:?} where `prepared` was expected")).into());
            }
            Some(Err(error)) => return Err(error.into()),
            None if Instant::now() >= until => {
                return Err(MigrationError::Peer(format!("no answer to `prepare` in {timeout:?}")).into());
            }
            None => {}
        }
    }
}

/// Follows the source QEMU.
struct Driver<'a> {
    vm: &'a mut Vm,
    incoming: &'a Incoming,
    control: &'a MigrationControl,
    bridge_progress: &'a MigrationControl,
    started: Instant,
    /// When the guest was stopped, by our clock and as QEMU says.
    stopped: Option<(Instant, Option<SystemTime>)>,
    /// What was known when the rates were computed last: when, and the wire bytes.
    last: Option<(Instant, u64)>,
    memory_bytes: u64,
    switchover: Switchover,
    /// What QEMU was told last.
    told: Option<u64>,
}

impl Driver<'_> {
    /// Waits until the source QEMU has completed the migration.
    fn run(&mut self) -> Result<(), ManageError> {
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
                    self.stopped = Some((Instant::now(), event.at));
                    self.control.update(|progress| progress.phase = Phase::Switchover);
                } else if event.name == "RESUME" {
                    self.stopped = None;
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

    /// Tells QEMU when to stop the guest.
    fn limit(&mut self, status: &MigrationStatus) -> Result<(), ManageError> {
        let epoch = status.ram.as_ref().map_or(0, |ram| ram.dirty_sync_count);
        self.switchover.observe(Instant::now(), epoch, self.bridge_progress.progress().guest_bytes);
        let (key, value, told) = if self.vm.version() >= SWITCHOVER_BANDWIDTH {
            let Some(rate) = self.switchover.sustained() else { return Ok(()) };
            ("avail-switchover-bandwidth", rate as u64, &mut self.told)
        } else {
            ("downtime-limit", self.switchover.limit_ms(), &mut self.told)
        };
        // Small changes are not worth a command.
        if told.is_some_and(|told| value.abs_diff(told) * 20 < told) {
            return Ok(());
        }
        *told = Some(value);
        let parameters = serde_json::Map::from_iter([(key.to_owned(), value.into())]);
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

fn destination_side(incoming: &Incoming) -> Option<DestinationSide> {
    match incoming.next(REPORT_TIMEOUT) {
        Some(Ok(Message::Report(report))) => Some(*report),
        other => {
            info!(?other, "the destination's account did not arrive");
            None
        }
    }
}

fn stop_to_resume(stopped: Option<SystemTime>, running: Running) -> Option<f64> {
    let resumed = SystemTime::UNIX_EPOCH.checked_add(Duration::from_micros(running.resumed_at_us?))?;
    // Clocks that do not agree may have it the other way round.
    resumed.duration_since(stopped?).ok().map(ms)
}

/// The socket between QEMU and the bridge, in a directory of its own unless one is named.
pub(super) fn socket_path(dir: Option<&Path>, side: &str) -> Result<(Option<TempDir>, PathBuf), ManageError> {
    let name = format!("pagewarp-{side}-{}.sock", std::process::id());
    match dir {
        Some(dir) => Ok((None, dir.join(name))),
        None => {
            let dir = TempDir::with_prefix("pagewarp-").map_err(|error| {
                ManageError::Host(format!(
                    "cannot make a temporary directory: {error}; name one with --socket-dir"
                ))
            })?;
            let path = dir.path().join(name);
            Ok((Some(dir), path))
        }
    }
}
