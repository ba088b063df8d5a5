//! `pagewarp run` and `pagewarp receive`: the processes that have VMs.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use pagewarp_codec::{SharedBackend, Trace};
use pagewarp_engine::config::DestinationConfig;
use pagewarp_engine::report::DestinationReport;
use pagewarp_kvm::control::Request;
use pagewarp_kvm::runtime::{BackendChooser, BackendRequest, NoBackend, Notice, ReceiveError};
use pagewarp_kvm::{
    ConsoleCopy, Error, ExitReason, HostConfig, KernelSource, MachineConfig, Outcome, RuntimeOptions,
    receive_vm, run_vm,
};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::args::{ConsoleTarget, Kernel, PlaceArgs, ReceiveArgs, RunArgs, SeccompChoice};
use crate::backend::{self, BackendName, Role, Task};
use crate::exit::{Exit, Failure, exit_of, failure, of_migration, one_line};
use crate::net;
use crate::report::destination_report;
use crate::sandbox::{Computing, Process, enter};
use crate::say;
use crate::trace::{Host, TraceFile};
use crate::vm::Vm;

/// What the engine is told where nobody gave a limit: longer than anything runs.
const FOR_EVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Runs `pagewarp run`.
pub(super) fn run(args: &RunArgs, run_dir: PathBuf) -> Result<()> {
    let (kernel, builtin) = match &args.kernel {
        Kernel::Builtin => (KernelSource::Bytes(Arc::from(pagewarp_guest::ELF)), true),
        Kernel::File(path) => (KernelSource::Path(path.clone()), false),
    };
    if let Kernel::File(path) = &args.kernel {
        readable(path, "kernel", "name an ELF kernel with a PVH note, a bzImage, or `builtin`")?;
    }
    if let Some(path) = &args.initrd {
        readable(path, "initrd", "name another or leave --initrd out")?;
    }
    let config = MachineConfig {
        vcpus: args.vcpus,
        initrd: args.initrd.clone(),
        cmdline: args.cmdline.clone(),
        // The built-in guest would have to measure it otherwise.
        tsc_khz_in_cmdline: builtin,
        host: host_config(&args.place),
        ..MachineConfig::new(&args.name, args.memory.0, kernel)
    };
    let socket = OwnSocket::default();
    let options = options(&args.place, run_dir, &socket, |_| ())?;
    stop_on_signal(socket)?;
    confine(&args.place)?;
    let outcome =
        run_vm(&config, options).map_err(of_kvm).with_context(|| format!("cannot run `{}`", args.name))?;
    ended(&args.name, outcome)
}

/// Runs `pagewarp receive`.
pub(super) fn receive(args: &ReceiveArgs, run_dir: PathBuf) -> Result<()> {
    if args.json && args.place.console == ConsoleTarget::Stdout {
        bail!(failure(
            Exit::Usage,
            "--json and the guest's console would both go to standard output; pass --console none or --console FILE"
        ));
    }
    let acceptor = net::acceptor(&args.listen, &args.encryption, &args.admission, &args.endurance)?;
    net::look_at_endurance(&args.endurance, args.peer_timeout);
    let task = Task { role: Role::Decode, threads: args.threads as usize, link_bytes_per_s: None };
    let trace = args.trace.clone().map(|file| (file, Trace::new()));
    let spans = trace.as_ref().map(|(_, trace)| trace.clone());
    let backend = backend::choose(args.place.backend, None, task, spans.clone())?;
    let config = DestinationConfig {
        encodings: args.encodings,
        allowed_vms: args.allow_vm.clone(),
        max_memory_bytes: args.max_memory.0,
        history_bytes: args.history.0,
        deserialize_threads: args.threads as usize,
        max_connections: args.max_connections as usize,
        max_batch_pages: args.max_batch_pages as usize,
        accept_timeout: args.accept_timeout.unwrap_or(FOR_EVER),
        peer_timeout: args.peer_timeout,
        trace: spans,
        ..DestinationConfig::new(backend)
    };
    let socket = OwnSocket::default();
    let json = args.json;
    let received = trace.clone();
    let on_received = move |report: &DestinationReport| {
        // First, so that it is there for whoever reads the report.
        write_trace(received.as_ref());
        print_received(report, json);
    };
    let options = options(&args.place, run_dir, &socket, on_received)?;
    stop_on_signal(socket)?;
    let local = acceptor.local();
    confine(&args.place)?;
    say!("waiting for a VM on {local}");
    let outcome = receive_vm(acceptor, &config, host_config(&args.place), args.name.as_deref(), options)
        .inspect_err(|_| write_trace(trace.as_ref()))
        .map_err(of_receive)
        .with_context(|| format!("cannot receive a VM on {local}"))?;
    ended(args.name.as_deref().unwrap_or("the VM"), outcome)
}

