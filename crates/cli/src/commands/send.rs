//! `pagewarp send`: tells a VM process to migrate, shows how it goes, and cancels on Ctrl-C.

use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result, bail};
use pagewarp_kvm::control::{Event, MigrateOptions, Request};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::address::Use;
use crate::args::SendArgs;
use crate::exit::{Exit, exit_of, failure, one_line};
use crate::net::{look_at_endurance, usable};
use crate::output::print_report;
use crate::progress::ProgressDisplay;
use crate::report::source_report;
use crate::say;
use crate::vm::Vm;

/// Runs `pagewarp send`.
pub(super) fn send(args: &SendArgs, run_dir: &Path) -> Result<()> {
    let to = usable(&args.to, Use::Connect, &args.encryption)?;
    look_at_endurance(&args.endurance, args.peer_timeout);
    // The VM's process has a directory of its own.
    let absolute = |path: &Option<PathBuf>| path.as_deref().map(std::path::absolute).transpose();
    let trace_file = absolute(&args.trace).context("cannot tell where the trace is to go")?;
    let tls_dir = absolute(&args.encryption.tls_dir).context("cannot tell where the certificates are")?;
    let options = MigrateOptions { trace_file, tls_dir, ..args.options() };
    let mut vm = Vm::open(run_dir, &args.name)?;
    cancel_on_signal(run_dir.to_owned(), args.name.clone())?;
    let mut display = ProgressDisplay::for_stderr(args.json_events);
    let request = Request::Migrate { to: to.to_string(), options: Box::new(options) };
    let mut warnings = Vec::new();
    let outcome = vm.follow(&request, |event| match event {
        Event::Progress(progress) => display.update(progress),
        Event::Warning { message } => warnings.push(message.clone()),
        _ => {}
    });
    display.finish();
    for warning in warnings {
        say!("warning: {warning}");
    }
    let outcome =
        outcome.map_err(with_hint).with_context(|| format!("cannot migrate `{}` to {to}", args.name))?;
    let report = match outcome {
        Event::Done(report) => report,
        other => bail!("the VM process answered {other:?} to a migration; its version does not fit this one"),
    };
    let text = if args.json {
        serde_json::to_string_pretty(&report)? + "\n"
    } else {
        source_report(&report, args.verify)
    };
    print_report(&text);
    verdict(&args.name, args.verify, report.verified == Some(true))
}

/// A migration that did not converge: the options that could change it. One that would have damaged the VM: where it is.
fn with_hint(error: anyhow::Error) -> anyhow::Error {
    match exit_of(&error) {
        Exit::NotConverged => {}
        Exit::Differs => {
            return failure(Exit::Differs, format!("{}; the VM goes on here", one_line(&error)));
        }
        _ => return error,
    }
    failure(
        Exit::NotConverged,
        format!(
            "{}; --max-time and --max-epochs set the limits, --on-limit what happens there, --downtime-ms when to switch over",
            one_line(&error)
        ),
    )
}

/// The VM has moved. That it was not verified, because its process is of a version that does not do so before the hand-over, must not look
/// like success.
fn verdict(name: &str, asked: bool, verified: bool) -> Result<()> {
    if !asked || verified {
        return Ok(());
    }
    bail!(
        "`{name}` runs on the destination, and is not verified: its process does not say that it has compared the memory; its version does \
         not fit this one"
    )
}

/// The first SIGINT or SIGTERM cancels the migration and waits for its end; the second one leaves.
fn cancel_on_signal(run_dir: PathBuf, name: String) -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("cannot watch for Ctrl-C")?;
    thread::Builder::new().name("signals".into()).spawn(move || {
        let mut arrived = signals.forever();
        arrived.next();
        say!("cancelling; the VM stays here. Ctrl-C again leaves without waiting");
        // A second connection: the first one is busy with the migration's events.
        if let Err(error) = Vm::open(&run_dir, &name).and_then(|mut vm| vm.ask(&Request::Cancel)) {
            say!("warning: the cancel request failed: {error:#}");
        }
        arrived.next();
        say!("left; `pagewarp status {name}` tells how the migration ends");
        std::process::exit(Exit::Failure as i32);
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_that_is_not_verified_is_no_success() {
        let error = verdict("db1", true, false).unwrap_err();
        assert_eq!(exit_of(&error), Exit::Failure);
        assert!(error.to_string().contains("runs on the destination"), "{error}");
        for (asked, verified) in [(true, true), (false, true), (false, false)] {
            verdict("db1", asked, verified).unwrap();
        }
    }

    #[test]
    fn what_does_not_converge_comes_with_the_options_that_could_help() {
        let hinted = with_hint(failure(Exit::NotConverged, "no end in sight"));
        assert_eq!(exit_of(&hinted), Exit::NotConverged);
        let text = hinted.to_string();
        for option in ["no end in sight", "--max-time", "--max-epochs", "--on-limit", "--downtime-ms"] {
            assert!(text.contains(option), "{text}");
        }
        assert_eq!(with_hint(failure(Exit::Link, "gone")).to_string(), "gone");
    }
}
