//! Other processes: `pagewarp` as a child, signals, and the memory that they use.

use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

use super::{Sent, wait_for};

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

/// A `pagewarp` process; killed when dropped.
pub(crate) struct Process {
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Process {
    /// Starts a command that becomes `pagewarp`. What it writes goes to `files`, with `.out` and `.err` behind it.
    pub(crate) fn start(mut command: Command, files: &Path) -> Process {
        let (stdout, stderr) = (files.with_extension("out"), files.with_extension("err"));
        let child = command
            .stdin(Stdio::null())
            .stdout(File::create(&stdout).unwrap())
            .stderr(File::create(&stderr).unwrap())
            .spawn()
            .unwrap();
        Process { child, stdout, stderr }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal, if it has not ended.
    pub(crate) fn signal(&self, what: Signal) {
        let pid = Pid::from_raw(self.child.id() as i32).expect("a process has a number above 0");
        let sent = kill_process(pid, what);
        assert!(matches!(sent, Ok(()) | Err(Errno::SRCH)), "{sent:?}");
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    pub(crate) fn stderr(&self) -> String {
        std::fs::read_to_string(&self.stderr).unwrap()
    }

    pub(crate) fn stdout(&self) -> String {
        std::fs::read_to_string(&self.stdout).unwrap()
    }

    /// Waits for a whole line on standard error.
    pub(crate) fn wait_line(&mut self, what: &str, wanted: impl Fn(&str) -> bool) -> String {
        wait_for(what, || {
            let ended = self.has_ended();
            let stderr = self.stderr();
            let mut whole = stderr.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
            let found = whole.find(|line| wanted(line)).map(str::to_owned);
            assert!(found.is_some() || !ended, "it ended without {what}: {stderr}");
            found
        })
    }

    /// Waits until a migration's progress has been shown, which is when it can be cancelled.
    pub(crate) fn wait_progress(&mut self) {
        self.wait_line("progress (takes --json-events)", |line| line.starts_with('{'));
    }

    /// Waits until so many reports have been printed, a line of JSON each.
    pub(crate) fn wait_reports(&self, count: usize) {
        wait_for("a report", || {
            let printed = std::fs::read_to_string(&self.stdout).unwrap();
            (printed.lines().count() >= count).then_some(())
        });
    }

    /// Where it listens for sources.
    pub(crate) fn listening(&mut self) -> SocketAddr {
        let line = self.wait_line("where it listens", |line| line.starts_with("waiting for a "));
        line.split_whitespace().find_map(|word| word.parse().ok()).unwrap()
    }

    pub(crate) fn stop(self) -> Sent {
        signal(self.pid(), Signal::TERM);
        self.wait()
    }

    pub(crate) fn wait(mut self) -> Sent {
        let status = wait_for("pagewarp to end", || self.child.try_wait().unwrap());
        Sent { code: status.code(), stdout: self.stdout(), stderr: self.stderr() }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
