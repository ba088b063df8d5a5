//! The threads that are a synthetic guest's vCPUs.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::synthetic::MappedMemory;
use crate::workload::{Share, SyntheticConfig};

/// How often a writer looks what it owes.
const SLICE: Duration = Duration::from_millis(1);

/// A writer that could not keep up forgets what it owes beyond this.
const MAX_DEBT: Duration = Duration::from_millis(100);

/// How often `pause` looks whether a writer has ended.
const PATIENCE: Duration = Duration::from_millis(50);

/// Writes between two looks at whether to park.
const BURST: u64 = 64;

/// All writers of one guest. Dropping it ends them.
#[derive(Debug)]
pub(crate) struct Writers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    orders: Mutex<Orders>,
    changed: Condvar,
    /// Writes done, per writer.
    done: Vec<AtomicU64>,
    writes_per_s: AtomicU64,
    last_active_ns: AtomicU64,
    longest_pause_ns: AtomicU64,
}

#[derive(Debug)]
struct Orders {
    running: bool,
    quit: bool,
    /// Writers that wait until the guest runs.
    parked: usize,
}

impl Writers {
    /// Starts the writers, parked.
    pub(crate) fn start(config: &SyntheticConfig, memory: &Arc<MappedMemory>) -> io::Result<Writers> {
        let shared = Arc::new(Shared {
            orders: Mutex::new(Orders { running: false, quit: false, parked: 0 }),
            changed: Condvar::new(),
            done: (0..config.writers).map(|_| AtomicU64::new(0)).collect(),
            writes_per_s: AtomicU64::new(config.writes_per_s),
            last_active_ns: AtomicU64::new(0),
            longest_pause_ns: AtomicU64::new(0),
        });
        let mut writers = Writers { shared, threads: Vec::new() };
        for writer in 0..config.writers {
            let (shared, memory, config) = (Arc::clone(&writers.shared), Arc::clone(memory), config.clone());
            let run = move || shared.write(&config, writer, &memory);
            let thread = std::thread::Builder::new().name(format!("guest-{writer}")).spawn(run)?;
            writers.threads.push(thread);
        }
        Ok(writers)
    }

    /// Parks all writers and returns when nobody writes any more.
    pub(crate) fn pause(&self) {
        let mut orders = self.shared.orders();
        orders.running = false;
        self.shared.changed.notify_all();
        // A writer that panicked will not park, nor will it write.
        let ended = || self.threads.iter().filter(|thread| thread.is_finished()).count();
        while orders.parked + ended() < self.threads.len() {
            orders =
                self.shared.changed.wait_timeout(orders, PATIENCE).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub(crate) fn resume(&self) {
        self.shared.orders().running = true;
        self.shared.changed.notify_all();
    }

    pub(crate) fn is_running(&self) -> bool {
        self.shared.orders().running
    }

    pub(crate) fn set_rate(&self, writes_per_s: u64) {
        self.shared.writes_per_s.store(writes_per_s, Ordering::Relaxed);
    }

    /// Writes done by each writer.
    pub(crate) fn done(&self) -> Vec<u64> {
        self.shared.done.iter().map(|done| done.load(Ordering::Acquire)).collect()
    }

    /// When a writer last looked around, in nanoseconds of `CLOCK_MONOTONIC`; 0 if none ever did.
    pub(crate) fn last_active_ns(&self) -> u64 {
        self.shared.last_active_ns.load(Ordering::Acquire)
    }

    pub(crate) fn longest_pause(&self) -> Duration {
        Duration::from_nanos(self.shared.longest_pause_ns.load(Ordering::Acquire))
    }

    pub(crate) fn reset_longest_pause(&self) {
        self.shared.longest_pause_ns.store(0, Ordering::Release);
    }

    /// Continues from here; only while parked.
    pub(crate) fn load(&self, done: &[u64], last_active_ns: u64) {
        for (mine, &done) in self.shared.done.iter().zip(done) {
            mine.store(done, Ordering::Release);
        }
        self.shared.last_active_ns.store(last_active_ns, Ordering::Release);
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.shared.orders().quit = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            // A panic in there was reported on stderr already, and the self-check finds what it left.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn orders(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, config: &SyntheticConfig, writer: u32, memory: &MappedMemory) {
        let share = Share::new(config, writer);
        let done = &self.done[writer as usize];
        // The time up to which the writes owed are done.
        let mut paid_ns = None;
        while let Some(was_parked) = self.look() {
            let now = self.stamp();
            let paid = if was_parked { now } else { paid_ns.unwrap_or(now) };
            let paid = paid.max(now.saturating_sub(MAX_DEBT.as_nanos() as u64));
            let rate = self.writes_per_s.load(Ordering::Relaxed);
            let per_second = u128::from(config.writers) * 1_000_000_000;
            let owed = u128::from(now - paid) * u128::from(rate) / per_second;
            let count = owed.min(u128::from(BURST)) as u64;
            let first = done.load(Ordering::Acquire);
            for n in first..first + count {
                let write = share.plan(n);
                let (region, page) = config.locate(share.page(write.slot));
                if write.whole {
                    memory.poke(region, page, &share.whole(n).0);
                } else {
                    memory.poke(region, page, &share.header(n));
                }
                done.store(n + 1, Ordering::Release);
            }
            // What a fraction of a write is owed stays owed.
            let spent = if rate == 0 {
                u128::from(now - paid)
            } else {
                u128::from(count) * per_second / u128::from(rate)
            };
            paid_ns = Some(paid + spent as u64);
            if count < BURST {
                self.rest();
            }
        }
    }

    /// Parks as long as the guest is paused. Says whether it did; `None` means quit.
    fn look(&self) -> Option<bool> {
        let mut orders = self.orders();
        if orders.running || orders.quit {
            return (!orders.quit).then_some(false);
        }
        orders.parked += 1;
        self.changed.notify_all();
        while !orders.running && !orders.quit {
            orders = self.changed.wait(orders).unwrap_or_else(PoisonError::into_inner);
        }
        orders.parked -= 1;
        (!orders.quit).then_some(true)
    }

    /// Notes that the guest is alive, and for how long it was not.
    fn stamp(&self) -> u64 {
        let time = clock_gettime(ClockId::Monotonic);
        let now = time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64;
        let last = self.last_active_ns.fetch_max(now, Ordering::AcqRel);
        if last != 0 {
            self.longest_pause_ns.fetch_max(now.saturating_sub(last), Ordering::AcqRel);
        }
        now
    }

    fn rest(&self) {
        let orders = self.orders();
        if orders.running && !orders.quit {
            drop(self.changed.wait_timeout(orders, SLICE));
        }
    }
}
