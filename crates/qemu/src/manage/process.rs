//! The process of a QEMU, where it is certain which one that is.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use pagewarp_engine::metrics::status_bytes;
use rustix::io;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::qmp::Vm;

/// A QEMU process on this host.
#[derive(Debug)]
pub(super) struct Process {
    pid: i32,
    vcpus: Vec<u32>,
    /// Stands for this very process, also when its number has been given to another one.
    handle: OwnedFd,
}

impl Process {
    /// The process at the other end of the monitor. `None` if that is not certain: the other end is who made the socket, which may be somebody else that gave
    /// it to QEMU, and numbers mean something else in another container. The threads that QEMU names as its vCPUs must be threads of that process.
    pub(super) fn of(vm: &mut Vm) -> Option<Process> {
        let pid = vm.qmp().peer_pid()?;
        let handle = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
        let vcpus = vm.vcpu_threads().ok()?;
        let is_its_thread = |tid: &u32| Path::new(&format!("/proc/{pid}/task/{tid}")).exists();
        (!vcpus.is_empty() && vcpus.iter().all(is_its_thread)).then_some(Process { pid, vcpus, handle })
    }

    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    /// The threads of its vCPUs.
    pub(super) fn vcpus(&self) -> &[u32] {
        &self.vcpus
    }

    /// Bytes of memory that it has, huge pages included (proc(5), `/proc/PID/status`).
    pub(super) fn resident_bytes(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        Some(status_bytes(&status, "VmRSS:")? + status_bytes(&status, "HugetlbPages:").unwrap_or(0))
    }

    /// Ends it at once, if it has not ended.
    pub(super) fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(&self.handle, Signal::KILL) {
            Err(io::Errno::SRCH) => Ok(()),
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::manage::fake::{Reply, with_monitor};

    /// What is made of a monitor in this very process that names these threads as vCPUs.
    fn of_threads(vcpus: &[u32]) -> Option<Process> {
        let list: Value = vcpus.iter().map(|tid| json!({ "thread-id": tid })).collect();
        let mut process = None;
        with_monitor(move |_| Reply::Return(list.clone()), |vm| process = Process::of(vm));
        process
    }

    #[test]
    fn a_process_is_certain_by_its_threads_only() {
        let pid = std::process::id();
        let this = of_threads(&[pid]).unwrap();
        assert_eq!((this.pid(), this.vcpus()), (pid as i32, &[pid][..]));
        let resident = this.resident_bytes().unwrap();
        assert!((1 << 20..1 << 40).contains(&resident), "{resident} bytes");
        assert!(of_threads(&[]).is_none(), "nothing tells whose process it is");
        assert!(of_threads(&[1]).is_none(), "somebody else's thread");
        assert!(of_threads(&[pid, 1]).is_none());
    }
}
