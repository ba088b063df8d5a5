//! The command line: `key=value` words.

/// What the guest does with its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Idle,
    Kv,
    Graph,
    Uniform,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Idle => "idle",
            Kind::Kv => "kv",
            Kind::Graph => "graph",
            Kind::Uniform => "uniform",
        }
    }
}

/// Everything the command line says. Docs of the keys: `HELP` and docs/guest.md.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Params {
    pub workload: Kind,
    /// MiB of usable memory the workload lays claim to; `None`: all there is.
    pub mem_mib: Option<u64>,
    /// MiB that are written in steady state; `None`: all that was filled.
    pub ws_mib: Option<u64>,
    /// Page writes a second; 0: as fast as possible.
    pub rate: u64,
    pub seed: u64,
    pub report_ms: u64,
    /// Percent of the memory that gets contents; `None`: the workload's own choice.
    pub fill_percent: Option<u64>,
    /// MiB of memory verified a second.
    pub verify_mib_s: u64,
    /// 0: find out.
    pub tsc_khz: u64,
    /// Reset the machine this long after `ready`; 0: never.
    pub exit_after_ms: u64,
}

impl Default for Params {
    fn default() -> Self {
        Params {
            workload: Kind::Kv,
            mem_mib: None,
            ws_mib: None,
            rate: 10_000,
            seed: 1,
            report_ms: 1000,
            fill_percent: None,
            verify_mib_s: 512,
            tsc_khz: 0,
            exit_after_ms: 0,
        }
    }
}

/// Printed when the command line is wrong.
pub const HELP: &str = "\
workload=idle|kv|graph|uniform  what to do with the memory (kv)
mem=all|MIB         memory to lay claim to (all)
ws=all|MIB          working set: the part that is written (all)
rate=PAGES|MIBm     page writes a second, or MiB of them with an m; 0: no limit (10000)
seed=N              seed of contents and writes (1)
fill=PERCENT        share of mem that gets contents (kv 68, graph 90, uniform 100, idle 0)
verify=MIB          self-check rate, MiB a second (512)
report_ms=N         time between report lines (1000)
tsc_khz=N           TSC frequency; 0: find out (0)
exit_after_ms=N     reset the machine this long after ready; 0: never (0)
";

/// A word with a known key and an unusable value.
#[derive(Debug, PartialEq, Eq)]
pub struct BadParam<'a> {
    pub word: &'a str,
    pub expected: &'static str,
}

impl Params {
    /// Reads a command line. Words with unknown keys go to `unknown` and change nothing: loaders add words of
    /// their own.
    pub fn parse<'a>(cmdline: &'a str, mut unknown: impl FnMut(&'a str)) -> Result<Params, BadParam<'a>> {
        let mut p = Params::default();
        for word in cmdline.split_ascii_whitespace() {
            let Some((key, value)) = word.split_once('=') else {
                unknown(word);
                continue;
            };
            let bad = |expected| BadParam { word, expected };
            let number = |lo: u64, hi: u64, expected| match value.parse::<u64>() {
                Ok(n) if (lo..=hi).contains(&n) => Ok(n),
                _ => Err(bad(expected)),
            };
            let mib =
                |expected| if value == "all" { Ok(None) } else { number(1, 1 << 24, expected).map(Some) };
            match key {
                "workload" => {
                    p.workload = match value {
                        "idle" => Kind::Idle,
                        "kv" => Kind::Kv,
                        "graph" => Kind::Graph,
                        "uniform" => Kind::Uniform,
                        _ => return Err(bad("idle, kv, graph or uniform")),
                    }
                }
                "mem" => p.mem_mib = mib("all, or MiB from 1 to 16777216")?,
                "ws" => p.ws_mib = mib("all, or MiB from 1 to 16777216")?,
                "rate" => {
                    p.rate = rate(value)
                        .ok_or(bad("pages a second, or MiB a second with an m, up to 1000000000 pages"))?;
                }
                "seed" => p.seed = number(0, u64::MAX, "a number")?,
                "report_ms" => p.report_ms = number(10, 3_600_000, "10 to 3600000")?,
                "fill" => p.fill_percent = Some(number(0, 100, "0 to 100")?),
                "verify" => p.verify_mib_s = number(1, 1 << 20, "1 to 1048576")?,
                "tsc_khz" => p.tsc_khz = number(0, 100_000_000, "0 to 100000000")?,
                "exit_after_ms" => p.exit_after_ms = number(0, u64::from(u32::MAX), "0 to 4294967295")?,
                _ => unknown(word),
            }
        }
        Ok(p)
    }
}

fn rate(value: &str) -> Option<u64> {
    const PAGES_PER_MIB: u64 = 256;
    let pages = match value.strip_suffix('m') {
        Some(mib) => mib.parse::<u64>().ok()?.checked_mul(PAGES_PER_MIB)?,
        None => value.parse().ok()?,
    };
    (pages <= 1_000_000_000).then_some(pages)
}
