//! Processor time by thread.

use std::fs;
use std::path::Path;
use std::time::Duration;

/// Of the process, without its threads that are vCPUs.
pub(super) fn without_vcpus(pid: u32) -> Duration {
    let process = Path::new("/proc").join(pid.to_string());
    // That of the process includes threads that have ended, as those of a migration have when it is over. It is read last: what the
    // vCPUs work meanwhile is counted wrongly as QEMU's rather than making the result negative.
    let vcpus: Duration = fs::read_dir(process.join("task"))
        .into_iter()
        .flatten()
        .filter_map(|thread| of(&thread.ok()?.path()))
        .filter(|(name, _)| is_vcpu(name))
        .map(|(_, time)| time)
        .sum();
    of(&process).map_or(Duration::ZERO, |(_, total)| total.saturating_sub(vcpus))
}

/// As QEMU calls them with `debug-threads=on`: `CPU 0/KVM`, `CPU 0/TCG`.
fn is_vcpu(name: &str) -> bool {
    name.starts_with("CPU ")
}

/// Name and processor time of a process or thread; `None`: it is gone.
fn of(directory: &Path) -> Option<(String, Duration)> {
    let (name, ticks) = parse(&fs::read_to_string(directory.join("stat")).ok()?)?;
    let ms = ticks.saturating_mul(1000) / rustix::param::clock_ticks_per_second();
    Some((name, Duration::from_millis(ms)))
}

/// Reads a line of `/proc/PID/stat`, where the name may hold anything, parentheses as well.
fn parse(stat: &str) -> Option<(String, u64)> {
    let (head, rest) = stat.rsplit_once(')')?;
    let (_, name) = head.split_once('(')?;
    // After the name: state is field 3, utime 14, stime 15.
    let mut ticks = rest.split_whitespace().skip(11).map(|field| field.parse::<u64>().ok());
    Some((name.to_owned(), ticks.next()?? + ticks.next()??))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_proc_parse() {
        let line = "1234 (CPU 0/KVM) S 1 1 1 0 -1 4194304 100 0 0 0 77 23 0 0 20 0 5 0 99 1 2";
        assert_eq!(parse(line), Some(("CPU 0/KVM".to_owned(), 100)));
        assert_eq!(parse("1 (a) b) (c) S 1 1 1 0 -1 0 0 0 0 0 1 2 0"), Some(("a) b) (c".to_owned(), 3)));
        for damaged in ["", "1 (x", "1 (x) S 1 1 1 0 -1 0 0 0 0 0 1", "1 (x) S 1 1 1 0 -1 0 0 0 0 0 a 2"] {
            assert_eq!(parse(damaged), None, "{damaged:?}");
        }
        let (_, time) = of(Path::new("/proc/self")).expect("this process");
        assert!(time >= without_vcpus(std::process::id()).saturating_sub(Duration::from_secs(1)));
        assert_eq!(without_vcpus(u32::MAX), Duration::ZERO);
    }
}
