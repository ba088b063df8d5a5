//! `pagewarp send`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use pagewarp_codec::EncodingSet;
use pagewarp_engine::config::{OnLimit, default_threads};
use pagewarp_kvm::control::MigrateOptions;
use pagewarp_net::tls::host_of;

use super::link::Endurance;
use super::tls::{Encryption, Expectation};
use crate::backend::BackendName;
use crate::units::{ByteSize, Rate, seconds};

/// `pagewarp send`.
#[derive(Clone, Debug, Args)]
pub struct SendArgs {
    /// Name of the VM
    pub name: String,
    /// The destination, HOST:PORT; anything but loopback needs --tls-dir or --plaintext
    #[arg(long, value_name = "ADDR")]
    pub to: String,
    /// Data connections beside the control connection
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub connections: u32,
    /// Switch over when the expected downtime is at most this
    #[arg(long, value_name = "MS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    pub downtime_ms: u64,
    /// Send at most this much, on all connections together, for example 1Gbit or 100MB/s
    #[arg(long, value_name = "RATE")]
    pub bandwidth: Option<Rate>,
    /// Who encodes: `cpu`, `gpu`, `gpu:N` for a device that `pagewarp devices` lists, or `auto` for the faster one
    #[arg(long, value_name = "auto|cpu|gpu[:N]", default_value = "auto")]
    pub backend: BackendName,
    /// The encodings to offer: `all`, or a list such as zero,raw,lz4
    #[arg(long, value_name = "LIST", default_value = "all")]
    pub encodings: EncodingSet,
    /// Memory for page versions sent before, the bases of deltas; 0 switches deltas off
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    pub history: ByteSize,
    /// Run the stages one after another instead of all at once
    #[arg(long)]
    pub no_pipeline: bool,
    /// Pages in a batch; the destination may have a lower limit (--max-batch-pages of `receive`)
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub batch_pages: u32,
    /// Threads that encode [default: half of the processors, at most 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub threads: Option<u32>,
    /// Epochs after which --on-limit decides [default: no limit]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_epochs: Option<u32>,
    /// Time after which --on-limit decides, for example 90 or 10m
    #[arg(long, value_name = "TIME", default_value = "60m", value_parser = seconds)]
    pub max_time: Duration,
    /// What to do at either limit
    #[arg(long, value_enum, default_value = "cancel")]
    pub on_limit: LimitChoice,
    /// Compare a digest of every page on both sides before the hand-over, while the VM is paused; no hand-over if one differs
    #[arg(long)]
    pub verify: bool,
    /// Write who worked on which batch, and when, into a file for ui.perfetto.dev; done by the VM's process when the migration has ended, however it ended
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// How long a silent destination is waited for
    #[arg(long, value_name = "TIME", default_value = "30", value_parser = seconds)]
    pub peer_timeout: Duration,
    /// How long a lost network is waited for.
    #[command(flatten)]
    pub endurance: Endurance,
    /// Whether the connections are encrypted.
    #[command(flatten)]
    pub encryption: Encryption,
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

impl SendArgs {
    /// The options for the VM process. The names of files are as they were typed: they mean something in this process alone.
    pub fn options(&self) -> MigrateOptions {
        MigrateOptions {
            connections: self.connections as usize,
            downtime_ms: self.downtime_ms,
            bandwidth_bytes_per_s: self.bandwidth.map(|rate| rate.bytes_per_s),
            encodings: self.encodings.to_string(),
            history_bytes: self.history.0,
            pipeline: !self.no_pipeline,
            batch_pages: self.batch_pages as usize,
            serialize_threads: self.threads.map_or_else(default_threads, |threads| threads as usize),
            max_epochs: self.max_epochs,
            max_time_ms: Some(self.max_time.as_millis() as u64),
            on_limit: self.on_limit.into(),
            verify: self.verify,
            backend: self.backend.to_string(),
            simd: None,
            trace_file: self.trace.clone(),
            peer_timeout_ms: self.peer_timeout.as_millis() as u64,
            resume_timeout_ms: self.endurance.resume_timeout.as_millis() as u64,
            plaintext: self.encryption.plaintext,
            tls_dir: self.encryption.tls_dir.clone(),
            tls_hostname: Some(
                self.expectation.tls_hostname.clone().unwrap_or_else(|| host_of(&self.to).to_owned()),
            )
            .filter(|_| self.encryption.tls_dir.is_some()),
        }
    }
}

/// What to do at the epoch or time limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LimitChoice {
    /// Go on for as long as it takes
    KeepGoing,
    /// Switch over with a longer downtime than asked for
    StopAnyway,
    /// Give up; the VM stays on the source
    Cancel,
}

impl From<LimitChoice> for OnLimit {
    fn from(choice: LimitChoice) -> OnLimit {
        match choice {
            LimitChoice::KeepGoing => OnLimit::KeepGoing,
            LimitChoice::StopAnyway => OnLimit::StopAnyway,
            LimitChoice::Cancel => OnLimit::Cancel,
        }
    }
}
