//! CPU time of a QEMU process, apart from its vCPUs.

use std::fs;

use super::process::Process;

/// Counts the CPU time of a QEMU process.
#[derive(Debug)]
pub(super) struct Meter<'a> {
    process: &'a Process,
    start_ms: f64,
}

impl Meter<'_> {
    /// Starts to count.
    pub(super) fn start(process: &Process) -> Option<Meter<'_>> {
        Some(Meter { process, start_ms: now_ms(process)? })
    }

    /// CPU time since the start.
    pub(super) fn elapsed_ms(&self) -> Option<f64> {
        Some((now_ms(self.process)? - self.start_ms).max(0.0))
    }
}

/// The process, with its threads that have ended, less the vCPUs.
fn now_ms(process: &Process) -> Option<f64> {
    let pid = process.pid();
    let vcpus: Option<f64> =
        process.vcpus().iter().map(|tid| of(&format!("/proc/{pid}/task/{tid}/stat"))).sum();
    Some(of(&format!("/proc/{pid}/stat"))? - vcpus?)
}

/// User and system time in a line of `/proc/PID/stat` (proc(5): fields 14 and 15; the name before them may hold anything).
fn of(path: &str) -> Option<f64> {
    let stat = fs::read_to_string(path).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    let mut ticks = rest.split_whitespace().skip(11).map(|field| field.parse::<u64>().ok());
    let ticks = ticks.next()?? + ticks.next()??;
    Some(ticks as f64 * 1000.0 / rustix::param::clock_ticks_per_second() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_can_be_read_and_none_cannot() {
        assert!(of("/proc/self/stat").is_some());
        assert!(of("/proc/0/stat").is_none());
    }
}
