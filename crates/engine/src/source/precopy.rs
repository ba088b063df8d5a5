//! The pre-copy controller: epochs until the rest fits the downtime limit, then the switch-over.

use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use pagewarp_codec::{Encoding, PAGE_SIZE};
use pagewarp_wire::{Message, SourceDuty, SourceState, state_hash, state_messages};
use tracing::{debug, warn};

use crate::bitmap::PageBitmap;
use crate::config::{OnLimit, SourceConfig};
use crate::convergence::{Decision, Remaining, Speed, decide, estimate_downtime, verifying};
use crate::digest::{Digester, compare};
use crate::error::MigrationError;
use crate::flow::{Flow, Stopped};
use crate::link::{WireBytes, own_error};
use crate::metrics::{ms, thread_cpu};
use crate::report::{DestinationReport, EpochReport, Phase};
use crate::source::copy::{Copier, Walk};
use crate::source::owned::Owned;
use crate::source::peer::Peer;
use crate::source::serialize::Serializing;
use crate::source::session::Control;
use crate::source::stages::{Counters, Stages};
use crate::stage_trace::Track;
use crate::transport::{Connector, OUTAGE_WHILE_PAUSED};
use crate::vm::{DirtyLog, GuestMemory, RegionInfo, SourceVm};

/// An epoch takes at least this long.
const MIN_EPOCH: Duration = Duration::from_millis(20);
/// Framing bytes of a page beside its payload, roughly.
const FRAMING_PER_PAGE: f64 = 4.0;

/// Everything the controller works with.
pub(crate) struct Precopy<'a> {
    pub(crate) vm: &'a mut dyn SourceVm,
    pub(crate) log: &'a mut dyn DirtyLog,
    pub(crate) owned: &'a mut Owned,
    pub(crate) regions: &'a [RegionInfo],
    pub(crate) config: &'a SourceConfig,
    pub(crate) batch_pages: usize,
    /// Serialize threads.
    pub(crate) serializers: u32,
    pub(crate) flow: &'a Flow,
    pub(crate) connector: &'a dyn Connector,
    pub(crate) channel: &'a Control<'a>,
    pub(crate) peer: &'a Peer,
    pub(crate) counters: &'a Counters,
    pub(crate) bytes: &'a WireBytes,
    pub(crate) serializing: &'a Serializing,
    pub(crate) track: Track,
    /// Batches copied so far.
    pub(crate) batches: u64,
    /// Pages that arrived damaged so far.
    pub(crate) resent_pages: u64,
    /// What verifying counts for in the estimates of the downtime.
    pub(crate) verifying: Duration,
    pub(crate) started: Instant,
}

/// A migration that succeeded.
pub(crate) struct Finished {
    pub(crate) total_ms: f64,
    pub(crate) downtime_ms: f64,
    pub(crate) wire_bytes: u64,
    pub(crate) epochs: Vec<EpochReport>,
    /// How long the paused VM waited until its memory was compared, if it was.
    pub(crate) verify: Option<Duration>,
    /// Pages that arrived damaged and were sent again.
    pub(crate) resent_pages: u64,
    pub(crate) destination: DestinationReport,
    /// CPU time of the controller's thread when the VM ran on the destination.
    pub(crate) thread_cpu: Duration,
}

/// Measures that carry over from epoch to epoch.
struct Speeds {
    wire: Speed,
    copy: Speed,
    serialize: Speed,
    /// The destination's, over clock time.
    restore: Speed,
}

