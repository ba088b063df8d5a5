//! How many bytes of a connection may be on their way between the two QEMU processes.
//!
//! QEMU decides by the rate at which its socket takes bytes when the rest of memory fits the downtime limit. What lies in buffers behind that
//! socket deceives it: it makes the link look fast at first and adds its own time to the downtime. So the bytes on their way are kept to what the link
//! delivers in its round trip and a few milliseconds more.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// A sample of the rate takes at least this long.
const SAMPLE: Duration = Duration::from_millis(25);
/// The best of so many samples counts.
const SAMPLES: usize = 4;

/// The window of one connection, in bytes of QEMU's stream.
#[derive(Debug)]
pub struct Window {
    round_trip: Duration,
    delay: Duration,
    taken: u64,
    delivered: u64,
    samples: VecDeque<f64>,
    sample_start: Instant,
    sample_from: u64,
    /// Whether the window was more than half full at some time during this sample: otherwise the source QEMU, not the link, set the pace.
    was_full: bool,
}

impl Window {
    /// The smallest window, in bytes: less would be a burden on fast links before anything is known about them.
    pub const MIN: u64 = 128 << 10;
    /// The largest, in bytes: 16 MiB are 10 ms at 13 Gbit/s, and a limit to the memory of a connection.
    pub const MAX: u64 = 16 << 20;

    /// A window for a link with this round trip. What is on its way may take `delay` beyond that.
    pub fn new(round_trip: Duration, delay: Duration, now: Instant) -> Window {
        Window {
            round_trip,
            delay,
            taken: 0,
            delivered: 0,
            samples: VecDeque::with_capacity(SAMPLES),
            sample_start: now,
            sample_from: 0,
            was_full: false,
        }
    }

    /// The size of the window now.
    pub fn size(&self) -> u64 {
        let bytes = self.rate() * (self.round_trip + self.delay).as_secs_f64();
        (bytes as u64).clamp(Window::MIN, Window::MAX)
    }

    /// Bytes a second that the destination took, lately and at best.
    pub fn rate(&self) -> f64 {
        self.samples.iter().copied().fold(0.0, f64::max)
    }

    /// Bytes on their way.
    pub fn in_flight(&self) -> u64 {
        self.taken - self.delivered
    }

    /// Bytes that may be taken from the source QEMU now.
    pub fn room(&mut self) -> u64 {
        let room = self.size().saturating_sub(self.in_flight());
        self.was_full |= room < self.size() / 2;
        room
    }

    /// So many bytes were taken from the source QEMU.
    pub fn take(&mut self, bytes: u64) {
        self.taken += bytes;
    }

    /// Bytes that were taken in all.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// So many bytes in all have been written into the destination QEMU. A peer that says more than it got is wrong.
    pub fn deliver(&mut self, total: u64, now: Instant) -> Result<(), u64> {
        if total > self.taken || total < self.delivered {
            return Err(self.taken);
        }
        self.delivered = total;
        let time = now.saturating_duration_since(self.sample_start);
        if time >= SAMPLE {
            let rate = (total - self.sample_from) as f64 / time.as_secs_f64();
            if self.was_full || rate > self.rate() {
                if self.samples.len() == SAMPLES {
                    self.samples.pop_front();
                }
                self.samples.push_back(rate);
            }
            self.sample_start = now;
            self.sample_from = total;
            self.was_full = false;
        }
        Ok(())
    }
}

/// What the windows of all connections of a session may hold together: a limit to the memory of a migration with many channels, or over a long link.
///
/// Each connection may have the smallest window in any case: others may wait for what comes on it.
#[derive(Debug, Default)]
pub struct Together {
    in_flight: AtomicU64,
}

impl Together {
    /// The most bytes of QEMU's stream on their way, but for the smallest window of each connection, and what several threads read at the same moment.
    pub const MAX: u64 = 32 << 20;

    /// Bytes that a connection may take that has this room in its own window, and these bytes on their way.
    pub fn room(&self, own: u64, in_flight: u64) -> u64 {
        let common = Together::MAX.saturating_sub(self.in_flight.load(Relaxed));
        own.min(common.max(Window::MIN.saturating_sub(in_flight)))
    }

    /// So many bytes more are on their way.
    pub fn take(&self, bytes: u64) {
        self.in_flight.fetch_add(bytes, Relaxed);
    }

    /// So many bytes have arrived, which must have been taken.
    pub fn deliver(&self, bytes: u64) {
        self.in_flight.fetch_sub(bytes, Relaxed);
    }
}

/// How fast a rate that QEMU sees may rise.
///
/// Pages that have not changed pass a thousand times faster than others. QEMU, which looks at the last 100 ms, would take a run of them for a fast link, and stop the
/// guest with more left to send than the link can carry in time. So the rate rises step by step, and whoever drives the migration has time to see it.
#[derive(Debug)]
pub struct Slew {
    slot: Instant,
    used: u64,
    before: u64,
}

impl Slew {
    const SLOT: Duration = Duration::from_millis(50);
    const RISE: f64 = 1.5;
    /// Bytes that always pass in a slot: 160 MB a second.
    const FREE: u64 = 8 << 20;

