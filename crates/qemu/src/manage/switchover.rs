//! Keeps the source QEMU from stopping the guest too early.
//!
//! QEMU stops the guest when what is left fits the downtime limit at the rate of the last 100 ms. Behind a bridge that rate depends on what is in the pages: a run of pages that
//! have not changed passes many times faster than what may follow. So QEMU is told less than the limit while its rate is higher than the slowest that held lately.
//! Only what QEMU sent while the bridge held it back counts as slow: while it looks for pages, or has none, its rate says nothing about what it could be.
//! Pure code: it is told what was measured, and answers.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The slowest part is looked for in pieces of this length.
const PIECE: Duration = Duration::from_millis(400);
/// A piece counts in the epoch in which it ended and in the next, and for so long in any case, because epochs may be short.
const SHORT: Duration = Duration::from_secs(3);
/// No piece counts for longer than this, because epochs may be long.
const LONG: Duration = Duration::from_secs(60);
/// QEMU is held back where it had to wait for one part in so many of the time.
const HELD_BACK: u32 = 4;
/// What QEMU will find: the fastest it can have seen lately.
const RECENT: Duration = Duration::from_millis(300);
/// The least that QEMU is told, in milliseconds: at 0 it would stop at once.
const LEAST_MS: u64 = 5;

/// What is seen of the source bridge.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    pub(super) at: Instant,
    pub(super) epoch: u64,
    /// Bytes taken from QEMU so far.
    pub(super) bytes: u64,
    /// For how long QEMU had more to send than there was room for, so far; of several connections, all together.
    pub(super) held_back: Duration,
}

/// What was measured while QEMU was held back.
#[derive(Debug)]
struct Piece {
    end: Instant,
    epoch: u64,
    /// Bytes a second.
    rate: f64,
}

/// What is known of the rate.
#[derive(Debug)]
pub(super) struct Switchover {
    limit_ms: u64,
    /// When, and bytes taken from QEMU until then.
    recent: VecDeque<(Instant, u64)>,
    last: Option<Seen>,
    /// Time and bytes since QEMU was last seen held back.
    quiet: (Duration, u64),
    /// Time and bytes of the piece that has begun.
    begun: (Duration, u64),
    pieces: VecDeque<Piece>,
}

impl Switchover {
    pub(super) fn new(limit_ms: u64) -> Switchover {
        Switchover {
            limit_ms,
            recent: VecDeque::new(),
            last: None,
            // It may have begun in the middle of the first time.
            quiet: (Duration::MAX, 0),
            begun: (Duration::ZERO, 0),
            pieces: VecDeque::new(),
        }
    }

    /// Takes a look, as every 100 ms.
    pub(super) fn observe(&mut self, seen: Seen) {
        let Seen { at, epoch, bytes, held_back } = seen;
        self.recent.push_back((at, bytes));
        while self.recent.len() > 2 && at.saturating_duration_since(self.recent[1].0) >= RECENT {
            self.recent.pop_front();
        }
        if let Some(last) = self.last.replace(seen) {
            let time = at.saturating_duration_since(last.at);
            let bytes = bytes.saturating_sub(last.bytes);
            let waited = held_back.saturating_sub(last.held_back);
            if waited * HELD_BACK >= time {
                let quiet = std::mem::take(&mut self.quiet);
                // A wait is known once it is over. If it explains the quiet before, this was the link's.
                if waited.saturating_sub(time) * 2 >= quiet.0 {
                    self.begun.0 += quiet.0 + time;
                    self.begun.1 += quiet.1 + bytes;
                } else {
                    self.begun = (Duration::ZERO, 0);
                }
            } else {
                self.quiet = (self.quiet.0.saturating_add(time), self.quiet.1.saturating_add(bytes));
            }
            let (time, bytes) = self.begun;
            if time >= PIECE {
                self.pieces.push_back(Piece { end: at, epoch, rate: bytes as f64 / time.as_secs_f64() });
                self.begun = (Duration::ZERO, 0);
            }
        }
        self.pieces.retain(|piece| {
            let age = at.saturating_duration_since(piece.end);
            age <= SHORT || (age <= LONG && piece.epoch + 1 >= epoch)
        });
    }

