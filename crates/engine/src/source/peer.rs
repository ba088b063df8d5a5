//! What the destination has told the source so far.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use pagewarp_wire::{Ack, Message};
use tracing::warn;

use crate::bitmap::PageBitmap;
use crate::error::MigrationError;
use crate::flow::{Flow, Stopped, lock};
use crate::report::DestinationReport;
use crate::vm::RegionInfo;

/// Of the time between two messages no more than this counts as time in which nothing was done: both ends say something every second, unless the network is lost.
const PULSE: Duration = Duration::from_secs(2);

/// Filled by the thread that reads the control connection, watched by the others.
pub(crate) struct Peer {
    /// Id and size in pages of each region.
    regions: Vec<(u32, u64)>,
    state: Mutex<State>,
    changed: Condvar,
    started: Instant,
    /// How long the destination may show that it is alive and get nothing done that is waited for.
    patience: Duration,
}

/// Pages that arrived damaged and were dropped. Its size does not depend on how often the destination says so.
#[derive(Debug)]
pub(crate) struct Damaged {
    /// The pages, one bitmap per region.
    pub(crate) pages: Vec<PageBitmap>,
    /// The epochs they were sent in, and what the destination saw first in each.
    pub(crate) epochs: BTreeMap<u32, String>,
}

struct State {
    acked: Ack,
    /// Not yet dealt with.
    damaged: Option<Damaged>,
    epochs_done: u32,
    ready: bool,
    running: Option<DestinationReport>,
    /// As many as there are pages, in the order of the regions, if they were asked for.
    digests: Vec<Vec<u64>>,
    digests_complete: bool,
    round_trip: Option<Duration>,
    /// When it was heard last.
    heard: Instant,
    /// For how long it has been heard since it got on.
    stalled: Duration,
}

impl State {
    /// The destination has said something, which is progress or not.
    fn hear(&mut self, progress: bool) {
        let now = Instant::now();
        let gap = now.saturating_duration_since(self.heard).min(PULSE);
        self.heard = now;
        self.stalled = if progress { Duration::ZERO } else { self.stalled + gap };
    }
}

impl Peer {
    /// A destination that has accepted these regions. It may get nothing done for as long as `patience`.
    pub(crate) fn new(regions: &[RegionInfo], verify: bool, patience: Duration) -> Peer {
        let digests = if verify { regions } else { &[] };
        Peer {
            regions: regions.iter().map(|region| (region.id, region.pages)).collect(),
            state: Mutex::new(State {
                acked: Ack::default(),
                damaged: None,
                epochs_done: 0,
                ready: false,
                running: None,
                digests: digests.iter().map(|region| vec![0; region.pages as usize]).collect(),
                digests_complete: false,
                round_trip: None,
                heard: Instant::now(),
                stalled: Duration::ZERO,
            }),
            changed: Condvar::new(),
            started: Instant::now(),
            patience,
        }
    }

    /// The message that asks for an answer, to measure the round trip and to show that this end is alive.
    pub(crate) fn ping(&self) -> Message {
        Message::Ping { id: self.started.elapsed().as_nanos() as u64 }
    }

