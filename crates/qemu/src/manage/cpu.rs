//! CPU time of a QEMU process, apart from its vCPUs.

use std::fs;

use crate::qmp::Vm;

/// A QEMU process whose CPU time can be told.
#[derive(Debug)]
pub(super) struct Meter {
    pid: i32,
    vcpus: Vec<u32>,
    start_ms: f64,
}

impl Meter {
    /// Starts to count. `None` if the process is not visible from here, as from another container.
    pub(super) fn start(vm: &mut Vm) -> Option<Meter> {
        let pid = vm.qmp().peer_pid()?;
        let vcpus = vm.vcpu_threads().ok()?;
        let mut meter = Meter { pid, vcpus, start_ms: 0.0 };
        meter.start_ms = meter.now_ms()?;
        Some(meter)
    }

    /// CPU time since the start.
    pub(super) fn elapsed_ms(&self) -> Option<f64> {
        Some((self.now_ms()? - self.start_ms).max(0.0))
    }

    /// The process, with its threads that have ended, less the vCPUs.
    fn now_ms(&self) -> Option<f64> {
        let vcpus: Option<f64> =
            self.vcpus.iter().map(|tid| of(&format!("/proc/{}/task/{tid}/stat", self.pid))).sum();
        Some(of(&format!("/proc/{}/stat", self.pid))? - vcpus?)
    }
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
