//! Other processes: signals, and the memory that they use.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

const SAMPLE_EVERY: Duration = Duration::from_millis(10);

/// Sends a signal to a process that is known to be there or to be a zombie of ours.
pub(crate) fn signal(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid as i32).expect("a process has a number above 0");
    kill_process(pid, signal).unwrap();
}

/// Anonymous memory of a process in bytes: all but guest memory, which is a memfd, and files. 0 if it has ended.
pub(crate) fn anonymous_bytes(pid: u32) -> u64 {
    status_bytes(pid, "RssAnon:")
}

/// The most memory of any kind that a process has had in its life so far, in bytes (`VmHWM`): its files, its guest and all. 0 if it has ended.
pub(crate) fn peak_bytes(pid: u32) -> u64 {
    status_bytes(pid, "VmHWM:")
}

fn status_bytes(pid: u32, what: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix(what)?.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// Follows the memory of a process.
pub(crate) struct MemoryWatch {
    peak: Arc<AtomicU64>,
    all: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl MemoryWatch {
    pub(crate) fn start(pid: u32) -> MemoryWatch {
        let (peak, all) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let (peak, all, stop) = (peak.clone(), all.clone(), stop.clone());
            move || {
                while !stop.load(Relaxed) {
                    peak.fetch_max(anonymous_bytes(pid), Relaxed);
                    all.fetch_max(peak_bytes(pid), Relaxed);
                    std::thread::sleep(SAMPLE_EVERY);
                }
            }
        });
        MemoryWatch { peak, all, stop, thread: Some(thread) }
    }

    /// The most anonymous memory that was seen so far, in bytes.
    pub(crate) fn peak(&self) -> u64 {
        self.peak.load(Relaxed)
    }

    /// The most memory of any kind, see [`peak_bytes`]; at the end of a process, but for its last moment.
    pub(crate) fn peak_of_all(&self) -> u64 {
        self.all.load(Relaxed)
    }
}

impl Drop for MemoryWatch {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            // It cannot panic.
            let _ = thread.join();
        }
    }
}
