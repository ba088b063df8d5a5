//! The source's view of a migration: what may be sent and received when, and whether the VM may run here.

use crate::Outcome;
use crate::damage::{Damage, next_epoch};
use crate::device_state::StateProgress;
use crate::digests::DigestCursor;
use crate::duty::SourceDuty;
use crate::error::{WireError, malformed};
use crate::message::{Ack, Message, Offer, Role};
use crate::session::Session;
use crate::{MAX_VERSION, MIN_VERSION};

/// Where the source is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourcePhase {
    /// Nothing was sent.
    Connecting,
    /// `Hello` was sent.
    Greeting,
    /// `HelloAck` came.
    Connected,
    /// `Offer` was sent.
    Offered,
    /// `Accept` came: epochs, at last the device state.
    Precopy,
    /// `Prepare` was sent; the VM is paused.
    SwitchingOver,
    /// `Ready` came; the VM is paused and still belongs to the source.
    Ready,
    /// `Commit` was sent, or may have been: the source never resumes the VM by itself from here on.
    Committed,
    /// `Running` came: the VM runs on the destination.
    Running,
    /// The migration is over.
    Done,
    /// The migration failed or was cancelled before `Commit`: the VM stays here.
    Failed,
    /// `Commit` was sent and `Running` will not come. An operator has to decide.
    InDoubt,
}

impl SourcePhase {
    fn name(self) -> &'static str {
        match self {
            SourcePhase::Connecting => "connecting (source)",
            SourcePhase::Greeting => "greeting (source)",
            SourcePhase::Connected => "connected (source)",
            SourcePhase::Offered => "offered (source)",
            SourcePhase::Precopy => "in pre-copy (source)",
            SourcePhase::SwitchingOver => "switching over (source)",
            SourcePhase::Ready => "ready (source)",
            SourcePhase::Committed => "committed (source)",
            SourcePhase::Running => "running (source)",
            SourcePhase::Done => "done (source)",
            SourcePhase::Failed => "failed (source)",
            SourcePhase::InDoubt => "in doubt (source)",
        }
    }

    fn sends(self) -> &'static str {
        match self {
            SourcePhase::Connecting => "Hello",
            SourcePhase::Greeting => "Cancel or Error",
            SourcePhase::Connected => "Offer, Cancel or Error",
            SourcePhase::Offered => "Cancel or Error",
            SourcePhase::Precopy => "EpochStart, DeviceState, StateEnd, Prepare, Cancel or Error",
            SourcePhase::SwitchingOver => "EpochStart (to send damaged pages again), Cancel or Error",
            SourcePhase::Ready => {
                "Commit (if digests were agreed: once they were compared and agree), Cancel or Error"
            }
            SourcePhase::Committed => "Error",
            SourcePhase::Running => "Bye or Error",
            SourcePhase::Done | SourcePhase::Failed | SourcePhase::InDoubt => "Error",
        }
    }

    fn receives(self) -> &'static str {
        match self {
            SourcePhase::Connecting => "nothing",
            SourcePhase::Greeting => "HelloAck or Error",
            SourcePhase::Connected => "Error",
            SourcePhase::Offered => "Accept or Error",
            SourcePhase::Precopy => "Damaged, EpochDone, Ack or Error",
            SourcePhase::SwitchingOver => {
                "Damaged, EpochDone, Digests, DigestsEnd (if agreed, when all epochs are done), Ack, Ready or Error"
            }
            SourcePhase::Ready => "Ack or Error",
            SourcePhase::Committed => "Ack, Running or Error",
            SourcePhase::Running => "Error",
            SourcePhase::Done | SourcePhase::Failed | SourcePhase::InDoubt => "nothing",
        }
    }

    fn is_over(self) -> bool {
        matches!(self, SourcePhase::Done | SourcePhase::Failed | SourcePhase::InDoubt)
    }

    /// Whether `HelloAck` has come and the end is not reached.
    fn is_established(self) -> bool {
        !self.is_over() && !matches!(self, SourcePhase::Connecting | SourcePhase::Greeting)
    }
}

