//! A VM process: one VM, its control socket, and the migrations that bring it here and take it away.

use std::io::Read;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use pagewarp_codec::SharedBackend;
use pagewarp_engine::config::DestinationConfig;
use pagewarp_engine::control::MigrationControl;
use pagewarp_engine::error::MigrationError;
use pagewarp_engine::report::{DestinationReport, SourceReport};
use pagewarp_engine::transport::Acceptor;
use thiserror::Error as ThisError;

use crate::config::{HostConfig, MachineConfig, check_name};
use crate::control::server::Server;
use crate::error::Error;
use crate::gate::ExitReason;
use crate::migrate::DestinationMachine;
use crate::process::Process;
use crate::vm::{ConsoleCopy, Vm};

/// How often the end of the VM is looked for.
const POLL: Duration = Duration::from_millis(50);
/// How often input that did not fit into the serial port is tried again.
const INPUT_RETRY: Duration = Duration::from_millis(5);
/// Names tried for a VM that arrives under a name that is taken.
const NAME_TRIES: u32 = 9;

/// Makes a backend from the names in [`MigrateOptions`](crate::control::MigrateOptions): `backend` and `simd`. An error is one line.
pub type BackendChooser = Arc<dyn Fn(&str, Option<&str>) -> Result<SharedBackend, String> + Send + Sync>;

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
    /// Hears what is going on.
    pub on_notice: Box<dyn Fn(Notice<'_>) + Send + Sync>,
}

impl RuntimeOptions {
    /// Without console, input and notices.
    pub fn new(run_dir: PathBuf, backends: BackendChooser) -> RuntimeOptions {
        RuntimeOptions { run_dir, console: None, input: None, backends, on_notice: Box::new(|_| ()) }
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
    let process = Arc::new(Process::new(&config.name, options.backends.clone()));
    // The name first: whoever has it already must not share memory with a second VM that is thrown away again.
    let server = Server::start(&options.run_dir, &config.name, Arc::new(process.clone()))?;
    let vm = Arc::new(Vm::boot(config, options.console)?);
    vm.resume()?;
    process.set_running(vm.clone(), None);
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
/// the source is on this host, `-2` or the next free number is added.
pub fn receive_vm(
    acceptor: &dyn Acceptor,
    config: &DestinationConfig,
    host: HostConfig,
    name: Option<&str>,
    options: RuntimeOptions,
) -> Result<Outcome, ReceiveError> {
    name.map_or(Ok(()), check_name)?;
    let process = Arc::new(Process::new(name.unwrap_or_default(), options.backends.clone()));
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
    let mut machine = DestinationMachine::new(host, options.console).with_name(Box::new(choose_name));
    let received = pagewarp_engine::receive(&mut machine, acceptor, config, &control);
    let vm = machine.vm();
    drop(machine);
    match (received, vm) {
        (Ok(report), Some(vm)) => {
            (options.on_notice)(Notice::Received(&report));
            process.set_running(vm.clone(), Some(report));
            if let Some(input) = options.input {
                start_input(input, Arc::downgrade(&vm))?;
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

/// Serves under `wanted` or the first free name like it.
fn first_free(wanted: &str, serve: &mut dyn FnMut(&str) -> Result<(), Error>) -> Result<String, Error> {
    let mut result = serve(wanted).map(|()| wanted.to_owned());
    for number in 2..2 + NAME_TRIES {
        if result.is_ok() {
            break;
        }
        let name = format!("{wanted}-{number}");
        if check_name(&name).is_err() {
            break;
        }
        result = serve(&name).map(|()| name);
    }
    result
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
            // The migration will notice by itself that its VM has ended, and must not find it torn down.
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
