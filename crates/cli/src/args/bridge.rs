//! `pagewarp bridge`, and the options that it shares with `pagewarp qemu`.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Args, Subcommand, ValueEnum};
use pagewarp_qemu::bridge::Compression;
use pagewarp_qemu::policy::Level;

use super::link::Endurance;
use super::seccomp::SeccompChoice;
use super::tls::{Admission, Encryption, Expectation};
use crate::backend::BackendName;
use crate::units::{HistoryChoice, seconds};

/// `pagewarp bridge`.
#[derive(Clone, Debug, Args)]
pub struct BridgeArgs {
    /// Which end.
    #[command(subcommand)]
    pub command: BridgeCommand,
}

/// The two ends of a bridge.
#[derive(Clone, Debug, Subcommand)]
pub enum BridgeCommand {
    /// On the source host: take migrations from QEMU's Unix socket to a destination bridge
    Source(BridgeSourceArgs),
    /// On the destination host: take migrations from source bridges to QEMU's Unix socket
    Destination(BridgeDestinationArgs),
}

/// `pagewarp bridge source`.
#[derive(Clone, Debug, Args)]
#[command(group = ArgGroup::new("socket").required(true))]
pub struct BridgeSourceArgs {
    /// The socket to make, for QEMU's `migrate` with `unix:PATH`
    #[arg(long, value_name = "PATH", group = "socket")]
    pub unix: Option<PathBuf>,
    /// Instead of a socket: the port of this host to listen on, 127.0.0.1:PORT, for QEMU's `migrate` with `tcp:127.0.0.1:PORT`
    #[arg(long, value_name = "ADDR", group = "socket")]
    pub tcp: Option<SocketAddr>,
    /// The destination bridge, HOST:PORT; anything but loopback needs --tls-dir or --plaintext
    #[arg(long, value_name = "ADDR")]
    pub connect: String,
    /// End after one migration, with its exit code
    #[arg(long)]
    pub once: bool,
    /// How hard to compress: as it pays, or always the same
    #[arg(long, value_enum, default_value = "auto")]
    pub compression: CompressionChoice,
    /// Compare a hash of what is read from the source QEMU with one of what is written into the destination QEMU; cut the connections if they differ
    #[arg(long)]
    pub verify: bool,
    /// What both ends share.
    #[command(flatten)]
    pub common: BridgeOptions,
    /// What the other end has to be.
    #[command(flatten)]
    pub expectation: Expectation,
    /// Print a report of each migration as one line of JSON to standard output
    #[arg(long)]
    pub json: bool,
}

/// `pagewarp bridge destination`.
#[derive(Clone, Debug, Args)]
#[command(group = ArgGroup::new("socket").required(true))]
pub struct BridgeDestinationArgs {
    /// Address to listen on, HOST:PORT; anything but loopback needs --tls-dir or --plaintext
    #[arg(long, value_name = "ADDR")]
    pub listen: String,
    /// The socket where QEMU listens, or will: that of `-incoming unix:PATH` or `migrate-incoming`
    #[arg(long, value_name = "PATH", group = "socket")]
    pub unix: Option<PathBuf>,
    /// Instead of a socket: the port of this host where QEMU listens, or will, 127.0.0.1:PORT
    #[arg(long, value_name = "ADDR", group = "socket")]
    pub tcp: Option<SocketAddr>,
    /// End after one migration, with its exit code
    #[arg(long)]
    pub once: bool,
    /// End after so many migrations, however they ended. There is never more than one at a time [default: no limit]
    #[arg(long, value_name = "N", conflicts_with = "once")]
    pub max_sessions: Option<NonZeroU32>,
    /// What both ends share.
    #[command(flatten)]
    pub common: BridgeOptions,
    /// Who may connect.
    #[command(flatten)]
    pub admission: Admission,
    /// Print a report of each migration as one line of JSON to standard output
    #[arg(long)]
    pub json: bool,
}

/// Options of both ends.
#[derive(Clone, Debug, Args)]
pub struct BridgeOptions {
    /// Who encodes and decodes: `cpu`, `gpu`, `gpu:N` for a device that `pagewarp devices` lists, or `auto` for the faster one
    #[arg(long, value_name = "auto|cpu|gpu[:N]", default_value = "auto")]
    pub backend: BackendName,
    /// Memory for page versions sent before, the bases of deltas; the smaller one of both hosts counts; 0 switches deltas off. `auto` is an eighth of what
    /// this host has available, and no more than the VM has (512M for a `bridge`, which does not know the VM)
    #[arg(long, value_name = "auto|SIZE", default_value = "auto")]
    pub history: HistoryChoice,
    /// Threads that encode or decode [default: half of the processors, at most 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub threads: Option<u32>,
    /// How long a peer that cannot be reached is waited for: seconds, or a number with ms, s, m or h
    #[arg(long, value_name = "TIME", default_value = "10", value_parser = seconds)]
    pub peer_timeout: Duration,
    /// How long a lost network is waited for.
    #[command(flatten)]
    pub endurance: Endurance,
    /// Whether the connections are encrypted.
    #[command(flatten)]
    pub encryption: Encryption,
    /// Refuse system calls that this process has no business to make; `log` lets them pass and makes the kernel log them
    #[arg(long, value_enum, default_value = "on", hide_possible_values = true, value_name = "on|log|off")]
    pub seccomp: SeccompChoice,
}

/// How hard to compress.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CompressionChoice {
    /// What is best for the link and this host, batch by batch
    Auto,
    /// Nothing: pages pass as they are
    Pass,
    /// Zero pages, unchanged pages and small changes
    Fast,
    /// These, and a quick LZ4 for all other pages of a batch together
    Lz4Batch,
    /// These, and LZ4 page by page
    Lz4,
    /// zstd for what is no delta
    Zstd,
}

impl From<CompressionChoice> for Compression {
    fn from(choice: CompressionChoice) -> Compression {
        match choice {
            CompressionChoice::Auto => Compression::Auto,
            CompressionChoice::Pass => Compression::Always(Level::Pass),
            CompressionChoice::Fast => Compression::Always(Level::Fast),
            CompressionChoice::Lz4Batch => Compression::Always(Level::Lz4Batch),
            CompressionChoice::Lz4 => Compression::Always(Level::Lz4),
            CompressionChoice::Zstd => Compression::Always(Level::Zstd),
        }
    }
}
