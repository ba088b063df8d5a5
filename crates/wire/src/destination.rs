//! The destination's view of a migration: what may be sent and received when, and whether the VM may run here.

use crate::Outcome;
use crate::damage::{Damage, next_epoch};
use crate::device_state::StateProgress;
use crate::digests::DigestCursor;
use crate::duty::DestinationDuty;
use crate::error::{WireError, malformed};
use crate::message::{Ack, Message, Offer, Role};
use crate::session::{Session, choose_version};
use crate::source::last_epoch;

/// Where the destination is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationPhase {
    /// Nothing came.
    Listening,
    /// `Hello` came.
    Greeting,
    /// `HelloAck` was sent.
    Connected,
    /// `Offer` came.
    Offered,
    /// `Accept` was sent: epochs and device state come.
    Receiving,
    /// `Prepare` came: verify and load.
    Loading,
    /// `Ready` was sent. The VM does not run: `Commit` may never come.
    Ready,
    /// `Commit` came: the VM belongs here and has to run, whatever becomes of the source.
    Committed,
    /// `Running` was sent.
    Running,
    /// The migration is over and the VM runs here.
    Done,
    /// The migration is over and the VM does not run here.
    Failed,
}

impl DestinationPhase {
    fn name(self) -> &'static str {
        match self {
            DestinationPhase::Listening => "listening (destination)",
            DestinationPhase::Greeting => "greeting (destination)",
            DestinationPhase::Connected => "connected (destination)",
            DestinationPhase::Offered => "offered (destination)",
            DestinationPhase::Receiving => "receiving (destination)",
            DestinationPhase::Loading => "loading (destination)",
            DestinationPhase::Ready => "ready (destination)",
            DestinationPhase::Committed => "committed (destination)",
            DestinationPhase::Running => "running (destination)",
            DestinationPhase::Done => "done (destination)",
            DestinationPhase::Failed => "failed (destination)",
        }
    }

    fn sends(self) -> &'static str {
        match self {
            DestinationPhase::Listening => "nothing",
            DestinationPhase::Greeting => "HelloAck or Error",
            DestinationPhase::Connected => "Error",
            DestinationPhase::Offered => "Accept or Error",
            DestinationPhase::Receiving => "Damaged, EpochDone, Ack or Error",
            DestinationPhase::Loading => {
                "Damaged, EpochDone, Digests, DigestsEnd (if agreed, when all epochs are done), Ack, Ready or Error"
            }
            DestinationPhase::Ready => "Ack or Error",
            DestinationPhase::Committed => "Running or Error",
            DestinationPhase::Running => "Error",
            DestinationPhase::Done | DestinationPhase::Failed => "Error",
        }
    }

    fn receives(self) -> &'static str {
        match self {
            DestinationPhase::Listening => "Hello for a control connection",
            DestinationPhase::Greeting => "Cancel or Error",
            DestinationPhase::Connected => "Offer, Cancel or Error",
            DestinationPhase::Offered => "Cancel or Error",
            DestinationPhase::Receiving => "EpochStart, DeviceState, StateEnd, Prepare, Cancel or Error",
            DestinationPhase::Loading => "EpochStart (with damaged pages), Cancel or Error",
            DestinationPhase::Ready => "Commit, Cancel or Error",
            DestinationPhase::Committed => "Error",
            DestinationPhase::Running => "Bye or Error",
            DestinationPhase::Done | DestinationPhase::Failed => "nothing",
        }
    }

    fn is_over(self) -> bool {
        matches!(self, DestinationPhase::Done | DestinationPhase::Failed)
    }

    /// Whether `HelloAck` was sent and the end is not reached.
    fn is_established(self) -> bool {
        !self.is_over() && !matches!(self, DestinationPhase::Listening | DestinationPhase::Greeting)
    }
}

/// The destination's side of the control connection.
///
/// Call [`on_send`](DestinationState::on_send) *before* a message is handed to the transport: for `Running`, after the
/// VM has started. Call [`on_receive`](DestinationState::on_receive) for each message, and
/// [`on_connection_lost`](DestinationState::on_connection_lost) when the control connection, or any data connection
/// before the last epoch is done, ends, fails or is silent for too long.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DestinationState {
    phase: DestinationPhase,
    /// Why the phase is `Failed`.
    failed_as: Outcome,
    /// What was offered, without the machine description.
    offer: Option<Offer>,
    session: Option<Session>,
    epochs_started: u32,
    epochs_done: u32,
    damage: Damage,
    state: StateProgress,
    acked: Ack,
    digests: DigestCursor,
}

impl Default for DestinationState {
    fn default() -> DestinationState {
        DestinationState::new()
    }
}

impl DestinationState {
    /// Before anything came.
    pub fn new() -> DestinationState {
        DestinationState {
            phase: DestinationPhase::Listening,
            failed_as: Outcome::VmStaysOnSource,
            offer: None,
            session: None,
            epochs_started: 0,
            epochs_done: 0,
            damage: Damage::default(),
            state: StateProgress::default(),
            acked: Ack::default(),
            digests: DigestCursor::default(),
        }
    }

