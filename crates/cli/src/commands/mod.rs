//! One module per group of commands: from what was typed to ready objects, and doing it.

mod bridge;
mod certs;
mod codec;
mod demo;
mod devices;
mod docs;
mod qemu;
mod run;
mod send;
mod vm;

use anyhow::{Context, Result};
use pagewarp_engine::control::MigrationControl;
use pagewarp_engine::report::Phase;
use pagewarp_kvm::control::run_dir;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::args::{Cli, Command};
use crate::exit::Exit;
use crate::protect::keep_private;
use crate::say;

/// Does what the command line says.
pub fn run(cli: Cli) -> Result<()> {
    let run_dir = run_dir(cli.global.run_dir);
    if holds_guest_memory(&cli.command) {
        keep_private()?;
    }
    match cli.command {
        Command::Run(args) => run::run(&args, run_dir),
        Command::Receive(args) => run::receive(&args, run_dir),
        Command::Send(args) => send::send(&args, &run_dir),
        Command::Status(args) => vm::status(&args, &run_dir),
        Command::Cancel(args) => vm::cancel(&args, &run_dir),
        Command::Resolve(args) => vm::resolve(&args, &run_dir),
        Command::Qemu(args) => qemu::qemu(&args),
        Command::Bridge(args) => bridge::bridge(&args),
        Command::Demo(args) => demo::demo(&args),
        Command::Certs(args) => certs::certs(&args),
        Command::Devices(args) => devices::devices(&args),
        Command::Codec(args) => codec::codec(&args),
        Command::Completions { shell } => docs::completions(shell),
        Command::Man { dir } => docs::man(dir.as_deref()),
    }
}

/// Whether the command's process gets to see what is in the memory of a guest. The demo does not count: its guests are its own, and have no secrets.
fn holds_guest_memory(command: &Command) -> bool {
    matches!(
        command,
        Command::Run(_) | Command::Receive(_) | Command::Qemu(_) | Command::Bridge(_) | Command::Codec(_)
    )
}

/// The first SIGINT or SIGTERM cancels and waits for the end; the second one ends the process. After the commit of a hand-over nothing can be cancelled, and where
/// the VM runs is not known before the end.
fn cancel_on_signal(control: MigrationControl, message: &'static str) -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("cannot watch for Ctrl-C")?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        let mut arrived = signals.forever();
        arrived.next();
        let is_committed = || matches!(control.progress().phase, Phase::Committed | Phase::Done);
        if is_committed() {
            say!("too late to cancel: the hand-over is committed; waiting for its end");
        } else {
            say!("{message}");
        }
        control.cancel();
        arrived.next();
        let exit = if is_committed() { Exit::InDoubt } else { Exit::Failure };
        std::process::exit(exit as i32);
    })?;
    Ok(())
}
