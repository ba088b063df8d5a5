//! `pagewarp qemu`.

use std::num::NonZeroU8;
use std::path::PathBuf;

use clap::{ArgGroup, Args, Subcommand, ValueEnum};
use pagewarp_qemu::manage::RouteWish;

use super::bridge::{BridgeOptions, CompressionChoice};
use super::tls::{Admission, Expectation};

/// `pagewarp qemu`.
#[derive(Clone, Debug, Args)]
pub struct QemuArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: QemuCommand,
}

/// What can be done with a QEMU.
#[derive(Clone, Debug, Subcommand)]
pub enum QemuCommand {
    /// On the destination host: wait for a VM and run it in a QEMU that was started with `-incoming defer`
    Receive(QemuReceiveArgs),
    /// On the source host: migrate the VM of a QEMU to a `pagewarp qemu receive`
    Migrate(QemuMigrateArgs),
    /// Decide about a VM that its QEMU keeps paused because the hand-over is in doubt
    Resolve(QemuResolveArgs),
}

/// `pagewarp qemu receive`.
#[derive(Clone, Debug, Args)]
pub struct QemuReceiveArgs {
    /// The QMP socket of the destination QEMU
    #[arg(long, value_name = "SOCK")]
    pub qmp: PathBuf,
    /// Address to listen on, HOST:PORT; anything but loopback needs --tls-dir or --plaintext
    #[arg(long, value_name = "ADDR")]
    pub listen: String,
    /// Accept only a VM with this name or UUID in the source QEMU (`-name`, `-uuid`); may be given several times [default: any]
    #[arg(long, value_name = "NAME|UUID")]
    pub allow_vm: Vec<String>,
    /// Where the socket between QEMU and pagewarp is made; both must be able to use it [default: a new directory]
    #[arg(long, value_name = "DIR")]
    pub socket_dir: Option<PathBuf>,
    /// What both ends share.
    #[command(flatten)]
    pub common: BridgeOptions,
    /// Who may connect.
    #[command(flatten)]
    pub admission: Admission,
    /// Print one JSON report to standard output
    #[arg(long)]
    pub json: bool,
}

/// `pagewarp qemu migrate`.
#[derive(Clone, Debug, Args)]
pub struct QemuMigrateArgs {
    /// The QMP socket of the source QEMU
    #[arg(long, value_name = "SOCK")]
    pub qmp: PathBuf,
    /// The destination, HOST:PORT, where `pagewarp qemu receive` listens; anything but loopback needs --tls-dir or --plaintext
    #[arg(long, value_name = "ADDR")]
    pub to: String,
    /// Connections for pages beside the main one (QEMU's multifd), 1 to 255 [default: QEMU sends everything over one connection]
    #[arg(long, value_name = "N", value_parser = channels)]
    pub multifd: Option<NonZeroU8>,
    /// QEMU switches over when it expects the downtime to be at most this
    #[arg(long, value_name = "MS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    pub downtime_ms: u64,
    /// How hard to compress: as it pays, or always the same
    #[arg(long, value_enum, default_value = "auto")]
    pub compression: CompressionChoice,
    /// Whether QEMU's stream goes through the bridge, or from one QEMU to the other with nobody in between. `auto` measures, and steps aside where the link is faster than a bridge
    /// on these processors. A `direct` migration is not compressed, has no check of its pages but TCP's and does not outlast a loss of the network; nothing is direct with --tls-dir
    #[arg(
        long,
        value_enum,
        default_value = "auto",
        hide_possible_values = true,
        value_name = "auto|bridge|direct"
    )]
    pub route: RouteChoice,
    /// Compare a hash of what is read from the source QEMU with one of what is written into the destination QEMU; no hand-over if they differ
    #[arg(long)]
    pub verify: bool,
    /// End the source QEMU once the VM runs on the destination, instead of leaving it paused
    #[arg(long)]
    pub quit_source: bool,
    /// Where the socket between QEMU and pagewarp is made; both must be able to use it [default: a new directory]
    #[arg(long, value_name = "DIR")]
    pub socket_dir: Option<PathBuf>,
    /// What both ends share.
    #[command(flatten)]
    pub common: BridgeOptions,
    /// What the other end has to be.
    #[command(flatten)]
    pub expectation: Expectation,
    /// Print one JSON report to standard output
    #[arg(long)]
    pub json: bool,
    /// Print progress as JSON lines to standard error
    #[arg(long)]
    pub json_events: bool,
}

/// The route of QEMU's stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RouteChoice {
    /// The faster one
    Auto,
    /// Through the bridge
    Bridge,
    /// From QEMU to QEMU
    Direct,
}

impl From<RouteChoice> for RouteWish {
    fn from(choice: RouteChoice) -> RouteWish {
        match choice {
            RouteChoice::Auto => RouteWish::Auto,
            RouteChoice::Bridge => RouteWish::Bridge,
            RouteChoice::Direct => RouteWish::Direct,
        }
    }
}

/// Parses a number of multifd channels: QEMU takes up to 255.
fn channels(text: &str) -> Result<NonZeroU8, String> {
    text.parse().map_err(|_| "expected a number from 1 to 255".to_owned())
}

/// `pagewarp qemu resolve`.
#[derive(Clone, Debug, Args)]
#[command(group = ArgGroup::new("decision").required(true))]
pub struct QemuResolveArgs {
    /// The QMP socket of the source QEMU
    #[arg(long, value_name = "SOCK")]
    pub qmp: PathBuf,
    /// The VM surely does not run on the destination, and never will: run it here
    #[arg(long, group = "decision")]
    pub resume: bool,
    /// The VM runs on the destination: end this QEMU
    #[arg(long, group = "decision")]
    pub discard: bool,
}
