//! What the acknowledgements of the destination tell about the link: food for the policy.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use pagewarp_codec::PAGE_SIZE;

use crate::policy::Interval;
use crate::protocol::hello::Credit;

/// How long an interval is at least.
const INTERVAL: Duration = Duration::from_millis(50);
/// Bytes that wait for the link this long, on average, show that it has no rest.
const QUEUE: Duration = Duration::from_micros(2500);
/// To show that it is slower than it was, they must wait for longer: a host that is busy with other things looks much like a slow link.
const LONG_QUEUE: Duration = Duration::from_millis(4);
/// A stage that works for this share of the time is what bounds the migration, and not the link.
const BUSY: f64 = 0.85;

/// What an acknowledgement says is new.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Step {
    /// Bytes of frames received since the last one.
    pub(crate) received: u64,
    /// Bytes of the stream written into the destination QEMU since the last one.
    pub(crate) delivered: u64,
    /// Bytes of frames that are on their way, on all connections.
    pub(crate) backlog: u64,
}

/// Collects intervals over all connections of a session.
#[derive(Debug)]
pub(crate) struct Pace {
    round_trip: Duration,
    decode_threads: usize,
    start: Instant,
    received: u64,
    encode: Duration,
    encode_now: Duration,
    decode_ns: u64,
    decoded_pages: u64,
    latest: Credit,
    /// Per connection, the time spent on writing into the destination QEMU: at the start of the interval, and now.
    restore: HashMap<u16, (u64, u64)>,
    delivered: u64,
    backlogs: u64,
    credits: u64,
    pressed: bool,
    /// The rate of the link when it was full last.
    full_rate: f64,
}

impl Pace {
    pub(crate) fn new(round_trip: Duration, decode_threads: usize, now: Instant) -> Pace {
        Pace {
            round_trip,
            decode_threads: decode_threads.max(1),
            start: now,
            received: 0,
            encode: Duration::ZERO,
            encode_now: Duration::ZERO,
            decode_ns: 0,
            decoded_pages: 0,
            latest: Credit::default(),
            restore: HashMap::new(),
            delivered: 0,
            backlogs: 0,
            credits: 0,
            pressed: false,
            full_rate: 0.0,
        }
    }

    /// The source QEMU had more to send than there was room for.
    pub(crate) fn press(&mut self) {
        self.pressed = true;
    }

    /// The destination acknowledged something on this connection. Each encoding thread has worked for `encode` so far.
    pub(crate) fn credit(
        &mut self,
        connection: u16,
        credit: &Credit,
        step: &Step,
        encode: Duration,
        now: Instant,
    ) -> Option<Interval> {
        // The peer may say whatever it likes.
        self.received = self.received.saturating_add(step.received);
        self.delivered = self.delivered.saturating_add(step.delivered);
        self.encode_now = encode;
        self.latest.decode_ns = self.latest.decode_ns.max(credit.decode_ns);
        self.latest.decoded_pages = self.latest.decoded_pages.max(credit.decoded_pages);
        let restore = self.restore.entry(connection).or_default();
        restore.1 = restore.1.max(credit.restore_ns);
        self.backlogs = self.backlogs.saturating_add(step.backlog);
        self.credits += 1;
        let time = now.saturating_duration_since(self.start);
        (time >= INTERVAL).then(|| self.end(time, now))
    }

