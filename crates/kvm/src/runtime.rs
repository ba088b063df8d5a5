//! A VM process: one VM, its control socket, and the migrations that bring it here and take it away.

use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use pagewarp_codec::{SharedBackend, Trace};
use pagewarp_engine::config::DestinationConfig;
use pagewarp_engine::control::MigrationControl;
use pagewarp_engine::error::MigrationError;
use pagewarp_engine::report::{DestinationReport, SourceReport};
use pagewarp_engine::transport::{Acceptor, Connector, TcpConnector};
use thiserror::Error as ThisError;

use crate::config::{HostConfig, MachineConfig, check_name};
use crate::control::server::Server;
use crate::error::Error;
use crate::gate::ExitReason;
use crate::migrate::DestinationMachine;
use crate::process::{Makers, Process};
use crate::vm::{ConsoleCopy, Vm};

/// How often the end of the VM is looked for.
const POLL: Duration = Duration::from_millis(50);
/// How often input that did not fit into the serial port is tried again.
const INPUT_RETRY: Duration = Duration::from_millis(5);
/// Added to the name of a VM that arrives under a name that is taken: the first one that is free.
const NUMBERS: std::ops::RangeInclusive<u32> = 2..=10;

/// The backend that a migration away wants, and what helps to choose one.
#[derive(Clone, Debug)]
pub struct BackendRequest<'a> {
    /// [`MigrateOptions::backend`](crate::control::MigrateOptions::backend).
    pub name: &'a str,
    /// [`MigrateOptions::simd`](crate::control::MigrateOptions::simd).
    pub simd: Option<&'a str>,
    /// Threads that encode.
    pub threads: usize,
    /// What the migration may send at most; `None`: as much as the link carries.
    pub bandwidth_bytes_per_s: Option<u64>,
    /// Where the backend is to record what it does.
    pub trace: Option<Trace>,
}

/// Why there is no backend. Each is one line.
#[derive(Clone, Debug, PartialEq, Eq, ThisError)]
pub enum NoBackend {
    /// What was asked for makes no sense.
    #[error("{0}")]
    Config(String),
    /// This host does not have what was asked for, or it does not work.
    #[error("{0}")]
    Unavailable(String),
}

/// Makes backends.
pub type BackendChooser = Arc<dyn Fn(&BackendRequest<'_>) -> Result<SharedBackend, NoBackend> + Send + Sync>;

/// The connections that a migration away wants.
#[derive(Clone, Debug)]
pub struct ConnectRequest<'a> {
    /// The destination, as it was named.
    pub to: &'a str,
    /// Its address.
    pub address: SocketAddr,
    /// How long one attempt may take.
    pub timeout: Duration,
    /// [`MigrateOptions::resume_timeout_ms`](crate::control::MigrateOptions::resume_timeout_ms).
    pub resume_timeout: Duration,
    /// [`MigrateOptions::tls_dir`](crate::control::MigrateOptions::tls_dir).
    pub tls_dir: Option<&'a Path>,
    /// [`MigrateOptions::tls_hostname`](crate::control::MigrateOptions::tls_hostname).
    pub tls_hostname: Option<&'a str>,
}

/// Why there are no connections. Each is one line.
#[derive(Clone, Debug, PartialEq, Eq, ThisError)]
pub enum NoConnector {
    /// What was asked for makes no sense.
    #[error("{0}")]
    Config(String),
    /// This host does not have what it takes.
    #[error("{0}")]
    Unavailable(String),
}

