//! The destination's control connection after the handshake, and the hand-over.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use pagewarp_codec::PAGE_SIZE;
use pagewarp_wire::{
    Ack, DestinationDuty, ErrorCode, MAX_DIGESTS, MAX_STATE_LEN, Message, StateAssembler, WireError,
};
use tracing::{info, warn};

use crate::destination::session::{Control, gone};
use crate::destination::stages::Shared;
use crate::digest::Digester;
use crate::error::MigrationError;
use crate::flow::Stopped;
use crate::link::{Reading, WireBytes, own_error, peer_error};
use crate::metrics::{anonymous_bytes, ms};
use crate::report::{DestinationReport, Phase};
use crate::vm::DestinationVm;

/// How often the source hears what has been restored.
const ACK_EVERY: Duration = Duration::from_millis(25);
/// The source hears something at least this often, so that it knows that this end is alive.
const ALIVE_EVERY: Duration = Duration::from_secs(1);
/// How often the progress is refreshed.
const REFRESH: Duration = Duration::from_millis(200);

/// Tells the source why it ends, unless nobody is there to hear it. The second word is not sent.
pub(crate) fn say_why(control: &Control<'_>, error: &MigrationError) {
    if let Some(message) = last_word(error) {
        let _ = control.send(&message);
    }
}

/// What the source is told about an error.
fn last_word(error: &MigrationError) -> Option<Message> {
    let code = match error {
        MigrationError::Damaged(_) => ErrorCode::Damaged,
        MigrationError::Peer(_) => ErrorCode::Protocol,
        MigrationError::Vm(_) | MigrationError::StartFailed(_) => ErrorCode::Vm,
        MigrationError::Backend(_) => ErrorCode::Backend,
        MigrationError::Cancelled => ErrorCode::Refused,
        MigrationError::Internal(_) => ErrorCode::Internal,
        _ => return None,
    };
    Some(Message::Error { code, message: error.to_string() })
}

/// Gives up, unless the source has committed: then the VM is ours and has to run whatever else failed. `false` if the VM is ours.
fn give_up(control: &Control<'_>, last_word: Option<Message>) -> bool {
    if let Some(message) = last_word {
        // Whether or not the word reaches the source, the state has changed unless it was refused.
        let _ = control.send_checked(&message, |state| state.on_last_word(&message).map_err(own_error));
    }
    control.with_state(|state| state.give_up() == DestinationDuty::Discard)
}

/// Reads the control connection until the migration is over. Answers what needs no thought, so that the source knows that somebody is
/// here while the VM's state is loaded, and passes the rest on.
pub(crate) fn listen(mut reading: Reading<'_>, shared: Shared<'_>, inbox: &Sender<Message>) {
    let Shared { flow, control, .. } = shared;
    loop {
        let next = reading.next().and_then(|message| {
            control.received(&message)?;
            match message {
                Message::EpochStart { epoch, .. } => {
                    shared.gate.announce(epoch);
                    Ok(Some(message))
                }
                Message::Ping { id } => control.pong(id).map(|()| None),
                Message::Pong { .. } => Ok(None),
                Message::Commit => {
                    flow.committed_by_peer();
                    Ok(Some(Message::Commit))
                }
                Message::Cancel { .. } | Message::Error { .. } => Err(gone(&message)),
                other => Ok(Some(other)),
            }
        });
        match next {
            Ok(None) => {}
            Ok(Some(message)) => {
                if inbox.send(message).is_err() {
                    // Nobody waits for more.
                    return;
                }
            }
            // After the commit the source may go away as it likes.
            Err(_) if flow.is_committed() => return,
            Err(error) => {
                // The peer's fault deserves an answer; a connection that is gone does not carry one.
                match error {
                    MigrationError::Peer(_) => flow.stop_threads(error),
                    _ => flow.fail(error),
                };
                return;
            }
        }
    }
}

