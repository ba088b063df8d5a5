//! What the built-in guest says on its serial console, followed across migrations.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result};
use pagewarp_guest::{Event, Report};

/// The report interval the demo asks the guest for.
pub const REPORT_MS: u64 = 250;

/// Reports at the destination that are looked at for the pause: the first one after the hand-over covers the time since the last one
/// at the source; if that one was on its way already when the guest was paused, the second one does.
const PAUSE_REPORTS: usize = 2;

/// Follows one guest. Each hop continues in the console file of the next machine, in the middle of a line if need be.
#[derive(Debug)]
pub struct GuestWatch {
    console: File,
    partial: Vec<u8>,
    ready: bool,
    last: Option<Report>,
    /// Reports since the last hop.
    since_hop: Vec<Report>,
    problems: Vec<String>,
}

impl GuestWatch {
    /// Watches the guest whose console is written to this file.
    pub fn new(console: &Path) -> Result<GuestWatch> {
        Ok(GuestWatch {
            console: open(console)?,
            partial: Vec::new(),
            ready: false,
            last: None,
            since_hop: Vec::new(),
            problems: Vec::new(),
        })
    }

    /// Reads what the guest has written since.
    pub fn poll(&mut self) -> Result<()> {
        self.console.read_to_end(&mut self.partial).context("cannot read the guest's console")?;
        while let Some(end) = self.partial.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.partial.drain(..=end).collect();
            self.line(String::from_utf8_lossy(&line).trim());
        }
        Ok(())
    }

    /// The guest has moved: reads the old console to its end, then goes on with this one.
    pub fn hop(&mut self, console: &Path) -> Result<()> {
        self.poll()?;
        self.console = open(console)?;
        self.since_hop.clear();
        Ok(())
    }

    /// Starts counting reports from here, where no hop does.
    pub fn mark(&mut self) -> Result<()> {
        self.poll()?;
        self.since_hop.clear();
        Ok(())
    }

    /// Whether the guest has filled its memory and begun to work.
    pub fn is_ready(&self) -> bool {
        self.ready
    }

    /// Reports since the last hop or mark.
    pub fn reports(&self) -> usize {
        self.since_hop.len()
    }

    /// The last report.
    pub fn last(&self) -> Option<&Report> {
        self.last.as_ref()
    }

    /// The longest pause that the guest saw around the last hop, in milliseconds. `None` before it has reported.
    pub fn hop_pause_ms(&self) -> Option<f64> {
        self.since_hop
            .iter()
            .take(PAUSE_REPORTS)
            .map(|report| report.last_pause_us as f64 / 1000.0)
            .reduce(f64::max)
    }

    /// What is wrong with the guest: corruption, a fault, time running backwards. Empty is good.
    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    fn line(&mut self, line: &str) {
        match Event::parse(line) {
            Some(Event::Ready(_)) if self.ready => {
                self.problems.push(format!("the guest started again: {line}"));
            }
            Some(Event::Ready(_)) => self.ready = true,
            Some(Event::Report(report)) => self.report(report),
            Some(Event::Corrupt(_) | Event::Fault(_) | Event::Exit { .. }) => {
                self.problems.push(line.to_owned());
            }
            // Pauses are in the reports as well; warnings are for people who read the console.
            Some(Event::Pause(_) | Event::Warning(_)) | None => {}
        }
    }

    fn report(&mut self, report: Report) {
        if let Some(last) = &self.last
            && (report.seq <= last.seq || report.t_ms < last.t_ms || report.ops < last.ops)
        {
            self.problems.push(format!("the guest's counters went back: from {last:?} to {report:?}"));
        }
        if report.errors > self.last.as_ref().map_or(0, |last| last.errors) {
            self.problems.push(format!("the guest counts {} corruptions", report.errors));
        }
        self.since_hop.push(report);
        self.last = Some(report);
    }
}

fn open(console: &Path) -> Result<File> {
    File::open(console).with_context(|| format!("cannot open the console file `{}`", console.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(seq: u64, pause_us: u64, errors: u64) -> String {
        let t_ms = seq * 250;
        format!(
            "report seq={seq} t_ms={t_ms} ops={seq} pages={seq} pause_us={pause_us} max_pause_us=9 sweeps=0 errors={errors}\r\n"
        )
    }

    const READY: &str =
        "pagewarp-guest ready workload=kv mem_mib=9 filled_mib=8 ws_mib=8 rate=1 seed=1 fill_ms=5\r\n";

    fn watch(dir: &Path, before: &str, after: &str) -> GuestWatch {
        let (source, destination) = (dir.join("a"), dir.join("b"));
        std::fs::write(&source, before).unwrap();
        std::fs::write(&destination, after).unwrap();
        let mut watch = GuestWatch::new(&source).unwrap();
        watch.poll().unwrap();
        watch.hop(&destination).unwrap();
        watch.poll().unwrap();
        watch
    }

    #[test]
    fn a_line_may_be_cut_by_the_hand_over() {
        let dir = tempfile::tempdir().unwrap();
        let all = READY.to_owned()
            + &report(1, 100, 0)
            + &report(2, 80_000, 0)
            + &report(3, 70, 0)
            + &report(4, 999_000, 0);
        let cut = READY.len() + report(1, 100, 0).len() + 20;
        let watch = watch(dir.path(), &all[..cut], &all[cut..]);
        assert!(watch.is_ready());
        assert_eq!(watch.problems(), [""; 0]);
        assert_eq!(watch.reports(), 3);
        assert_eq!(watch.hop_pause_ms(), Some(80.0), "a pause long after the hand-over is none of it");
    }

    #[test]
    fn corruption_and_a_restart_are_problems() {
        let dir = tempfile::tempdir().unwrap();
        for after in [
            report(3, 1, 1),
            report(1, 1, 0),
            READY.to_owned(),
            "CORRUPT what=page-sum address=0x1000 expected=0x1 found=0x0 at_ms=9\r\n".to_owned(),
            "FAULT panic\r\n".to_owned(),
        ] {
            let watch = watch(dir.path(), &(READY.to_owned() + &report(2, 1, 0)), &after);
            assert_eq!(watch.problems().len(), 1, "{after}");
        }
    }
}
