//! The destination's part.

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use pagewarp_engine::control::MigrationControl;
use pagewarp_engine::error::MigrationError;
use pagewarp_engine::greeter::{Greeter, HELLO_TIMEOUT};
use pagewarp_engine::metrics::ms;
use pagewarp_engine::report::Phase;
use pagewarp_engine::seldom::Seldom;
use pagewarp_engine::transport::{Acceptor, OUTAGE_OF_LAST_WORD};
use tracing::{debug, warn};

use super::blame::{Side, Signs};
use super::cpu::Meter;
use super::link::{Incoming, Outgoing, end_bridge, read};
use super::process::Process;
use super::report::{QemuReceiveReport, name_of};
use super::route::{Receiving, answer};
use super::source::socket_path;
use super::states::{DestinationDuty, DestinationState, Heard};
use super::takeover::take_over;
use super::{ManageConfig, ManageError};
use crate::bridge::destination::{Awaited, Greeted};
use crate::bridge::link::peer_error;
use crate::bridge::{BridgeConfig, DestinationBridge, DestinationBridgeReport, Endpoint, Guest};
use crate::protocol::control::{DestinationSide, Message, Prepare, Route};
use crate::protocol::frame::Kind;
use crate::protocol::hello::{Purpose, Terms};
use crate::qmp::check::{self, Seen, Wish};
use crate::qmp::{QmpError, QmpEvent, Vm};

/// How long a single wait for the peer takes.
const LOOK: Duration = Duration::from_millis(20);
/// What is known of a QEMU that closes its monitor.
const ENDED: &str = "it ended or was killed; look at its exit status and its standard error";
/// How long a better reason for a failure is waited for. The source waits for less, so that not both wait for each other.
const WORD_TIMEOUT: Duration = Duration::from_secs(5);
/// The same on the direct route, where it is the other way round: the destination QEMU ends when it is killed, and when the source gives up, which it says soon.
const DIRECT_WORD_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the bridge may take to end once the migration has.
const BRIDGE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a QEMU that is told to end may take to do so.
const QUIT_TIMEOUT: Duration = Duration::from_secs(5);

/// A QEMU that was started with `-incoming defer`, and can take a VM.
pub struct Receiver {
    vm: Vm,
    qmp: PathBuf,
    process: Option<Process>,
    bridge: BridgeConfig,
    config: ManageConfig,
    /// What this side can do.
    terms: Terms,
}

impl Receiver {
    /// Connects to the monitor at `qmp` and sees whether this QEMU can take a VM: now rather than when somebody is waiting.
    pub fn connect(qmp: &Path, config: ManageConfig) -> Result<Receiver, ManageError> {
        let mut vm = Vm::connect(qmp, config.timeout)?;
        check::destination(&Seen::ask(&mut vm)?, &Wish::default())?;
        // While it still answers.
        let process = Process::of(&mut vm);
        let bridge = config.bridge_for(&mut vm, Guest::Coming)?;
        let terms = Terms { direct: vm.takes_sockets()?, ..bridge.terms() };
        Ok(Receiver { vm, qmp: qmp.to_owned(), process, bridge, config, terms })
    }
}