impl Precopy<'_> {
    /// Runs the migration to its end. On an error the VM runs here, unless the error says otherwise.
    pub(crate) fn run(mut self, mut stages: Stages<'_>) -> Result<Finished, MigrationError> {
        let mut epochs = Vec::new();
        let dirty = self.precopy(&mut stages, &mut epochs).map_err(|Stopped| self.flow.take_reason())?;
        let paused = Instant::now();
        let result = self.switch_over(stages, &mut epochs, dirty, paused);
        let (destination, verify) = match (result, self.channel.with_state(|state| state.duty())) {
            (Ok(end), _) => end,
            // The news came and something else failed in the same moment.
            (Err(Stopped), SourceDuty::Release) => (DestinationReport::default(), None),
            (Err(Stopped), SourceDuty::KeepPaused) => {
                return Err(MigrationError::InDoubt(self.flow.take_reason().to_string()));
            }
            (Err(Stopped), SourceDuty::Resume) => return Err(self.keep_the_vm(self.flow.take_reason())),
        };
        // The VM runs there: what follows is neither downtime nor migration time.
        let finished = Finished {
            total_ms: ms(self.started.elapsed()),
            downtime_ms: ms(paused.elapsed()),
            wire_bytes: self.bytes.sent(),
            epochs,
            verify,
            resent_pages: self.resent_pages,
            destination,
            thread_cpu: thread_cpu(),
        };
        // Whether the destination hears it or not, the migration is done.
        if let Err(error) = self.channel.send(&Message::Bye) {
            debug!(%error, "no goodbye");
        }
        Ok(finished)
    }

    /// The migration failed for this reason and the VM is paused: it goes on here.
    fn keep_the_vm(&mut self, reason: MigrationError) -> MigrationError {
        match self.vm.resume() {
            Ok(()) => reason,
            Err(resume) => MigrationError::StillPaused { reason: Box::new(reason), resume },
        }
    }

    /// Sends epochs while the VM runs. Returns what is dirty at the end.
    fn precopy(
        &mut self,
        stages: &mut Stages<'_>,
        epochs: &mut Vec<EpochReport>,
    ) -> Result<Vec<PageBitmap>, Stopped> {
        if self.config.verify {
            let memory = self.vm.memory();
            let expected = self.digester(&*memory).estimate(self.regions)?;
            let verifying = verifying(self.config, expected);
            self.verifying = verifying.map_err(|why| self.local(MigrationError::NotConverged(why)))?;
        }
        self.log.start().map_err(|e| self.local(e))?;
        self.flow.control().update(|p| p.phase = Phase::Precopy);
        let mut dirty: Vec<_> = self.regions.iter().map(|r| PageBitmap::full(r.pages)).collect();
        self.owned.take(0, &dirty);
        let mut speeds =
            Speeds { wire: Speed::new(), copy: Speed::new(), serialize: Speed::new(), restore: Speed::new() };
        for epoch in 0..u32::MAX - 1 {
            let began = Instant::now();
            // At most one epoch that is not restored behind the one under way: a destination that does not keep up is not buried.
            self.peer.wait_epochs(epoch.saturating_sub(1), self.flow)?;
            self.add_damaged(epoch, &mut dirty)?;
            let mut report = self.send_epoch(epoch, dirty, stages, true)?;
            // Damage makes more of it likely, and what is in flight would come again while the VM is paused. So from the first time on,
            // nothing is in flight when it is decided.
            if self.resent_pages > 0 || self.peer.damaged_pages() > 0 {
                self.peer.wait_epochs(epoch + 1, self.flow)?;
            }
            dirty = self.fetch(epoch + 1)?;
            report.dirty_pages = dirty.iter().map(PageBitmap::count).sum();
            report.duration_ms = ms(began.elapsed());
            let mut remaining = self.remaining(epoch, &report, &mut speeds);
            // Asked last: whatever was acknowledged above is in it if it was damaged.
            let damaged = self.peer.damaged_pages();
            remaining.pages += damaged;
            let estimate = estimate_downtime(&remaining);
            report.estimated_downtime_ms = Some(ms(estimate));
            debug!(epoch, ?report, "epoch");
            epochs.push(report);
            self.flow.control().update(|p| {
                p.estimated_downtime_ms = report.estimated_downtime_ms;
                p.dirty_pages_per_s = report.dirty_pages as f64 / (report.duration_ms / 1e3).max(1e-3);
            });
            let idle =
                remaining.pages == 0 && remaining.in_flight_bytes == 0 && remaining.in_flight_pages == 0;
            match decide(self.config, estimate, idle, epoch, self.started.elapsed()) {
                // That ends: damage that goes on fails the migration.
                Decision::SwitchOver if damaged > 0 => {}
                // Epochs shorter than this only burn the hosts' time.
                Decision::Continue => self.flow.sleep(MIN_EPOCH.saturating_sub(began.elapsed()))?,
                Decision::SwitchOver => return Ok(dirty),
                Decision::GiveUp(why) => {
                    return Err(self.flow.stop_threads(MigrationError::NotConverged(why)));
                }
            }
        }
        Err(self.flow.stop_threads(MigrationError::NotConverged("it ran out of epoch numbers".into())))
    }

    /// Pauses the VM, sends the rest, and hands the VM over.
    fn switch_over(
        &mut self,
        mut stages: Stages<'_>,
        epochs: &mut Vec<EpochReport>,
        mut dirty: Vec<PageBitmap>,
        paused: Instant,
    ) -> Result<(DestinationReport, Option<Duration>), Stopped> {
        self.flow.control().update(|p| p.phase = Phase::Switchover);
        self.connector.limit_outage(Some(OUTAGE_WHILE_PAUSED));
        self.vm.pause().map_err(|e| self.local(e))?;
        // Saving may write to guest memory, so the dirty log is read afterwards.
        let state = self.vm.save_state().map_err(|e| self.local(e))?;
        let epoch = epochs.len() as u32;
        for (all, late) in dirty.iter_mut().zip(self.fetch(epoch)?) {
            all.union(&late);
        }
        self.peer.wait_epochs(epoch.saturating_sub(1), self.flow)?;
        self.add_damaged(epoch, &mut dirty)?;
        let report = self.send_epoch(epoch, dirty, &mut stages, false)?;
        for message in state_messages(&state) {
            self.send(&message)?;
        }
        let (state_len, state_hash) = (state.len() as u64, state_hash(&state));
        let prepare = |epoch| Message::Prepare { epoch, state_len, state_hash };
        let memory = self.vm.memory();
        let digester = self.digester(&*memory);
        let (regions, verifies) = (self.regions, self.config.verify);
        let verify = thread::scope(|scope| {
            // All is encoded, so that the processors are free while the last pages travel.
            let ours = verifies.then(|| scope.spawn(move || digester.all(regions)));
            self.finish_epochs(&mut stages, epochs, report, paused, prepare)?;
            ours.map(|ours| self.compare(ours)).transpose()
        })?;
        self.peer.wait_ready(self.flow)?;
        if let Some(last) = epochs.last_mut() {
            last.duration_ms = ms(paused.elapsed());
        }
        // The last moment at which a cancel is heard.
        self.flow.commit()?;
        self.flow.control().update(|p| p.phase = Phase::Committed);
        // From here on to know is better than to be in doubt.
        self.connector.limit_outage(None);
        self.send(&Message::Commit)?;
        Ok((self.peer.wait_running(self.flow)?, verify))
    }

    /// Waits until everything is at the destination. What arrived damaged comes again, for as long as it takes; the destination has the
    /// state already.
    fn finish_epochs(
        &mut self,
        stages: &mut Stages<'_>,
        epochs: &mut Vec<EpochReport>,
        mut report: EpochReport,
        paused: Instant,
        prepare: impl Fn(u32) -> Message,
    ) -> Result<(), Stopped> {
        loop {
            let epoch = epochs.len() as u32;
            self.send(&prepare(epoch))?;
            self.peer.wait_epochs(epoch + 1, self.flow)?;
            report.duration_ms = ms(paused.elapsed());
            epochs.push(report);
            if !self.channel.with_state(|state| state.must_send_again()) {
                return Ok(());
            }
            let mut damaged = self.no_pages();
            self.add_damaged(epoch + 1, &mut damaged)?;
            report = self.send_epoch(epoch + 1, damaged, stages, false)?;
        }
    }

    /// Compares the digests of the memory here with those that the destination sends. Returns how long the VM has waited for it.
    fn compare(
        &self,
        ours: ScopedJoinHandle<'_, Result<Vec<Vec<u64>>, Stopped>>,
    ) -> Result<Duration, Stopped> {
        let began = Instant::now();
        let theirs = self.peer.wait_digests(self.flow)?;
        let ours = ours.join().map_err(|_| {
            self.local(MigrationError::Internal("the thread that digests the memory panicked".into()))
        })??;
        compare(self.regions, &ours, &theirs).map_err(|error| self.local(error))?;
        let agreed = self.channel.with_state(SourceState::on_digests_agree);
        agreed.map_err(|error| self.local(own_error(error)))?;
        Ok(began.elapsed())
    }

    fn digester<'m>(&self, memory: &'m dyn GuestMemory) -> Digester<'m>
    where
        Self: 'm,
    {
        Digester::new(memory, self.flow, &self.counters.control)
    }

    /// Copies the dirty pages into the stages and closes the epoch. Returns when everything is encoded, which is not yet sent.
    fn send_epoch(
        &mut self,
        epoch: u32,
        dirty: Vec<PageBitmap>,
        stages: &mut Stages<'_>,
        running: bool,
    ) -> Result<EpochReport, Stopped> {
        let mut copier = Copier::new(self.vm.memory());
        let bytes_before = self.payload_bytes();
        let mut walk = Walk::new(epoch, dirty);
        let pages = walk.remaining();
        self.send(&Message::EpochStart { epoch, pages })?;
        self.flow.control().update(|p| (p.epoch, p.epoch_pages, p.epoch_pages_done) = (epoch, pages, 0));
        loop {
            if running {
                self.check_time()?;
            }
            let mut batch = stages.empty_batch(self.flow)?;
            if !walk.next(self.batch_pages, &mut batch) {
                stages.give_back(batch);
                break;
            }
            // A paused VM writes nothing: there is nothing to watch again.
            let log: Option<&mut dyn DirtyLog> = if running { Some(&mut *self.log) } else { None };
            batch.job.number = self.batches;
            self.batches += 1;
            let begin = self.track.begin();
            let filled = self.counters.copy.busy(|| copier.fill(&mut batch, log));
            self.track.end("copy", batch.job.number, begin);
            filled.map_err(|e| self.local(e))?;
            let count = batch.pages.len();
            self.counters.copy.bytes(count * PAGE_SIZE, count * PAGE_SIZE);
            self.flow.control().update(|p| {
                p.epoch_pages_done += count as u64;
                p.guest_bytes += (count * PAGE_SIZE) as u64;
            });
            stages.push(batch, self.flow)?;
        }
        stages.end_epoch(self.flow)?;
        Ok(EpochReport {
            pages,
            payload_bytes: self.payload_bytes() - bytes_before,
            ..EpochReport::default()
        })
    }

    /// Adds what arrived damaged to what is sent in `epoch`, which comes next. It stays ours until it has arrived.
    fn add_damaged(&mut self, epoch: u32, dirty: &mut [PageBitmap]) -> Result<(), Stopped> {
        // Asked before what was damaged is taken: of these epochs nothing more will be reported.
        let done = self.peer.epochs_done();
        let damaged = self.peer.take_damaged();
        if let Some(damaged) = &damaged {
            self.owned.take(epoch, &damaged.pages);
        }
        self.owned.delivered_before(done);
        let Some(damaged) = damaged else { return Ok(()) };
        for (dirty, again) in dirty.iter_mut().zip(&damaged.pages) {
            self.resent_pages += again.count();
            dirty.union(again);
        }
        for (&sent_in, reason) in &damaged.epochs {
            warn!(epoch = sent_in, reason, "pages arrived damaged and are sent again");
            self.serializing.distrust(sent_in, epoch, reason).map_err(|error| self.local(error))?;
        }
        Ok(())
    }

    fn no_pages(&self) -> Vec<PageBitmap> {
        self.regions.iter().map(|region| PageBitmap::new(region.pages)).collect()
    }

    /// What the guest has written since it was last asked, for `epoch`. It is ours from now on, because the log may have forgotten it.
    fn fetch(&mut self, epoch: u32) -> Result<Vec<PageBitmap>, Stopped> {
        let mut all = self.no_pages();
        let fetched: Result<(), _> = self
            .regions
            .iter()
            .zip(&mut all)
            .try_for_each(|(region, dirty)| self.log.fetch(region.id, dirty));
        self.owned.take(epoch, &all);
        fetched.map_err(|e| self.local(e))?;
        Ok(all)
    }

    /// The time limit, where it means that the migration ends at once.
    fn check_time(&self) -> Result<(), Stopped> {
        match self.config.max_time {
            Some(most) if self.config.on_limit == OnLimit::Cancel && self.started.elapsed() >= most => {
                let why =
                    format!("{} s were not enough; allow more time or a longer downtime", most.as_secs_f64());
                Err(self.flow.stop_threads(MigrationError::NotConverged(why)))
            }
            _ => Ok(()),
        }
    }

    /// What would be left to do if the VM were paused now, after `epoch`.
    fn remaining(&self, epoch: u32, report: &EpochReport, speeds: &mut Speeds) -> Remaining {
        let counters = self.counters;
        // In the pipeline the connections work at the same time, so the time of one is the time of all.
        let senders = if self.config.pipeline { self.config.connections as u32 } else { 1 };
        speeds.wire.note(counters.send.working_time() / senders, counters.send.bytes_out());
        speeds.copy.note(counters.copy.working_time(), counters.copy.bytes_out() / PAGE_SIZE as u64);
        let serialized = counters.serialize.bytes_in() / PAGE_SIZE as u64;
        speeds.serialize.note(counters.serialize.working_time() / self.serializers, serialized);
        let acked = self.peer.acked();
        speeds.restore.note(self.started.elapsed(), acked.pages);
        let unacked = counters.sent_bytes().saturating_sub(acked.wire_bytes);
        let pages_per_s = match (speeds.copy.per_second(), speeds.serialize.per_second()) {
            (Some(copy), Some(serialize)) if self.config.pipeline => Some(copy.min(serialize)),
            (Some(copy), Some(serialize)) => Some(1.0 / (1.0 / copy + 1.0 / serialize)),
            _ => None,
        };
        Remaining {
            pages: report.dirty_pages,
            bytes_per_page: self.expected_bytes_per_page(epoch, report),
            in_flight_bytes: unacked + counters.queued_bytes(),
            in_flight_pages: serialized.saturating_sub(acked.pages),
            restored_pages_per_s: speeds.restore.per_second(),
            wire_bytes_per_s: speeds.wire.per_second(),
            pages_per_s,
            round_trip: self.peer.round_trip(),
            verify: self.verifying,
            pipeline: self.config.pipeline,
        }
    }

    /// What a page that is sent again will take on the wire: what those of this epoch took. After the first epoch, in which
    /// everything was sent for the first time, what the pages that are not zero took.
    fn expected_bytes_per_page(&self, epoch: u32, report: &EpochReport) -> f64 {
        let zero = self.counters.encodings()[usize::from(Encoding::Zero.tag())].pages;
        let pages = if epoch == 0 { report.pages.saturating_sub(zero) } else { report.pages };
        if pages == 0 {
            return PAGE_SIZE as f64;
        }
        report.payload_bytes as f64 / pages as f64 + FRAMING_PER_PAGE
    }

    /// Payload bytes of all pages encoded so far.
    fn payload_bytes(&self) -> u64 {
        self.counters.encodings().iter().map(|e| e.bytes).sum()
    }

    fn send(&self, message: &Message) -> Result<(), Stopped> {
        self.channel.send(message).map_err(|e| self.flow.fail_unless_heard(e))
    }

    /// A failure on this host: the peer will be told.
    fn local(&self, error: impl Into<MigrationError>) -> Stopped {
        self.flow.stop_threads(error.into())
    }
}