/// Tells the source what has been restored, refreshes the progress, and makes sure that a stop is heard by threads that wait for
/// the network.
pub(crate) fn report_back(
    shared: Shared<'_>,
    bytes: &WireBytes,
    started: Instant,
    peak_anonymous: &AtomicU64,
) {
    let Shared { flow, counters, control, .. } = shared;
    let (mut last, mut last_sent) = (Ack::default(), Instant::now());
    let mut refreshed = (Instant::now(), Ack::default(), 0);
    while flow.sleep(ACK_EVERY).is_ok() {
        counters.control.cpu_only(|| {
            let ack = counters.restored();
            if (ack != last || last_sent.elapsed() >= ALIVE_EVERY) && !flow.is_committed() {
                (last, last_sent) = (ack, Instant::now());
                if let Err(error) = control.send(&Message::Ack(ack))
                    && !flow.is_committed()
                {
                    flow.fail_unless_explained(error);
                }
            }
            let since = refreshed.0.elapsed();
            if since >= REFRESH {
                let received = bytes.received();
                peak_anonymous.fetch_max(anonymous_bytes(), Relaxed);
                flow.control().update(|p| {
                    p.epoch_pages_done =
                        (p.epoch_pages_done + ack.pages - refreshed.1.pages).min(p.epoch_pages);
                    p.guest_bytes = ack.pages * PAGE_SIZE as u64;
                    p.wire_bytes = received;
                    p.wire_bytes_per_s = (received - refreshed.2) as f64 / since.as_secs_f64();
                    p.elapsed_ms = ms(started.elapsed());
                });
                refreshed = (Instant::now(), ack, received);
            }
        });
    }
    // Whoever waits for the network does not notice the stop: say the last word for them and wake them. Unless the VM is ours: then the
    // connections are still needed to say so.
    if give_up(control, flow.look_at_reason(last_word).flatten()) {
        flow.stop();
    }
}

/// How long the paused VM waited.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Took {
    pub(crate) load_state: Duration,
    /// For its memory to be digested, if it was.
    pub(crate) verify: Option<Duration>,
}

/// Owns the VM until it runs.
pub(crate) struct HandOver<'m, 'a> {
    vm: &'m mut dyn DestinationVm,
    inbox: Receiver<Message>,
    shared: Shared<'a>,
}

impl<'m, 'a> HandOver<'m, 'a> {
    /// `inbox` gets what [`listen`] does not answer by itself.
    pub(crate) fn new(
        vm: &'m mut dyn DestinationVm,
        inbox: Receiver<Message>,
        shared: Shared<'a>,
    ) -> HandOver<'m, 'a> {
        HandOver { vm, inbox, shared }
    }

    /// Ends the migration for this reason, unless another came first.
    pub(crate) fn give_up<T>(&self, reason: MigrationError) -> Result<T, MigrationError> {
        let Shared { flow, control, .. } = self.shared;
        let reason = flow.end(reason);
        give_up(control, last_word(&reason));
        flow.stop();
        Err(reason)
    }

    /// Goes on until the source gives the VM away. Returns how long the VM waited for what.
    pub(crate) fn until_committed(&mut self) -> Result<Took, MigrationError> {
        let Shared { flow, control, .. } = self.shared;
        let mut took = Took::default();
        if self.prepare_to_run(&mut took).is_err()
            && give_up(control, flow.look_at_reason(last_word).flatten())
        {
            flow.stop();
            return Err(flow.take_reason());
        }
        // Either nothing failed, or the source had committed before it did.
        flow.control().update(|p| p.phase = Phase::Committed);
        Ok(took)
    }

