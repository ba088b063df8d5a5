//! When to switch over: pure policy, no I/O.

use std::collections::VecDeque;
use std::time::Duration;

use crate::config::{OnLimit, SourceConfig};

/// Time that a switch-over takes beside sending memory and round trips: pausing, saving and loading the state, scheduling.
const FIXED_OVERHEAD: Duration = Duration::from_millis(20);
/// Part of the downtime limit that the estimate may use up; the rest is for what an estimate cannot know.
const SAFETY: f64 = 0.8;
/// Working time of a stage that its speed is measured over.
const WINDOW: Duration = Duration::from_millis(1000);

/// The speed of something over its latest second of *work*.
///
/// Working time rather than clock time, so that pauses do not count; a whole second of it, so that short bursts that
/// vanish in a socket buffer do not count for much.
#[derive(Debug)]
pub(crate) struct Speed {
    samples: VecDeque<(Duration, u64)>,
    total: (Duration, u64),
}

impl Speed {
    pub(crate) fn new() -> Speed {
        Speed { samples: VecDeque::from([(Duration::ZERO, 0)]), total: (Duration::ZERO, 0) }
    }

    /// Takes note of the working time and the amount done since the beginning.
    pub(crate) fn note(&mut self, busy: Duration, amount: u64) {
        self.total = (busy, amount);
        self.samples.push_back(self.total);
        // Keep one sample that is older than the window.
        while self.samples.len() > 2 && busy.saturating_sub(self.samples[1].0) >= WINDOW {
            self.samples.pop_front();
        }
    }

    /// Amount per second of work; `None` before any work was seen.
    pub(crate) fn per_second(&self) -> Option<f64> {
        let (busy, amount) = *self.samples.front()?;
        let time = self.total.0.saturating_sub(busy).as_secs_f64();
        (time > 0.0 && self.total.1 > amount).then(|| (self.total.1 - amount) as f64 / time)
    }
}

/// What is left to do if the VM were paused now.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Remaining {
    /// Dirty pages.
    pub(crate) pages: u64,
    /// Bytes a dirty page is expected to take on the wire.
    pub(crate) bytes_per_page: f64,
    /// Bytes handed to the send stage that the destination has not restored.
    pub(crate) in_flight_bytes: u64,
    /// Pages handed to the stages that the destination has not restored.
    pub(crate) in_flight_pages: u64,
    /// Pages per second that the destination restores, if known.
    pub(crate) restored_pages_per_s: Option<f64>,
    /// Bytes per second on the wire, if known.
    pub(crate) wire_bytes_per_s: Option<f64>,
    /// Pages per second of the stages before the wire, if known.
    pub(crate) pages_per_s: Option<f64>,
    /// Round trip between the hosts.
    pub(crate) round_trip: Duration,
    /// Time for digesting guest memory, as far as the limit holds for it.
    pub(crate) verify: Duration,
    /// Whether the stages and the wire work at the same time.
    pub(crate) pipeline: bool,
}

/// The downtime if the VM were paused now.
pub(crate) fn estimate_downtime(remaining: &Remaining) -> Duration {
    let wire = remaining.wire_bytes_per_s.map_or(0.0, |rate| {
        (remaining.in_flight_bytes as f64 + remaining.pages as f64 * remaining.bytes_per_page) / rate
    });
    let stages = remaining.pages_per_s.map_or(0.0, |rate| remaining.pages as f64 / rate);
    let work = if remaining.pipeline { wire.max(stages) } else { wire + stages };
    // A destination that is slower than the link has pages waiting that are no bytes worth mentioning: zero pages, above all.
    let landing = remaining.restored_pages_per_s.map_or(0.0, |rate| remaining.in_flight_pages as f64 / rate);
    let work = work.max(landing);
    // Two round trips: Prepare and Ready, Commit and Running.
    FIXED_OVERHEAD
        + remaining.round_trip * 2
        + remaining.verify
        + Duration::try_from_secs_f64(work).unwrap_or(Duration::MAX / 4)
}

