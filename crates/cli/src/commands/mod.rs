//! One module per group of commands: from what was typed to ready objects, and doing it.

mod codec;
mod demo;
mod devices;
mod docs;
mod run;
mod send;
mod vm;

use std::net::SocketAddr;

use anyhow::Result;
use pagewarp_kvm::control::run_dir;

use crate::args::{Cli, Command};

/// Does what the command line says.
pub fn run(cli: Cli) -> Result<()> {
    let run_dir = run_dir(cli.global.run_dir);
    match cli.command {
        Command::Run(args) => run::run(&args, run_dir),
        Command::Receive(args) => run::receive(&args, run_dir),
        Command::Send(args) => send::send(&args, &run_dir),
        Command::Status(args) => vm::status(&args, &run_dir),
        Command::Cancel(args) => vm::cancel(&args, &run_dir),
        Command::Resolve(args) => vm::resolve(&args, &run_dir),
        Command::Demo(args) => demo::demo(&args),
        Command::Devices(args) => devices::devices(&args),
        Command::Codec(args) => codec::codec(&args),
        Command::Completions { shell } => docs::completions(shell),
        Command::Man { dir } => docs::man(dir.as_deref()),
    }
}

/// Says once that guest memory crosses a network in the clear.
fn warn_plaintext(address: SocketAddr) {
    eprintln!("warning: guest memory crosses the network to or from {address} unencrypted (--plaintext)");
}