/// Makes what opens connections to a destination.
pub type ConnectorMaker =
    Arc<dyn Fn(&ConnectRequest<'_>) -> Result<Box<dyn Connector>, NoConnector> + Send + Sync>;

/// Plain TCP, and nothing else.
pub(crate) fn tcp_only(request: &ConnectRequest<'_>) -> Result<Box<dyn Connector>, NoConnector> {
    match request.tls_dir {
        Some(_) => Err(NoConnector::Config("this program speaks no TLS".to_owned())),
        None => Ok(Box::new(TcpConnector { address: request.address, timeout: request.timeout })),
    }
}

/// Writes the trace of a migration away into a file, [`MigrateOptions::trace_file`](crate::control::MigrateOptions::trace_file). An error is one
/// line.
pub type TraceWriter = Arc<dyn Fn(&Path, &Trace) -> Result<(), String> + Send + Sync>;

/// What is going on, for a process that tells its user.
#[derive(Debug)]
#[non_exhaustive]
pub enum Notice<'a> {
    /// The control socket answers.
    Ready {
        /// The VM's name here.
        name: &'a str,
        /// The socket.
        socket: PathBuf,
    },
    /// The VM has been received and runs.
    Received(&'a DestinationReport),
}

/// How a VM process is to behave.
pub struct RuntimeOptions {
    /// Where the control socket goes: see [`run_dir`](crate::control::run_dir()).
    pub run_dir: PathBuf,
    /// Where a copy of the serial output goes.
    pub console: Option<ConsoleCopy>,
    /// What is typed into the serial port.
    pub input: Option<Box<dyn Read + Send>>,
    /// Makes backends for migrations away.
    pub backends: BackendChooser,
    /// Opens connections for migrations away.
    pub connectors: ConnectorMaker,
    /// Writes traces of migrations away.
    pub traces: TraceWriter,
    /// Hears what is going on.
    pub on_notice: Box<dyn Fn(Notice<'_>) + Send + Sync>,
}

impl RuntimeOptions {
    /// Without console, input and notices, with nobody who could write a trace, and without TLS.
    pub fn new(run_dir: PathBuf, backends: BackendChooser) -> RuntimeOptions {
        RuntimeOptions {
            run_dir,
            console: None,
            input: None,
            backends,
            connectors: Arc::new(tcp_only),
            traces: Arc::new(|_, _| Err("this program writes no traces".to_owned())),
            on_notice: Box::new(|_| ()),
        }
    }
}

/// How a VM process ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// The VM ended here.
    Ended(ExitReason),
    /// The VM runs on another host now.
    Migrated(Box<SourceReport>),
    /// The hand-over was in doubt, and an operator found that the VM runs on the other host.
    Discarded,
}

/// Why no VM was received.
#[derive(Debug, ThisError)]
#[non_exhaustive]
pub enum ReceiveError {
    /// This side could not start.
    #[error(transparent)]
    Local(#[from] Error),
    /// The migration failed.
    #[error(transparent)]
    Migration(#[from] MigrationError),
}

/// Boots a VM and serves its control socket until it ends or has been migrated away.
pub fn run_vm(config: &MachineConfig, options: RuntimeOptions) -> Result<Outcome, Error> {
    config.validate()?;
    let process = Arc::new(Process::new(&config.name, Makers::of(&options)));
    // The name first: whoever has it already must not share memory with a second VM that is thrown away again.
    let server = Server::start(&options.run_dir, &config.name, Arc::new(process.clone()))?;
    let vm = Arc::new(Vm::boot(config, options.console)?);
    vm.resume()?;
    process.set_running(vm.clone());
    (options.on_notice)(Notice::Ready { name: &config.name, socket: server.path() });
    if let Some(input) = options.input {
        start_input(input, Arc::downgrade(&vm))?;
    }
    let outcome = wait(&process, &vm);
    drop(server);
    Ok(outcome)
}

/// Receives one VM, runs it, and serves its control socket until it ends or has been migrated away.
///
/// With a `name` the control socket is there from the start. Without, it comes with the VM and has its name; if that is taken, because
/// the source is on this host, `-2` or the next free number is added. Nobody is listened to any more once the VM is here, or is not going to come.
pub fn receive_vm(
    acceptor: Box<dyn Acceptor>,
    config: &DestinationConfig,
    host: HostConfig,
    name: Option<&str>,
    options: RuntimeOptions,
) -> Result<Outcome, ReceiveError> {
    name.map_or(Ok(()), check_name)?;
    let process = Arc::new(Process::new(name.unwrap_or_default(), Makers::of(&options)));
    let control = MigrationControl::new();
    process.set_receiving(acceptor.local(), control.clone());
    let mut server = None;
    let mut serve = |name: &str| -> Result<(), Error> {
        let started = Server::start(&options.run_dir, name, Arc::new(process.clone()))?;
        (options.on_notice)(Notice::Ready { name, socket: started.path() });
        server = Some(started);
        Ok(())
    };
    if let Some(name) = name {
        serve(name)?;
    }
    let choose_name = |source: &str| match name {
        Some(name) => Ok(name.to_owned()),
        None => {
            let name = first_free(source, &mut serve)?;
            process.set_name(&name);
            Ok(name)
        }
    };
    // At once, because the migration's last words may take long: until then it is the running VM that has to be acted upon.
    let on_run = |vm: &Arc<Vm>| process.set_running(vm.clone());
    let mut machine = DestinationMachine::new(host, options.console)
        .with_name(Box::new(choose_name))
        .with_on_run(Box::new(on_run));
    let received = pagewarp_engine::receive(&mut machine, &*acceptor, config, &control);
    let vm = machine.vm();
    drop(machine);
    match (received, vm) {
        (Ok(report), Some(vm)) => {
            (options.on_notice)(Notice::Received(&report));
            process.set_received(report);
            drop(acceptor);
            // The VM runs nowhere but here: it must not end because nobody can type.
            if let Some(input) = options.input
                && let Err(e) = start_input(input, Arc::downgrade(&vm))
            {
                tracing::warn!("{e}");
            }
            let outcome = wait(&process, &vm);
            drop(server);
            Ok(outcome)
        }
        (received, _) => {
            let error =
                received.err().unwrap_or_else(|| MigrationError::Internal("received no machine".into()));
            process.set_failed(&error);
            drop(server);
            Err(error.into())
        }
    }
}

/// Serves under `wanted` or, where that is taken, the first free name like it.
fn first_free(wanted: &str, serve: &mut dyn FnMut(&str) -> Result<(), Error>) -> Result<String, Error> {
    let numbered = NUMBERS.map(|number| format!("{}-{number}", without_number(wanted)));
    let mut taken = None;
    for name in std::iter::once(wanted.to_owned()).chain(numbered) {
        if check_name(&name).is_err() {
            break;
        }
        match serve(&name) {
            Ok(()) => return Ok(name),
            // The first refusal is about the name that was wanted.
            Err(e @ Error::NameTaken(_)) => drop(taken.get_or_insert(e)),
            Err(e) => return Err(e),
        }
    }
    Err(taken.unwrap_or_else(|| Error::Peer(format!("the VM's name {wanted:?} cannot be used here"))))
}

/// `name` without a number that an earlier migration added to it.
fn without_number(name: &str) -> &str {
    match name.rsplit_once('-') {
        Some((stem, number)) if NUMBERS.map(|n| n.to_string()).any(|n| n == number) => stem,
        _ => name,
    }
}

/// Waits for the end of the VM here.
fn wait(process: &Process, vm: &Vm) -> Outcome {
    loop {
        if let Some(outcome) = process.ended() {
            return outcome;
        }
        if let Some(reason) = vm.wait_exit(POLL) {
            if !process.is_migrating() {
                process.set_stopped();
                return process.ended().unwrap_or(Outcome::Ended(reason));
            }
            // There is nothing left to migrate. The migration must not find its VM torn down, so its end is waited for.
            process.cancel();
            thread::sleep(POLL);
        }
    }
}

/// Types what `input` gives into the serial port, until either ends.
fn start_input(mut input: Box<dyn Read + Send>, vm: Weak<Vm>) -> Result<(), Error> {
    let body = move || {
        let mut buffer = [0; 256];
        while let Ok(count @ 1..) = input.read(&mut buffer) {
            let mut rest = &buffer[..count];
            while !rest.is_empty() {
                let Some(vm) = vm.upgrade() else { return };
                match vm.type_serial(rest) {
                    Ok(0) => thread::sleep(INPUT_RETRY),
                    Ok(typed) => rest = &rest[typed..],
                    Err(e) => return tracing::warn!("input: {e}"),
                }
            }
        }
    };
    thread::Builder::new()
        .name("input".into())
        .spawn(body)
        .map(drop)
        .map_err(|e| Error::Host(format!("input: cannot start a thread: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a VM that wants `wanted` is called where `taken` are.
    fn name_beside(wanted: &str, taken: &[&str]) -> Result<String, Error> {
        first_free(wanted, &mut |name| match taken.contains(&name) {
            true => Err(Error::NameTaken(name.to_owned())),
            false => Ok(()),
        })
    }

    #[test]
    fn a_name_gets_one_number_however_often_its_vm_moves() {
        assert_eq!(name_beside("db", &[]).unwrap(), "db");
        assert_eq!(name_beside("db", &["db"]).unwrap(), "db-2");
        assert_eq!(name_beside("db-2", &["db-2"]).unwrap(), "db-3");
        assert_eq!(name_beside("db-2024", &["db-2024"]).unwrap(), "db-2024-2", "not a number of ours");
        let all: Vec<_> = NUMBERS.map(|n| format!("db-{n}")).chain(["db".to_owned()]).collect();
        let all: Vec<_> = all.iter().map(String::as_str).collect();
        assert!(matches!(name_beside("db", &all), Err(Error::NameTaken(name)) if name == "db"));
    }

    #[test]
    fn no_other_name_is_tried_where_the_name_is_not_what_is_wrong() {
        let mut tried = 0;
        let result = first_free("db", &mut |_| {
            tried += 1;
            Err(Error::Host("no space left".into()))
        });
        assert!(matches!(result, Err(Error::Host(_))));
        assert_eq!(tried, 1);
    }
}
