//! The token bucket of one direction of a link, as a virtual clock: pure arithmetic, the caller brings the time.

use std::time::{Duration, Instant};

/// The least burst, in bytes: below one large read the link could never be kept busy.
const MIN_BURST_BYTES: u64 = 64 << 10;

/// At most this much lateness of the forwarding threads is made up for.
const MAX_CATCH_UP: Duration = Duration::from_millis(50);

/// When a link of a given rate has put which bytes through.
#[derive(Debug)]
pub(crate) struct Bucket {
    rate_bits_per_s: Option<u64>,
    burst_bytes: Option<u64>,
    /// When everything accepted so far has been put through.
    idle_at: Instant,
    busy: Duration,
    bytes: u64,
}

impl Bucket {
    /// An idle link. Without a rate it is infinitely fast, without a burst the burst is 2 ms of the rate but at least 64 KiB.
    pub(crate) fn new(rate_bits_per_s: Option<u64>, burst_bytes: Option<u64>, now: Instant) -> Bucket {
        Bucket { rate_bits_per_s, burst_bytes, idle_at: now, busy: Duration::ZERO, bytes: 0 }
    }

    /// Changes the rate for bytes that come from now on.
    pub(crate) fn set_rate(&mut self, rate_bits_per_s: Option<u64>) {
        self.rate_bits_per_s = rate_bits_per_s;
    }

    /// How long `bytes` occupy the link.
    fn time_of(&self, bytes: u64) -> Duration {
        let nanos = |rate: u64| u128::from(bytes) * 8 * 1_000_000_000 / u128::from(rate.max(1));
        self.rate_bits_per_s
            .map_or(Duration::ZERO, |rate| Duration::from_nanos(nanos(rate).try_into().unwrap_or(u64::MAX)))
    }

    /// Bytes per read: half a millisecond of the rate, so that waits are longer than the timer's resolution and shorter than
    /// anybody notices.
    pub(crate) fn chunk_bytes(&self, most: usize) -> usize {
        let half_ms = |rate: u64| (rate / 8 / 2000).try_into().unwrap_or(usize::MAX);
        self.rate_bits_per_s.map_or(most, half_ms).clamp(4096, most)
    }

    /// How many bytes pass in this time; `None` without a rate.
    pub(crate) fn bytes_in(&self, time: Duration) -> Option<u64> {
        self.rate_bits_per_s.map(|rate| (rate as f64 / 8.0 * time.as_secs_f64()) as u64)
    }

    /// Accepts `bytes` at `now` and says when their last bit is through.
    ///
    /// `late` is for how long these bytes would have been on the link already, had the forwarding thread been on time; a thread that
    /// sleeps too long must not make the link slower.
    pub(crate) fn accept(&mut self, now: Instant, bytes: u64, late: Duration) -> Instant {
        let burst = self
            .burst_bytes
            .unwrap_or_else(|| self.rate_bits_per_s.map_or(0, |rate| (rate / 8 / 500).max(MIN_BURST_BYTES)));
        let credit = self.time_of(burst).max(late.min(MAX_CATCH_UP));
        let start = now.checked_sub(credit).map_or(self.idle_at, |earliest| self.idle_at.max(earliest));
        let time = self.time_of(bytes);
        self.idle_at = start + time;
        self.busy += time;
        self.bytes += bytes;
        self.idle_at
    }

    /// Forgets credit from before `now`, after a time when the link was down.
    pub(crate) fn restart(&mut self, now: Instant) {
        self.idle_at = self.idle_at.max(now);
    }

    /// Bytes accepted so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// For how long those bytes occupied the link.
    pub(crate) fn busy(&self) -> Duration {
        self.busy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_busy_link_passes_its_rate_after_the_burst() {
        let start = Instant::now();
        // 8 Mbit/s is one byte per microsecond.
        let mut bucket = Bucket::new(Some(8_000_000), Some(1000), start);
        let mut now = start + 10 * MS;
        assert_eq!(bucket.accept(now, 1000, Duration::ZERO), now, "the burst passes at once");
        for _ in 0..100 {
            let due = bucket.accept(now, 500, Duration::ZERO);
            assert_eq!(due, now + Duration::from_micros(500));
            now = due;
        }
        assert_eq!((bucket.bytes(), bucket.busy()), (51_000, 51 * MS));
    }

    #[test]
    fn lateness_is_made_up_for_but_idleness_is_not() {
        let start = Instant::now();
        let mut bucket = Bucket::new(Some(8_000_000), Some(1000), start);
        let due = bucket.accept(start, 10_000, Duration::ZERO);
        let woken = due + 8 * MS;
        assert_eq!(bucket.accept(woken, 10_000, 8 * MS), due + 10 * MS, "as if the thread had been on time");
        let later = due + 1000 * MS;
        assert_eq!(
            bucket.accept(later, 10_000, Duration::ZERO),
            later + 9 * MS,
            "only the burst is saved up"
        );
        let much_later = later + 1000 * MS;
        assert_eq!(
            bucket.accept(much_later, 60_000, 900 * MS),
            much_later + 10 * MS,
            "the catch-up is bounded"
        );
    }

    #[test]
    fn several_connections_share_the_rate() {
        let start = Instant::now();
        let mut bucket = Bucket::new(Some(8_000_000), Some(0), start);
        let one = bucket.accept(start, 1000, Duration::ZERO);
        let two = bucket.accept(start, 1000, Duration::ZERO);
        assert_eq!((one, two), (start + MS, start + 2 * MS));
    }

    #[test]
    fn no_rate_means_no_wait() {
        let start = Instant::now();
        let mut bucket = Bucket::new(None, None, start);
        assert!(bucket.accept(start, 1 << 40, Duration::ZERO) <= start);
        assert_eq!(bucket.busy(), Duration::ZERO);
        assert_eq!(bucket.chunk_bytes(1 << 18), 1 << 18);
        bucket.set_rate(Some(1_000_000_000));
        assert_eq!(bucket.chunk_bytes(1 << 18), 62_500);
        bucket.set_rate(Some(1));
        assert_eq!(bucket.chunk_bytes(1 << 18), 4096);
        bucket.set_rate(Some(u64::MAX));
        assert_eq!(bucket.chunk_bytes(1 << 18), 1 << 18);
    }

    #[test]
    fn the_rate_changes_for_later_bytes() {
        let start = Instant::now();
        let mut bucket = Bucket::new(Some(8_000_000), Some(0), start);
        let first = bucket.accept(start, 1000, Duration::ZERO);
        bucket.set_rate(Some(16_000_000));
        assert_eq!(bucket.accept(start, 1000, Duration::ZERO), first + MS / 2);
        bucket.restart(start + 100 * MS);
        assert_eq!(bucket.accept(start + 100 * MS, 0, 50 * MS), start + 100 * MS);
    }
}
