//! The `pagewarp` program.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use pagewarp_cli::args::Cli;
use pagewarp_cli::commands;
use pagewarp_cli::exit::{Exit, exit_of, one_line};

fn main() -> ExitCode {
    let cli = Cli::parse();
    start_logging(cli.global.verbose);
    match commands::run(cli) {
        Ok(()) => Exit::Ok.into(),
        Err(error) => {
            let exit = exit_of(&error);
            if exit != Exit::Ok {
                eprintln!("error: {}", one_line(&error));
            }
            exit.into()
        }
    }
}

fn start_logging(verbose: u8) {
    let level = ["warn", "info", "debug", "trace"][usize::from(verbose).min(3)];
    let filter = tracing_subscriber::EnvFilter::try_from_env("PAGEWARP_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).init();
}
