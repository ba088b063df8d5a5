//! Keeps the source QEMU from stopping the guest too early.
//!
//! QEMU stops the guest when what is left fits the downtime limit at the rate of the last 100 ms. Behind a bridge that rate depends on what is in the pages: a run of pages that
//! have not changed passes many times faster than what may follow. So QEMU is told less than the limit while its rate is higher than the one that held for the slowest part of the last epochs.
//! Pure code: it is told what was measured, and answers.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The slowest part is looked for in pieces of this length.
const PIECE: Duration = Duration::from_millis(400);
/// What QEMU will find: the fastest it can have seen lately.
const RECENT: Duration = Duration::from_millis(300);
/// The least that QEMU is told, in milliseconds: at 0 it would stop at once.
const LEAST_MS: u64 = 5;

/// What is known of the rate.
#[derive(Debug)]
pub(super) struct Switchover {
    limit_ms: u64,
    /// When, and bytes taken from QEMU until then.
    recent: VecDeque<(Instant, u64)>,
    piece: Option<(Instant, u64)>,
    epoch: u64,
    /// The slowest piece of this epoch and of the one before, bytes a second.
    slowest: [Option<f64>; 2],
}

impl Switchover {
    pub(super) fn new(limit_ms: u64) -> Switchover {
        Switchover { limit_ms, recent: VecDeque::new(), piece: None, epoch: 0, slowest: [None; 2] }
    }

    /// So many bytes have been taken from QEMU so far, in this epoch.
    pub(super) fn observe(&mut self, now: Instant, epoch: u64, bytes: u64) {
        self.recent.push_back((now, bytes));
        while self.recent.len() > 2 && now.saturating_duration_since(self.recent[1].0) >= RECENT {
            self.recent.pop_front();
        }
        if epoch != self.epoch {
            self.epoch = epoch;
            self.slowest = [None, self.slowest[0].or(self.slowest[1])];
            self.piece = None;
        }
        let (start, from) = *self.piece.get_or_insert((now, bytes));
        let time = now.saturating_duration_since(start);
        if time >= PIECE {
            let rate = bytes.saturating_sub(from) as f64 / time.as_secs_f64();
            self.slowest[0] = Some(self.slowest[0].map_or(rate, |slowest| slowest.min(rate)));
            self.piece = Some((now, bytes));
        }
    }

    /// The rate at which the rest will go, in bytes a second; `None`: not known yet.
    pub(super) fn sustained(&self) -> Option<f64> {
        let [this, before] = self.slowest;
        match (this, before) {
            (Some(this), Some(before)) => Some(this.min(before)),
            (one, other) => one.or(other),
        }
    }

    /// The limit to tell a QEMU that goes by its own rate, in milliseconds.
    pub(super) fn limit_ms(&self) -> u64 {
        let pairs = self.recent.iter().zip(self.recent.iter().skip(1));
        let fastest = pairs
            .map(|(&(from, before), &(to, after))| {
                after.saturating_sub(before) as f64
                    / to.saturating_duration_since(from).as_secs_f64().max(0.001)
            })
            .fold(0.0, f64::max);
        match self.sustained() {
            Some(sustained) if fastest > sustained => ((self.limit_ms as f64 * sustained / fastest) as u64)
                .clamp(LEAST_MS.min(self.limit_ms), self.limit_ms),
            _ => self.limit_ms,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds `seconds` at this rate, every 100 ms.
    fn feed(switchover: &mut Switchover, at: &mut (Instant, u64), epoch: u64, seconds: f64, rate: f64) {
        for _ in 0..(seconds * 10.0) as u32 {
            at.0 += Duration::from_millis(100);
            at.1 += (rate / 10.0) as u64;
            switchover.observe(at.0, epoch, at.1);
        }
    }

    #[test]
    fn a_steady_rate_leaves_the_limit_as_it_is() {
        let (mut switchover, mut at) = (Switchover::new(300), (Instant::now(), 0));
        assert_eq!(switchover.limit_ms(), 300);
        feed(&mut switchover, &mut at, 0, 2.0, 2e8);
        feed(&mut switchover, &mut at, 1, 2.0, 2e8);
        assert!(switchover.limit_ms() >= 290, "{}", switchover.limit_ms());
    }

    #[test]
    fn a_run_of_unchanged_pages_does_not_count_as_a_fast_link() {
        let (mut switchover, mut at) = (Switchover::new(300), (Instant::now(), 0));
        feed(&mut switchover, &mut at, 0, 5.0, 2e8);
        feed(&mut switchover, &mut at, 1, 0.3, 2e9);
        assert!((25..=35).contains(&switchover.limit_ms()), "{}", switchover.limit_ms());
        feed(&mut switchover, &mut at, 1, 1.0, 2e8);
        assert!(switchover.limit_ms() >= 290, "the rate is what it was: {}", switchover.limit_ms());
    }

    #[test]
    fn what_held_two_epochs_ago_counts_no_more() {
        let (mut switchover, mut at) = (Switchover::new(300), (Instant::now(), 0));
        feed(&mut switchover, &mut at, 0, 5.0, 2e8);
        feed(&mut switchover, &mut at, 1, 2.0, 2e9);
        feed(&mut switchover, &mut at, 2, 2.0, 2e9);
        assert!(switchover.limit_ms() >= 280, "{}", switchover.limit_ms());
        assert!(switchover.sustained().expect("known") > 1.9e9);
    }
}
