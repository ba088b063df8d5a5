//! The bandwidth limit: a token bucket shared by all connections of a migration.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::flow::{Flow, Stopped};

const MIN_SLICE: usize = 512;
const MAX_SLICE: usize = 64 << 10;

const CREDIT: Duration = Duration::from_millis(5);

/// Paces writers to a common rate.
#[derive(Debug)]
pub(crate) struct Limiter {
    bytes_per_s: f64,
    /// When the link would be free again if everything granted so far went at the rate.
    free_at: Mutex<Instant>,
}

impl Limiter {
    pub(crate) fn new(bytes_per_s: u64) -> Limiter {
        Limiter { bytes_per_s: bytes_per_s as f64, free_at: Mutex::new(Instant::now()) }
    }

    /// The most that is written at once: at most a twentieth of a second, so that the pace is even and a cancel is heard.
    pub(crate) fn slice(&self) -> usize {
        ((self.bytes_per_s / 20.0) as usize).clamp(MIN_SLICE, MAX_SLICE)
    }

    /// Waits until `bytes` may be written.
    pub(crate) fn acquire(&self, bytes: usize, flow: &Flow) -> Result<(), Stopped> {
        let wait = self.reserve(bytes, Instant::now());
        if wait.is_zero() { Ok(()) } else { flow.sleep(wait) }
    }

    fn reserve(&self, bytes: usize, now: Instant) -> Duration {
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        // Idle time is not saved up, so that the limit holds over any interval that matters; the little credit only makes up for
        // sleeping longer than asked for.
        let start = (*free_at).max(now.checked_sub(CREDIT).unwrap_or(now));
        *free_at = start + Duration::from_secs_f64(bytes as f64 / self.bytes_per_s);
        start.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writers_queue_up_behind_each_other() {
        let limiter = Limiter::new(1_000_000);
        let now = Instant::now() + Duration::from_secs(1);
        assert_eq!(limiter.reserve(500_000, now), Duration::ZERO);
        assert_eq!(limiter.reserve(500_000, now), Duration::from_millis(500) - CREDIT);
        assert_eq!(limiter.reserve(1, now), Duration::from_secs(1) - CREDIT);
    }

    #[test]
    fn idle_time_is_not_saved_up() {
        let limiter = Limiter::new(1_000_000);
        let later = Instant::now() + Duration::from_secs(60);
        assert_eq!(limiter.reserve(1_000_000, later), Duration::ZERO);
        assert_eq!(limiter.reserve(1, later), Duration::from_secs(1) - CREDIT);
    }
}
