//! What the guest is told: its command line.

use std::fmt;
use std::str::FromStr;

/// What the guest does with its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Workload {
    /// A few ticking pages; everything else stays untouched.
    Idle,
    /// An in-memory key-value store under a Zipf-distributed write load.
    #[default]
    Kv,
    /// PageRank sweeps over a graph in compressed sparse rows.
    Graph,
    /// Random words written to random pages of random bytes.
    Uniform,
}

impl Workload {
    /// All of them.
    pub const ALL: [Workload; 4] = [Workload::Idle, Workload::Kv, Workload::Graph, Workload::Uniform];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Workload::Idle => "idle",
            Workload::Kv => "kv",
            Workload::Graph => "graph",
            Workload::Uniform => "uniform",
        }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is no workload's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownWorkload(String);

impl fmt::Display for UnknownWorkload {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "no workload is called {:?}; choose idle, kv, graph or uniform", self.0)
    }
}

impl std::error::Error for UnknownWorkload {}

impl FromStr for Workload {
    type Err = UnknownWorkload;

    fn from_str(name: &str) -> Result<Self, UnknownWorkload> {
        Workload::ALL.into_iter().find(|w| w.name() == name).ok_or_else(|| UnknownWorkload(name.to_owned()))
    }
}

/// How fast the guest writes, counted in page writes: a page written twice counts twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteRate {
    /// As fast as it can.
    Unlimited,
    /// Page writes a second, at least 1.
    PagesPerS(u64),
    /// MiB of page writes a second (256 pages each), at least 1.
    MibPerS(u64),
}

/// Everything the guest can be told. The default is the `kv` workload on all memory at 10 000 page writes a
/// second.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestConfig {
    /// What the guest does.
    pub workload: Workload,
    /// MiB of memory the workload lays claim to; `None`: all there is.
    pub memory_mib: Option<u64>,
    /// MiB that are written in steady state; `None`: everything that was filled.
    pub working_set_mib: Option<u64>,
    /// How fast it writes.
    pub write_rate: WriteRate,
    /// Seed of contents and writes.
    pub seed: u64,
    /// Time between report lines, in milliseconds: 10 to 3 600 000.
    pub report_ms: u64,
    /// Percent of the claimed memory that gets contents, 0 to 100; `None`: what suits the workload.
    pub fill_percent: Option<u8>,
    /// MiB that the guest checks a second, 1 to 1 048 576; `None`: 512.
    pub verify_mib_s: Option<u64>,
    /// Frequency of the time-stamp counter in kHz; `None`: the guest finds out.
    pub tsc_khz: Option<u64>,
    /// Makes the guest reset its machine this many milliseconds after it is ready.
    pub exit_after_ms: Option<u32>,
}

impl Default for GuestConfig {
    fn default() -> Self {
        GuestConfig {
            workload: Workload::Kv,
            memory_mib: None,
            working_set_mib: None,
            write_rate: WriteRate::PagesPerS(10_000),
            seed: 1,
            report_ms: 1000,
            fill_percent: None,
            verify_mib_s: None,
            tsc_khz: None,
            exit_after_ms: None,
        }
    }
}

impl GuestConfig {
    /// The guest's command line.
    pub fn cmdline(&self) -> String {
        let rate = match self.write_rate {
            WriteRate::Unlimited => "0".to_owned(),
            WriteRate::PagesPerS(pages) => pages.max(1).to_string(),
            WriteRate::MibPerS(mib) => format!("{}m", mib.max(1)),
        };
        let mut line =
            format!("workload={} rate={rate} seed={} report_ms={}", self.workload, self.seed, self.report_ms);
        let options = [
            ("mem", self.memory_mib),
            ("ws", self.working_set_mib),
            ("fill", self.fill_percent.map(u64::from)),
            ("verify", self.verify_mib_s),
            ("tsc_khz", self.tsc_khz),
            ("exit_after_ms", self.exit_after_ms.map(u64::from)),
        ];
        for (key, value) in options {
            if let Some(value) = value {
                line += &format!(" {key}={value}");
            }
        }
        line
    }
}
