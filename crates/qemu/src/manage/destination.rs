//! The destination's part.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use pagewarp_engine::control::MigrationControl;
use pagewarp_engine::error::MigrationError;
use pagewarp_engine::metrics::ms;
use pagewarp_engine::report::Phase;
use pagewarp_engine::transport::Acceptor;
use tracing::{debug, warn};

use super::cpu::Meter;
use super::link::{Incoming, Outgoing, read};
use super::report::QemuReceiveReport;
use super::source::socket_path;
use super::takeover::take_over;
use super::{ManageConfig, ManageError};
use crate::bridge::destination::Greeted;
use crate::bridge::link::peer_error;
use crate::bridge::{DestinationBridge, Endpoint};
use crate::protocol::control::{DestinationSide, Message, Prepare};
use crate::protocol::frame::Kind;
use crate::protocol::hello::Purpose;
use crate::qmp::check::{self, Seen, Wish};
use crate::qmp::{QmpError, Vm};

/// How long a single wait for QEMU or the peer takes.
const LOOK: Duration = Duration::from_millis(20);

/// Waits for one VM from a `pagewarp qemu migrate` and runs it in the QEMU whose monitor is at `qmp`, which was started with `-incoming defer`.
///
/// On any error but [`ManageError::Unconfirmed`] the VM does not run here and never will: QEMU is ended, because it may hold a VM that runs
/// elsewhere.
pub fn receive(
    qmp: &Path,
    acceptor: &dyn Acceptor,
    config: &ManageConfig,
    control: &MigrationControl,
) -> Result<QemuReceiveReport, ManageError> {
    let mut vm = Vm::connect(qmp, config.timeout)?;
    // Now rather than when somebody is waiting.
    check::destination(&Seen::ask(&mut vm)?, &Wish::default())?;
    let (greeted, prepare) = await_source(acceptor, config, control, &mut vm)?;
    let started = Instant::now();
    let Greeted { stream, sending, receiving, hello } = greeted;
    let session = hello.session;
    let mut outgoing = Outgoing::new(sending);
    let (news, incoming) = Incoming::new();
    let (dir, path) = socket_path(config.socket_dir.as_deref(), "destination")?;
    let bridge = DestinationBridge::new(acceptor, Endpoint::Unix(path.clone()), config.bridge.clone());
    let bridge_control = MigrationControl::new();
    let mut committed = false;
    let result = std::thread::scope(|scope| {
        scope.spawn(move || read(receiving, &news));
        let (bridge, bridge_control) = (&bridge, &bridge_control);
        let result = (|| {
            let meter = Meter::start(&mut vm);
            if let Err(error) = ready(&mut vm, &prepare, &path) {
                let _ = outgoing.send(&Message::Failed { reason: error.to_string() });
                return Err(error);
            }
            let bridging = scope.spawn(move || bridge.run(Some(session), bridge_control));
            outgoing.send(&Message::Prepared)?;
            control.update(|progress| progress.phase = Phase::Precopy);
            let mut waiting = Waiting { vm: &mut vm, incoming: &incoming, control, bridge_control, started };
            let heard = waiting.run(|| bridging.is_finished());
            let run = match heard {
                Ok(run) => run,
                Err(error) => {
                    bridge_control.cancel();
                    // What ended the bridge is most often why QEMU failed.
                    let error = match bridging.join() {
                        Ok(Err(bridge))
                            if !matches!(bridge, MigrationError::Cancelled)
                                && matches!(error, ManageError::Qemu { .. }) =>
                        {
                            bridge.into()
                        }
                        _ => error,
                    };
                    let _ = outgoing.send(&Message::Failed { reason: error.to_string() });
                    return Err(error);
                }
            };
            control.update(|progress| progress.phase = Phase::Committed);
            committed = true;
            let running = match take_over(&mut vm, run) {
                Ok(running) => running,
                Err(error) => {
                    let reason = error.to_string();
                    let _ = outgoing.send(&Message::Failed { reason: reason.clone() });
                    return Err(ManageError::Unconfirmed { reason, qmp: qmp.display().to_string() });
                }
            };
            let total = started.elapsed();
            control.update(|progress| progress.phase = Phase::Done);
            // From here on nothing is a failure any more: the VM runs.
            let told = outgoing.send(&Message::Running(running));
            let bridge = match bridging.join() {
                Ok(Ok(report)) => Some(report),
                other => {
                    debug!(?other, "the bridge, after the VM was handed over");
                    None
                }
            };
            let qemu_cpu_ms = meter.as_ref().and_then(Meter::elapsed_ms);
            let qemu_version = vm.version().to_string();
            let side =
                DestinationSide { bridge: bridge.clone(), qemu_version: qemu_version.clone(), qemu_cpu_ms };
            if let Err(error) = told.and_then(|()| outgoing.send(&Message::Report(Box::new(side)))) {
                warn!(%error, "the VM runs here, and the source may not know");
            }
            Ok(QemuReceiveReport {
                name: prepare.name.unwrap_or(prepare.uuid),
                qemu_version,
                runs: run,
                total_ms: ms(total),
                qemu_cpu_ms,
                bridge,
            })
        })();
        bridge_control.cancel();
        let _ = stream.shutdown();
        result
    });
    drop(dir);
    if result.is_err() {
        control.update(|progress| progress.phase = Phase::Failed);
        if !committed {
            end(&mut vm);
        }
    }
    result
}

