//! `pagewarp send`: tells a VM process to migrate, shows how it goes, and cancels on Ctrl-C.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result, bail};
use pagewarp_kvm::control::{Event, Request};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::warn_plaintext;
use crate::address::{Use, check};
use crate::args::SendArgs;
use crate::exit::Exit;
use crate::progress::ProgressDisplay;
use crate::report::source_report;
use crate::vm::Vm;

/// Runs `pagewarp send`.
pub(super) fn send(args: &SendArgs, run_dir: &Path) -> Result<()> {
    let to = check(&args.to, Use::Connect, args.plaintext)?;
    if to.exposed {
        warn_plaintext(to.address);
    }
    let mut vm = Vm::open(run_dir, &args.name)?;
    cancel_on_signal(run_dir.to_owned(), args.name.clone())?;
    let mut display = ProgressDisplay::for_stderr(args.json_events);
    let request = Request::Migrate { to: to.address.to_string(), options: args.options() };
    let outcome = vm.follow(&request, |progress| display.update(progress));
    display.finish();
    let report = match outcome.with_context(|| format!("cannot migrate `{}` to {}", args.name, to.address))? {
        Event::Done(report) => report,
        other => bail!("the VM process answered {other:?} to a migration; its version does not fit this one"),
    };
    let text = if args.json { serde_json::to_string_pretty(&report)? + "\n" } else { source_report(&report) };
    std::io::stdout().write_all(text.as_bytes()).context("cannot print the report")
}

/// The first SIGINT or SIGTERM cancels the migration and waits for its end; the second one leaves.
fn cancel_on_signal(run_dir: PathBuf, name: String) -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("cannot watch for Ctrl-C")?;
    thread::Builder::new().name("signals".into()).spawn(move || {
        let mut arrived = signals.forever();
        arrived.next();
        eprintln!("cancelling; the VM stays here. Ctrl-C again leaves without waiting");
        // A second connection: the first one is busy with the migration's events.
        if let Err(error) = Vm::open(&run_dir, &name).and_then(|mut vm| vm.ask(&Request::Cancel)) {
            eprintln!("warning: the cancel request failed: {error:#}");
        }
        arrived.next();
        eprintln!("left; `pagewarp status {name}` tells how the migration ends");
        std::process::exit(Exit::Failure as i32);
    })?;
    Ok(())
}
