//! What a VM process knows about itself, and how it answers its control socket.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use pagewarp_codec::Trace;
use pagewarp_engine::config::SourceConfig;
use pagewarp_engine::control::MigrationControl;
use pagewarp_engine::error::MigrationError;
use pagewarp_engine::report::{DestinationReport, SourceReport};
use pagewarp_engine::transport::Connector;

use crate::control::server::Service;
use crate::control::{Event, MigrateOptions, Request, Status, VmState, codes};
use crate::error::Error;
use crate::migrate::SourceMachine;
use crate::runtime::{
    BackendChooser, BackendRequest, ConnectRequest, ConnectorMaker, NoBackend, NoConnector, Outcome,
    RuntimeOptions, TraceWriter,
};
use crate::vm::Vm;

/// How often watchers hear of progress.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// What a migration away is made with.
#[derive(Clone)]
pub(crate) struct Makers {
    backends: BackendChooser,
    connectors: ConnectorMaker,
    traces: TraceWriter,
}

impl Makers {
    pub(crate) fn of(options: &RuntimeOptions) -> Makers {
        let RuntimeOptions { backends, connectors, traces, .. } = options;
        Makers { backends: backends.clone(), connectors: connectors.clone(), traces: traces.clone() }
    }
}

pub(crate) struct Process {
    makers: Makers,
    started: Instant,
    inner: Mutex<Inner>,
    changed: Condvar,
}

struct Inner {
    name: String,
    state: VmState,
    vm: Option<Arc<Vm>>,
    listening: Option<String>,
    /// Of the migration under way, or the last one.
    control: Option<MigrationControl>,
    /// How the last migration ended; absent while one is under way.
    migration: Option<Event>,
    /// What else there is to say about that.
    warning: Option<Event>,
    /// Whether the last migration is the one that brings the VM here. The VM may run before it has ended.
    arriving: bool,
    outcome: Option<Outcome>,
}

type Emit<'a> = &'a mut dyn FnMut(&Event) -> io::Result<()>;

