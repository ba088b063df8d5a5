//! What can be chosen.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use pagewarp_cli::args::CompressionChoice;
use pagewarp_cli::units::{ByteSize, HistoryChoice, Rate, memory_size, seconds};
use pagewarp_guest::Workload;

use crate::mode::Mode;

/// Measures live migrations of QEMU's VMs: by QEMU alone, in its modes, and through pagewarp
#[derive(Clone, Debug, Parser)]
#[command(name = "bench_qemu")]
pub(crate) struct Args {
    /// What to compare
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "none,relay,relay+splice,relay+peek,xbzrle,multifd,multifd+zlib,multifd+zstd,pagewarp,pagewarp-bridge,pagewarp-multifd"
    )]
    pub(crate) modes: Vec<Mode>,
    /// What the guest does: kv, graph, idle or uniform; with a write rate of its own as `kv@100000`
    #[arg(long, value_delimiter = ',', default_value = "kv,graph,idle")]
    pub(crate) workloads: Vec<LoadChoice>,
    /// Pages the guest writes a second, for workloads without a rate of their own
    #[arg(long, value_name = "PAGES_PER_S", default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) rate: u64,
    /// Rates of the link, each way
    #[arg(long, value_delimiter = ',', default_value = "1gbit,10gbit")]
    pub(crate) links: Vec<Rate>,
    /// Memory of the VM
    #[arg(long, value_name = "SIZE", default_value = "2G", value_parser = memory_size)]
    pub(crate) memory: ByteSize,
    /// Percent of the guest's memory with contents [default: what suits the workload; kv 68, graph 90, uniform 100]
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) fill: Option<u8>,
    /// How often each is measured
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) repeat: u32,
    /// When a migration whose guest still runs on the source is given up as one that does not converge
    #[arg(long, value_name = "TIME", default_value = "120", value_parser = seconds)]
    pub(crate) limit: Duration,
    /// The downtime limit, of all modes
    #[arg(long, value_name = "MS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    pub(crate) downtime_ms: u64,
    /// pagewarp's memory for page versions sent before, on each side
    #[arg(long, value_name = "auto|SIZE", default_value = "auto")]
    pub(crate) history: HistoryChoice,
    /// How hard pagewarp compresses
    #[arg(long, value_enum, default_value = "auto")]
    pub(crate) compression: CompressionChoice,
    /// The cache of QEMU's xbzrle, a power of two, at most the VM's memory
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    pub(crate) xbzrle_cache: ByteSize,
    /// Connections for pages in the modes with multifd
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..))]
    pub(crate) channels: u8,
    /// The binary to measure [default: that of the build this program is from]
    #[arg(long, value_name = "PATH")]
    pub(crate) pagewarp: Option<PathBuf>,
    /// Where every single run is stored, as JSON [default: docs/data/qemu-bench-DATE.json]
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// Measure nothing and be one half of the mode `relay`
    #[arg(long, num_args = 2, value_names = ["FROM", "TO"], hide = true)]
    pub(crate) relay: Vec<String>,
    /// The same for `relay+splice`
    #[arg(long, num_args = 2, value_names = ["FROM", "TO"], hide = true)]
    pub(crate) relay_splice: Vec<String>,
    /// The same for `relay+peek`
    #[arg(long, num_args = 2, value_names = ["FROM", "TO"], hide = true)]
    pub(crate) relay_peek: Vec<String>,
    /// Measure nothing and print the table of runs stored before
    #[arg(long, value_name = "FILE")]
    pub(crate) from: Option<PathBuf>,
}

impl Args {
    /// As `pagewarp qemu migrate` takes it.
    pub(crate) fn compression(&self) -> String {
        self.compression.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// The workloads, all with a rate.
    pub(crate) fn loads(&self) -> Vec<Load> {
        let load = |choice: &LoadChoice| Load {
            workload: choice.workload,
            pages_per_s: choice.pages_per_s.unwrap_or(self.rate),
        };
        self.workloads.iter().map(load).collect()
    }
}

/// A workload, perhaps with a rate: `kv`, `kv@100000`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LoadChoice {
    workload: Workload,
    pages_per_s: Option<u64>,
}

impl FromStr for LoadChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<LoadChoice, String> {
        let (name, rate) = text.split_once('@').map_or((text, None), |(name, rate)| (name, Some(rate)));
        let workload = name.parse::<Workload>().map_err(|e| e.to_string())?;
        let pages_per_s = match rate.map(str::parse::<u64>) {
            None => None,
            Some(Ok(rate)) if rate > 0 => Some(rate),
            Some(_) => return Err(format!("no write rate in `{text}`; write for example kv@100000")),
        };
        Ok(LoadChoice { workload, pages_per_s })
    }
}

/// What the guest does, and how fast.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Load {
    pub(crate) workload: Workload,
    pub(crate) pages_per_s: u64,
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {} writes/s", self.workload, self.pages_per_s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workloads_may_have_a_rate() {
        let args = Args::parse_from(["bench_qemu", "--workloads", "kv,kv@150000,idle", "--rate", "7"]);
        let loads: Vec<String> = args.loads().iter().map(Load::to_string).collect();
        assert_eq!(loads, ["kv at 7 writes/s", "kv at 150000 writes/s", "idle at 7 writes/s"]);
        for wrong in ["", "kv@", "kv@0", "kv@x", "db"] {
            assert!(wrong.parse::<LoadChoice>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn all_modes_and_both_links_by_default() {
        let args = Args::parse_from(["bench_qemu"]);
        assert_eq!(args.modes, Mode::value_variants());
        assert_eq!(args.links.len(), 2);
    }
}
