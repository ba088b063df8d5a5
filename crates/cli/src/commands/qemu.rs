//! `pagewarp qemu`: migrations of QEMU's VMs from beginning to end.

use std::io::ErrorKind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use pagewarp_engine::control::MigrationControl;
use pagewarp_engine::error::MigrationError;
use pagewarp_qemu::bridge::BridgeConfig;
use pagewarp_qemu::manage::{self, Decision, ManageConfig, ManageError, Receiver};
use pagewarp_qemu::qmp::check::Wish;

use super::bridge::config;
use super::cancel_on_signal;
use crate::args::{
    CompressionChoice, QemuArgs, QemuCommand, QemuMigrateArgs, QemuReceiveArgs, QemuResolveArgs,
};
use crate::backend::Role;
use crate::exit::{Exit, exit_of, failure, of_migration, one_line};
use crate::net::{acceptor, connector};
use crate::output::print_report;
use crate::progress::ProgressDisplay;
use crate::report::{qemu_receive_report, qemu_report};
use crate::sandbox::{Computing, Process, enter};
use crate::say;
use crate::units::HistoryChoice;

/// How often progress is shown.
const SHOW: Duration = Duration::from_millis(200);
/// How long a monitor is waited for when resolving.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Runs `pagewarp qemu`.
pub(super) fn qemu(args: &QemuArgs) -> Result<()> {
    match &args.command {
        QemuCommand::Receive(args) => receive(args),
        QemuCommand::Migrate(args) => migrate(args),
        QemuCommand::Resolve(args) => resolve(args),
    }
}

fn receive(args: &QemuReceiveArgs) -> Result<()> {
    let acceptor = acceptor(&args.listen, &args.common.encryption, &args.admission, &args.common.endurance)?;
    let config = ManageConfig {
        history_follows_vm: args.common.history == HistoryChoice::Auto,
        allowed_vms: args.allow_vm.clone(),
        socket_dir: args.socket_dir.clone(),
        ..ManageConfig::new(config(&args.common, Role::Decode, CompressionChoice::Auto)?)
    };
    let computing = Computing::with(&*config.bridge.backend);
    let local = acceptor.local();
    let failed = |error| of_manage(error).context(format!("cannot receive a VM on {local}"));
    let receiver = Receiver::connect(&args.qmp, config).map_err(failed)?;
    let control = MigrationControl::new();
    cancel_on_signal(control.clone(), "cancelling; the VM stays with the source")?;
    enter(args.common.seccomp, Process::Bridge, computing)?;
    say!("waiting for a VM on {local} for the QEMU at {}", args.qmp.display());
    let report = manage::receive(receiver, &*acceptor, &control).map_err(failed)?;
    if args.json {
        let text = serde_json::to_string_pretty(&report)? + "\n";
        print_report(&text);
    } else {
        say!("{}", qemu_receive_report(&report).trim_end());
    }
    Ok(())
}

fn migrate(args: &QemuMigrateArgs) -> Result<()> {
    let common = &args.common;
    let connector =
        connector(&args.to, &common.encryption, &args.expectation, &common.endurance, common.peer_timeout)?;
    let config = ManageConfig {
        history_follows_vm: args.common.history == HistoryChoice::Auto,
        wish: Wish { multifd: args.multifd, downtime_ms: args.downtime_ms, ..Wish::default() },
        socket_dir: args.socket_dir.clone(),
        quit_source: args.quit_source,
        route: args.route.into(),
        ..ManageConfig::new(BridgeConfig {
            verify: args.verify,
            ..config(&args.common, Role::Encode, args.compression)?
        })
    };
    let control = MigrationControl::new();
    cancel_on_signal(control.clone(), "cancelling; the VM stays here")?;
    let mut display = ProgressDisplay::for_stderr(args.json_events);
    enter(args.common.seccomp, Process::Bridge, Computing::with(&*config.bridge.backend))?;
    let over = AtomicBool::new(false);
    let result = std::thread::scope(|scope| {
        let (control, over, display) = (&control, &over, &mut display);
        let connector = &*connector;
        scope.spawn(move || {
            while !over.load(Ordering::Acquire) {
                display.update(&control.progress());
                std::thread::park_timeout(SHOW);
            }
            display.finish();
        });
        let result = manage::migrate(&args.qmp, connector, &config, control);
        over.store(true, Ordering::Release);
        result
    });
    let report = result.map_err(|error| {
        let what = format!("cannot migrate the VM of the QEMU at {} to {}", args.qmp.display(), args.to);
        let advice = advice(&error);
        let error = of_manage(error);
        match advice {
            Some(advice) => failure(exit_of(&error), format!("{what}: {}; {advice}", one_line(&error))),
            None => error.context(what),
        }
    })?;
    let text = if args.json { serde_json::to_string_pretty(&report)? + "\n" } else { qemu_report(&report) };
    print_report(&text);
    Ok(())
}

fn resolve(args: &QemuResolveArgs) -> Result<()> {
    let decision = if args.resume { Decision::Resume } else { Decision::Discard };
    manage::resolve(&args.qmp, decision, RESOLVE_TIMEOUT).map_err(of_manage)?;
    say!("{}", if args.resume { "the VM runs here again" } else { "the VM was ended here" });
    Ok(())
}

/// What the error does not say: where the VM is after it, and what to do about a peer that is not there.
fn advice(error: &ManageError) -> Option<&'static str> {
    match error {
        // It says itself, or nothing is known; a VM that was migrated before may run elsewhere.
        ManageError::InDoubt { .. }
        | ManageError::StillPaused { .. }
        | ManageError::Qmp(_)
        | ManageError::Refused(_) => None,
        ManageError::Migration(MigrationError::Link { source, .. })
            if source.kind() == ErrorKind::ConnectionRefused =>
        {
            Some(
                "start `pagewarp qemu receive` there first, on this port; if it runs, see whether a firewall refuses the port; the VM stays here",
            )
        }
        _ => Some("the VM stays here"),
    }
}

/// An error with its exit code.
fn of_manage(error: ManageError) -> anyhow::Error {
    let exit = match error {
        ManageError::Migration(error) => return of_migration(error),
        ManageError::Qmp(_) | ManageError::Refused(_) | ManageError::Host(_) => Exit::Environment,
        ManageError::Qemu { .. } => Exit::Peer,
        ManageError::InDoubt { .. } | ManageError::Unconfirmed { .. } => Exit::InDoubt,
        _ => Exit::Failure,
    };
    failure(exit, error.to_string())
}
