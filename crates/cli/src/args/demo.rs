//! `pagewarp demo`.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use pagewarp_codec::PAGE_SIZE;
use pagewarp_guest::WriteRate;

use crate::backend::BackendName;
use crate::demo::Mode;
use crate::units::{ByteSize, Rate, memory_size};

/// `pagewarp demo`.
#[derive(Clone, Debug, Args)]
pub struct DemoArgs {
    /// Guest memory
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = memory_size)]
    pub memory: ByteSize,
    /// Rate of the link between the two processes, or `none` for an unshaped one
    #[arg(long, value_name = "RATE|none", default_value = "1Gbit")]
    pub link: LinkRate,
    /// What the guest does
    #[arg(long, value_enum, default_value = "kv")]
    pub workload: WorkloadChoice,
    /// How fast the guest writes: pages a second, such as 10000, bytes a second, such as 80MB/s, or `max`
    #[arg(long, value_name = "RATE", default_value = "40000")]
    pub rate: DirtyRate,
    /// Part of guest memory that the guest works on [default: that of the workload]
    #[arg(long, value_name = "SIZE")]
    pub working_set: Option<ByteSize>,
    /// The modes to run, in this order [default: all, `pipelined-gpu` only where there is a GPU]
    #[arg(long, value_enum, value_name = "LIST", value_delimiter = ',')]
    pub modes: Vec<Mode>,
    /// The GPU of `pipelined-gpu`: `gpu` or `gpu:N`, which adds that mode even if the device is software; `cpu` leaves it out of the default
    #[arg(long, value_name = "auto|cpu|gpu[:N]", default_value = "auto")]
    pub backend: BackendName,
    /// How often to run each mode
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
    /// Switch over when the expected downtime is at most this
    #[arg(long, value_name = "MS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    pub downtime_ms: u64,
    /// Data connections
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub connections: u32,
    /// Memory for page versions sent before, the bases of deltas
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    pub history: ByteSize,
    /// Compare a digest of every page on both sides before the hand-over, which makes the downtimes longer
    #[arg(long)]
    pub verify: bool,
    /// Use the synthetic guest (threads that write memory) even where /dev/kvm works
    #[arg(long)]
    pub synthetic: bool,
    /// Write who worked on which batch, and when, on both sides of the last run, into a file for ui.perfetto.dev
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Print the JSON report to standard output instead of the table
    #[arg(long)]
    pub json: bool,
    /// Where to write the JSON report [default: a new file in the directory for temporary files; with --json: nowhere else]
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

impl DemoArgs {
    /// The modes to run. `has_gpu` is asked only if it matters.
    pub fn modes(&self, has_gpu: impl FnOnce() -> bool) -> Vec<Mode> {
        let mut modes = self.modes.clone();
        if modes.is_empty() {
            let with_gpu = self.backend == BackendName::Auto && has_gpu();
            modes.extend(Mode::ALL.into_iter().filter(|mode| with_gpu || !mode.on_gpu()));
        }
        if matches!(self.backend, BackendName::Gpu(_)) && !modes.iter().any(|mode| mode.on_gpu()) {
            modes.push(Mode::PipelinedGpu);
        }
        modes
    }
}

/// The rate of the demo's link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkRate(pub Option<Rate>);

impl FromStr for LinkRate {
    type Err = String;

    fn from_str(text: &str) -> Result<LinkRate, String> {
        if text == "none" { Ok(LinkRate(None)) } else { text.parse().map(|rate| LinkRate(Some(rate))) }
    }
}

/// How fast the demo's guest writes, counted in whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyRate(pub WriteRate);

impl FromStr for DirtyRate {
    type Err = String;

    fn from_str(text: &str) -> Result<DirtyRate, String> {
        let pages = match text.parse::<u64>() {
            Ok(pages) => pages,
            Err(_) if text == "max" => return Ok(DirtyRate(WriteRate::Unlimited)),
            Err(_) => text.parse::<Rate>()?.bytes_per_s / PAGE_SIZE as u64,
        };
        if pages == 0 {
            return Err(
                "less than a page a second; use --workload idle for a guest that writes nothing".to_owned()
            );
        }
        Ok(DirtyRate(WriteRate::PagesPerS(pages)))
    }
}

/// What the demo's guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WorkloadChoice {
    /// An in-memory key-value store with Zipf-distributed updates
    Kv,
    /// PageRank-like sweeps over a graph
    Graph,
    /// Writes at random places
    Uniform,
    /// Nothing but the self-check
    Idle,
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Cli, Command};

    fn modes(args: &[&str], has_gpu: bool) -> Vec<&'static str> {
        let cli = Cli::parse_from(["pagewarp", "demo"].iter().chain(args));
        let Command::Demo(args) = cli.command else { panic!("not the demo") };
        args.modes(|| has_gpu).into_iter().map(Mode::name).collect()
    }

    #[test]
    fn the_mode_on_a_gpu_is_run_where_there_is_one_or_where_it_is_asked_for() {
        assert_eq!(modes(&[], true).len(), 5);
        assert_eq!(modes(&[], false).last(), Some(&"pipelined-compressed"));
        assert_eq!(modes(&["--backend", "cpu"], true), modes(&[], false));
        assert_eq!(modes(&["--backend", "gpu:1"], false), modes(&[], true));
        assert_eq!(modes(&["--modes", "sequential"], true), ["sequential"]);
        assert_eq!(
            modes(&["--modes", "sequential", "--backend", "gpu"], false),
            ["sequential", "pipelined-gpu"]
        );
        assert_eq!(modes(&["--modes", "pipelined-gpu", "--backend", "gpu"], false), ["pipelined-gpu"]);
    }
}
