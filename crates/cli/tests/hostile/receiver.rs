//! A `pagewarp receive` that is watched closely.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pagewarp_cli::demo::machine::Machine;
use pagewarp_cli::exit::Exit;
use tempfile::TempDir;

use crate::support::process::MemoryWatch;
use crate::support::{PROGRAM, one_error, wait_for};
use crate::{BOUND, PEER_TIMEOUT, WAITED};

/// What a process may use for a migration that never gets anywhere, in bytes.
const MEMORY_BOUND: u64 = 64 << 20;
/// The same with the program itself, and the memory of a VM that hardly got any.
const WHOLE_BOUND: u64 = 96 << 20;

/// See the module. Killed when dropped.
pub(crate) struct Receiver {
    child: Child,
    pub(crate) address: String,
    log: PathBuf,
    console: PathBuf,
    memory: MemoryWatch,
    dir: TempDir,
}

impl Receiver {
    pub(crate) fn start() -> Receiver {
        Receiver::with(&["--resume-timeout", "0"])
    }

    pub(crate) fn with(options: &[&str]) -> Receiver {
        let dir = tempfile::Builder::new().prefix("pagewarp-test-").tempdir().unwrap();
        let (log, console) = (dir.path().join("log"), dir.path().join("console"));
        let child = Command::new(PROGRAM)
            .arg("--run-dir")
            .arg(dir.path().join("run"))
            .args(["receive", "--name", Machine::NAME, "--listen", "127.0.0.1:0", "--backend", "cpu"])
            .args(["--peer-timeout", PEER_TIMEOUT, "--max-memory", "1G", "--console"])
            .arg(&console)
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let address = wait_for("it to listen", || {
            let text = std::fs::read_to_string(&log).unwrap();
            // The end of a line that is still being written may be missing.
            let mut lines = text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
            lines.find_map(|line| line.strip_prefix("waiting for a VM on ")).map(str::to_owned)
        });
        let memory = MemoryWatch::start(child.id());
        Receiver { child, address, log, console, memory, dir }
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    pub(crate) fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits until it has ended, which it must have soon after `since`, with one line of error and without having run anything. Returns its exit code and that line.
    pub(crate) fn failed(mut self, case: &str, since: Instant) -> (i32, String) {
        let status =
            wait_for(&format!("the receiver to give up ({case})"), || self.child.try_wait().unwrap());
        let log = self.log();
        let code = status.code().unwrap_or_else(|| panic!("{case}: killed by a signal: {status}; {log}"));
        assert!(code != 0, "{case}: a success: {log}");
        // It may have waited for somebody silent, or for somebody to take data, each time it tried: the bound is for what follows.
        soon(since, if code == Exit::Link as i32 { BOUND + WAITED } else { BOUND }, case);
        assert!(!log.contains("panicked"), "{case}: {log}");
        assert_eq!(std::fs::metadata(&self.console).map_or(0, |m| m.len()), 0, "{case}: a guest ran");
        let (peak, whole) = (self.memory.peak(), self.memory.peak_of_all());
        assert!(peak <= MEMORY_BOUND, "{case}: {} MiB of memory", peak >> 20);
        assert!(whole <= WHOLE_BOUND, "{case}: {} MiB of memory, with everything", whole >> 20);
        (code, one_error(&log).to_owned())
    }
}

/// Whether an end came as soon as is promised.
pub(crate) fn soon(since: Instant, bound: Duration, case: &str) {
    let took = since.elapsed();
    assert!(took <= bound, "{case}: it took {} ms", took.as_millis());
}

impl Drop for Receiver {
    fn drop(&mut self) {
        // Fails only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = &self.dir;
    }
}