    fn end(&mut self, time: Duration, now: Instant) -> Interval {
        let seconds = time.as_secs_f64();
        let rate = self.received as f64 / seconds;
        let backlog = self.backlogs as f64 / self.credits.max(1) as f64;
        let decode = Duration::from_nanos(self.latest.decode_ns - self.decode_ns);
        let restore = self.restore.values().map(|(start, now)| now - start).max().unwrap_or(0);
        let shares = [
            self.encode_now.saturating_sub(self.encode).as_secs_f64() / seconds,
            decode.as_secs_f64() / seconds / self.decode_threads as f64,
            restore as f64 / 1e9 / seconds,
        ];
        let slower = rate < 0.9 * self.full_rate;
        let queue = if slower { LONG_QUEUE } else { QUEUE };
        let is_full = self.pressed
            && rate > 0.0
            && shares.iter().all(|&share| share < BUSY)
            && backlog > rate * (self.round_trip + queue).as_secs_f64();
        if is_full {
            self.full_rate = rate;
        }
        let pages = self.delivered as f64 / PAGE_SIZE as f64;
        let interval = Interval {
            end: now,
            time,
            wire_bytes: self.received,
            link_was_full: is_full,
            compute_bound: self.pressed && shares[..2].iter().any(|&share| share >= BUSY),
            restore_s: (self.pressed && shares[2] >= BUSY && pages >= 64.0)
                .then(|| restore as f64 / 1e9 / pages),
            decode,
            decoded_pages: self.latest.decoded_pages - self.decoded_pages,
        };
        tracing::trace!(?shares, backlog, rate, "an interval");
        self.start = now;
        (self.received, self.delivered) = (0, 0);
        self.encode = self.encode_now;
        (self.decode_ns, self.decoded_pages) = (self.latest.decode_ns, self.latest.decoded_pages);
        self.restore.values_mut().for_each(|restore| restore.0 = restore.1);
        (self.backlogs, self.credits, self.pressed) = (0, 0, false);
        interval
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RTT: Duration = Duration::from_millis(1);

    /// One interval of 100 ms with 10 MB, this backlog, and this share of the time for each stage.
    fn interval(backlog: u64, encode: f64, decode: f64, restore: f64) -> Interval {
        let start = Instant::now();
        let mut pace = Pace::new(RTT, 2, start);
        pace.press();
        let ns = |share: f64| (share * 1e8) as u64;
        let credit = Credit {
            decode_ns: 2 * ns(decode),
            decoded_pages: 70,
            restore_ns: ns(restore),
            ..Credit::default()
        };
        let half = start + Duration::from_millis(20);
        assert!(
            pace.credit(
                0,
                &Credit::default(),
                &Step { received: 5_000_000, delivered: 0, backlog },
                Duration::ZERO,
                half
            )
            .is_none()
        );
        let encode = Duration::from_nanos(ns(encode));
        let end = start + Duration::from_millis(100);
        let interval = pace
            .credit(0, &credit, &Step { received: 5_000_000, delivered: 4_096_000, backlog }, encode, end)
            .expect("it is over");
        assert_eq!(interval.wire_bytes, 10_000_000);
        assert_eq!(interval.decoded_pages, 70);
        let later = end + Duration::from_millis(60);
        let next = pace.credit(0, &credit, &Step::default(), encode, later).expect("it is over");
        assert_eq!((next.wire_bytes, next.link_was_full, next.compute_bound), (0, false, false));
        assert_eq!((next.decode, next.decoded_pages), (Duration::ZERO, 0));
        interval
    }

    #[test]
    fn whatever_a_peer_says_can_be_counted() {
        let start = Instant::now();
        let mut pace = Pace::new(RTT, 2, start);
        pace.press();
        let step = Step { received: u64::MAX, delivered: u64::MAX, backlog: u64::MAX };
        for n in 1..10 {
            let value = if n % 2 == 0 { 0 } else { u64::MAX };
            let credit = Credit {
                delivered_bytes: value,
                received_bytes: value,
                decode_ns: value,
                decoded_pages: value,
                restore_ns: value,
                stream_hash: value,
            };
            pace.credit(
                n % 3,
                &credit,
                &step,
                Duration::ZERO,
                start + u32::from(n) * Duration::from_millis(30),
            );
        }
    }

    #[test]
    fn a_link_is_full_if_something_waits_for_it_and_no_stage_is_busy() {
        assert!(interval(400_000, 0.5, 0.5, 0.5).link_was_full);
        assert!(!interval(100_000, 0.5, 0.5, 0.5).link_was_full, "nothing waits");
        assert!(!interval(400_000, 0.95, 0.5, 0.5).link_was_full, "encoding bounds");
        assert!(!interval(400_000, 0.5, 0.95, 0.5).link_was_full, "decoding bounds");
        let by_qemu = interval(400_000, 0.5, 0.5, 0.95);
        assert!(!by_qemu.link_was_full && !by_qemu.compute_bound, "the destination QEMU bounds");
        assert!((94e-6..96e-6).contains(&by_qemu.restore_s.expect("it was seen")), "{by_qemu:?}");
        assert!(interval(0, 0.95, 0.5, 0.5).compute_bound);
    }
}
