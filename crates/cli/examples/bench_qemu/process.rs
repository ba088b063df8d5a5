//! Processes of `pagewarp`, and what the system says of processes.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use pagewarp_testkit::netns::{End, NetPair};
use rustix::process::{Pid, Signal, kill_process};

/// How long `pagewarp` may take to be ready on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// A process of `pagewarp`; killed when dropped, or when this process dies.
pub(crate) struct Tool {
    child: Child,
    output: PathBuf,
    errors: PathBuf,
    peak_rss_bytes: u64,
    ended: Option<Ended>,
}

/// A process that is over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) cpu: Duration,
}

impl Tool {
    /// Starts it in the namespace of an end; what it says goes to files in `dir`.
    pub(crate) fn start(
        net: &NetPair,
        end: End,
        program: &Path,
        args: &[String],
        dir: &Path,
    ) -> Result<Tool, String> {
        let file = |kind: &str| {
            let path = dir.join(format!("{end:?}-{kind}"));
            File::create(&path).map(|file| (path, file)).map_err(|e| format!("cannot make a file: {e}"))
        };
        let ((output, stdout), (errors, stderr)) = (file("output")?, file("errors")?);
        // Both wrappers become the process that they run: the process here is pagewarp in the end. It is started by the main thread, so
        // that it does not die before this process does.
        let child = net
            .command(end, "setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(stderr)
            .spawn()
            .map_err(|e| format!("pagewarp does not start: {e}"))?;
        Ok(Tool { child, output, errors, peak_rss_bytes: 0, ended: None })
    }

    /// Waits until it has said `text`.
    pub(crate) fn wait_until_it_says(&mut self, text: &str) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        while !self.errors().contains(text) {
            if self.look().is_some() || Instant::now() >= deadline {
                return Err(format!("pagewarp did not say {text:?}, but {:?}", self.errors()));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Looks at its memory, and whether it has ended.
    pub(crate) fn look(&mut self) -> Option<Ended> {
        if self.ended.is_none() {
            let pid = self.child.id();
            self.peak_rss_bytes = self.peak_rss_bytes.max(peak_rss_bytes(pid));
            // A process that is over keeps its times until its parent waits for it.
            if let Some(stat) = Stat::of(pid).filter(|stat| stat.is_over)
                && let Ok(status) = self.child.wait()
            {
                self.ended = Some(Ended { status, cpu: stat.cpu });
            }
        }
        self.ended
    }

    /// Asks it to cancel what it does.
    pub(crate) fn interrupt(&mut self) {
        if self.look().is_none()
            && let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw)
        {
            // It may end at this moment.
            let _ = kill_process(pid, Signal::INT);
        }
    }

    /// Processor time so far.
    pub(crate) fn cpu(&mut self) -> Duration {
        match self.look() {
            Some(ended) => ended.cpu,
            None => Stat::of(self.child.id()).map_or(Duration::ZERO, |stat| stat.cpu),
        }
    }

    /// The most memory it had at once.
    pub(crate) fn peak_rss_bytes(&self) -> u64 {
        self.peak_rss_bytes
    }

    /// What it wrote to its standard output.
    pub(crate) fn output(&self) -> String {
        fs::read_to_string(&self.output).unwrap_or_default()
    }

    /// What it wrote to its standard error.
    pub(crate) fn errors(&self) -> String {
        fs::read_to_string(&self.errors).unwrap_or_default()
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        if self.ended.is_none() {
            // It may have ended by itself.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Of `/proc/PID/stat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stat {
    is_over: bool,
    cpu: Duration,
}

impl Stat {
    /// `None`: there is no such process.
    fn of(pid: u32) -> Option<Stat> {
        Stat::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    fn parse(line: &str) -> Option<Stat> {
        // The name, in parentheses, may hold anything.
        let (_, rest) = line.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        // After the name: state is field 3, utime 14, stime 15.
        let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
        let ticks = number(11)? + number(12)?;
        let ms = ticks.saturating_mul(1000) / rustix::param::clock_ticks_per_second();
        Some(Stat { is_over: matches!(*fields.first()?, "Z" | "X"), cpu: Duration::from_millis(ms) })
    }
}

/// 0 of a process that is over.
fn peak_rss_bytes(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib = status.lines().find_map(|line| {
        line.strip_prefix("VmHWM:")?.trim().trim_end_matches("kB").trim().parse::<u64>().ok()
    });
    kib.unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_proc_says_whether_a_process_is_over() {
        let line = |state| format!("1234 (a) b) {state} 1 1 1 0 -1 4194304 100 0 0 0 77 23 0 0 20 0 5 0 99");
        let cpu = Duration::from_millis(100_000 / rustix::param::clock_ticks_per_second());
        assert_eq!(Stat::parse(&line("S")), Some(Stat { is_over: false, cpu }));
        assert_eq!(Stat::parse(&line("Z")), Some(Stat { is_over: true, cpu }));
        assert_eq!(Stat::parse("1234 (x) S 1"), None);
        assert!(peak_rss_bytes(std::process::id()) > 1 << 20);
    }
}
