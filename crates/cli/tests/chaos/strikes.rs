//! Deals the faults of a trial at their moments, and takes those back that pass.

use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::draw::{Plan, Strike};

/// How often somebody who waits looks.
const LOOK: Duration = Duration::from_millis(2);

/// Who is struck.
pub(crate) trait Victim {
    /// Deals a fault.
    fn strike(&mut self, strike: &Strike);
    /// Takes it back.
    fn heal(&mut self, strike: &Strike);
    /// Whether there is nothing left to disturb.
    fn is_over(&mut self) -> bool;
}

/// Deals all faults that happen; returns those that came before the end.
pub(crate) fn deal(victim: &mut impl Victim, plan: &Plan, expected: Duration) -> Vec<Strike> {
    let start = Instant::now();
    let mut events: Vec<(Duration, bool, Strike)> = Vec::new();
    for strike in plan.strikes.iter().filter(|strike| !strike.fault.is_condition()) {
        let at = expected.mul_f64(strike.at);
        events.push((at, false, *strike));
        if !strike.lasts.is_zero() {
            events.push((at + strike.lasts, true, *strike));
        }
    }
    events.sort_by_key(|event| event.0);
    let mut dealt = Vec::new();
    for (at, is_heal, strike) in events {
        while start.elapsed() < at && !victim.is_over() {
            std::thread::sleep(LOOK);
        }
        let was_dealt = dealt.iter().any(|other: &Strike| other.fault == strike.fault);
        if is_heal && was_dealt {
            victim.heal(&strike);
        } else if !is_heal && !victim.is_over() {
            victim.strike(&strike);
            dealt.push(strike);
        }
    }
    dealt
}

/// Sends a signal to a child, which may have ended.
pub(crate) fn signal(pid: u32, what: Signal) {
    let pid = Pid::from_raw(pid as i32).expect("a process has a number above 0");
    let _ = kill_process(pid, what);
}