    /// Takes note of a message. While this end `is_sending` the destination has a reason to wait.
    pub(crate) fn note(&self, message: Message, is_sending: bool) -> Result<(), MigrationError> {
        let mut state = lock(&self.state);
        let progress = match &message {
            Message::Ack(ack) => *ack != state.acked,
            Message::Ping { .. } | Message::Pong { .. } => false,
            _ => true,
        };
        state.hear(progress || is_sending);
        match message {
            Message::Ack(ack) => state.acked = ack,
            Message::EpochDone { epoch } => state.epochs_done = epoch.saturating_add(1),
            Message::Damaged { epoch, region, pages, reason } => {
                let none = || Damaged {
                    pages: self.regions.iter().map(|&(_, pages)| PageBitmap::new(pages)).collect(),
                    epochs: BTreeMap::new(),
                };
                let damaged = state.damaged.get_or_insert_with(none);
                damaged.epochs.entry(epoch).or_insert(reason);
                // The state machine has checked region and pages.
                if let Some(index) = self.regions.iter().position(|&(id, _)| id == region) {
                    for page in pages {
                        damaged.pages[index].insert(page);
                    }
                }
            }
            Message::Ready => state.ready = true,
            Message::Running { report } => {
                // The VM runs there, whatever the report looks like.
                let report = serde_json::from_slice(&report).unwrap_or_else(|error| {
                    warn!(%error, "the destination's report is not readable");
                    DestinationReport::default()
                });
                state.running = Some(report);
            }
            Message::Digests { region, first_page, digests } => {
                let index = self.regions.iter().position(|&(id, _)| id == region);
                let known = index.and_then(|index| state.digests.get_mut(index));
                let range = usize::try_from(first_page).ok().and_then(|first| {
                    let end = first.checked_add(digests.len())?;
                    known?.get_mut(first..end)
                });
                let range = range.ok_or_else(|| {
                    MigrationError::Peer(format!(
                        "digests of pages that region {region} does not have, or nobody asked for"
                    ))
                })?;
                range.copy_from_slice(&digests);
            }
            Message::DigestsEnd => state.digests_complete = true,
            Message::Error { code, message } => {
                return Err(match code {
                    pagewarp_wire::ErrorCode::Refused
                    | pagewarp_wire::ErrorCode::Busy
                    | pagewarp_wire::ErrorCode::Version => MigrationError::Refused(message),
                    pagewarp_wire::ErrorCode::Differs => MigrationError::Differs(message),
                    _ => MigrationError::PeerReports(message),
                });
            }
            Message::Ping { .. } => {}
            Message::Pong { id } => {
                let now = self.started.elapsed().as_nanos() as u64;
                let took = Duration::from_nanos(now.saturating_sub(id));
                // The shortest one: the others waited in queues, which are counted as bytes in flight.
                state.round_trip = Some(state.round_trip.map_or(took, |shortest| shortest.min(took)));
            }
            other => return Err(MigrationError::Peer(format!("{} is not for the source", other.kind()))),
        }
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// Waits for the destination to do something, or finds out that it should stop. One that is heard all the time and gets nothing done is not waited for: while the VM
    /// stands still, it would for ever.
    fn wait(
        &self,
        flow: &Flow,
        what: &str,
        is_done: impl Fn(&State) -> bool,
    ) -> Result<MutexGuard<'_, State>, Stopped> {
        lock(&self.state).stalled = Duration::ZERO;
        let state =
            flow.wait(&self.state, &self.changed, |state| is_done(state) || state.stalled > self.patience)?;
        if is_done(&state) {
            return Ok(state);
        }
        let patience = self.patience;
        drop(state);
        Err(flow.stop_threads(MigrationError::Peer(format!(
            "it has shown for {patience:?} that it is alive, and has got nothing done; it was to {what}"
        ))))
    }

    /// What the destination has restored.
    pub(crate) fn acked(&self) -> Ack {
        lock(&self.state).acked
    }

    /// The number of epochs that the destination has restored.
    pub(crate) fn epochs_done(&self) -> u32 {
        lock(&self.state).epochs_done
    }

    /// The shortest round trip.
    pub(crate) fn round_trip(&self) -> Duration {
        lock(&self.state).round_trip.unwrap_or_default()
    }

    /// Waits until the destination has restored this many epochs.
    pub(crate) fn wait_epochs(&self, count: u32, flow: &Flow) -> Result<(), Stopped> {
        self.wait(flow, "restore an epoch", |state| state.epochs_done >= count).map(drop)
    }

    /// How many pages arrived damaged and were not [taken](Self::take_damaged) yet.
    pub(crate) fn damaged_pages(&self) -> u64 {
        let state = lock(&self.state);
        state.damaged.as_ref().map_or(0, |damaged| damaged.pages.iter().map(PageBitmap::count).sum())
    }