    /// The rate at which the rest will go, in bytes a second; `None`: QEMU was not held back lately, so that nothing is known of it.
    pub(super) fn sustained(&self) -> Option<f64> {
        self.pieces.iter().map(|piece| piece.rate).reduce(f64::min)
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

    /// A migration as it goes on.
    struct Course {
        switchover: Switchover,
        seen: Seen,
    }

    impl Course {
        fn new() -> Course {
            let seen = Seen { at: Instant::now(), epoch: 0, bytes: 0, held_back: Duration::ZERO };
            Course { switchover: Switchover::new(300), seen }
        }

        /// So many seconds at this rate, of which QEMU is held back for a part.
        fn go(&mut self, epoch: u64, seconds: f64, rate: f64, held_back: f64) {
            for _ in 0..(seconds * 10.0).round() as u32 {
                self.seen.at += Duration::from_millis(100);
                self.seen.epoch = epoch;
                self.seen.bytes += (rate / 10.0) as u64;
                self.seen.held_back += Duration::from_secs_f64(0.1 * held_back);
                self.switchover.observe(self.seen);
            }
        }

        fn limit_ms(&self) -> u64 {
            self.switchover.limit_ms()
        }
    }

    #[test]
    fn a_steady_rate_leaves_the_limit_as_it_is() {
        let mut course = Course::new();
        assert_eq!(course.limit_ms(), 300);
        course.go(0, 2.0, 2e8, 0.9);
        course.go(1, 2.0, 2e8, 0.9);
        assert!(course.limit_ms() >= 290, "{}", course.limit_ms());
    }

    #[test]
    fn a_run_of_unchanged_pages_does_not_count_as_a_fast_link() {
        let mut course = Course::new();
        course.go(0, 5.0, 2e8, 0.9);
        course.go(1, 0.3, 2e9, 0.9);
        assert!((25..=35).contains(&course.limit_ms()), "{}", course.limit_ms());
        course.go(1, 1.0, 2e8, 0.9);
        assert!(course.limit_ms() >= 290, "the rate is what it was: {}", course.limit_ms());
    }

    #[test]
    fn what_held_two_epochs_ago_counts_no_more() {
        let mut course = Course::new();
        course.go(0, 5.0, 2e8, 0.9);
        course.go(1, 2.0, 2e9, 0.9);
        course.go(2, 2.0, 2e9, 0.9);
        assert!(course.limit_ms() >= 280, "{}", course.limit_ms());
        assert!(course.switchover.sustained().expect("known") > 1.9e9);
    }

    #[test]
    fn epochs_that_are_too_short_to_measure_age_too() {
        let mut course = Course::new();
        course.go(0, 5.0, 2e7, 0.9);
        for epoch in 1..=20 {
            course.go(epoch, 0.2, 2e9, 0.9);
            if epoch <= 5 {
                assert!(course.limit_ms() < 30, "it was slow a second ago: {}", course.limit_ms());
            }
        }
        assert!(course.limit_ms() >= 280, "{}", course.limit_ms());
    }

    #[test]
    fn what_was_long_ago_counts_no_more_in_a_long_epoch_either() {
        let mut course = Course::new();
        course.go(0, 2.0, 2e7, 0.9);
        course.go(0, 50.0, 2e9, 0.9);
        assert!(course.limit_ms() < 30, "{}", course.limit_ms());
        course.go(0, 15.0, 2e9, 0.9);
        assert!(course.limit_ms() >= 280, "{}", course.limit_ms());
    }

    #[test]
    fn a_link_that_stalls_is_slow() {
        let mut course = Course::new();
        course.go(0, 2.0, 2e8, 0.9);
        // Nothing gets through, and how long QEMU was held back is known only in the end.
        course.go(0, 2.0, 0.0, 0.0);
        course.go(0, 0.1, 2e8, 20.0);
        let sustained = course.switchover.sustained().expect("known");
        assert!(sustained < 3e7, "{sustained}");
    }

    #[test]
    fn a_qemu_that_sends_little_by_itself_is_not_slow() {
        let mut course = Course::new();
        course.go(0, 2.0, 2e8, 0.9);
        // It looks for pages that are not zero, then it waits for the guest, then there is a moment's work at a time.
        course.go(0, 5.0, 1e6, 0.0);
        course.go(0, 5.0, 0.0, 0.0);
        for _ in 0..10 {
            course.go(0, 0.1, 1e7, 0.5);
            course.go(0, 0.4, 0.0, 0.0);
        }
        assert!(course.switchover.sustained().expect("known") > 1.9e8);
        // In the end nothing is known any more, and nothing is held against it.
        course.go(2, 5.0, 0.0, 0.0);
        assert_eq!((course.switchover.sustained(), course.limit_ms()), (None, 300));
    }
}