    /// Collects the state, loads it when everything is restored, says so, and waits for the commit.
    fn prepare_to_run(&mut self, took: &mut Took) -> Result<(), Stopped> {
        let Shared { flow, gate, control, session, .. } = self.shared;
        let mut assembler = StateAssembler::new(MAX_STATE_LEN);
        let mut state = Vec::new();
        let peer = |e: WireError| flow.stop_threads(peer_error(e));
        loop {
            match flow.receive(&self.inbox)?.ok_or(Stopped)? {
                Message::EpochStart { epoch, pages } => {
                    flow.control()
                        .update(|p| (p.epoch, p.epoch_pages, p.epoch_pages_done) = (epoch, pages, 0));
                }
                Message::DeviceState { total_len, offset, bytes } => {
                    assembler.piece(total_len, offset, &bytes).map_err(peer)?;
                }
                Message::StateEnd { len, xxh3 } => {
                    let whole = std::mem::replace(&mut assembler, StateAssembler::new(MAX_STATE_LEN));
                    state = whole.finish(len, xxh3).map_err(peer)?;
                }
                Message::Prepare { epoch, .. } => {
                    flow.control().update(|p| p.phase = Phase::Switchover);
                    gate.wait_done(epoch, flow)?;
                    if !control.with_state(|state| state.is_complete(epoch)) {
                        // Batches were damaged: the source sends them again, with a further epoch, and then prepares anew.
                        continue;
                    }
                    if !gate.close(epoch, flow)? {
                        let why = "pages were sent after the last epoch".to_owned();
                        return Err(flow.stop_threads(MigrationError::Peer(why)));
                    }
                    if session.verify {
                        let began = Instant::now();
                        // Before the state is loaded: a hypervisor that does may write to guest memory, such as the guest's clock.
                        self.send_digests()?;
                        took.verify = Some(began.elapsed());
                    }
                    let began = Instant::now();
                    self.vm.load_state(&state).map_err(|e| flow.stop_threads(e.into()))?;
                    took.load_state = began.elapsed();
                    // The last moment at which a cancel on this side is sure to be heard.
                    flow.check()?;
                    control.send(&Message::Ready).map_err(|e| flow.fail_unless_heard(e))?;
                }
                Message::Commit => return Ok(()),
                other => return Err(flow.stop_threads(gone(&other))),
            }
        }
    }

    /// Tells the source what is in guest memory. While one message is under way, the pages of the next are digested.
    fn send_digests(&self) -> Result<(), Stopped> {
        let Shared { flow, control, restorer, session, counters, .. } = self.shared;
        let send = |message: &Message| control.send(message).map_err(|e| flow.fail_unless_heard(e));
        let digester = Digester::new(restorer.memory(), flow, &counters.control);
        for region in &session.regions {
            for first_page in (0..region.pages).step_by(MAX_DIGESTS) {
                let mut digests = vec![0; (region.pages - first_page).min(MAX_DIGESTS as u64) as usize];
                digester.pages(region.id, first_page, &mut digests)?;
                send(&Message::Digests { region: region.id, first_page, digests })?;
            }
        }
        send(&Message::DigestsEnd)
    }

    /// Runs the VM: it is ours.
    pub(crate) fn start(&mut self) -> Result<(), MigrationError> {
        let Shared { control, flow, .. } = self.shared;
        self.vm.run().map_err(|error| {
            let error = MigrationError::StartFailed(error.to_string());
            say_why(control, &error);
            control.with_state(|state| state.on_start_failed());
            flow.stop();
            error
        })?;
        info!("the VM runs here");
        Ok(())
    }

    /// Tells the source that the VM runs here, and what it looks like.
    pub(crate) fn farewell(&mut self, report: &DestinationReport, timeout: Duration) {
        if let Err(error) = self.tell(report, timeout) {
            warn!(%error, "the VM runs here, but the source may not know it");
        }
    }

    fn tell(&mut self, report: &DestinationReport, timeout: Duration) -> Result<(), MigrationError> {
        let control = self.shared.control;
        let json = serde_json::to_vec(report).map_err(|e| MigrationError::Internal(e.to_string()))?;
        control.send(&Message::Running { report: json })?;
        let end = Instant::now() + timeout;
        loop {
            match self.inbox.recv_deadline(end) {
                Ok(Message::Bye) => return Ok(()),
                // Left over from before the commit.
                Ok(_) => {}
                Err(error) => {
                    return Err(MigrationError::Internal(format!("no goodbye from the source: {error}")));
                }
            }
        }
    }
}