/// What verifying counts for in the estimates, if it is going to take this long. Nothing, if it alone takes longer than the limit and that
/// is no reason not to migrate: then the limit holds for the rest.
///
/// # Errors
/// If no downtime can be within the limit.
pub(crate) fn verifying(config: &SourceConfig, expected: Duration) -> Result<Duration, String> {
    if FIXED_OVERHEAD + expected <= config.downtime_limit.mul_f64(SAFETY) {
        return Ok(expected);
    }
    if config.on_limit != OnLimit::Cancel {
        return Ok(Duration::ZERO);
    }
    Err(format!(
        "comparing the memory of both sides would take about {} ms while the VM is paused, and {} ms of downtime are allowed; allow a longer \
         downtime, or migrate without verifying",
        expected.as_millis(),
        config.downtime_limit.as_millis()
    ))
}

/// What to do at the end of an epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// One more epoch.
    Continue,
    /// Pause the VM and send the rest.
    SwitchOver,
    /// Give up, for this reason.
    GiveUp(String),
}

/// Decides at the end of `epoch` (from 0), `elapsed` after the start. `idle`: nothing is dirty and nothing in flight, so that it cannot
/// get better.
pub(crate) fn decide(
    config: &SourceConfig,
    estimate: Duration,
    idle: bool,
    epoch: u32,
    elapsed: Duration,
) -> Decision {
    if estimate <= config.downtime_limit.mul_f64(SAFETY) {
        return Decision::SwitchOver;
    }
    let limit = match (config.max_epochs, config.max_time) {
        _ if idle => "everything was sent".to_owned(),
        (Some(most), _) if epoch + 1 >= most => format!("{most} epochs"),
        (_, Some(most)) if elapsed >= most => format!("{} s", most.as_secs_f64()),
        _ => return Decision::Continue,
    };
    match config.on_limit {
        OnLimit::KeepGoing if !idle => Decision::Continue,
        OnLimit::KeepGoing => Decision::SwitchOver,
        OnLimit::StopAnyway => Decision::SwitchOver,
        OnLimit::Cancel => Decision::GiveUp(format!(
            "after {limit} the downtime would be about {} ms, and {} ms are allowed; allow a longer downtime or more time, \
             or let it stop anyway",
            estimate.as_millis(),
            config.downtime_limit.as_millis()
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use pagewarp_codec::CpuBackend;

    use super::*;

    fn remaining(pages: u64) -> Remaining {
        Remaining {
            pages,
            bytes_per_page: 4096.0,
            in_flight_bytes: 0,
            in_flight_pages: 0,
            restored_pages_per_s: Some(1e6),
            wire_bytes_per_s: Some(125e6),
            pages_per_s: Some(1e6),
            round_trip: Duration::from_millis(1),
            verify: Duration::ZERO,
            pipeline: true,
        }
    }

    fn config() -> SourceConfig {
        SourceConfig::new(Arc::new(CpuBackend::new()))
    }

    #[test]
    fn the_wire_decides_when_it_is_slower() {
        let time = estimate_downtime(&remaining(125_000));
        assert_eq!(time.as_millis(), 4096 + 22);
    }

    #[test]
    fn the_stages_decide_when_they_are_slower() {
        let slow = Remaining { pages_per_s: Some(1000.0), ..remaining(1000) };
        assert_eq!(estimate_downtime(&slow).as_millis(), 1022);
    }

    #[test]
    fn without_a_pipeline_the_times_add_up() {
        let sequential = Remaining { pipeline: false, ..remaining(125_000) };
        assert_eq!(estimate_downtime(&sequential).as_millis(), 4096 + 125 + 22);
    }

    #[test]
    fn what_is_in_flight_counts() {
        let busy = Remaining { in_flight_bytes: 125_000_000, ..remaining(0) };
        assert_eq!(estimate_downtime(&busy).as_millis(), 1022);
    }

    #[test]
    fn pages_that_wait_at_a_slow_destination_count() {
        let slow = Remaining { in_flight_pages: 500_000, ..remaining(0) };
        assert_eq!(estimate_downtime(&slow).as_millis(), 522);
    }

    #[test]
    fn verifying_counts_unless_the_limit_cannot_hold_for_it() {
        let verified = Remaining { verify: Duration::from_millis(100), ..remaining(0) };
        assert_eq!(estimate_downtime(&verified).as_millis(), 122);
        let verifying = |on_limit, ms| {
            verifying(&SourceConfig { on_limit, ..config() }, Duration::from_millis(ms))
                .map(|d| d.as_millis())
        };
        for on_limit in [OnLimit::Cancel, OnLimit::StopAnyway, OnLimit::KeepGoing] {
            assert_eq!(verifying(on_limit, 220), Ok(220));
        }
        assert!(verifying(OnLimit::Cancel, 221).unwrap_err().contains("about 221 ms"));
        assert_eq!(verifying(OnLimit::StopAnyway, 221), Ok(0));
        assert_eq!(verifying(OnLimit::KeepGoing, 221), Ok(0));
    }

    #[test]
    fn speed_forgets_what_is_older_than_its_window() {
        let mut speed = Speed::new();
        assert_eq!(speed.per_second(), None);
        for second in 1..=10 {
            speed.note(Duration::from_secs(second), second * 1000);
        }
        speed.note(Duration::from_secs(11), 10_500);
        speed.note(Duration::from_secs(12), 11_000);
        assert_eq!(speed.per_second(), Some(500.0));
    }

    #[test]
    fn short_bursts_do_not_hide_a_slow_link() {
        let mut speed = Speed::new();
        speed.note(Duration::from_secs(8), 1_000_000_000);
        speed.note(Duration::from_millis(8001), 1_004_000_000);
        assert!(speed.per_second().unwrap() < 126e6);
    }

    #[test]
    fn it_switches_over_when_the_estimate_fits_with_a_margin() {
        let decide_at = |ms| decide(&config(), Duration::from_millis(ms), false, 3, Duration::from_secs(1));
        assert_eq!(decide_at(240), Decision::SwitchOver);
        assert_eq!(decide_at(241), Decision::Continue);
    }

    #[test]
    fn at_a_limit_the_choice_is_the_callers() {
        let at_limit = |on_limit| {
            let config = SourceConfig { max_epochs: Some(5), on_limit, ..config() };
            assert_eq!(decide(&config, Duration::from_secs(9), false, 3, Duration::ZERO), Decision::Continue);
            decide(&config, Duration::from_secs(9), false, 4, Duration::ZERO)
        };
        assert_eq!(at_limit(OnLimit::KeepGoing), Decision::Continue);
        assert_eq!(at_limit(OnLimit::StopAnyway), Decision::SwitchOver);
        assert!(matches!(at_limit(OnLimit::Cancel), Decision::GiveUp(why) if why.contains("5 epochs")));
    }

    #[test]
    fn it_does_not_wait_for_what_cannot_get_better() {
        let idle = |on_limit| {
            let config = SourceConfig { on_limit, ..config() };
            decide(&config, Duration::from_secs(9), true, 0, Duration::ZERO)
        };
        assert_eq!(idle(OnLimit::KeepGoing), Decision::SwitchOver);
        assert_eq!(idle(OnLimit::StopAnyway), Decision::SwitchOver);
        assert!(
            matches!(idle(OnLimit::Cancel), Decision::GiveUp(why) if why.contains("everything was sent"))
        );
    }

    #[test]
    fn time_is_a_limit_too() {
        let config = SourceConfig { max_time: Some(Duration::from_secs(60)), ..config() };
        let decide_at = |s| decide(&config, Duration::from_secs(9), false, 100, Duration::from_secs(s));
        assert_eq!(decide_at(59), Decision::Continue);
        assert!(matches!(decide_at(60), Decision::GiveUp(_)));
    }
}
