//! Messages that strangers can cause: each must be told, but not so often that logs fill up.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::flow::lock;

/// In so long...
const WINDOW: Duration = Duration::from_secs(60);
/// ... so many are told.
const MOST: u32 = 20;

/// Counts messages of one kind.
#[derive(Debug, Default)]
pub struct Seldom {
    state: Mutex<Option<Window>>,
}

#[derive(Debug)]
struct Window {
    since: Instant,
    told: u32,
    left_out: u64,
}

impl Seldom {
    /// Tells a message with `tell`, unless there have been many of late. `tell` is also given how many were left out since the last one that was told, as words that follow
    /// it; mostly none.
    pub fn tell(&self, tell: impl FnOnce(&str)) {
        if let Some(left_out) = self.next(Instant::now()) {
            match left_out {
                0 => tell(""),
                n => tell(&format!(" ({n} more like this were not told)")),
            }
        }
    }

    /// `None`: this one is left out.
    fn next(&self, now: Instant) -> Option<u64> {
        let mut state = lock(&self.state);
        let window = state.get_or_insert(Window { since: now, told: 0, left_out: 0 });
        if now.duration_since(window.since) >= WINDOW {
            (window.since, window.told) = (now, 0);
        }
        if window.told >= MOST {
            window.left_out += 1;
            return None;
        }
        window.told += 1;
        Some(std::mem::take(&mut window.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_are_left_out_and_none_is_forgotten() {
        let (seldom, start) = (Seldom::default(), Instant::now());
        for _ in 0..MOST {
            assert_eq!(seldom.next(start), Some(0));
        }
        for _ in 0..7 {
            assert_eq!(seldom.next(start + WINDOW / 2), None);
        }
        assert_eq!(seldom.next(start + WINDOW), Some(7));
        assert_eq!(seldom.next(start + WINDOW), Some(0));
    }
}