    /// Takes what arrived damaged and was not taken before. Of an epoch that is done, nothing comes later.
    pub(crate) fn take_damaged(&self) -> Option<Damaged> {
        lock(&self.state).damaged.take()
    }

    /// Waits until the destination is ready.
    pub(crate) fn wait_ready(&self, flow: &Flow) -> Result<(), Stopped> {
        self.wait(flow, "get ready", |state| state.ready).map(drop)
    }

    pub(crate) fn wait_running(&self, flow: &Flow) -> Result<DestinationReport, Stopped> {
        let mut state = self.wait(flow, "run the VM", |state| state.running.is_some())?;
        Ok(state.running.take().unwrap_or_default())
    }

    /// Waits for the digests of all pages, region by region.
    pub(crate) fn wait_digests(&self, flow: &Flow) -> Result<Vec<Vec<u64>>, Stopped> {
        let mut state = self.wait(flow, "digest its memory", |state| state.digests_complete)?;
        Ok(std::mem::take(&mut state.digests))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::MigrationControl;

    const PATIENCE: Duration = Duration::from_secs(60);

    #[test]
    fn a_destination_that_only_shows_that_it_is_alive_is_not_waited_for() {
        let peer = Peer::new(&[], false, Duration::from_millis(100));
        let flow = Flow::new(MigrationControl::new());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| peer.wait_ready(&flow));
            while !waiting.is_finished() {
                peer.note(Message::Ping { id: 1 }, false).unwrap();
                std::thread::sleep(Duration::from_millis(5));
            }
            assert!(waiting.join().unwrap().is_err());
        });
        let reason = flow.take_reason().to_string();
        assert!(reason.contains("it is alive") && reason.contains("get ready"), "{reason}");
    }

    #[test]
    fn a_network_that_is_lost_for_long_is_not_held_against_the_destination() {
        let peer = Peer::new(&[], false, 2 * PULSE);
        lock(&peer.state).heard -= 10 * PULSE;
        peer.note(Message::Pong { id: 0 }, false).unwrap();
        assert_eq!(lock(&peer.state).stalled, PULSE);
        peer.note(Message::Ack(Ack { pages: 1, ..Ack::default() }), false).unwrap();
        assert_eq!(lock(&peer.state).stalled, Duration::ZERO);
    }

    #[test]
    fn a_report_that_cannot_be_read_does_not_hide_that_the_vm_runs() {
        let peer = Peer::new(&[], false, PATIENCE);
        peer.note(Message::Running { report: b"not JSON".to_vec() }, false).unwrap();
        let flow = Flow::new(MigrationControl::new());
        assert_eq!(peer.wait_running(&flow), Ok(DestinationReport::default()));
    }

    #[test]
    fn a_report_of_another_release_is_read_as_far_as_it_is_known() {
        let report: DestinationReport =
            serde_json::from_str(r#"{"total_ms": 7.5, "of_the_future": {"a": 1}}"#).unwrap();
        assert_eq!(report.total_ms, 7.5);
    }

    #[test]
    fn digests_of_pages_that_do_not_exist_are_the_peers_fault() {
        let regions = [RegionInfo { id: 3, name: "ram".into(), pages: 4 }];
        let digests =
            |region, first_page, count| Message::Digests { region, first_page, digests: vec![1; count] };
        let peer = Peer::new(&regions, true, PATIENCE);
        assert!(peer.note(digests(3, 0, 4), false).is_ok());
        for (region, first_page, count) in [(3, 1, 4), (3, u64::MAX, 1), (2, 0, 1)] {
            assert!(matches!(
                peer.note(digests(region, first_page, count), false),
                Err(MigrationError::Peer(_))
            ));
        }
        let unasked = Peer::new(&regions, false, PATIENCE);
        assert!(matches!(unasked.note(digests(3, 0, 1), false), Err(MigrationError::Peer(_))));
    }
}
