//! `pagewarp bridge`: the two ends, by hand.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use pagewarp_engine::control::MigrationControl;
use pagewarp_engine::error::MigrationError;
use pagewarp_engine::transport::random_session;
use pagewarp_qemu::bridge::{BridgeConfig, DestinationBridge, Endpoint, SourceBridge};
use serde::Serialize;

use super::cancel_on_signal;
use crate::args::{
    BridgeArgs, BridgeCommand, BridgeDestinationArgs, BridgeOptions, BridgeSourceArgs, CompressionChoice,
};
use crate::backend::{self, Role, Task};
use crate::exit::{Exit, Failure, exit_of, failure, of_migration, one_line};
use crate::net::{acceptor, connector};
use crate::output::print_report;
use crate::report::{destination_bridge_report, source_bridge_report};
use crate::sandbox::{Computing, Process, enter};
use crate::say;
use crate::units::HistoryChoice;

/// Between a migration that failed and waiting for the next: a peer that refuses must not be asked without end.
const PAUSE: Duration = Duration::from_millis(200);

/// Runs `pagewarp bridge`.
pub(super) fn bridge(args: &BridgeArgs) -> Result<()> {
    match &args.command {
        BridgeCommand::Source(args) => source(args),
        BridgeCommand::Destination(args) => destination(args),
    }
}

fn source(args: &BridgeSourceArgs) -> Result<()> {
    let common = &args.common;
    let connector = connector(
        &args.connect,
        &common.encryption,
        &args.expectation,
        &common.endurance,
        common.peer_timeout,
    )?;
    let config =
        BridgeConfig { verify: args.verify, ..config(&args.common, Role::Encode, args.compression)? };
    let computing = Computing::with(&*config.backend);
    let place = endpoint(args.unix.as_deref(), args.tcp)?;
    let bridge = SourceBridge::bind(place.clone(), &*connector, config).with_context(|| {
        let message =
            format!("cannot listen on {place}; another process may be listening there, or the directory may be missing");
        Failure::new(Exit::Environment, message)
    })?;
    let control = MigrationControl::new();
    cancel_on_signal(control.clone(), "ending; a migration under way is cancelled")?;
    enter(args.common.seccomp, Process::Bridge, computing)?;
    say!("waiting for QEMU on {place} for {}", connector.peer());
    let run = || bridge.run(random_session()?, &control);
    let sessions = if args.once { Sessions::One } else { Sessions::NoLimit };
    let result = repeat(sessions, args.json, &control, run, source_bridge_report);
    if let Endpoint::Unix(path) = place {
        // Nobody else listens there.
        let _ = std::fs::remove_file(path);
    }
    result
}

fn destination(args: &BridgeDestinationArgs) -> Result<()> {
    let acceptor = acceptor(&args.listen, &args.common.encryption, &args.admission, &args.common.endurance)?;
    let config = config(&args.common, Role::Decode, CompressionChoice::Auto)?;
    let computing = Computing::with(&*config.backend);
    let place = endpoint(args.unix.as_deref(), args.tcp)?;
    let bridge = DestinationBridge::new(&*acceptor, place.clone(), config);
    let control = MigrationControl::new();
    cancel_on_signal(control.clone(), "ending; a migration under way is cancelled")?;
    let local = acceptor.local();
    enter(args.common.seccomp, Process::Bridge, computing)?;
    say!("waiting for a source bridge on {local} for QEMU at {place}");
    let sessions = match args.max_sessions {
        _ if args.once => Sessions::One,
        Some(most) => Sessions::AtMost(most.get()),
        None => Sessions::NoLimit,
    };
    repeat(sessions, args.json, &control, || bridge.run(None, &control), destination_bridge_report)
}

/// Where QEMU and this bridge meet.
fn endpoint(unix: Option<&Path>, tcp: Option<SocketAddr>) -> Result<Endpoint> {
    let place = match (unix, tcp) {
        (Some(path), _) => Endpoint::Unix(path.to_owned()),
        (None, Some(address)) => Endpoint::Tcp(address),
        // The command line asks for one of them.
        (None, None) => {
            bail!(failure(Exit::Usage, "name a socket with --unix, or a port of this host with --tcp"))
        }
    };
    if !place.is_local() {
        bail!(failure(
            Exit::Usage,
            format!(
                "{place} is not on this host's loopback: between QEMU and its bridge memory is unencrypted, so use 127.0.0.1"
            )
        ));
    }
    Ok(place)
}

/// How many migrations there are to be, one after another.
#[derive(Clone, Copy)]
enum Sessions {
    /// One, and how it ended is how the bridge ends.
    One,
    /// So many, however they end.
    AtMost(u32),
    NoLimit,
}

/// Runs one migration after another.
fn repeat<R: Serialize>(
    sessions: Sessions,
    json: bool,
    control: &MigrationControl,
    run: impl Fn() -> Result<R, MigrationError>,
    text: impl Fn(&R) -> String,
) -> Result<()> {
    let once = matches!(sessions, Sessions::One);
    let mut ended = 0;
    loop {
        match run() {
            Ok(report) => {
                let text = if json { serde_json::to_string(&report)? + "\n" } else { text(&report) };
                print_report(&text);
            }
            Err(error) if once || control.is_cancelled() => {
                let error = with_advice(error);
                // Ending a bridge that waits is no failure.
                return if !once && exit_of(&error) == Exit::Cancelled { Ok(()) } else { Err(error) };
            }
            Err(error) => {
                say!("the migration failed: {}", one_line(&with_advice(error)));
                std::thread::sleep(PAUSE);
            }
        }
        ended += 1;
        if once || matches!(sessions, Sessions::AtMost(most) if ended >= most) {
            return Ok(());
        }
    }
}

/// An error with its exit code, and with what to do about a destination that is not there.
fn with_advice(error: MigrationError) -> anyhow::Error {
    let is_nobody = matches!(
        &error,
        MigrationError::Link { doing, source, .. } if doing == "connecting" && source.kind() == ErrorKind::ConnectionRefused
    );
    let error = of_migration(error);
    if !is_nobody {
        return error;
    }
    failure(
        exit_of(&error),
        format!(
            "{}; start `pagewarp bridge destination` there first, on this port; if it runs, see whether a firewall refuses the port",
            one_line(&error)
        ),
    )
}

/// The bridge of this host.
pub(super) fn config(
    options: &BridgeOptions,
    role: Role,
    compression: CompressionChoice,
) -> Result<BridgeConfig> {
    let threads =
        options.threads.map_or_else(pagewarp_engine::config::default_threads, |threads| threads as usize);
    let task = Task { role, threads, link_bytes_per_s: None };
    let backend = backend::choose(options.backend, None, task, None)?;
    let suits = BridgeConfig::new(backend);
    let history_bytes = match options.history {
        HistoryChoice::Auto => suits.history_bytes,
        HistoryChoice::Size(size) => size.0,
    };
    Ok(BridgeConfig {
        compression: compression.into(),
        history_bytes,
        threads,
        peer_timeout: options.peer_timeout,
        ..suits
    })
}
