//! What the demo ran on, so that figures can be compared.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// The host of a demo.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HostInfo {
    /// CPU model as the kernel names it.
    pub cpu: String,
    /// CPUs that this process may use.
    pub cpus: usize,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Kernel release.
    pub kernel: String,
    /// Whether /dev/kvm can be opened.
    pub kvm: bool,
    /// The vector instructions that the CPU backend uses.
    pub simd: String,
    /// Version of pagewarp.
    pub version: String,
    /// Day of the run, UTC, `YYYY-MM-DD`.
    pub date: String,
}

impl HostInfo {
    /// This host, now. What cannot be found out is `unknown` or 0.
    pub fn detect() -> HostInfo {
        let unknown = || "unknown".to_owned();
        let seconds = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        HostInfo {
            cpu: field("/proc/cpuinfo", "model name").unwrap_or_else(unknown),
            cpus: std::thread::available_parallelism().map_or(0, Into::into),
            memory_bytes: field("/proc/meminfo", "MemTotal")
                .and_then(|value| value.trim_end_matches(" kB").trim().parse::<u64>().ok())
                .map_or(0, |kib| kib << 10),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")
                .map_or_else(|_| unknown(), |release| release.trim().to_owned()),
            kvm: kvm_works(),
            simd: crate::backend::simd_name(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            date: date(seconds / 86_400),
        }
    }
}

/// Whether /dev/kvm can be opened by this process.
pub fn kvm_works() -> bool {
    fs::OpenOptions::new().read(true).write(true).open(Path::new("/dev/kvm")).is_ok()
}

/// The value of the first line `name : value` in a file of /proc.
fn field(file: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(file).ok()?;
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim().to_owned())
    })
}

/// The date of a day since 1970-01-01, in the proleptic Gregorian calendar.
///
/// Counts years from 1 March, so that the leap day is the last of a year and all months before it have fixed lengths.
fn date(days: u64) -> String {
    let days = days + 719_468; // from 0000-03-01 to 1970-01-01
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_of_known_days() {
        assert_eq!(date(0), "1970-01-01");
        assert_eq!(date(59), "1970-03-01");
        assert_eq!(date(11_016), "2000-02-29");
        assert_eq!(date(20_779), "2026-11-22");
        assert_eq!(date(20_818), "2026-12-31");
    }

    #[test]
    fn this_host_has_a_cpu() {
        let host = HostInfo::detect();
        assert!(host.cpus > 0);
        assert!(host.memory_bytes > 0);
        assert_ne!(host.kernel, "unknown");
    }
}