/// Ends a QEMU that must not run the VM: it may be complete.
fn end(vm: &mut Vm) {
    match vm.quit() {
        Ok(()) | Err(QmpError::Gone { .. }) => {}
        Err(error) => warn!(
            %error,
            "the destination QEMU could not be ended: end it by hand, and never let it `cont`, because the VM stays with the source"
        ),
    }
}

/// Waits for a source that says what it wants. One that does not, or is none, leaves this side waiting.
fn await_source(
    acceptor: &dyn Acceptor,
    config: &ManageConfig,
    control: &MigrationControl,
    vm: &mut Vm,
) -> Result<(Greeted, Prepare), ManageError> {
    loop {
        if control.is_cancelled() {
            return Err(MigrationError::Cancelled.into());
        }
        // A QEMU that is gone is of no use to anybody.
        vm.next_event(Duration::ZERO)?;
        let stream = match acceptor.accept(Duration::from_millis(100)) {
            Ok(stream) => stream,
            Err(e) if e.kind() == io::ErrorKind::TimedOut => continue,
            Err(error) => {
                return Err(ManageError::Host(format!(
                    "cannot accept connections at {}: {error}",
                    acceptor.local()
                )));
            }
        };
        match Greeted::read(stream).and_then(|greeted| prepared(greeted, config)) {
            Ok(Some(ready)) => return Ok(ready),
            Ok(None) => {}
            Err(error) => debug!(%error, "a connection that is none of a source"),
        }
    }
}

/// Agrees with a source and hears what it wants. `None`: it is a bridge, which was refused.
fn prepared(
    mut greeted: Greeted,
    config: &ManageConfig,
) -> Result<Option<(Greeted, Prepare)>, MigrationError> {
    if greeted.hello.purpose != Purpose::Control {
        greeted.refuse("this destination waits for `pagewarp qemu migrate`, not for a bridge");
        return Ok(None);
    }
    let terms = config.bridge.terms().agree(greeted.hello.terms);
    greeted.accept(terms, config.bridge.peer_timeout)?;
    let link = |source: io::Error| MigrationError::Link {
        peer: "a source".into(),
        doing: "waiting for what it wants".into(),
        source,
    };
    greeted.stream.set_timeouts(Some(config.timeout), None).map_err(link)?;
    let mut body = Vec::new();
    let header = greeted.receiving.receive(&mut body)?;
    greeted.stream.set_timeouts(None, None).map_err(link)?;
    match header.map(|header| (header.kind, Message::decode(&body))) {
        Some((Kind::Control, Ok(Message::Prepare(prepare)))) => Ok(Some((greeted, prepare))),
        Some((Kind::Control, Err(error))) => Err(peer_error(error)),
        Some((kind, message)) => {
            Err(MigrationError::Peer(format!("{kind:?} {message:?} where `prepare` was expected")))
        }
        None => Err(link(io::ErrorKind::UnexpectedEof.into())),
    }
}

/// Tells QEMU to listen, and not to run the VM by itself.
fn ready(vm: &mut Vm, prepare: &Prepare, path: &Path) -> Result<(), ManageError> {
    let wish = Wish { multifd: prepare.multifd, run: prepare.was_running, ..Wish::default() };
    let plan = check::destination(&Seen::ask(vm)?, &wish)?;
    plan.apply(vm)?;
    // While a migration is awaited this only means that the VM is not started once it is loaded (`qmp_stop` in QEMU's monitor/qmp-cmds.c).
    vm.stop()?;
    vm.migrate_incoming(&format!("unix:{}", path.display()))?;
    Ok(())
}

/// Waits for the commit.
struct Waiting<'a> {
    vm: &'a mut Vm,
    incoming: &'a Incoming,
    control: &'a MigrationControl,
    bridge_control: &'a MigrationControl,
    started: Instant,
}

impl Waiting<'_> {
    /// Returns whether the VM is to run.
    fn run(&mut self, bridge_has_ended: impl Fn() -> bool) -> Result<bool, ManageError> {
        let mut bridge_gone: Option<Instant> = None;
        loop {
            match self.incoming.next(LOOK) {
                Some(Ok(Message::Commit { run })) => return Ok(run),
                Some(Ok(Message::Cancel { reason })) => {
                    return Err(MigrationError::PeerReports(format!("the source gave up: {reason}")).into());
                }
                Some(Ok(message)) => {
                    return Err(MigrationError::Peer(format!("{message:?} before the commit")).into());
                }
                Some(Err(error)) => return Err(error.into()),
                None => {}
            }
            if self.control.is_cancelled() {
                return Err(MigrationError::Cancelled.into());
            }
            let event = self.vm.next_event(Duration::ZERO)?;
            if event.as_ref().and_then(|event| event.migration_status()) == Some("failed") {
                let reason = self.vm.migration().ok().and_then(|status| status.error_desc);
                let reason = reason.unwrap_or_else(|| "it could not load what the source sent".into());
                return Err(ManageError::Qemu { side: "the destination", reason });
            }
            if bridge_has_ended() {
                // The commit comes shortly after the end of a migration that went well.
                let since = *bridge_gone.get_or_insert_with(Instant::now);
                if since.elapsed() > Duration::from_secs(5) {
                    let reason = "its connections ended before the source committed".into();
                    return Err(ManageError::Qemu { side: "the destination", reason });
                }
            }
            let bridge = self.bridge_control.progress();
            self.control.update(|progress| {
                (progress.guest_bytes, progress.wire_bytes) = (bridge.guest_bytes, bridge.wire_bytes);
                progress.elapsed_ms = ms(self.started.elapsed());
            });
        }
    }
}