impl Process {
    pub(crate) fn new(name: &str, makers: Makers) -> Process {
        let inner = Inner {
            name: name.to_owned(),
            // Until the VM is there: nothing can be done to it yet.
            state: VmState::Receiving,
            vm: None,
            listening: None,
            control: None,
            migration: None,
            warning: None,
            arriving: false,
            outcome: None,
        };
        let started = Instant::now();
        Process { makers, started, inner: Mutex::new(inner), changed: Condvar::new() }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Inner)) {
        change(&mut self.inner());
        self.changed.notify_all();
    }

    pub(crate) fn set_name(&self, name: &str) {
        self.change(|inner| inner.name = name.to_owned());
    }

    pub(crate) fn set_receiving(&self, listening: String, control: MigrationControl) {
        self.change(|inner| {
            inner.listening = Some(listening);
            inner.control = Some(control);
            inner.arriving = true;
        });
    }

    /// The VM runs here, and can be acted upon.
    pub(crate) fn set_running(&self, vm: Arc<Vm>) {
        self.change(|inner| {
            inner.state = VmState::Running;
            inner.vm = Some(vm);
            inner.listening = None;
        });
    }

    /// The migration that brought the running VM here has ended. By now the VM may be in any state, and even on its way elsewhere: then
    /// that migration is the last one.
    pub(crate) fn set_received(&self, report: DestinationReport) {
        self.change(|inner| {
            if std::mem::take(&mut inner.arriving) {
                inner.migration = Some(Event::Received(Box::new(report)));
            }
        });
    }

    pub(crate) fn set_failed(&self, error: &MigrationError) {
        self.change(|inner| {
            inner.state = VmState::Stopped;
            inner.listening = None;
            inner.migration = Some(migration_error(error));
        });
    }

    pub(crate) fn set_stopped(&self) {
        self.change(|inner| inner.state = VmState::Stopped);
    }

    pub(crate) fn is_migrating(&self) -> bool {
        self.inner().state == VmState::Migrating
    }

    /// How it ended, if it did by other means than the VM's end.
    pub(crate) fn ended(&self) -> Option<Outcome> {
        self.inner().outcome.clone()
    }

    fn status(&self) -> Event {
        let inner = self.inner();
        let vm = inner.vm.as_ref();
        let serial = vm.map(|vm| vm.serial_counters()).unwrap_or_default();
        Event::Status(Box::new(Status {
            name: inner.name.clone(),
            state: inner.state,
            pid: std::process::id(),
            memory_bytes: vm.map_or(0, |vm| vm.memory_bytes()),
            vcpus: vm.map_or(0, |vm| vm.vcpu_count()),
            uptime_ms: vm.map_or(self.started.elapsed(), |vm| vm.uptime()).as_secs_f64() * 1e3,
            serial_lines: serial.lines,
            serial_bytes: serial.bytes,
            listening: inner.listening.clone(),
            progress: inner.control.as_ref().map(MigrationControl::progress),
        }))
    }

    /// Changes the state of a VM that is not being migrated.
    fn act(
        &self,
        from: &[VmState],
        what: &str,
        action: impl FnOnce(&mut Inner, &Vm) -> Result<(), Error>,
    ) -> Event {
        let mut inner = self.inner();
        if let Some(refusal) = refusal(inner.state, from, what) {
            return refusal;
        }
        let Some(vm) = inner.vm.clone() else {
            return Event::error(codes::WRONG_STATE, format!("there is no VM yet to {what}"));
        };
        let outcome = action(&mut inner, &vm);
        self.changed.notify_all();
        match outcome {
            Ok(()) => Event::Ok,
            Err(e) => Event::error(codes::VM, e),
        }
    }

    fn resolve(&self, resume: bool) -> Event {
        // A failed migration may have left the VM paused without any doubt whose it is: the same word lets it go on.
        let from: &[VmState] =
            if resume { &[VmState::InDoubt, VmState::Paused] } else { &[VmState::InDoubt] };
        self.act(from, "resolve", |inner, vm| {
            if resume {
                vm.resume()?;
                inner.state = VmState::Running;
            } else {
                inner.outcome = Some(Outcome::Discarded);
                inner.state = VmState::Stopped;
            }
            Ok(())
        })
    }

    fn stop(&self) -> Event {
        if self.inner().state == VmState::Receiving {
            return self.cancel();
        }
        self.act(&[VmState::Running, VmState::Paused, VmState::Stopped], "stop", |inner, vm| {
            vm.stop();
            inner.state = VmState::Stopped;
            Ok(())
        })
    }

    /// Cancels the migration that is under way.
    pub(crate) fn cancel(&self) -> Event {
        let inner = self.inner();
        match (&inner.control, inner.state) {
            (Some(control), VmState::Migrating | VmState::Receiving) => {
                control.cancel();
                Event::Ok
            }
            _ => Event::error(codes::NO_MIGRATION, "there is no migration under way"),
        }
    }

    fn migrate(self: &Arc<Process>, to: &str, options: &MigrateOptions) -> Result<(), Event> {
        let address = resolve_address(to, options.plaintext || options.tls_dir.is_some())
            .map_err(|e| Event::error(codes::CONFIG, e))?;
        let trace = options.trace_file.clone().map(|file| (file, Trace::new()));
        let request = BackendRequest {
            name: &options.backend,
            simd: options.simd.as_deref(),
            threads: options.serialize_threads,
            bandwidth_bytes_per_s: options.bandwidth_bytes_per_s,
            trace: trace.as_ref().map(|(_, trace)| trace.clone()),
        };
        let backend = (self.makers.backends)(&request).map_err(no_backend)?;
        let mut config = options.source_config(backend).map_err(|e| Event::error(codes::CONFIG, e))?;
        config.trace = trace.as_ref().map(|(_, trace)| trace.clone());
        let connector = (self.makers.connectors)(&ConnectRequest {
            to,
            address,
            timeout: config.peer_timeout,
            resume_timeout: Duration::from_millis(options.resume_timeout_ms),
            tls_dir: options.tls_dir.as_deref(),
            tls_hostname: options.tls_hostname.as_deref(),
        });
        let connector = connector.map_err(no_connector)?;
        let control = MigrationControl::new();
        let vm = {
            let mut inner = self.inner();
            if let Some(refusal) = refusal(inner.state, &[VmState::Running], "migrate") {
                return Err(refusal);
            }
            let Some(vm) = inner.vm.clone() else {
                return Err(Event::error(codes::WRONG_STATE, "there is no VM yet to migrate"));
            };
            inner.state = VmState::Migrating;
            inner.control = Some(control.clone());
            inner.migration = None;
            inner.warning = None;
            inner.arriving = false;
            vm
        };
        let process = self.clone();
        let body = move || {
            let outcome = migrate(vm, &*connector, &config, &control);
            if let Some((file, trace)) = trace {
                process.write_trace(&file, &trace);
            }
            process.migrated(outcome);
        };
        if let Err(e) = thread::Builder::new().name("migrate".into()).spawn(body) {
            let event = Event::error(codes::INTERNAL, format!("cannot start a thread: {e}"));
            self.change(|inner| {
                inner.state = VmState::Running;
                inner.migration = Some(event.clone());
            });
            return Err(event);
        }
        Ok(())
    }

    /// Before the end is told, because this process may end with it. A file that cannot be written is no reason for a migration to fail.
    fn write_trace(&self, file: &Path, trace: &Trace) {
        if let Err(message) = (self.makers.traces)(file, trace) {
            tracing::warn!("{message}");
            self.change(|inner| inner.warning = Some(Event::Warning { message }));
        }
    }

    /// A migration away has ended.
    fn migrated(&self, outcome: Result<SourceReport, MigrationError>) {
        self.change(|inner| match outcome {
            Ok(report) => {
                let report = Box::new(report);
                inner.state = VmState::Migrated;
                inner.migration = Some(Event::Done(report.clone()));
                inner.outcome = Some(Outcome::Migrated(report));
            }
            Err(error) => {
                tracing::warn!("migration: {error}");
                let exit = inner.vm.as_ref().and_then(|vm| vm.exit_reason());
                (inner.state, inner.migration) = match (&error, exit) {
                    (MigrationError::InDoubt(_), _) => (VmState::InDoubt, Some(migration_error(&error))),
                    // Whatever the migration made of it, this is what happened.
                    (_, Some(reason)) => {
                        let why = format!("the VM ended while it was being migrated: {reason}");
                        (VmState::Stopped, Some(Event::error(codes::VM, why)))
                    }
                    (MigrationError::StillPaused { .. }, _) => {
                        (VmState::Paused, Some(migration_error(&error)))
                    }
                    _ => (VmState::Running, Some(migration_error(&error))),
                };
            }
        });
    }

    /// Tells of the migration under way until it ends.
    fn watch(&self, emit: Emit<'_>) -> io::Result<()> {
        loop {
            let (warning, event) = {
                let inner = self.inner();
                match (&inner.migration, &inner.control) {
                    (Some(end), _) => (inner.warning.clone(), end.clone()),
                    (None, Some(control)) => (None, Event::Progress(control.progress())),
                    (None, None) => {
                        (None, Event::error(codes::NO_MIGRATION, "there is no migration to watch"))
                    }
                }
            };
            warning.map_or(Ok(()), |warning| emit(&warning))?;
            emit(&event)?;
            if event.is_final() {
                return Ok(());
            }
            let under_way = |inner: &mut Inner| inner.migration.is_none();
            drop(self.changed.wait_timeout_while(self.inner(), PROGRESS_INTERVAL, under_way));
        }
    }
}

