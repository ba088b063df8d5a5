//! Whole VM processes, as threads of this one: the control socket, and migrations over loopback.

mod common;

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use common::{config, have_kvm, wait_for};
use pagewarp_codec::CpuBackend;
use pagewarp_engine::config::DestinationConfig;
use pagewarp_engine::transport::TcpAcceptor;
use pagewarp_kvm::control::{Client, Event, MigrateOptions, Request, Status, VmState, codes, socket_path};
use pagewarp_kvm::runtime::ReceiveError;
use pagewarp_kvm::{ExitReason, HostConfig, Outcome, RuntimeOptions, receive_vm, run_vm};

fn options(run_dir: &Path) -> RuntimeOptions {
    RuntimeOptions::new(run_dir.to_owned(), Arc::new(|_| Ok(Arc::new(CpuBackend::new()))))
}

fn start(run_dir: &Path, name: &str) -> JoinHandle<Outcome> {
    let (config, options) = (config(name), options(run_dir));
    let handle = thread::spawn(move || run_vm(&config, options).unwrap());
    wait_for("the guest's first line", || state(run_dir, name).is_some_and(|s| s.serial_lines > 0));
    handle
}

/// Receives a VM as `name`; the port is the second result.
fn start_receiving(
    run_dir: &Path,
    name: Option<&'static str>,
) -> (JoinHandle<Result<Outcome, ReceiveError>>, String) {
    let acceptor = TcpAcceptor::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = acceptor.local_addr().unwrap().to_string();
    let options = options(run_dir);
    let handle = thread::spawn(move || {
        let config = DestinationConfig::new(Arc::new(CpuBackend::new()));
        receive_vm(Box::new(acceptor), &config, HostConfig::default(), name, options)
    });
    (handle, address)
}

fn ask(run_dir: &Path, name: &str, request: &Request) -> Event {
    let mut client = Client::connect(socket_path(run_dir, name).unwrap()).unwrap();
    client.request(request, |_| ()).unwrap()
}

/// The status, if the socket is there.
fn state(run_dir: &Path, name: &str) -> Option<Status> {
    let mut client = Client::connect(socket_path(run_dir, name).unwrap()).ok()?;
    match client.request(&Request::Status, |_| ()).ok()? {
        Event::Status(status) => Some(*status),
        other => panic!("{other:?}"),
    }
}

fn code(event: Event) -> String {
    match event {
        Event::Error { code, message } => {
            assert!(!message.contains('\n'), "{message}");
            code
        }
        other => panic!("expected an error, not {other:?}"),
    }
}

fn migrate_to(address: &str) -> Request {
    Request::Migrate {
        to: address.into(),
        options: Box::new(MigrateOptions { verify: true, ..MigrateOptions::default() }),
    }
}

#[test]
fn a_vm_is_watched_paused_resumed_and_stopped_through_its_socket() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vm = start(dir.path(), "control");
    let status = state(dir.path(), "control").unwrap();
    assert_eq!((status.state, status.memory_bytes, status.vcpus), (VmState::Running, 64 << 20, 1));
    assert_eq!(
        ask(dir.path(), "control", &Request::Console { lines: 5 }),
        Event::Console { lines: vec!["!".into()] }
    );
    assert_eq!(ask(dir.path(), "control", &Request::Pause), Event::Ok);
    assert_eq!(state(dir.path(), "control").unwrap().state, VmState::Paused);
    assert_eq!(code(ask(dir.path(), "control", &migrate_to("127.0.0.1:1"))), codes::WRONG_STATE);
    assert_eq!(ask(dir.path(), "control", &Request::Resume), Event::Ok);
    assert_eq!(code(ask(dir.path(), "control", &Request::Cancel)), codes::NO_MIGRATION);
    assert_eq!(code(ask(dir.path(), "control", &Request::Watch)), codes::NO_MIGRATION);
    assert_eq!(code(ask(dir.path(), "control", &Request::Resolve { resume: true })), codes::WRONG_STATE);
    let twice = run_vm(&config("control"), options(dir.path())).unwrap_err().to_string();
    assert!(twice.contains("runs already"), "{twice}");
    assert_eq!(ask(dir.path(), "control", &Request::Stop), Event::Ok);
    assert_eq!(vm.join().unwrap(), Outcome::Ended(ExitReason::Stopped));
    assert!(state(dir.path(), "control").is_none());
}

#[test]
fn a_vm_migrates_there_and_on_and_keeps_running() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let first = start(dir.path(), "one");
    let (second, address) = start_receiving(dir.path(), Some("two"));
    wait_for("the destination's socket", || state(dir.path(), "two").is_some_and(|s| s.listening.is_some()));
    let Event::Done(report) = ask(dir.path(), "one", &migrate_to(&address)) else { panic!("not done") };
    assert_eq!(report.verified, Some(true));
    assert!(matches!(first.join().unwrap(), Outcome::Migrated(_)));
    wait_for("the VM to run", || state(dir.path(), "two").is_some_and(|s| s.state == VmState::Running));
    let Event::Received(received) = ask(dir.path(), "two", &Request::Watch) else { panic!("not received") };
    assert_eq!(received.wire_bytes, report.destination.unwrap().wire_bytes);

    // On to a third one, which takes the name it can get.
    let (third, address) = start_receiving(dir.path(), None);
    assert!(matches!(ask(dir.path(), "two", &migrate_to(&address)), Event::Done(_)));
    assert!(matches!(second.join().unwrap(), Ok(Outcome::Migrated(_))));
    wait_for("the VM to run", || state(dir.path(), "two-2").is_some_and(|s| s.state == VmState::Running));
    assert_eq!(ask(dir.path(), "two-2", &Request::Stop), Event::Ok);
    assert_eq!(third.join().unwrap().unwrap(), Outcome::Ended(ExitReason::Stopped));
}