/// Fails, with advice, if a file cannot be read.
fn readable(path: &Path, what: &str, advice: &str) -> Result<()> {
    match File::open(path) {
        Ok(_) => Ok(()),
        Err(error) => {
            bail!(failure(
                Exit::Environment,
                format!("cannot open the {what} `{}`: {error}; {advice}", path.display())
            ))
        }
    }
}

/// That a trace cannot be written is no reason to fail.
fn write_trace(trace: Option<&(PathBuf, Trace)>) {
    if let Some((file, trace)) = trace
        && let Err(error) = TraceFile::of(Host::Destination, trace).write(file)
    {
        tracing::warn!("{}", one_line(&error));
    }
}

fn print_received(report: &DestinationReport, json: bool) {
    let text = if json { serde_json::to_string_pretty(report).map(|t| t + "\n") } else { Ok(String::new()) };
    // The VM runs. Nobody listening to its report is no reason to end it.
    let _ = match text {
        Ok(text) if json => std::io::stdout().write_all(text.as_bytes()),
        _ => std::io::stderr().write_all(destination_report(report).as_bytes()),
    };
}

/// Who computes for the VM, now and when it moves on, which may be any time: this must be known now.
fn computing(name: BackendName) -> Computing {
    match name {
        BackendName::Cpu => Computing::Cpu,
        BackendName::Gpu(_) => Computing::Gpu,
        BackendName::Auto => {
            if backend::may_have_gpu() {
                Computing::Gpu
            } else {
                Computing::Cpu
            }
        }
    }
}

/// Gives up what this process does not need.
fn confine(place: &PlaceArgs) -> Result<()> {
    enter(place.seccomp, Process::Vm, computing(place.backend))
}

fn host_config(place: &PlaceArgs) -> HostConfig {
    HostConfig { huge_pages: place.huge_pages, overcommit: place.overcommit, vcpu_nice: place.vcpu_nice }
}

/// The control socket of this process, once there is one.
type OwnSocket = Arc<Mutex<Option<PathBuf>>>;

fn options(
    place: &PlaceArgs,
    run_dir: PathBuf,
    socket: &OwnSocket,
    on_received: impl Fn(&DestinationReport) + Send + Sync + 'static,
) -> Result<RuntimeOptions> {
    let socket = socket.clone();
    let default = place.backend;
    let has_room = place.seccomp == SeccompChoice::Off || computing(default) == Computing::Gpu;
    let backends: BackendChooser = Arc::new(move |request| choose(request, default, has_room));
    Ok(RuntimeOptions {
        console: console(&place.console)?,
        input: place.stdin.then(|| Box::new(std::io::stdin()) as _),
        connectors: Arc::new(net::connector_of_vm),
        traces: Arc::new(|file, trace| {
            TraceFile::of(Host::Source, trace).write(file).map_err(|error| one_line(&error))
        }),
        on_notice: Box::new(move |notice| match notice {
            Notice::Ready { name, socket: path } => {
                say!("`{name}` answers on {}", path.display());
                *socket.lock().unwrap_or_else(PoisonError::into_inner) = Some(path);
            }
            Notice::Received(report) => on_received(report),
            _ => {}
        }),
        ..RuntimeOptions::new(run_dir, backends)
    })
}