impl Service for Arc<Process> {
    fn handle(&self, request: Request, emit: Emit<'_>) -> io::Result<()> {
        let answer = match request {
            Request::Status => self.status(),
            Request::Migrate { to, options } => match self.migrate(&to, &options) {
                Ok(()) => return self.watch(emit),
                Err(event) => event,
            },
            Request::Watch => return self.watch(emit),
            Request::Cancel => self.cancel(),
            Request::Stop => self.stop(),
            Request::Pause => self.act(&[VmState::Running, VmState::Paused], "pause", |inner, vm| {
                vm.pause()?;
                inner.state = VmState::Paused;
                Ok(())
            }),
            Request::Resume => self.act(&[VmState::Running, VmState::Paused], "resume", |inner, vm| {
                vm.resume()?;
                inner.state = VmState::Running;
                Ok(())
            }),
            Request::Console { lines } => {
                let vm = self.inner().vm.clone();
                Event::Console { lines: vm.map(|vm| vm.console_lines(lines)).unwrap_or_default() }
            }
            Request::Resolve { resume } => self.resolve(resume),
        };
        emit(&answer)
    }
}

/// Why `what` cannot be done in this state, if it is not one of `from`.
fn refusal(state: VmState, from: &[VmState], what: &str) -> Option<Event> {
    if from.contains(&state) {
        return None;
    }
    let (code, why) = match state {
        VmState::Migrating => (codes::BUSY, "a migration is under way; wait for it or cancel it"),
        VmState::InDoubt => (codes::WRONG_STATE, "a hand-over is in doubt; resolve it first"),
        VmState::Receiving => (codes::WRONG_STATE, "the VM is not here yet"),
        VmState::Paused => (codes::WRONG_STATE, "the VM is paused; resume it first"),
        VmState::Migrated => (codes::WRONG_STATE, "the VM has been migrated away"),
        VmState::Stopped => (codes::WRONG_STATE, "the VM has ended"),
        VmState::Running => (codes::WRONG_STATE, "the VM runs, and nothing is in doubt"),
    };
    Some(Event::error(code, format!("cannot {what} the VM: {why}")))
}