#[test]
fn a_migration_that_fails_leaves_the_vm_running() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let vm = start(dir.path(), "stays");
    // Nobody listens there.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    assert_eq!(code(ask(dir.path(), "stays", &migrate_to(&closed))), codes::LINK);
    assert_eq!(
        code(ask(dir.path(), "stays", &Request::Watch)),
        codes::LINK,
        "the end of the last one is remembered"
    );
    assert_eq!(code(ask(dir.path(), "stays", &migrate_to("192.0.2.1:1"))), codes::CONFIG);
    assert_eq!(code(ask(dir.path(), "stays", &migrate_to("no port"))), codes::CONFIG);
    let options = MigrateOptions { encodings: "morse".into(), ..MigrateOptions::default() };
    let request = Request::Migrate { to: closed, options: Box::new(options) };
    assert_eq!(code(ask(dir.path(), "stays", &request)), codes::CONFIG);
    // A destination that hangs up at once.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let hangs_up = thread::spawn(move || drop(listener.accept().unwrap()));
    assert_eq!(code(ask(dir.path(), "stays", &migrate_to(&address))), codes::LINK);
    hangs_up.join().unwrap();
    assert_eq!(state(dir.path(), "stays").unwrap().state, VmState::Running);

    let (destination, address) = start_receiving(dir.path(), Some("arrives"));
    assert!(matches!(ask(dir.path(), "stays", &migrate_to(&address)), Event::Done(_)));
    vm.join().unwrap();
    wait_for("the VM to run", || state(dir.path(), "arrives").is_some_and(|s| s.state == VmState::Running));
    ask(dir.path(), "arrives", &Request::Stop);
    destination.join().unwrap().unwrap();
}

#[test]
fn a_trace_is_written_however_the_migration_ends_and_never_decides_how() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let written = Arc::new(Mutex::new(Vec::new()));
    let vm = {
        let (config, mut options, written) = (config("traced"), options(dir.path()), written.clone());
        options.traces = Arc::new(move |file, trace| {
            written.lock().unwrap().push((file.to_owned(), trace.spans().0.len()));
            Err("no space for traces".to_owned())
        });
        thread::spawn(move || run_vm(&config, options).unwrap())
    };
    wait_for("the VM to run", || state(dir.path(), "traced").is_some_and(|s| s.state == VmState::Running));
    let migrate = |to: &str, trace_file: Option<&str>| {
        let options = MigrateOptions { trace_file: trace_file.map(Into::into), ..MigrateOptions::default() };
        let mut client = Client::connect(socket_path(dir.path(), "traced").unwrap()).unwrap();
        let mut warnings = Vec::new();
        let end = client
            .request(&Request::Migrate { to: to.into(), options: Box::new(options) }, |event| {
                warnings.extend((!matches!(event, Event::Progress(_))).then(|| event.clone()));
            })
            .unwrap();
        (end, warnings)
    };
    let warning = Event::Warning { message: "no space for traces".into() };
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let (end, warnings) = migrate(&closed, Some("/first"));
    assert_eq!((code(end), warnings), (codes::LINK.to_owned(), vec![warning.clone()]));
    let (end, warnings) = migrate(&closed, None);
    assert_eq!((code(end), warnings), (codes::LINK.to_owned(), vec![]), "that was the one before");

    let (destination, address) = start_receiving(dir.path(), Some("there"));
    let (end, warnings) = migrate(&address, Some("/second"));
    assert!(matches!(end, Event::Done(_)), "{end:?}");
    assert_eq!(warnings, [warning]);
    let written = std::mem::take(&mut *written.lock().unwrap());
    assert_eq!(
        written.iter().map(|(file, _)| file.to_str().unwrap()).collect::<Vec<_>>(),
        ["/first", "/second"]
    );
    assert!(written[1].1 > 0, "the stages record what they do");
    vm.join().unwrap();
    wait_for("the VM to run", || state(dir.path(), "there").is_some_and(|s| s.state == VmState::Running));
    ask(dir.path(), "there", &Request::Stop);
    destination.join().unwrap().unwrap();
}

#[test]
fn a_cancelled_destination_ends_and_says_so() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (destination, _address) = start_receiving(dir.path(), Some("waits"));
    wait_for("the destination's socket", || {
        state(dir.path(), "waits").is_some_and(|s| s.listening.is_some())
    });
    assert_eq!(ask(dir.path(), "waits", &Request::Cancel), Event::Ok);
    wait_for("the end", || destination.is_finished());
    assert!(destination.join().unwrap().is_err());
}
