//! The `pagewarp` program.
#![forbid(unsafe_code)]

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use pagewarp_cli::args::Cli;
use pagewarp_cli::commands;
use pagewarp_cli::exit::{Exit, exit_of, is_broken_pipe, one_line};

/// Overwrites all that is freed: buffers held pages of guests, and what is freed here is handed out again here, or lies around until somebody else needs
/// memory. Nothing is freed while a migration is under way but by the way: buffers are used again and again.
#[global_allocator]
static ALLOCATOR: zeroizing_alloc::ZeroAlloc<std::alloc::System> =
    zeroizing_alloc::ZeroAlloc(std::alloc::System);

fn main() -> ExitCode {
    // Before anything starts a thread or loads Vulkan.
    pagewarp_gpu::switch_off_device_select();
    let cli = Cli::parse();
    start_logging(cli.global.verbose);
    match commands::run(cli) {
        Ok(()) => Exit::Ok.into(),
        Err(error) if is_broken_pipe(&error) => Exit::Ok.into(),
        Err(error) => {
            pagewarp_cli::say!("error: {}", one_line(&error));
            exit_of(&error).into()
        }
    }
}

fn start_logging(verbose: u8) {
    let level = ["warn", "info", "debug", "trace"][usize::from(verbose).min(3)];
    let filter = tracing_subscriber::EnvFilter::try_from_env("PAGEWARP_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        // A log that cannot be written is lost. It would be told on standard error, where it cannot be written, and end the thread.
        .log_internal_errors(false)
        .init();
}