/// Migrates. A panic leaves open how far the hand-over got, so it counts as one that is in doubt.
fn migrate(
    vm: Arc<Vm>,
    connector: &dyn Connector,
    config: &SourceConfig,
    control: &MigrationControl,
) -> Result<SourceReport, MigrationError> {
    let run = || pagewarp_engine::migrate(&mut SourceMachine::new(vm), connector, config, control);
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| {
        Err(MigrationError::InDoubt("this process has a bug: the migration panicked".into()))
    })
}

/// The address of a destination. One that is not on this host is refused unless it is encrypted, or the user knows that nothing is.
fn resolve_address(to: &str, leaves_host: bool) -> Result<SocketAddr, String> {
    let addresses: Vec<_> = to.to_socket_addrs().map_err(|e| format!("destination {to}: {e}"))?.collect();
    let Some(&address) = addresses.first() else { return Err(format!("destination {to}: no address found")) };
    if !leaves_host && !address.ip().is_loopback() {
        return Err(format!(
            "destination {to}: guest memory would cross the network unencrypted; encrypt it (--tls-dir), or allow it (--plaintext) only on a network that you trust"
        ));
    }
    Ok(address)
}

fn no_backend(error: NoBackend) -> Event {
    match error {
        NoBackend::Config(why) => Event::error(codes::CONFIG, why),
        NoBackend::Unavailable(why) => Event::error(codes::BACKEND, why),
    }
}

fn no_connector(error: NoConnector) -> Event {
    match error {
        NoConnector::Config(why) => Event::error(codes::CONFIG, why),
        NoConnector::Unavailable(why) => Event::error(codes::TLS, why),
    }
}

fn migration_error(error: &MigrationError) -> Event {
    Event::error(codes::of(error), error)
}

#[cfg(test)]
mod tests {
    use pagewarp_engine::vm::SourceVm;

    use super::*;
    use crate::config::HostConfig;
    use crate::machine::Machine;
    use crate::vm::open_kvm;

    fn ask(process: &Arc<Process>, request: Request) -> Event {
        let mut events = Vec::new();
        let mut emit = |event: &Event| {
            events.push(event.clone());
            Ok(())
        };
        process.handle(request, &mut emit).unwrap();
        events.pop().unwrap()
    }

    fn code(event: Event) -> String {
        match event {
            Event::Error { code, .. } => code,
            other => panic!("expected an error, not {other:?}"),
        }
    }

    fn have_kvm() -> bool {
        if std::path::Path::new("/dev/kvm").exists() {
            return true;
        }
        assert!(std::env::var_os("PAGEWARP_ALLOW_NO_KVM").is_some_and(|v| v == "1"), "there is no /dev/kvm");
        eprintln!("NOT RUN: no /dev/kvm");
        false
    }

    fn process(name: &str) -> Arc<Process> {
        with_backends(name, Arc::new(|_| Err(NoBackend::Unavailable("no backend".into()))))
    }

    fn with_backends(name: &str, backends: BackendChooser) -> Arc<Process> {
        Arc::new(Process::new(name, Makers::of(&RuntimeOptions::new("".into(), backends))))
    }

    fn vm(name: &str) -> Arc<Vm> {
        let kvm = open_kvm().unwrap();
        let machine = Machine::new(&kvm, 32 << 20, 1).unwrap();
        Arc::new(Vm::build(kvm, name, machine, &HostConfig::default(), None).unwrap())
    }