    /// Starts slowly.
    pub fn new(now: Instant) -> Slew {
        Slew { slot: now, used: 0, before: 0 }
    }

    /// Bytes that may be taken now; if there are none, how long to wait for more.
    pub fn room(&mut self, now: Instant) -> Result<u64, Duration> {
        let slots = now.saturating_duration_since(self.slot).as_micros() / Slew::SLOT.as_micros();
        if slots > 0 {
            // A pause of QEMU does not make the link slower.
            self.before =
                if slots > 1 { self.used.max(self.before / 2) } else { self.used.max(self.before * 3 / 4) };
            self.used = 0;
            self.slot = now;
        }
        let most = Slew::FREE.max((self.before as f64 * Slew::RISE) as u64);
        match most.saturating_sub(self.used) {
            0 => Err((self.slot + Slew::SLOT).saturating_duration_since(now)),
            room => Ok(room),
        }
    }

    /// So many bytes were taken.
    pub fn take(&mut self, bytes: u64) {
        self.used += bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RTT: Duration = Duration::from_millis(1);
    const DELAY: Duration = Duration::from_millis(9);

    /// Runs a link of this rate for so long, with a source that always has data, and returns the time that a byte then needs.
    fn run(
        window: &mut Window,
        start: Instant,
        rate: f64,
        time: Duration,
        mut taken: u64,
        mut delivered: f64,
    ) -> (u64, f64, Duration) {
        let tick = Duration::from_micros(200);
        let mut now = start;
        while now < start + time {
            now += tick;
            let room = window.room();
            window.take(room);
            taken += room;
            delivered = (delivered + rate * tick.as_secs_f64()).min(taken as f64);
            window.deliver(delivered as u64, now).unwrap();
        }
        let queue = Duration::from_secs_f64(window.in_flight() as f64 / rate);
        (taken, delivered, queue)
    }

    #[test]
    fn it_grows_to_the_rate_of_the_link_and_shrinks_with_it() {
        let start = Instant::now();
        let mut window = Window::new(RTT, DELAY, start);
        let second = Duration::from_secs(1);
        let (taken, delivered, queue) = run(&mut window, start, 1e9, second, 0, 0.0);
        assert!((0.9e9..1.1e9).contains(&window.rate()), "{}", window.rate());
        assert!(queue <= Duration::from_millis(11), "{queue:?}");
        let (.., queue) = run(&mut window, start + second, 1e8, second, taken, delivered);
        assert!((0.9e8..1.2e8).contains(&window.rate()), "{}", window.rate());
        assert!(queue <= Duration::from_millis(12), "{queue:?}");
    }

    #[test]
    fn an_idle_source_does_not_make_the_link_look_slow() {
        let start = Instant::now();
        let mut window = Window::new(RTT, DELAY, start);
        run(&mut window, start, 1e9, Duration::from_secs(1), 0, 0.0);
        let size = window.size();
        let mut now = start + Duration::from_secs(1);
        // What was on its way arrives; then a trickle.
        let mut total = window.taken;
        window.deliver(total, now).unwrap();
        for _ in 0..100 {
            now += Duration::from_millis(10);
            assert!(window.room() > 0);
            window.take(1000);
            total += 1000;
            window.deliver(total, now).unwrap();
        }
        assert!(window.size() >= size / 2, "{} {size}", window.size());
    }

    #[test]
    fn all_windows_together_have_a_limit_and_each_connection_a_little() {
        let together = Together::default();
        let mut flying = [0; 16];
        for own in &mut flying {
            while together.room(Window::MAX - *own, *own) > 0 {
                let room = together.room(Window::MAX - *own, *own).min(256 << 10);
                together.take(room);
                *own += room;
            }
        }
        assert_eq!(flying[0], Window::MAX);
        assert_eq!(flying[15], Window::MIN);
        assert!(flying.iter().sum::<u64>() <= Together::MAX + 16 * Window::MIN);
        together.deliver(Window::MAX);
        assert_eq!(together.room(1 << 20, Window::MIN), 1 << 20);
    }

    #[test]
    fn a_rate_rises_step_by_step() {
        let start = Instant::now();
        let mut slew = Slew::new(start);
        let (mut now, mut per_slot) = (start, Vec::new());
        while now < start + Duration::from_millis(500) {
            let mut bytes = 0;
            loop {
                match slew.room(now) {
                    Ok(room) => {
                        slew.take(room);
                        bytes += room;
                    }
                    Err(wait) => {
                        now += wait;
                        break;
                    }
                }
            }
            per_slot.push(bytes);
        }
        assert!(per_slot.len() >= 10, "{per_slot:?}");
        assert_eq!(per_slot[0], 8 << 20);
        for pair in per_slot.windows(2) {
            assert!(pair[1] as f64 <= 1.51 * pair[0] as f64 && pair[1] >= pair[0], "{per_slot:?}");
        }
    }

    #[test]
    fn a_peer_cannot_have_delivered_more_than_it_got() {
        let mut window = Window::new(RTT, DELAY, Instant::now());
        window.take(10);
        window.deliver(10, Instant::now()).unwrap();
        assert_eq!(window.deliver(11, Instant::now()), Err(10));
        assert_eq!(window.deliver(9, Instant::now()), Err(10), "nor take anything back");
    }
}
