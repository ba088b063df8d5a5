//! What the acknowledgements of the destination tell about the link: food for the policy.

use std::time::{Duration, Instant};

use crate::policy::Interval;
use crate::protocol::hello::Credit;

/// How long an interval is at least.
const INTERVAL: Duration = Duration::from_millis(50);
/// Bytes that wait for the link this long show that it is full. The stages before it do not hold back as much.
const QUEUE: Duration = Duration::from_millis(3);

/// Collects intervals over all connections of a session.
#[derive(Debug)]
pub(crate) struct Pace {
    round_trip: Duration,
    start: Instant,
    received: u64,
    received_before: u64,
    decode_ns: u64,
    decoded_pages: u64,
    latest: Credit,
    least_backlog: u64,
    pressed: bool,
}

impl Pace {
    pub(crate) fn new(round_trip: Duration, now: Instant) -> Pace {
        Pace {
            round_trip,
            start: now,
            received: 0,
            received_before: 0,
            decode_ns: 0,
            decoded_pages: 0,
            latest: Credit::default(),
            least_backlog: u64::MAX,
            pressed: false,
        }
    }

    /// The source QEMU had more to send than there was room for.
    pub(crate) fn press(&mut self) {
        self.pressed = true;
    }

    /// The destination has received `more` bytes of frames, after which `backlog` bytes are on their way on all connections.
    pub(crate) fn credit(
        &mut self,
        credit: &Credit,
        more: u64,
        backlog: u64,
        now: Instant,
    ) -> Option<Interval> {
        self.received += more;
        self.latest.decode_ns = self.latest.decode_ns.max(credit.decode_ns);
        self.latest.decoded_pages = self.latest.decoded_pages.max(credit.decoded_pages);
        self.least_backlog = self.least_backlog.min(backlog);
        let time = now.saturating_duration_since(self.start);
        if time < INTERVAL {
            return None;
        }
        let wire_bytes = self.received - self.received_before;
        let queue = wire_bytes as f64 / time.as_secs_f64() * (self.round_trip + QUEUE).as_secs_f64();
        let interval = Interval {
            end: now,
            time,
            wire_bytes,
            link_was_full: wire_bytes > 0 && self.least_backlog as f64 > queue,
            was_pressed: self.pressed,
            decode: Duration::from_nanos(self.latest.decode_ns - self.decode_ns),
            decoded_pages: self.latest.decoded_pages - self.decoded_pages,
        };
        self.start = now;
        self.received_before = self.received;
        (self.decode_ns, self.decoded_pages) = (self.latest.decode_ns, self.latest.decoded_pages);
        (self.least_backlog, self.pressed) = (u64::MAX, false);
        Some(interval)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_full_if_something_always_waits_for_it() {
        let start = Instant::now();
        let after = |ms| start + Duration::from_millis(ms);
        let credit = Credit { decode_ns: 1000, decoded_pages: 70, ..Credit::default() };
        for (least, full) in [(1_000_000, true), (100_000, false)] {
            let mut pace = Pace::new(Duration::from_millis(1), start);
            pace.press();
            assert!(pace.credit(&credit, 5_000_000, 1_200_000, after(20)).is_none());
            let interval = pace.credit(&credit, 5_000_000, least, after(100)).unwrap();
            assert_eq!(
                (interval.wire_bytes, interval.link_was_full, interval.was_pressed),
                (10_000_000, full, true)
            );
            assert_eq!((interval.decode, interval.decoded_pages), (Duration::from_micros(1), 70));
            let next = pace.credit(&credit, 0, 0, after(200)).unwrap();
            assert_eq!((next.wire_bytes, next.link_was_full, next.was_pressed), (0, false, false));
            assert_eq!((next.decode, next.decoded_pages), (Duration::ZERO, 0));
        }
    }
}
