//! Steady state: work, verify, report, and watch the clock.

use crate::arena;
use crate::clock::Clock;
use crate::cpu;
use crate::params::Params;
use crate::serial::Serial;
use crate::workloads::{Corruption, Workload};

/// Gaps from here on get a line of their own.
const LONG_PAUSE_US: u64 = 5_000;
/// Pause lines in one report interval; a busy host makes many, and the serial line is slow. The longest yet
/// is always reported.
const PAUSE_LINES: u32 = 10;
/// Corruption lines in one report interval. All are counted.
const CORRUPT_LINES: u32 = 20;
/// Bytes sent to the serial port in one turn of the loop.
const BYTES_PER_TURN: usize = 4;
/// Throttles let work that is late catch up only this far: a guest that was paused must not burst afterwards.
const CATCH_UP_US: u64 = 20_000;

/// Lets `per_s` units a second through.
struct Throttle {
    /// Ticks one unit takes, times 2^16; 0: no limit.
    cost: u64,
    /// When the next unit is due, in ticks.
    due: u64,
    catch_up: u64,
}

impl Throttle {
    fn new(per_s: u64, clock: &Clock, now: u64) -> Self {
        let cost = if per_s == 0 {
            0
        } else {
            ((u128::from(clock.khz) * 1000) << 16).div_ceil(u128::from(per_s)) as u64
        };
        Throttle { cost, due: now, catch_up: clock.ticks_us(CATCH_UP_US) }
    }

    fn ready(&self, now: u64) -> bool {
        now >= self.due || self.cost == 0
    }

    fn spend(&mut self, now: u64, units: u64) {
        let spent = ((u128::from(self.cost) * u128::from(units)) >> 16) as u64;
        self.due = self.due.max(now.saturating_sub(self.catch_up)) + spent;
    }
}

/// Longest gaps between two turns of the loop, in ticks.
#[derive(Default)]
struct Pauses {
    interval: u64,
    ever: u64,
}

/// Runs `work` until the end of the machine, or until `exit_after_ms`.
pub fn run(work: &mut dyn Workload, params: &Params, clock: &Clock, start: u64, serial: &mut Serial) {
    let report_ticks = clock.ticks_us(params.report_ms * 1000);
    let long_pause = clock.ticks_us(LONG_PAUSE_US);
    let ready = cpu::tsc();
    let end = if params.exit_after_ms == 0 {
        u64::MAX
    } else {
        ready + clock.ticks_us(params.exit_after_ms * 1000)
    };
    let mut writes = Throttle::new(params.rate, clock, ready);
    let mut checks = Throttle::new(params.verify_mib_s << 20, clock, ready);
    let mut pauses = Pauses::default();
    let (mut seq, mut ops, mut pages, mut sweeps, mut errors) = (0u64, 0u64, 0u64, 0u64, 0u64);
    let (mut pause_lines, mut corrupt_lines) = (0, 0);
    let mut next_report = ready + report_ticks;
    let mut last = ready;
    loop {
        let now = cpu::tsc();
        if now < last {
            let back = clock.us(last - now);
            serial.line(format_args!(
                "warning tsc_backwards_us={back} at_ms={}",
                clock.us(now.saturating_sub(start)) / 1000
            ));
            // Everything due by the old count would be late by as much.
            writes.due = now;
            checks.due = now;
            next_report = now + report_ticks;
        }
        let gap = now.saturating_sub(last);
        last = now;
        let now_ms = clock.us(now - start.min(now)) / 1000;
        if gap >= long_pause && (pause_lines < PAUSE_LINES || gap > pauses.interval) {
            pause_lines += 1;
            serial.line(format_args!("pause us={} at_ms={now_ms}", clock.us(gap)));
        }
        pauses.interval = pauses.interval.max(gap);
        pauses.ever = pauses.ever.max(gap);
        if now >= next_report {
            seq += 1;
            let (pause, max) = (clock.us(pauses.interval), clock.us(pauses.ever));
            serial.line(format_args!(
                "report seq={seq} t_ms={now_ms} ops={ops} pages={pages} pause_us={pause} max_pause_us={max} sweeps={sweeps} errors={errors}"
            ));
            pauses.interval = 0;
            (pause_lines, corrupt_lines) = (0, 0);
            next_report += report_ticks;
            if next_report <= now {
                next_report = now + report_ticks;
            }
        }
        if now >= end {
            serial.line(format_args!("exit t_ms={now_ms} errors={errors}"));
            return;
        }
        serial.pump(BYTES_PER_TURN);
        let mut found = |c: Corruption| {
            errors += 1;
            if corrupt_lines < CORRUPT_LINES {
                corrupt_lines += 1;
                let address = arena::physical(c.at);
                let Corruption { what, expected, found, .. } = c;
                serial.line(format_args!(
                    "CORRUPT what={what} address={address:#x} expected={expected:#x} found={found:#x} at_ms={now_ms}"
                ));
            }
        };
        if writes.ready(now) {
            let done = work.step(now_ms, &mut found);
            ops += done.ops;
            pages += done.pages;
            writes.spend(now, done.pages);
        } else if !checks.ready(now) {
            cpu::relax();
        }
        if checks.ready(now) {
            let done = work.verify(&mut found);
            // A sweep's end costs nothing; charge it a little, or tiny memories would be verified in a tight
            // loop.
            checks.spend(now, done.bytes.max(64));
            sweeps += u64::from(done.sweep_done);
        }
    }
}
