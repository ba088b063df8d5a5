//! Per-stage counters. They are a product feature: the report shows which stage bounds the migration.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use crate::report::StageReport;

/// Counters of one stage, shared by its threads.
#[derive(Debug, Default)]
pub struct StageMeter {
    threads: AtomicU64,
    busy_ns: AtomicU64,
    device_wait_ns: AtomicU64,
    blocked_in_ns: AtomicU64,
    blocked_out_ns: AtomicU64,
    cpu_ns: AtomicU64,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
}

impl StageMeter {
    /// A meter of a stage that runs on `threads` threads.
    pub fn new(threads: usize) -> StageMeter {
        StageMeter { threads: AtomicU64::new(threads as u64), ..StageMeter::default() }
    }

    /// Runs `work` and counts its wall and CPU time as the stage's.
    pub fn busy<T>(&self, work: impl FnOnce() -> T) -> T {
        self.cpu_only(|| self.timed(work))
    }

    /// Like [`busy`](Self::busy) for work that says how much of its time it has waited for a device: that is not the stage's own work.
    pub fn busy_on_device<T>(&self, work: impl FnOnce() -> (T, Duration)) -> T {
        self.cpu_only(|| self.timed_on_device(work))
    }

    /// Runs `work` and counts its wall time as the stage's. For threads whose CPU time is counted from their beginning to their end, with
    /// [`cpu_only`](Self::cpu_only): asking for it takes a system call.
    pub fn timed<T>(&self, work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = work();
        add_duration(&self.busy_ns, start.elapsed());
        result
    }

    /// Like [`timed`](Self::timed) for work that says how much of its time it has waited for a device.
    pub fn timed_on_device<T>(&self, work: impl FnOnce() -> (T, Duration)) -> T {
        let start = Instant::now();
        let (result, waited) = work();
        let whole = start.elapsed();
        let waited = waited.min(whole);
        add_duration(&self.busy_ns, whole - waited);
        add_duration(&self.device_wait_ns, waited);
        result
    }

    /// Runs `work`, part of which is waiting, and counts its CPU time only.
    pub fn cpu_only<T>(&self, work: impl FnOnce() -> T) -> T {
        let cpu = thread_cpu();
        let result = work();
        add_duration(&self.cpu_ns, thread_cpu().saturating_sub(cpu));
        result
    }

    /// Runs `wait`, which waits for something to do.
    pub fn blocked_in<T>(&self, wait: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = wait();
        add_duration(&self.blocked_in_ns, start.elapsed());
        result
    }

    /// Runs `wait`, which waits for a buffer or for the next stage.
    pub fn blocked_out<T>(&self, wait: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = wait();
        add_duration(&self.blocked_out_ns, start.elapsed());
        result
    }

    /// Counts bytes that came in and went out.
    pub fn bytes(&self, bytes_in: usize, bytes_out: usize) {
        self.bytes_in.fetch_add(bytes_in as u64, Relaxed);
        self.bytes_out.fetch_add(bytes_out as u64, Relaxed);
    }

    /// Bytes that went out so far.
    pub fn bytes_out(&self) -> u64 {
        self.bytes_out.load(Relaxed)
    }

    /// Bytes that came in so far.
    pub fn bytes_in(&self) -> u64 {
        self.bytes_in.load(Relaxed)
    }

    /// Time spent on work so far, that of the device included, summed over the threads.
    pub fn working_time(&self) -> Duration {
        Duration::from_nanos(self.busy_ns.load(Relaxed) + self.device_wait_ns.load(Relaxed))
    }

    /// The counters as they stand.
    pub fn report(&self) -> StageReport {
        let ms = |counter: &AtomicU64| counter.load(Relaxed) as f64 / 1e6;
        StageReport {
            threads: self.threads.load(Relaxed) as u32,
            busy_ms: ms(&self.busy_ns),
            device_wait_ms: ms(&self.device_wait_ns),
            blocked_in_ms: ms(&self.blocked_in_ns),
            blocked_out_ms: ms(&self.blocked_out_ns),
            cpu_ms: ms(&self.cpu_ns),
            bytes_in: self.bytes_in.load(Relaxed),
            bytes_out: self.bytes_out.load(Relaxed),
        }
    }
}

fn add_duration(counter: &AtomicU64, time: Duration) {
    counter.fetch_add(time.as_nanos() as u64, Relaxed);
}

/// CPU time of the calling thread.
pub fn thread_cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// The stage that was at work, itself or its device, for the largest share of its threads' time.
pub fn busiest(stages: &BTreeMap<String, StageReport>) -> String {
    stages
        .iter()
        .max_by(|a, b| {
            let load = |s: &StageReport| (s.busy_ms + s.device_wait_ms) / f64::from(s.threads.max(1));
            load(a.1).total_cmp(&load(b.1))
        })
        .map(|(name, _)| name.clone())
        .unwrap_or_default()
}

/// Anonymous memory of this process at this moment, in bytes. Guest memory is a memfd and does not count.
pub fn anonymous_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status_bytes(&status, "RssAnon:").unwrap_or(0)
}

/// A size in the text of a `/proc/PID/status` (proc(5)), as `VmRSS:`, in bytes.
pub fn status_bytes(status: &str, name: &str) -> Option<u64> {
    let rest = status.lines().find_map(|line| line.strip_prefix(name))?;
    Some(rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? * 1024)
}

/// A duration in milliseconds, for reports.
pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_busiest_stage_is_judged_per_thread() {
        let stage = |threads, busy_ms| StageReport { threads, busy_ms, ..StageReport::default() };
        let stages =
            BTreeMap::from([("copy".to_owned(), stage(1, 60.0)), ("serialize".to_owned(), stage(2, 100.0))]);
        assert_eq!(busiest(&stages), "copy");
    }

    #[test]
    fn a_stage_that_waits_for_its_device_is_the_one_that_bounds() {
        let stage = |busy_ms, device_wait_ms| StageReport {
            threads: 1,
            busy_ms,
            device_wait_ms,
            ..StageReport::default()
        };
        let stages = BTreeMap::from([
            ("copy".to_owned(), stage(60.0, 0.0)),
            ("serialize".to_owned(), stage(10.0, 70.0)),
        ]);
        assert_eq!(busiest(&stages), "serialize");
    }

    #[test]
    fn waiting_for_the_device_is_no_work_of_the_thread() {
        let meter = StageMeter::new(1);
        let wait = Duration::from_millis(3);
        meter.busy_on_device(|| {
            std::thread::sleep(Duration::from_millis(5));
            ((), wait)
        });
        let report = meter.report();
        assert!(report.device_wait_ms == 3.0 && report.busy_ms >= 2.0, "{report:?}");
        assert!(meter.working_time() >= Duration::from_millis(5));
        // A device that claims more than there was.
        let meter = StageMeter::new(1);
        meter.busy_on_device(|| ((), Duration::from_secs(3600)));
        assert!(meter.working_time() < Duration::from_secs(3600) && meter.report().busy_ms == 0.0);
    }

    #[test]
    fn work_counts_as_busy_and_waiting_does_not() {
        let meter = StageMeter::new(1);
        meter.busy(|| std::thread::sleep(Duration::from_millis(2)));
        meter.blocked_in(|| std::thread::sleep(Duration::from_millis(2)));
        let report = meter.report();
        assert!(report.busy_ms >= 2.0 && report.blocked_in_ms >= 2.0 && report.blocked_out_ms == 0.0);
    }
}