    fn state(process: &Arc<Process>) -> VmState {
        match ask(process, Request::Status) {
            Event::Status(status) => status.state,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_vm_that_runs_is_acted_upon_before_its_migration_has_said_the_last_word() {
        if !have_kvm() {
            return;
        }
        let process = process("early");
        let control = MigrationControl::new();
        process.set_receiving("127.0.0.1:1".into(), control.clone());
        assert_eq!(state(&process), VmState::Receiving);
        process.set_running(vm("early"));
        assert_eq!(state(&process), VmState::Running);
        assert_eq!(code(ask(&process, Request::Cancel)), codes::NO_MIGRATION, "too late");
        assert_eq!(ask(&process, Request::Pause), Event::Ok);
        process.set_received(DestinationReport::default());
        assert_eq!(state(&process), VmState::Paused, "the news changes nothing");
        assert!(matches!(ask(&process, Request::Watch), Event::Received(_)));
        assert_eq!(ask(&process, Request::Stop), Event::Ok);
        assert!(!control.is_cancelled(), "stopping the VM is not cancelling its migration");
    }

    #[test]
    fn the_news_of_an_arrival_does_not_hide_a_later_migration() {
        if !have_kvm() {
            return;
        }
        let backends: BackendChooser = Arc::new(|_| Ok(Arc::new(pagewarp_codec::CpuBackend::new())));
        let process = with_backends("on", backends);
        process.set_receiving("127.0.0.1:1".into(), MigrationControl::new());
        process.set_running(vm("on"));
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let request = Request::Migrate { to: closed, options: Box::default() };
        assert_eq!(code(ask(&process, request)), codes::LINK);
        process.set_received(DestinationReport::default());
        assert_eq!(code(ask(&process, Request::Watch)), codes::LINK);
    }

    #[test]
    fn a_vm_that_could_not_be_resumed_is_resolved() {
        if !have_kvm() {
            return;
        }
        let process = process("paused");
        process.set_running(vm("paused"));
        let resume = pagewarp_engine::vm::VmError::new("resuming the VM", "a test");
        let reason = Box::new(MigrationError::Cancelled);
        process.migrated(Err(MigrationError::StillPaused { reason, resume }));
        assert_eq!(code(ask(&process, Request::Watch)), codes::STILL_PAUSED);
        assert_eq!(code(ask(&process, Request::Resolve { resume: false })), codes::WRONG_STATE);
        assert_eq!(state(&process), VmState::Paused);
        assert_eq!(ask(&process, Request::Resolve { resume: true }), Event::Ok);
        assert_eq!(state(&process), VmState::Running);
    }

    #[test]
    fn a_vm_that_ends_while_it_migrates_is_reported_as_that() {
        if !have_kvm() {
            return;
        }
        let process = process("ends");
        let vm = vm("ends");
        process.set_running(vm.clone());
        vm.stop();
        SourceVm::resume(&mut SourceMachine::new(vm)).unwrap();
        process.migrated(Err(MigrationError::Cancelled));
        assert_eq!(state(&process), VmState::Stopped);
        match ask(&process, Request::Watch) {
            Event::Error { code, message } => {
                assert_eq!(code, codes::VM);
                assert!(message.contains("ended"), "{message}");
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_vm_in_doubt_stays_paused_until_it_is_resolved() {
        if !have_kvm() {
            return;
        }
        for resume in [true, false] {
            let process = process("doubt");
            process.set_running(vm("doubt"));
            process.migrated(Err(MigrationError::InDoubt("the link broke".into())));
            assert_eq!(code(ask(&process, Request::Watch)), codes::IN_DOUBT);
            for request in [Request::Resume, Request::Pause, Request::Stop] {
                assert_eq!(code(ask(&process, request)), codes::WRONG_STATE);
            }
            assert_eq!(process.ended(), None);
            assert_eq!(ask(&process, Request::Resolve { resume }), Event::Ok);
            assert_eq!(process.ended(), (!resume).then_some(Outcome::Discarded));
            assert_eq!(code(ask(&process, Request::Resolve { resume })), codes::WRONG_STATE);
        }
    }

    #[test]
    fn plaintext_leaves_the_host_only_when_allowed() {
        assert!(resolve_address("127.0.0.1:5", false).is_ok());
        assert!(resolve_address("[::1]:5", false).is_ok());
        assert!(resolve_address("192.0.2.1:5", false).unwrap_err().contains("unencrypted"));
        assert!(resolve_address("192.0.2.1:5", true).is_ok());
        assert!(resolve_address("nonsense", true).is_err());
    }
}
