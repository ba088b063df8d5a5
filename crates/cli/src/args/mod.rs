//! The command line as typed. Values are parsed here; what they mean together is decided in [`crate::commands`].

mod bridge;
mod certs;
mod codec;
mod demo;
mod devices;
mod link;
mod qemu;
mod run;
mod seccomp;
mod send;
mod tls;
mod vm;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

pub use bridge::{
    BridgeArgs, BridgeCommand, BridgeDestinationArgs, BridgeOptions, BridgeSourceArgs, CompressionChoice,
};
pub use certs::CertsArgs;
pub use codec::{BenchArgs, CodecArgs, CodecCommand, Images};
pub use demo::{DemoArgs, DirtyRate, LinkRate, WorkloadChoice};
pub use devices::DevicesArgs;
pub use link::Endurance;
pub use qemu::{QemuArgs, QemuCommand, QemuMigrateArgs, QemuReceiveArgs, QemuResolveArgs, RouteChoice};
pub use run::{ConsoleTarget, Kernel, PlaceArgs, ReceiveArgs, RunArgs};
pub use seccomp::SeccompChoice;
pub use send::{LimitChoice, SendArgs};
pub use tls::{Admission, Encryption, Expectation};
pub use vm::{CancelArgs, ResolveArgs, StatusArgs};

/// Move running virtual machines between hosts, compressed.
///
/// Each VM is one process: `pagewarp run` starts one, `pagewarp receive` waits for one from another host. `pagewarp send` tells a VM
/// of this host, by its name, to move. `pagewarp demo` shows all of it on this machine.
#[derive(Debug, Parser)]
#[command(name = "pagewarp", version, max_term_width = 110, propagate_version = true, after_long_help = EXIT_CODES)]
pub struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub global: GlobalArgs,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Shown by `--help`; a test compares it with [`crate::exit::Exit`].
pub(crate) const EXIT_CODES: &str = "\
Exit codes:
  0  success
  1  failure of another kind
  2  the command line makes no sense
  3  cancelled; the VM is where it was
  4  did not converge within the limits; the VM is where it was
  5  the peer refused, failed or broke the protocol; the VM is where it was
  6  the connection failed; the VM is where it was
  7  in doubt: committed but not confirmed; look at the destination, then `pagewarp resolve`
  8  no VM of that name runs on this host
  9  this host cannot do it (no /dev/kvm, too little memory, port or name in use, missing file)
  10  --verify found that the memory at the destination differs; the VM is where it was

Environment:
  PAGEWARP_LOG      what to log to standard error, for example `debug` or `pagewarp_engine=trace`
  PAGEWARP_RUN_DIR  default of --run-dir";

const COMMON: &str = "Common options";

/// Options of every command.
#[derive(Clone, Debug, Args)]
pub struct GlobalArgs {
    /// Log more to standard error: -v information, -vv debugging, -vvv everything
    #[arg(short, long, action = clap::ArgAction::Count, global = true, help_heading = COMMON)]
    pub verbose: u8,
    /// Directory of the control sockets of this host's VMs [default: $XDG_RUNTIME_DIR/pagewarp, else /run/pagewarp for root, /tmp/pagewarp-UID for others]
    #[arg(long, value_name = "DIR", global = true, help_heading = COMMON)]
    pub run_dir: Option<PathBuf>,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a VM
    Run(RunArgs),
    /// Wait for a VM from another host, then run it
    Receive(ReceiveArgs),
    /// Migrate a running VM to another host
    Send(SendArgs),
    /// Show the VMs of this host
    Status(StatusArgs),
    /// Cancel a migration; the VM goes on here
    Cancel(CancelArgs),
    /// Decide about a VM whose hand-over is in doubt
    Resolve(ResolveArgs),
    /// Migrate VMs of unmodified QEMU processes
    Qemu(QemuArgs),
    /// The two ends of the bridge that `qemu` uses, for migrations that something else starts
    Bridge(BridgeArgs),
    /// Migrate a test VM between two processes of this host, in every mode, and compare
    Demo(DemoArgs),
    /// Make a set of certificates to try TLS with
    Certs(CertsArgs),
    /// Show who can compute encodings on this host, CPU and GPUs, and how fast
    Devices(DevicesArgs),
    /// Encode, decode and measure memory images
    Codec(CodecArgs),
    /// Print a shell completion script
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page, or write all of them into a directory
    Man {
        /// Directory to write one page per command into
        dir: Option<PathBuf>,
    },
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::exit::Exit;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_help_lists_the_exit_codes() {
        for exit in Exit::ALL {
            let line = format!("  {}  {}\n", exit as u8, exit.meaning());
            assert!(EXIT_CODES.contains(&line), "missing: {line}");
        }
    }
}