/// Waits for one VM from a `pagewarp qemu migrate`, and runs it.
///
/// On any error but [`ManageError::Unconfirmed`] the VM does not run here and never will: once a source has come, QEMU is ended, because it may hold
/// a VM that runs elsewhere.
pub fn receive(
    receiver: Receiver,
    acceptor: &dyn Acceptor,
    control: &MigrationControl,
) -> Result<QemuReceiveReport, ManageError> {
    let Receiver { mut vm, qmp, process, bridge, config, terms } = receiver;
    acceptor.limit_outage(None);
    // Before anybody waits for an answer.
    let (dir, path) = socket_path(config.socket_dir.as_deref(), "destination")?;
    let (greeted, prepare) = await_source(acceptor, terms, &config, control, &mut vm)?;
    let started = Instant::now();
    let Greeted { stream, sending, receiving, hello } = greeted;
    let route = prepare.route;
    let awaited = Awaited { session: hello.session, identity: stream.peer_identity() };
    let awaited = &awaited;
    let mut outgoing = Outgoing::new(sending);
    let (news, incoming) = Incoming::new();
    let bridge = DestinationBridge::new(acceptor, Endpoint::Unix(path.clone()), bridge);
    let bridge_control = MigrationControl::new();
    let mut state = DestinationState::new();
    let result = std::thread::scope(|scope| {
        scope.spawn(move || read(receiving, "`pagewarp qemu migrate`", &news));
        let (bridge, bridge_control) = (&bridge, &bridge_control);
        let result = (|| {
            let meter = process.as_ref().and_then(Meter::start);
            if let Err(error) = ready(&mut vm, &prepare, &path) {
                say_failed(&mut state, &mut outgoing, &error);
                return Err(error);
            }
            let (bridging, direct) = match route {
                Route::Bridge => (Some(scope.spawn(move || bridge.run(Some(awaited), bridge_control))), None),
                Route::Direct => (None, Some(Receiving::new(acceptor, awaited, terms))),
            };
            state.on_send(&Message::Prepared)?;
            outgoing.send(&Message::Prepared)?;
            control.update(|progress| progress.phase = Phase::Precopy);
            let mut waiting = Waiting {
                vm: &mut vm,
                state: &mut state,
                incoming: &incoming,
                control,
                bridge_control,
                started,
                bridging,
                bridged: None,
                direct,
                delivered: None,
                monitor: None,
                signs: Signs::new(Side::Destination),
            };
            let Some(run) = waiting.run(config.timeout) else {
                let Waiting { bridging, direct, mut signs, monitor, .. } = waiting;
                if let Some(direct) = direct {
                    direct.end();
                }
                if signs.cancelled {
                    // Nobody waits for a lost network to say so.
                    acceptor.limit_outage(Some(OUTAGE_OF_LAST_WORD));
                }
                if let Some(bridging) = bridging {
                    bridge_control.cancel();
                    signs.bridge = end_bridge(bridging, bridge_control, BRIDGE_TIMEOUT).err();
                }
                let error = monitor.unwrap_or_else(|| signs.cause());
                say_failed(&mut state, &mut outgoing, &error);
                return Err(error);
            };
            let Waiting { bridging, bridged, .. } = waiting;
            // From here on a word is worth waiting for.
            acceptor.limit_outage(None);
            control.update(|progress| progress.phase = Phase::Committed);
            let taken = take_over(&mut vm, run);
            state.on_taken_over(taken.is_ok());
            let running = match taken {
                Ok(running) => running,
                Err(error) => {
                    say_failed(&mut state, &mut outgoing, &error);
                    let reason = error.to_string();
                    return Err(ManageError::Unconfirmed { reason, qmp: qmp.display().to_string() });
                }
            };
            let total = started.elapsed();
            control.update(|progress| progress.phase = Phase::Done);
            // From here on nothing is a failure any more: the VM runs.
            let running = Message::Running(running);
            let told = state.on_send(&running).and_then(|()| outgoing.send(&running));
            let bridge = match bridging {
                Some(bridging) => end_bridge(bridging, bridge_control, BRIDGE_TIMEOUT)
                    .inspect_err(|error| debug!(%error, "the bridge, after the VM was handed over"))
                    .ok(),
                None => bridged,
            };
            let qemu_cpu_ms = meter.as_ref().and_then(Meter::elapsed_ms);
            let qemu_version = vm.version().to_string();
            let side =
                DestinationSide { bridge: bridge.clone(), qemu_version: qemu_version.clone(), qemu_cpu_ms };
            let account = Message::Report(Box::new(side));
            if let Err(error) =
                told.and_then(|()| state.on_send(&account)).and_then(|()| outgoing.send(&account))
            {
                warn!(%error, "the VM runs here, and the source may not know");
            }
            await_farewell(&incoming, acceptor.patience(), control);
            Ok(QemuReceiveReport {
                name: name_of(prepare.name, prepare.uuid),
                qemu_version,
                runs: run,
                total_ms: ms(total),
                qemu_cpu_ms,
                route,
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
        if state.give_up() == DestinationDuty::End {
            end(&mut vm, process.as_ref());
        }
    }
    result
}

/// Waits until the source, which has been told everything, ends the control connection. If that is broken just now, it goes on only while somebody is here.
fn await_farewell(incoming: &Incoming, patience: Duration, control: &MigrationControl) {
    let until = Instant::now() + patience;
    while Instant::now() < until && !control.is_cancelled() {
        if let Some(Err(_)) = incoming.next(LOOK) {
            return;
        }
    }
}

/// Tells a source that may be gone why this side ends.
fn say_failed(state: &mut DestinationState, outgoing: &mut Outgoing, error: &impl Display) {
    let failed = Message::Failed { reason: error.to_string() };
    let _ = state.on_send(&failed).and_then(|()| outgoing.send(&failed));
}

/// Ends a QEMU that must not run the VM: it may be complete. One that hangs is killed, as QEMU 7.2 does where its multifd connections end at the wrong
/// moment (`multifd_recv_sync_main`).
fn end(vm: &mut Vm, process: Option<&Process>) {
    let error = match quit(vm) {
        Ok(()) => {
            warn!(
                "the destination QEMU was ended, because it may hold parts of a VM that stays with the source: start another one for the next try"
            );
            return;
        }
        Err(QmpError::Gone { .. }) => {
            warn!("the destination QEMU has ended by itself: start another one for the next try");
            return;
        }
        Err(error) => error,
    };
    let killed = process.filter(|process| process.kill().is_ok());
    if let Some(process) = killed {
        warn!(%error, pid = process.pid(), "the destination QEMU did not end when it was told to, and was killed");
    } else {
        warn!(
            %error,
            "the destination QEMU could not be ended: end it by hand, and never let it `cont`, because the VM stays with the source"
        );
    }
}

/// Tells QEMU to end, and waits until it has.
fn quit(vm: &mut Vm) -> Result<(), QmpError> {
    vm.qmp().set_timeout(QUIT_TIMEOUT);
    vm.quit()?;
    let until = Instant::now() + QUIT_TIMEOUT;
    loop {
        match vm.next_event(until.saturating_duration_since(Instant::now())) {
            Err(QmpError::Gone { .. }) => return Ok(()),
            Err(error) => return Err(error),
            Ok(Some(_)) => {}
            Ok(None) => return Err(QmpError::TimedOut { command: "quit".into(), waited: QUIT_TIMEOUT }),
        }
    }
}

/// Waits for a source that says what it wants. One that does not, or is none, leaves this side waiting.
fn await_source(
    acceptor: &dyn Acceptor,
    terms: Terms,
    config: &ManageConfig,
    control: &MigrationControl,
    vm: &mut Vm,
) -> Result<(Greeted, Prepare), ManageError> {
    let (timeout, allowed) = (config.timeout, config.allowed_vms.clone());
    let peer_timeout = config.bridge.peer_timeout;
    let turned_away = Seldom::default();
    let mut greeter = Greeter::new(HELLO_TIMEOUT, move |stream| {
        let Some((mut greeted, prepare)) = prepared(Greeted::read(stream)?, terms, timeout, peer_timeout)?
        else {
            return Ok(None);
        };
        if !may_come(&prepare, &allowed) {
            // Whom it would take is nobody else's business.
            let vm = name_of(prepare.name, prepare.uuid);
            let reason = format!("the VM `{vm}` is none that this destination takes (--allow-vm there)");
            turned_away.tell(|more| warn!("turned a source away: {reason}{more}"));
            greeted.sending.send(Kind::Control, &Message::Failed { reason }.encode(), &[])?;
            return Ok(None);
        }
        Ok(Some((greeted, prepare)))
    });
    loop {
        acceptor.renew();
        if control.is_cancelled() {
            return Err(MigrationError::Cancelled.into());
        }
        // A QEMU that is gone is of no use to anybody.
        vm.next_event(Duration::ZERO).map_err(of_qemu)?;
        match greeter.accept(acceptor, Duration::from_millis(100)) {
            Ok(Some(ready)) => return Ok(ready),
            Ok(None) => {}
            Err(error) => {
                return Err(ManageError::Host(format!(
                    "cannot accept connections at {}: {error}",
                    acceptor.local()
                )));
            }
        }
    }
}

/// Whether a VM may come here, by its name or its UUID.
fn may_come(prepare: &Prepare, allowed: &[String]) -> bool {
    let is_it = |allowed: &String| {
        prepare.name.as_ref() == Some(allowed) || prepare.uuid.eq_ignore_ascii_case(allowed)
    };
    allowed.is_empty() || allowed.iter().any(is_it)
}

/// Agrees with a source and hears what it wants. `None`: it is a bridge, which was refused.
fn prepared(
    mut greeted: Greeted,
    own: Terms,
    timeout: Duration,
    peer_timeout: Duration,
) -> Result<Option<(Greeted, Prepare)>, MigrationError> {
    let terms = own.agree(greeted.hello.terms);
    match greeted.hello.purpose {
        Purpose::Control => {}
        Purpose::Probe if own.direct => return answer(greeted, terms, peer_timeout).map(|()| None),
        Purpose::Bridge(_) | Purpose::Probe | Purpose::Direct => {
            greeted.refuse("this destination waits for `pagewarp qemu migrate`, not for a bridge");
            return Ok(None);
        }
    }
    greeted.accept(terms, peer_timeout)?;
    let link = |source: io::Error| MigrationError::Link {
        peer: "a source".into(),
        doing: "waiting for what it wants".into(),
        source,
    };
    greeted.stream.set_timeouts(Some(timeout), None).map_err(link)?;
    let mut body = Vec::new();
    let header = greeted.receiving.receive(&mut body)?;
    greeted.stream.set_timeouts(None, None).map_err(link)?;
    match header.map(|header| (header.kind, Message::decode(&body))) {
        Some((Kind::Control, Ok(Message::Prepare(prepare)))) => {
            let is_possible = terms.direct && prepare.multifd.is_none();
            if prepare.route == Route::Direct && !is_possible {
                let what = "the direct route, which was not agreed on, or not with multifd";
                return Err(MigrationError::Peer(what.into()));
            }
            Ok(Some((greeted, prepare)))
        }
        Some((Kind::Control, Err(error))) => Err(peer_error(error)),
        Some((kind, message)) => {
            Err(MigrationError::Peer(format!("{kind:?} {message:?} where `prepare` was expected")))
        }
        None => Err(link(io::ErrorKind::UnexpectedEof.into())),
    }
}

/// Tells QEMU to listen, if the bridge is going to connect to it, and not to run the VM by itself.
fn ready(vm: &mut Vm, prepare: &Prepare, path: &Path) -> Result<(), ManageError> {
    let wish = Wish { multifd: prepare.multifd, run: prepare.was_running, ..Wish::default() };
    let seen = Seen::ask(vm).map_err(of_qemu)?;
    let plan = check::destination(&seen, &wish)?;
    let tell = || {
        plan.apply(vm)?;
        // While a migration is awaited this only means that the VM is not started once it is loaded (`qmp_stop` in QEMU's monitor/qmp-cmds.c).
        vm.stop()?;
        match prepare.route {
            Route::Bridge => vm.migrate_incoming(&format!("unix:{}", path.display())),
            // It is told once the connection is there.
            Route::Direct => Ok(()),
        }
    };
    tell().map_err(of_qemu)
}

/// A QEMU that ends before the commit is the cause of whatever follows.
fn of_qemu(error: QmpError) -> ManageError {
    match error {
        QmpError::Gone { .. } => ManageError::Qemu { side: "the destination", reason: ENDED.into() },
        other => other.into(),
    }
}

/// Waits for the commit.
struct Waiting<'a, 'scope> {
    vm: &'a mut Vm,
    state: &'a mut DestinationState,
    incoming: &'a Incoming,
    control: &'a MigrationControl,
    bridge_control: &'a MigrationControl,
    started: Instant,
    /// The bridge, if there is one, until it has ended.
    bridging: Option<ScopedJoinHandle<'scope, Result<DestinationBridgeReport, MigrationError>>>,
    /// Its account, once it had delivered everything.
    bridged: Option<DestinationBridgeReport>,
    /// On the direct route: who gives QEMU its connection.
    direct: Option<Receiving<'a>>,
    /// When QEMU had everything.
    delivered: Option<Instant>,
    /// What QEMU refused.
    monitor: Option<ManageError>,
    signs: Signs,
}

impl Waiting<'_, '_> {
    /// Returns whether the VM is to run. `None`: there is no commit, and `signs` tell why.
    fn run(&mut self, timeout: Duration) -> Option<bool> {
        let mut trouble: Option<Instant> = None;
        loop {
            // What QEMU says first, because the end of a connection may follow from it.
            self.look_at_qemu();
            self.look_for_source();
            match self.incoming.next(LOOK) {
                Some(Ok(message)) if self.state.on_receive(&message) == Heard::Due => {}
                Some(news) => self.signs.hear(news),
                None => {}
            }
            // Whatever was seen here, the VM is this side's now.
            if let DestinationDuty::TakeOver { run } = self.state.duty() {
                return Some(run);
            }
            self.signs.cancelled |= self.control.is_cancelled();
            self.look_at_bridge();
            if self.delivered.is_some_and(|since| since.elapsed() > timeout) {
                let reason = format!("no commit in {timeout:?} after its QEMU had sent everything");
                self.signs.word.get_or_insert(MigrationError::Peer(reason));
            }
            if self.signs.any() {
                let since = *trouble.get_or_insert_with(Instant::now);
                // A QEMU that ends after it got everything does so by itself.
                let is_clear =
                    self.signs.is_clear() || (self.signs.qemu.is_some() && self.delivered.is_some());
                let patience = if self.direct.is_some() { DIRECT_WORD_TIMEOUT } else { WORD_TIMEOUT };
                if is_clear || since.elapsed() > patience {
                    self.state.give_up();
                    return None;
                }
            }
            let bridge = self.bridge_control.progress();
            self.control.update(|progress| {
                (progress.guest_bytes, progress.wire_bytes) = (bridge.guest_bytes, bridge.wire_bytes);
                progress.elapsed_ms = ms(self.started.elapsed());
            });
        }
    }

    fn look_at_qemu(&mut self) {
        while self.signs.qemu.is_none() {
            match self.vm.next_event(Duration::ZERO) {
                Ok(None) => return,
                Ok(Some(event)) => self.note(&event),
                Err(QmpError::Gone { .. }) => self.signs.qemu = Some(ENDED.into()),
                Err(error) => self.signs.qemu = Some(error.to_string()),
            }
        }
    }

    fn note(&mut self, event: &QmpEvent) {
        match (event.migration_status(), &self.direct) {
            (Some("failed"), _) => {
                let reason = self.vm.migration().ok().and_then(|status| status.error_desc);
                self.signs.qemu =
                    Some(reason.unwrap_or_else(|| "it could not load what the source sent".into()));
            }
            // With the bridge it is known when the source had it confirmed as well.
            (Some("completed"), Some(direct)) => {
                self.delivered = Some(Instant::now());
                direct.arrived();
            }
            _ => {}
        }
    }

    /// On the direct route QEMU gets the source's connection as soon as that is there.
    fn look_for_source(&mut self) {
        let Some(direct) = &mut self.direct else { return };
        if self.signs.any() {
            direct.end();
            return;
        }
        match direct.look(self.vm) {
            Ok(()) => {}
            Err(ManageError::Migration(error)) => self.signs.bridge = Some(error),
            Err(ManageError::Qmp(QmpError::Gone { .. })) => self.signs.qemu = Some(ENDED.into()),
            Err(error) => {
                self.signs.qemu = Some(error.to_string());
                self.monitor = Some(error);
            }
        }
    }

    fn look_at_bridge(&mut self) {
        if let Some(bridging) = self.bridging.take_if(|bridging| bridging.is_finished()) {
            match end_bridge(bridging, self.bridge_control, Duration::ZERO) {
                Ok(report) => {
                    self.delivered = Some(Instant::now());
                    self.bridged = Some(report);
                }
                Err(error) => self.signs.bridge = Some(error),
            }
        }
    }
}
