//! The source's part.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use pagewarp_engine::control::MigrationControl;
use pagewarp_engine::error::MigrationError;
use pagewarp_engine::metrics::ms;
use pagewarp_engine::report::Phase;
use pagewarp_engine::transport::{Connector, OneDestination, random_session};
use tempfile::TempDir;
use tracing::{debug, info, warn};

use super::blame::{Side, Signs};
use super::cpu::Meter;
use super::follow::{Driver, parameters_to_restore};
use super::handover::{commit, keep_running};
use super::link::{Incoming, Outgoing, end_bridge, read};
use super::process::Process;
use super::report::{QemuReport, name_of};
use super::route::{Deciding, bound_to_bridge, give_to_source};
use super::states::{Heard, SourceState};
use super::switchover::Switchover;
use super::{ManageConfig, ManageError};
use crate::bridge::source::link::connect;
use crate::bridge::{BridgeConfig, Endpoint, Guest, SourceBridge, SourceBridgeReport};
use crate::protocol::control::{DestinationSide, Message, Prepare, Route, Running};
use crate::protocol::hello::{Hello, Purpose, Terms};
use crate::qmp::check::{self, Seen};
use crate::qmp::{QmpError, Vm};

/// How long a single wait for QEMU or the peer takes.
const LOOK: Duration = Duration::from_millis(20);
/// The same, while the VM waits.
const VERIFY_LOOK: Duration = Duration::from_millis(1);
/// How long the bridge may take to end once the migration has.
const BRIDGE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a better reason for a failure is waited for. The destination waits for longer, so that not both wait for each other.
const WORD_TIMEOUT: Duration = Duration::from_secs(2);
/// The same on the direct route, where either QEMU ends when the other one does.
const DIRECT_WORD_TIMEOUT: Duration = Duration::from_secs(4);
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
    let mut vm = Vm::connect(qmp, config.timeout)?;
    // To wait for another client of the monitor to leave is no part of the migration.
    let started = Instant::now();
    let seen = Seen::ask(&mut vm)?;
    let mut runs = seen.run.running;
    let plan = check::source(&seen, &config.wish)?;
    let before = parameters_to_restore(&seen.parameters, &plan.parameters);
    let uuid = vm.uuid()?;
    let name = vm.name()?;
    let process = Process::of(&mut vm);
    let bridge = config.bridge_for(&mut vm, Guest::Here)?;
    let verify = bridge.verify;
    let session = random_session()?;
    let bound = bound_to_bridge(config, connector, &mut vm)?;
    let terms = Terms { direct: bound.is_none(), ..bridge.offer() };
    let hello = Hello { session, purpose: Purpose::Control, terms };
    let destination = OneDestination::default();
    connector.renew();
    let (link, terms, _) = connect(connector, &hello, &destination, bridge.peer_timeout)?;
    // A QEMU that cannot be seen is taken to use all of its memory.
    let used = process.as_ref().and_then(Process::resident_bytes);
    let used = used.map_or_else(|| vm.memory_bytes(), Ok)?;
    let deciding = Deciding { config, connector, destination: &destination, session, terms, used, control };
    let route = deciding.decide(bound)?;
    let mut outgoing = Outgoing::new(link.sending);
    let (news, incoming) = Incoming::new();
    let stream = link.stream;
    let receiving = link.receiving;
    let prepare = Prepare {
        name: name.clone(),
        uuid: uuid.clone(),
        qemu_version: seen.version.to_string(),
        multifd: config.wish.multifd,
        was_running: runs,
        route: route.route,
    };
    let (dir, path) = socket_path(config.socket_dir.as_deref(), "source")?;
    let peer_timeout = bridge.peer_timeout;
    let direct = Hello { session, purpose: Purpose::Direct, terms: bridge.offer() };
    let bridge = match route.route {
        Route::Direct => None,
        Route::Bridge => Some(bind(&path, connector, bridge)?),
    };
    let bridge_control = MigrationControl::new();
    let mut state = SourceState::new(verify);
    let result = std::thread::scope(|scope| {
        scope.spawn(move || read(receiving, "`pagewarp qemu receive`", &news));
        let (bridge, destination) = (bridge.as_ref(), &destination);
        let bridge_control = &bridge_control;
        let result = (|| {
            let prepare = Message::Prepare(prepare);
            state.on_send(&prepare)?;
            outgoing.send(&prepare)?;
            await_prepared(&mut state, &incoming, config.timeout, control)?;
            let meter = process.as_ref().and_then(Meter::start);
            plan.apply(&mut vm)?;
            let bridging = bridge
                .map(|bridge| scope.spawn(move || bridge.run_towards(session, destination, bridge_control)));
            let given = match bridge {
                Some(_) => {
                    vm.migrate(&format!("unix:{}", path.display()))?;
                    None
                }
                None => {
                    connector.limit_outage(Some(Duration::ZERO));
                    let go_on = || !control.is_cancelled();
                    let given =
                        give_to_source(&mut vm, connector, &direct, destination, peer_timeout, &go_on);
                    Some(given.map_err(|error| not_given(error, &incoming, control))?)
                }
            };
            let mut driver = Driver {
                vm: &mut vm,
                incoming: &incoming,
                control,
                connector,
                bridge,
                bridge_progress: bridge_control,
                started,
                stopped: None,
                last: None,
                memory_bytes: 0,
                switchover: Switchover::new(config.wish.downtime_ms),
                told: 0,
                runs,
                signs: Signs::new(Side::Source),
                silent: None,
                patience: config.timeout * 2,
            };
            let followed = driver.run();
            let Driver { stopped, mut memory_bytes, mut signs, .. } = driver;
            runs = driver.runs;
            if followed.is_err() || signs.any() {
                if let Some(given) = &given {
                    given.cut();
                }
                bridge_control.cancel();
                let ended = bridging.map(|bridging| end_bridge(bridging, bridge_control, BRIDGE_TIMEOUT));
                signs.bridge = ended.and_then(Result::err);
                followed?;
                let patience = if bridge.is_some() { WORD_TIMEOUT } else { DIRECT_WORD_TIMEOUT };
                signs.wait(&incoming, patience);
                return Err(signs.cause());
            }
            state.on_completed();
            let verifying = verify.then(Instant::now);
            let mut bridging = bridging;
            if let Some(bridge) = bridge.filter(|_| verify) {
                let has_ended = || bridging.as_ref().is_none_or(|bridging| bridging.is_finished());
                if let Err(error) = await_verified(bridge, has_ended, &incoming, control, config.timeout) {
                    bridge_control.cancel();
                    let ended = bridging.take();
                    let ended = ended.map(|bridging| end_bridge(bridging, bridge_control, BRIDGE_TIMEOUT));
                    // It knows best what is wrong.
                    return Err(match ended {
                        Some(Err(differs @ MigrationError::Differs(_))) => differs.into(),
                        _ => error,
                    });
                }
                state.on_verified();
            }
            let verify_ms = verifying.map(|since| ms(since.elapsed()));
            control.update(|progress| progress.phase = Phase::Committed);
            // From here on to know is better than to be in doubt.
            connector.limit_outage(None);
            let running = commit(&mut state, &mut outgoing, &incoming, runs, qmp, control, config.timeout)?;
            let (downtime, total) = (stopped.map(|(at, _)| at.elapsed()), started.elapsed());
            let mut verified = verify.then_some(true);
            let bridge = bridging.map(|bridging| {
                end_bridge(bridging, bridge_control, BRIDGE_TIMEOUT).unwrap_or_else(|error| {
                    if matches!(error, MigrationError::Differs(_)) {
                        warn!(%error, "in what QEMU had no need of, the streams differ");
                        verified = Some(false);
                    }
                    debug!(%error, "the bridge, after the VM was handed over");
                    SourceBridgeReport::default()
                })
            });
            let destination = destination_side(&incoming);
            let status = vm.ended_migration(config.timeout).unwrap_or_default();
            let ram = status.ram.clone().unwrap_or_default();
            memory_bytes = memory_bytes.max(ram.total);
            let report = QemuReport {
                name: name_of(name.clone(), uuid.clone()),
                qemu_version: seen.version.to_string(),
                runs,
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
                verified,
                verify_ms,
                route: route.clone(),
                bridge,
                destination,
            };
            control.update(|progress| progress.phase = Phase::Done);
            Ok(report)
        })();
        if let Err(error) = &result {
            state.give_up();
            let cancel = Message::Cancel { reason: error.to_string() };
            // A destination that is gone needs no telling, and after the commit there is none.
            let _ = state.on_send(&cancel).and_then(|()| outgoing.send(&cancel));
        }
        // Ends the threads that still wait.
        bridge_control.cancel();
        let _ = stream.shutdown();
        result
    });
    drop(dir);
    let result = result.map_err(|error| keep_running(&mut vm, state.duty(), runs, qmp, error));
    if let Err(error) = vm.set_parameters(before)
        && !matches!(error, QmpError::Gone { .. })
    {
        warn!(%error, "the migration parameters of the source QEMU are not what they were: look at `query-migrate-parameters`");
    }
    if result.is_err() {
        control.update(|progress| progress.phase = Phase::Failed);
    } else if config.quit_source
        && let Err(error) = vm.quit()
    {
        // The VM runs on the destination: this must not look like a failed migration, after which the source would go on.
        warn!(%error, "the source QEMU could not be ended: end it by hand, and never let it `cont`");
    }
    result
}