    /// Where the destination is.
    pub fn phase(&self) -> DestinationPhase {
        self.phase
    }

    /// What was agreed on; `None` before `Accept`.
    pub fn session(&self) -> Option<&Session> {
        self.session.as_ref()
    }

    /// Whether `epoch`, which is done, is the last one and everything came whole with it, so that `Ready` may follow `Prepare`.
    pub fn is_complete(&self, epoch: u32) -> bool {
        self.epochs_done == self.epochs_started
            && self.epochs_started.checked_sub(1) == Some(epoch)
            && !self.damage.must_send_again(self.epochs_started, self.epochs_done)
    }

    /// Whether the destination may run the VM: only with `Commit`.
    pub fn may_run(&self) -> bool {
        self.duty() == DestinationDuty::Run
    }

    /// What becomes of the VM if nothing more is sent or received. Whoever means to give up asks [`give_up`](DestinationState::give_up).
    pub fn duty(&self) -> DestinationDuty {
        DestinationDuty::of(self.outcome())
    }

    /// This end gives up, unless the VM is its own: which of the two it is, is decided in one step, because a `Commit` may come at any moment.
    pub fn give_up(&mut self) -> DestinationDuty {
        if self.duty() == DestinationDuty::Discard {
            self.on_connection_lost();
        }
        self.duty()
    }

    /// This end gives up, and `message`, an `Error`, is about to be sent to say why.
    ///
    /// # Errors
    /// If the VM is this end's own: then there is no giving up. Otherwise as [`on_send`](DestinationState::on_send).
    pub fn on_last_word(&mut self, message: &Message) -> Result<(), WireError> {
        if self.duty() == DestinationDuty::Run {
            return Err(WireError::Unexpected {
                state: self.phase.name(),
                message: message.kind(),
                expected: "Running, or Error once the VM does not start: the VM is here, and there is no giving up",
            });
        }
        self.on_send(message)
    }

    /// How the migration ends if nothing more is sent or received.
    pub fn outcome(&self) -> Outcome {
        match self.phase {
            DestinationPhase::Ready => Outcome::NeverCommitted,
            DestinationPhase::Committed => Outcome::RunOnDestination,
            DestinationPhase::Running | DestinationPhase::Done => Outcome::VmRunsOnDestination,
            DestinationPhase::Failed => self.failed_as,
            _ => Outcome::VmStaysOnSource,
        }
    }

    /// The connection is lost, or this end gives up on it.
    ///
    /// With the right to run the VM in hand, the phase stays `Committed`: the VM has to be started all the same.
    pub fn on_connection_lost(&mut self) -> Outcome {
        match self.outcome() {
            Outcome::RunOnDestination => {}
            Outcome::VmRunsOnDestination => self.phase = DestinationPhase::Done,
            outcome => self.fail(outcome),
        }
        self.outcome()
    }

    /// The VM could not be started although `Commit` came. `on_send` of an `Error` says the same; this is for when the
    /// connection is lost as well.
    pub fn on_start_failed(&mut self) -> Outcome {
        if self.phase == DestinationPhase::Committed {
            self.fail(Outcome::FailedAfterCommit);
        }
        self.outcome()
    }

