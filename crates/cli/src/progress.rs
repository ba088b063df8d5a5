//! Progress of a migration, to standard error: a bar on a terminal, a line a second otherwise, JSON lines on demand.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use pagewarp_engine::report::{Phase, Progress};

use crate::say;
use crate::units::{human_bytes, human_ms, human_rate};

const LINE_INTERVAL: Duration = Duration::from_secs(1);

/// Shows progress.
#[derive(Debug)]
pub enum ProgressDisplay {
    /// A bar that is redrawn.
    Bar(ProgressBar),
    /// A line a second.
    Lines {
        /// When the last line was printed, and for which phase.
        last: Option<(Instant, Phase)>,
    },
    /// Every event as a line of JSON.
    Json,
    /// Nothing.
    Silent,
}

impl ProgressDisplay {
    /// What fits standard error: a bar on a terminal, lines otherwise.
    pub fn for_stderr(json_events: bool) -> ProgressDisplay {
        if json_events {
            return ProgressDisplay::Json;
        }
        if !std::io::stderr().is_terminal() {
            return ProgressDisplay::Lines { last: None };
        }
        let bar = ProgressBar::new(0);
        let style = ProgressStyle::with_template("{bar:32} {percent:>3}% {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        bar.set_style(style);
        ProgressDisplay::Bar(bar)
    }

    /// Shows where the migration is.
    pub fn update(&mut self, progress: &Progress) {
        match self {
            ProgressDisplay::Bar(bar) => {
                bar.set_length(progress.epoch_pages.max(1));
                bar.set_position(progress.epoch_pages_done);
                bar.set_message(line(progress));
            }
            ProgressDisplay::Lines { last } => {
                if last.is_some_and(|(at, phase)| at.elapsed() < LINE_INTERVAL && phase == progress.phase) {
                    return;
                }
                *last = Some((Instant::now(), progress.phase));
                // Nobody reading progress is no reason to fail a migration.
                let _ = writeln!(std::io::stderr(), "{}", line(progress));
            }
            ProgressDisplay::Json => {
                if let Ok(json) = serde_json::to_string(progress) {
                    let _ = writeln!(std::io::stderr(), "{json}");
                }
            }
            ProgressDisplay::Silent => {}
        }
    }

    /// Clears the bar, so that what follows stands alone.
    pub fn finish(&mut self) {
        if let ProgressDisplay::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }

    /// Shows a message without tearing the bar.
    pub fn say(&self, message: &str) {
        match self {
            ProgressDisplay::Bar(bar) => bar.suspend(|| say!("{message}")),
            ProgressDisplay::Lines { .. } => {
                let _ = writeln!(std::io::stderr(), "{message}");
            }
            ProgressDisplay::Json | ProgressDisplay::Silent => {}
        }
    }
}

/// One line on where the migration is.
pub fn line(progress: &Progress) -> String {
    let phase = match progress.phase {
        Phase::Connecting => "connecting",
        Phase::Precopy => "pre-copy",
        Phase::Switchover => "switch-over",
        Phase::Committed => "committed",
        Phase::Done => "done",
        Phase::Failed => "failed",
    };
    if progress.phase == Phase::Connecting {
        return phase.to_owned();
    }
    let mut line = format!(
        "{phase}, epoch {}: {}/{} pages, {} sent, {}, {} elapsed",
        progress.epoch,
        progress.epoch_pages_done,
        progress.epoch_pages,
        human_bytes(progress.wire_bytes),
        human_rate(progress.wire_bytes_per_s),
        human_ms(progress.elapsed_ms),
    );
    if progress.dirty_pages_per_s > 0.0 {
        line.push_str(&format!(", {:.0} pages/s dirtied", progress.dirty_pages_per_s));
    }
    if let Some(downtime) = progress.estimated_downtime_ms {
        line.push_str(&format!(", downtime would be {}", human_ms(downtime)));
    }
    if let (Some(lasts), Some(most)) = (progress.outage_ms, progress.outage_limit_ms) {
        line.push_str(&format!(
            ", connection lost {} ago, trying again for up to {}",
            human_ms(lasts),
            human_ms(most)
        ));
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_the_rates_once_they_are_known() {
        assert_eq!(line(&Progress::default()), "connecting");
        let progress = Progress {
            phase: Phase::Precopy,
            epoch: 1,
            epoch_pages: 100,
            epoch_pages_done: 50,
            wire_bytes: 3 << 20,
            wire_bytes_per_s: 117_500_000.0,
            elapsed_ms: 1234.0,
            dirty_pages_per_s: 5000.0,
            estimated_downtime_ms: Some(450.0),
            ..Progress::default()
        };
        assert_eq!(
            line(&progress),
            "pre-copy, epoch 1: 50/100 pages, 3.00 MiB sent, 940.0 Mbit/s, 1.23 s elapsed, 5000 pages/s dirtied, \
             downtime would be 450.0 ms"
        );
        let lost = Progress { outage_ms: Some(3200.0), outage_limit_ms: Some(60_000.0), ..progress };
        assert!(
            line(&lost).ends_with(", connection lost 3.20 s ago, trying again for up to 60.00 s"),
            "{}",
            line(&lost)
        );
    }
}