/// The source's side of the control connection.
///
/// Call [`on_send`](SourceState::on_send) *before* the first byte of a message is handed to the transport: a `Commit` of
/// which the transport may have taken a part counts as sent. Call [`on_receive`](SourceState::on_receive) for each
/// message, and [`on_connection_lost`](SourceState::on_connection_lost) when the control connection, or any data
/// connection before `Commit`, ends, fails or is silent for too long.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SourceState {
    phase: SourcePhase,
    /// What was offered, without the machine description.
    offer: Option<Offer>,
    session: Option<Session>,
    epochs_started: u32,
    epochs_done: u32,
    damage: Damage,
    state: StateProgress,
    acked: Ack,
    digests: DigestCursor,
    /// Whether the digests were compared and agree.
    agreed: bool,
}

impl Default for SourceState {
    fn default() -> SourceState {
        SourceState::new()
    }
}

impl SourceState {
    /// Before the control connection says anything.
    pub fn new() -> SourceState {
        SourceState {
            phase: SourcePhase::Connecting,
            offer: None,
            session: None,
            epochs_started: 0,
            epochs_done: 0,
            damage: Damage::default(),
            state: StateProgress::default(),
            acked: Ack::default(),
            digests: DigestCursor::default(),
            agreed: false,
        }
    }

    /// Where the source is.
    pub fn phase(&self) -> SourcePhase {
        self.phase
    }

    /// What was agreed on; `None` before `Accept`.
    pub fn session(&self) -> Option<&Session> {
        self.session.as_ref()
    }

    /// What the destination has acknowledged.
    pub fn acked(&self) -> Ack {
        self.acked
    }

    /// Epochs that the destination has restored completely.
    pub fn epochs_done(&self) -> u32 {
        self.epochs_done
    }

    /// Whether the destination has restored everything that was sent, and cannot be ready because batches were damaged: the source has
    /// to send a further epoch with their pages.
    pub fn must_send_again(&self) -> bool {
        self.damage.must_send_again(self.epochs_started, self.epochs_done)
    }

    /// Whether the digests of all pages have come.
    pub fn digests_complete(&self) -> bool {
        self.digests.ended()
    }

    /// Whether the digests were compared and agree, as [`on_digests_agree`](SourceState::on_digests_agree) has said.
    pub fn is_verified(&self) -> bool {
        self.agreed
    }

    /// The digests of all pages were compared with those of the memory here, and agree. Without this there is no `Commit`, if digests
    /// were agreed on.
    ///
    /// # Errors
    /// If the digests of all pages have not come; then the state is as it was.
    pub fn on_digests_agree(&mut self) -> Result<(), WireError> {
        if !self.digests.ended() {
            return Err(malformed("the comparison", "digests that have not all come", "after DigestsEnd"));
        }
        self.agreed = true;
        Ok(())
    }

    /// Whether the source may run the VM without asking anyone.
    pub fn may_run(&self) -> bool {
        self.duty() == SourceDuty::Resume
    }

    /// What becomes of the VM if nothing more is sent or received: to be asked by whoever gives up, or sees that the migration is over.
    ///
    /// With [`SourceDuty::Resume`] whoever asked must not send `Commit` afterwards.
    pub fn duty(&self) -> SourceDuty {
        SourceDuty::of(self.outcome())
    }

    /// How the migration ends if nothing more is sent or received.
    pub fn outcome(&self) -> Outcome {
        match self.phase {
            SourcePhase::Committed | SourcePhase::InDoubt => Outcome::InDoubt,
            SourcePhase::Running | SourcePhase::Done => Outcome::VmRunsOnDestination,
            _ => Outcome::VmStaysOnSource,
        }
    }

    /// The connection is lost, or this end gives up on it.
    pub fn on_connection_lost(&mut self) -> Outcome {
        self.phase = match self.outcome() {
            Outcome::InDoubt => SourcePhase::InDoubt,
            Outcome::VmRunsOnDestination => SourcePhase::Done,
            _ => SourcePhase::Failed,
        };
        self.outcome()
    }