    /// `message` is about to be sent.
    ///
    /// # Errors
    /// If it must not be; then the state is as it was, and so must be the connection.
    pub fn on_send(&mut self, message: &Message) -> Result<(), WireError> {
        use DestinationPhase as P;
        match (self.phase, message) {
            (P::Greeting, Message::HelloAck { .. }) => self.phase = P::Connected,
            (P::Offered, Message::Accept(accept)) => {
                let offer = self.offer.as_ref().expect("the phase is `Offered` only after an offer");
                self.session = Some(Session::new(offer, accept)?);
                self.phase = P::Receiving;
            }
            // `EpochStart` and the batches travel on different connections: whoever is ahead with an epoch waits for its `EpochStart`.
            (P::Receiving | P::Loading, &Message::EpochDone { epoch }) => {
                if epoch != self.epochs_done || epoch >= self.epochs_started {
                    let expected =
                        format_args!("{}, of {} started", self.epochs_done, self.epochs_started).to_string();
                    return Err(malformed("epoch of EpochDone", epoch, expected));
                }
                self.epochs_done += 1;
            }
            (P::Receiving | P::Loading, Message::Damaged { epoch, region, pages, .. }) => {
                let session = self.session.as_ref().expect("these phases have a session");
                session.check_pages(*region, pages)?;
                self.damage.note(*epoch, self.epochs_done, self.epochs_started)?;
            }
            (P::Receiving | P::Loading | P::Ready, Message::Ack(ack)) => {
                let Ack { batches, wire_bytes, pages } = self.acked;
                if ack.batches < batches || ack.wire_bytes < wire_bytes || ack.pages < pages {
                    return Err(malformed(
                        "Ack",
                        format_args!("{ack:?}"),
                        format_args!("no less than {:?}", self.acked),
                    ));
                }
                self.acked = *ack;
            }
            (P::Loading, Message::Ready) => {
                if self.epochs_done != self.epochs_started {
                    let expected =
                        format_args!("after EpochDone of epoch {}", self.epochs_started - 1).to_string();
                    return Err(malformed("Ready", "before the last epoch was done", expected));
                }
                self.damage.allow_ready(self.epochs_started)?;
                if self.verifies() {
                    self.digests.allow_ready()?;
                }
                self.phase = P::Ready;
            }
            (P::Committed, Message::Running { .. }) => self.phase = P::Running,
            (P::Loading, Message::Digests { region, first_page, digests }) if self.verifies() => {
                let session = self.session.as_ref().expect("`verifies` saw it");
                self.damage.allow_digests(self.epochs_started, self.epochs_done)?;
                self.digests.take(session, *region, *first_page, digests.len() as u64)?;
            }
            (P::Loading, Message::DigestsEnd) if self.verifies() => {
                let session = self.session.as_ref().expect("`verifies` saw it");
                self.digests.end(session)?;
            }
            (P::Committed, Message::Error { .. }) => self.fail(Outcome::FailedAfterCommit),
            // Also as a last word after a failure: the peer should learn why.
            (phase, Message::Error { .. }) if phase != P::Listening => {
                self.on_connection_lost();
            }
            (phase, Message::Ping { .. } | Message::Pong { .. }) if phase.is_established() => {}
            (phase, message) => {
                return Err(WireError::Unexpected {
                    state: phase.name(),
                    message: message.kind(),
                    expected: phase.sends(),
                });
            }
        }
        Ok(())
    }

    /// `message` came.
    ///
    /// # Errors
    /// If the peer must not have sent it; then the migration is over as if the connection were lost, see
    /// [`outcome`](DestinationState::outcome). The right to run the VM, once given, stays.
    pub fn on_receive(&mut self, message: &Message) -> Result<(), WireError> {
        let result = self.receive(message);
        if result.is_err() {
            self.on_connection_lost();
        }
        result
    }

    fn receive(&mut self, message: &Message) -> Result<(), WireError> {
        use DestinationPhase as P;
        match (self.phase, message) {
            (P::Listening, Message::Hello(hello)) if hello.role == Role::Control => {
                choose_version(hello)?;
                self.phase = P::Greeting;
            }
            (P::Connected, Message::Offer(offer)) => {
                self.offer = Some(Offer { machine: Vec::new(), ..offer.clone() });
                self.phase = P::Offered;
            }
            (P::Receiving, &Message::EpochStart { epoch, .. }) => {
                next_epoch(epoch, self.epochs_started, self.epochs_done)?;
                self.epochs_started += 1;
            }
            // What was damaged comes again, with a further epoch.
            (P::Loading, &Message::EpochStart { epoch, .. })
                if self.damage.must_send_again(self.epochs_started, self.epochs_done) =>
            {
                next_epoch(epoch, self.epochs_started, self.epochs_done)?;
                self.epochs_started += 1;
                self.damage = Damage::default();
                self.phase = P::Receiving;
            }
            (P::Receiving, Message::DeviceState { total_len, offset, bytes }) => {
                self.state.piece(*total_len, *offset, bytes.len() as u64)?;
            }
            (P::Receiving, &Message::StateEnd { len, xxh3 }) => self.state.end(len, xxh3)?,
            (P::Receiving, &Message::Prepare { epoch, state_len, state_hash }) => {
                self.state.prepare(state_len, state_hash)?;
                last_epoch(epoch, self.epochs_started)?;
                self.phase = P::Loading;
            }
            (P::Ready, Message::Commit) => self.phase = P::Committed,
            (P::Running, Message::Bye) => self.phase = P::Done,
            // The source keeps the VM, and says so before it could have said `Commit`.
            (phase, Message::Cancel { .. } | Message::Error { .. })
                if phase != P::Listening && !phase.is_over() && !self.may_run() =>
            {
                self.fail(Outcome::VmStaysOnSource);
            }
            // The source may fail as it likes: the VM is here.
            (P::Committed | P::Running, Message::Error { .. }) => {
                self.on_connection_lost();
            }
            (phase, Message::Ping { .. } | Message::Pong { .. }) if phase.is_established() => {}
            (phase, message) => {
                return Err(WireError::Unexpected {
                    state: phase.name(),
                    message: message.kind(),
                    expected: phase.receives(),
                });
            }
        }
        Ok(())
    }

    fn fail(&mut self, outcome: Outcome) {
        self.failed_as = outcome;
        self.phase = DestinationPhase::Failed;
    }

    fn verifies(&self) -> bool {
        self.session.as_ref().is_some_and(|session| session.verify)
    }
}
