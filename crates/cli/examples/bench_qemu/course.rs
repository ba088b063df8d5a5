//! What happens in a migration, as both QEMU processes tell it: one clock, as both run here.

use std::time::{Duration, SystemTime};

use pagewarp_guest::Event;
use pagewarp_testkit::qemu::SerialLine;

use crate::machines::{Machines, report};

/// How long one look waits for news. With no time at all, the monitor's socket would not be read.
const LOOK: Duration = Duration::from_millis(5);
const GLANCE: Duration = Duration::from_millis(1);
/// A pause that ended this long after the VM ran on the destination has to do with the migration; later ones are the scheduler's.
const AFTERMATH: Duration = Duration::from_millis(200);

/// So far.
#[derive(Clone, Debug)]
pub(crate) struct Course {
    pub(crate) started: SystemTime,
    /// The guest stands still on the source since.
    pub(crate) stopped: Option<SystemTime>,
    /// It runs on the destination since.
    pub(crate) resumed: Option<SystemTime>,
    /// What the source says of the migration.
    pub(crate) status: String,
    /// How often it has read the dirty log.
    pub(crate) passes: u64,
    /// Why the destination says nothing any more.
    pub(crate) destination_gone: Option<String>,
}

impl Course {
    /// From now on.
    pub(crate) fn start() -> Course {
        Course {
            started: SystemTime::now(),
            stopped: None,
            resumed: None,
            status: String::new(),
            passes: 0,
            destination_gone: None,
        }
    }

    /// Hears the news.
    pub(crate) fn look(&mut self, machines: &mut Machines) -> Result<(), String> {
        let mut patience = LOOK;
        while let Some(event) = machines
            .source_vm
            .next_event(patience)
            .map_err(|e| format!("the source QEMU: {e}; it said {:?}", machines.source.errors()))?
        {
            match event.name.as_str() {
                "STOP" => self.stopped = event.at,
                // It failed or was cancelled after all.
                "RESUME" => self.stopped = None,
                "MIGRATION_PASS" => self.passes = event.data["pass"].as_u64().unwrap_or(self.passes),
                _ => {}
            }
            if let Some(status) = event.migration_status() {
                status.clone_into(&mut self.status);
            }
            patience = GLANCE;
        }
        while self.destination_gone.is_none() {
            match machines.destination_vm.next_event(GLANCE) {
                Ok(Some(event)) if event.name == "RESUME" => self.resumed = event.at,
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(error) => {
                    let said = machines.destination.errors();
                    self.destination_gone = Some(format!("the destination QEMU: {error}; it said {said:?}"));
                }
            }
        }
        Ok(())
    }

    /// Whether the source has completed the migration and the VM runs on the destination.
    pub(crate) fn is_complete(&self) -> bool {
        self.status == "completed" && self.resumed.is_some()
    }

    /// Time since the start.
    pub(crate) fn elapsed(&self) -> Duration {
        self.started.elapsed().unwrap_or_default()
    }

    /// From the command to the VM running on the destination.
    pub(crate) fn total_ms(&self) -> Option<f64> {
        between_ms(self.started, self.resumed?)
    }

    /// From the stop on the source to the VM running on the destination.
    pub(crate) fn downtime_ms(&self) -> Option<f64> {
        between_ms(self.stopped?, self.resumed?)
    }
}

fn between_ms(from: SystemTime, to: SystemTime) -> Option<f64> {
    Some(ms(to.duration_since(from).ok()?))
}

pub(crate) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// The longest pause that the guest saw as it arrived, in milliseconds: where it saw none that it reports at once, the longest since its last
/// report.
pub(crate) fn guest_pause_ms(destination: &[SerialLine], resumed: SystemTime) -> Option<f64> {
    let pauses = destination.iter().filter(|line| line.at <= resumed + AFTERMATH).filter_map(|line| {
        match &line.event {
            Some(Event::Pause(pause)) => Some(pause.us),
            _ => None,
        }
    });
    let first = || destination.iter().find_map(|line| report(line.event.as_ref()?));
    let us = pauses.max().or_else(|| first().map(|report| report.last_pause_us))?;
    Some(us as f64 / 1000.0)
}

/// By how much the guest's clock is behind ours after the move, in milliseconds: a pause that the guest cannot see, because its time-stamp
/// counter stood still meanwhile.
pub(crate) fn guest_clock_lost_ms(source: &[SerialLine], destination: &[SerialLine]) -> Option<f64> {
    let read = |line: &SerialLine| Some((line.at, report(line.event.as_ref()?)?.t_ms));
    let (left_at, left) = source.iter().rev().find_map(read)?;
    let (came_at, came) = destination.iter().find_map(read)?;
    Some(between_ms(left_at, came_at)? - came.checked_sub(left)? as f64)
}