    /// `message` is about to be sent.
    ///
    /// # Errors
    /// If it must not be; then the state is as it was, and so must be the connection.
    pub fn on_send(&mut self, message: &Message) -> Result<(), WireError> {
        use SourcePhase as P;
        match (self.phase, message) {
            (P::Connecting, Message::Hello(hello)) if hello.role == Role::Control => self.phase = P::Greeting,
            (P::Connected, Message::Offer(offer)) => {
                self.offer = Some(Offer { machine: Vec::new(), ..offer.clone() });
                self.phase = P::Offered;
            }
            (P::Precopy, &Message::EpochStart { epoch, .. }) => {
                next_epoch(epoch, self.epochs_started, self.epochs_done)?;
                self.epochs_started += 1;
            }
            (P::SwitchingOver, &Message::EpochStart { epoch, .. }) if self.must_send_again() => {
                next_epoch(epoch, self.epochs_started, self.epochs_done)?;
                self.epochs_started += 1;
                self.damage = Damage::default();
                self.phase = P::Precopy;
            }
            (P::Precopy, Message::DeviceState { total_len, offset, bytes }) => {
                self.state.piece(*total_len, *offset, bytes.len() as u64)?;
            }
            (P::Precopy, &Message::StateEnd { len, xxh3 }) => self.state.end(len, xxh3)?,
            (P::Precopy, &Message::Prepare { epoch, state_len, state_hash }) => {
                self.state.prepare(state_len, state_hash)?;
                last_epoch(epoch, self.epochs_started)?;
                self.phase = P::SwitchingOver;
            }
            (P::Ready, Message::Commit) if !self.verifies() || self.agreed => self.phase = P::Committed,
            (P::Running, Message::Bye) => self.phase = P::Done,
            (phase, Message::Cancel { .. })
                if phase != P::Connecting && self.may_run() && !phase.is_over() =>
            {
                self.phase = P::Failed;
            }
            // Also as a last word after a failure: the peer should learn why.
            (phase, Message::Error { .. }) if phase != P::Connecting => {
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
    /// [`outcome`](SourceState::outcome).
    pub fn on_receive(&mut self, message: &Message) -> Result<(), WireError> {
        let result = self.receive(message);
        if result.is_err() {
            self.on_connection_lost();
        }
        result
    }

    fn receive(&mut self, message: &Message) -> Result<(), WireError> {
        use SourcePhase as P;
        match (self.phase, message) {
            (P::Greeting, &Message::HelloAck { version }) => {
                if !(MIN_VERSION..=MAX_VERSION).contains(&version) {
                    return Err(WireError::UnsupportedVersion {
                        what: "protocol version chosen by the destination",
                        seen: version.to_string(),
                        expected: format!("{MIN_VERSION} to {MAX_VERSION}"),
                    });
                }
                self.phase = P::Connected;
            }
            (P::Offered, Message::Accept(accept)) => {
                let offer = self.offer.as_ref().expect("the phase is `Offered` only after an offer");
                self.session = Some(Session::new(offer, accept)?);
                self.phase = P::Precopy;
            }
            (P::Precopy | P::SwitchingOver, &Message::EpochDone { epoch }) => {
                if epoch != self.epochs_done || epoch >= self.epochs_started {
                    let expected =
                        format_args!("{}, of {} started", self.epochs_done, self.epochs_started).to_string();
                    return Err(malformed("epoch of EpochDone", epoch, expected));
                }
                self.epochs_done += 1;
            }
            (P::Precopy | P::SwitchingOver, Message::Damaged { epoch, region, pages, .. }) => {
                let session = self.session.as_ref().expect("these phases have a session");
                session.check_pages(*region, pages)?;
                self.damage.note(*epoch, self.epochs_done, self.epochs_started)?;
            }
            (P::Precopy | P::SwitchingOver | P::Ready | P::Committed, Message::Ack(ack)) => {
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
            (P::SwitchingOver, Message::Ready) => {
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
            (P::SwitchingOver, Message::Digests { region, first_page, digests }) if self.verifies() => {
                let session = self.session.as_ref().expect("`verifies` saw it");
                self.damage.allow_digests(self.epochs_started, self.epochs_done)?;
                self.digests.take(session, *region, *first_page, digests.len() as u64)?;
            }
            (P::SwitchingOver, Message::DigestsEnd) if self.verifies() => {
                let session = self.session.as_ref().expect("`verifies` saw it");
                self.digests.end(session)?;
            }
            (phase, Message::Error { .. }) if phase != P::Connecting && !phase.is_over() => {
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

    fn verifies(&self) -> bool {
        self.session.as_ref().is_some_and(|session| session.verify)
    }
}

/// Checks that `epoch` is the last of `started` epochs.
pub(crate) fn last_epoch(epoch: u32, started: u32) -> Result<(), WireError> {
    match started.checked_sub(1) {
        Some(last) if last == epoch => Ok(()),
        Some(last) => Err(malformed("epoch of Prepare", epoch, format_args!("{last}, the last one started"))),
        None => Err(malformed("Prepare", "no epoch before it", "at least one")),
    }
}