/// The backend for a migration away; `default` is for one that leaves the choice to this process. Unless there is room for the driver of a GPU, it is the CPU.
fn choose(
    request: &BackendRequest<'_>,
    default: BackendName,
    has_room: bool,
) -> Result<SharedBackend, NoBackend> {
    let named: BackendName = request.name.parse().map_err(NoBackend::Config)?;
    let name = match if named == BackendName::Auto { default } else { named } {
        BackendName::Auto if !has_room => BackendName::Cpu,
        BackendName::Gpu(_) if !has_room => {
            let why = if default == BackendName::Auto {
                "it was started on a host without a GPU"
            } else {
                "it was started with `--backend cpu`"
            };
            return Err(NoBackend::Config(format!(
                "backend {named}: this VM's process has given up the system calls that the driver of a GPU makes, because {why}; take the CPU, or \
                 start such VMs with `--backend gpu`"
            )));
        }
        name => name,
    };
    let task = Task {
        role: Role::Encode,
        threads: request.threads,
        link_bytes_per_s: request.bandwidth_bytes_per_s,
    };
    backend::choose(name, request.simd, task, request.trace.clone()).map_err(|error| match exit_of(&error) {
        Exit::Usage => NoBackend::Config(one_line(&error)),
        _ => NoBackend::Unavailable(one_line(&error)),
    })
}

fn console(target: &ConsoleTarget) -> Result<Option<ConsoleCopy>> {
    Ok(match target {
        ConsoleTarget::None => None,
        ConsoleTarget::Stdout => Some(Box::new(std::io::stdout())),
        ConsoleTarget::File(path) => {
            // What a guest says is nobody else's business.
            let file =
                OpenOptions::new().create(true).append(true).mode(0o600).open(path).with_context(|| {
                    Failure::new(
                        Exit::Environment,
                        format!("cannot write the console to `{}`", path.display()),
                    )
                })?;
            Some(Box::new(file))
        }
    })
}

/// The first SIGINT or SIGTERM stops the VM as a request would; the second one ends the process.
fn stop_on_signal(socket: OwnSocket) -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("cannot watch for Ctrl-C")?;
    thread::Builder::new().name("signals".into()).spawn(move || {
        let mut arrived = signals.forever();
        arrived.next();
        let path = socket.lock().unwrap_or_else(PoisonError::into_inner).clone();
        // Before there is a socket there is no VM either.
        let Some(path) = path else { std::process::exit(Exit::Cancelled as i32) };
        if let Err(error) = stop(&path) {
            say!("warning: the VM goes on: {}; a second signal ends it regardless", one_line(&error));
        }
        arrived.next();
        std::process::exit(Exit::Failure as i32);
    })?;
    Ok(())
}

fn stop(socket: &Path) -> Result<()> {
    Vm::open_socket(socket)?.ask(&Request::Stop).map(drop)
}

fn ended(name: &str, outcome: Outcome) -> Result<()> {
    match outcome {
        Outcome::Ended(ExitReason::Failed(why)) => bail!("`{name}` failed: {why}"),
        Outcome::Ended(reason) => say!("`{name}` ended: {reason}"),
        Outcome::Migrated(report) => say!("`{}` has been migrated away", report.name),
        Outcome::Discarded => say!("`{name}` runs on the other host and is discarded here"),
    }
    Ok(())
}

/// An error of the VMM, with its exit code.
fn of_kvm(error: Error) -> anyhow::Error {
    let exit = match error {
        Error::Config(_) => Exit::Usage,
        Error::NameTaken(_) | Error::File { .. } | Error::Kernel(_) | Error::Host(_) | Error::Kvm { .. } => {
            Exit::Environment
        }
        Error::Peer(_) => Exit::Peer,
        _ => Exit::Failure,
    };
    failure(exit, error.to_string())
}

/// An error of a migration to this host, with its exit code.
fn of_receive(error: ReceiveError) -> anyhow::Error {
    match error {
        ReceiveError::Local(error) => of_kvm(error),
        ReceiveError::Migration(error) => of_migration(error),
        other => failure(Exit::Failure, other.to_string()),
    }
}