/// Why the source QEMU has no connection: the destination may have said so.
fn not_given(error: ManageError, incoming: &Incoming, control: &MigrationControl) -> ManageError {
    let ManageError::Migration(error) = error else { return error };
    let mut signs = Signs::new(Side::Source);
    signs.cancelled = control.is_cancelled();
    signs.bridge = Some(error);
    signs.wait(incoming, DIRECT_WORD_TIMEOUT);
    signs.cause()
}

/// Makes the socket that the source QEMU connects to.
fn bind<'a>(
    path: &Path,
    connector: &'a dyn Connector,
    bridge: BridgeConfig,
) -> Result<SourceBridge<'a>, ManageError> {
    SourceBridge::bind(Endpoint::Unix(path.to_owned()), connector, bridge).map_err(|error| {
        ManageError::Host(format!(
            "cannot make the socket {}: {error}; name a directory that QEMU and pagewarp can write to with --socket-dir",
            path.display()
        ))
    })
}

fn await_prepared(
    state: &mut SourceState,
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
            Some(Ok(message)) => match (state.on_receive(&message), message) {
                (Heard::Due, _) => return Ok(()),
                (Heard::GaveUp, Message::Failed { reason }) => {
                    return Err(MigrationError::Refused(reason).into());
                }
                (_, message) => {
                    let what = format!("{message:?} where `prepared` was expected");
                    return Err(MigrationError::Peer(what).into());
                }
            },
            Some(Err(error)) => return Err(error.into()),
            None if Instant::now() >= until => {
                return Err(MigrationError::Peer(format!("no answer to `prepare` in {timeout:?}")).into());
            }
            None => {}
        }
    }
}

/// Waits until what was written into the destination QEMU is known to be what was read from this one, which is mostly so already: only the last news may be
/// under way.
fn await_verified(
    bridge: &SourceBridge<'_>,
    has_ended: impl Fn() -> bool,
    incoming: &Incoming,
    control: &MigrationControl,
    timeout: Duration,
) -> Result<(), ManageError> {
    let until = Instant::now() + timeout;
    loop {
        // Asked first: a bridge that has ended says no more.
        let has_ended = has_ended();
        if bridge.is_verified() {
            return Ok(());
        }
        if has_ended || Instant::now() >= until {
            let why = "the destination has not said that it has written all pages, as they were read";
            return Err(MigrationError::Peer(why.into()).into());
        }
        if control.is_cancelled() {
            return Err(MigrationError::Cancelled.into());
        }
        match incoming.next(VERIFY_LOOK) {
            None => {}
            Some(Ok(Message::Failed { reason })) => return Err(MigrationError::PeerReports(reason).into()),
            Some(Ok(message)) => {
                return Err(MigrationError::Peer(format!("{message:?} before the commit")).into());
            }
            Some(Err(error)) => return Err(error.into()),
        }
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
