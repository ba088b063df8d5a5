//! The destination's side of the handshake, and its control connection afterwards.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pagewarp_codec::EncodingSet;
use pagewarp_wire::{
    Accept, ConnectionSet, DestinationState, ErrorCode, FrameReader, Hello, Limits, Message, Offer, Outcome,
    PAGE_SIZE, Role, Session, choose_version,
};
use tracing::warn;

use crate::config::DestinationConfig;
use crate::error::MigrationError;
use crate::flow::{Flow, lock};
use crate::link::{MessageWriter, Reading, WireBytes, link_error, peer_error};
use crate::transport::{Acceptor, Stream};
use crate::vm::{DestinationVm, GuestMemory, RegionInfo};

/// How the other end is called in messages.
pub(crate) const SOURCE: &str = "the source";
/// How often somebody who waits for a connection looks whether it should stop.
const LOOK: Duration = Duration::from_millis(200);

/// The control connection: every message passes the state machine.
pub(crate) struct Control<'a> {
    state: Mutex<DestinationState>,
    writer: MessageWriter<'a>,
}

impl Control<'_> {
    /// Sends a message if the protocol allows it now.
    pub(crate) fn send(&self, message: &Message) -> Result<(), MigrationError> {
        self.writer.send_if(message, || lock(&self.state).on_send(message))
    }

    /// Checks that the source may say this now.
    pub(crate) fn received(&self, message: &Message) -> Result<(), MigrationError> {
        lock(&self.state).on_receive(message).map_err(peer_error)
    }

    /// Who has the VM if nothing more is said.
    pub(crate) fn outcome(&self) -> Outcome {
        lock(&self.state).outcome()
    }
}

/// A migration that both ends agreed on.
pub(crate) struct Accepted<'a> {
    pub(crate) started: Instant,
    pub(crate) name: String,
    pub(crate) control: Control<'a>,
    pub(crate) reading: Reading<'a>,
    pub(crate) data: Vec<Reading<'a>>,
    pub(crate) session: Session,
    pub(crate) allowed: EncodingSet,
    pub(crate) pipeline: bool,
    pub(crate) memory: Arc<dyn GuestMemory>,
}

/// What accepting a session needs.
pub(crate) struct Accepting<'a> {
    pub(crate) acceptor: &'a dyn Acceptor,
    pub(crate) config: &'a DestinationConfig,
    pub(crate) flow: &'a Flow,
    pub(crate) bytes: &'a WireBytes,
}

/// A connection whose hello has been read.
struct Greeted<'a> {
    hello: Hello,
    writer: MessageWriter<'a>,
    reading: Reading<'a>,
}

impl<'a> Accepting<'a> {
    /// Waits for a source, agrees with it, and builds the VM.
    pub(crate) fn accept(&self, vm: &mut dyn DestinationVm) -> Result<Accepted<'a>, MigrationError> {
        let Greeted { hello, writer, mut reading } = self.wait_for_source()?;
        let started = Instant::now();
        let control = Control { state: Mutex::new(DestinationState::new()), writer };
        control.received(&Message::Hello(hello.clone()))?;
        let version = choose_version(&hello).map_err(peer_error)?;
        control.send(&Message::HelloAck { version })?;
        let offer = self.offer(&control, &mut reading)?;
        let (accept, memory) = self.consider(vm, &offer).inspect_err(|error| {
            let message = Message::Error { code: ErrorCode::Refused, message: error.to_string() };
            // The source hears why, if it is still there.
            let _ = control.send(&message);
        })?;
        let allowed = EncodingSet::from_bits(accept.encodings)
            .ok_or_else(|| MigrationError::Internal("accepted encodings that do not exist".into()))?;
        let session = Session::new(&offer, &accept).map_err(peer_error)?;
        control.send(&Message::Accept(accept))?;
        let data = self.data_connections(&hello, &session)?;
        let (name, pipeline) = (offer.vm_name, offer.pipeline);
        Ok(Accepted { started, name, control, reading, data, session, allowed, pipeline, memory })
    }

    /// The first connection that opens a migration. Others (a port scanner, say) are turned away and do no harm.
    fn wait_for_source(&self) -> Result<Greeted<'a>, MigrationError> {
        let deadline = Instant::now() + self.config.accept_timeout;
        loop {
            let stream = self.next_connection(deadline)?;
            match self.greet(stream) {
                Ok(greeted) if greeted.hello.role == Role::Control => {
                    choose_version(&greeted.hello)
                        .map_err(|e| refuse(&greeted.writer, ErrorCode::Version, e))?;
                    return Ok(greeted);
                }
                Ok(greeted) => {
                    let why = "no migration is under way that this connection could belong to";
                    warn!("turned a connection away: {why}");
                    let message = Message::Error { code: ErrorCode::Protocol, message: why.into() };
                    let _ = greeted.writer.send(&message);
                }
                Err(error) => warn!(%error, "turned a connection away"),
            }
        }
    }

    fn next_connection(&self, deadline: Instant) -> Result<Box<dyn Stream>, MigrationError> {
        loop {
            self.flow.check().map_err(|_| self.flow.take_reason())?;
            match self.acceptor.accept(LOOK) {
                Err(e) if e.kind() == io::ErrorKind::TimedOut && Instant::now() < deadline => {}
                other => return other.map_err(|e| link_error(SOURCE, "waiting for a connection", e)),
            }
        }
    }

    fn greet(&self, stream: Box<dyn Stream>) -> Result<Greeted<'a>, MigrationError> {
        let prepare = || -> io::Result<[Box<dyn Stream>; 3]> {
            stream.set_timeouts(Some(self.config.peer_timeout), Some(self.config.peer_timeout))?;
            Ok([stream.try_clone_stream()?, stream.try_clone_stream()?, stream.try_clone_stream()?])
        };
        let [for_flow, for_writer, for_reader] = prepare().map_err(|e| link_error(SOURCE, "accepting", e))?;
        self.flow.register(for_flow);
        let frames = FrameReader::accepting(Limits::default());
        let mut reading = Reading::new(frames, for_reader, SOURCE, self.bytes);
        let Message::Hello(hello) = reading.next()? else {
            return Err(MigrationError::Internal("the frame reader took something else for a Hello".into()));
        };
        Ok(Greeted { hello, writer: MessageWriter::new(for_writer, SOURCE, self.bytes), reading })
    }

    fn offer(&self, control: &Control<'_>, reading: &mut Reading<'_>) -> Result<Offer, MigrationError> {
        loop {
            let message = reading.next()?;
            control.received(&message)?;
            match message {
                Message::Offer(offer) => return Ok(offer),
                Message::Ping { id } => control.send(&Message::Pong { id })?,
                other => return Err(gone(&other)),
            }
        }
    }

    /// Builds the VM if the offer is acceptable.
    fn consider(
        &self,
        vm: &mut dyn DestinationVm,
        offer: &Offer,
    ) -> Result<(Accept, Arc<dyn GuestMemory>), MigrationError> {
        let pages: u64 = offer.regions.iter().map(|r| r.pages).sum();
        let memory_bytes = pages.saturating_mul(u64::from(PAGE_SIZE));
        if memory_bytes > self.config.max_memory_bytes {
            return Err(MigrationError::Config(format!(
                "the VM has {memory_bytes} bytes of memory and this receiver takes at most {}; raise its limit",
                self.config.max_memory_bytes
            )));
        }
        // A newer source may offer encodings that this build does not know.
        let known =
            EncodingSet::from_bits(offer.encodings & EncodingSet::ALL.bits()).unwrap_or(EncodingSet::RAW);
        let allowed = known.intersection(self.config.encodings);
        let regions: Vec<_> = offer
            .regions
            .iter()
            .map(|r| RegionInfo { id: r.id, name: r.name.clone(), pages: r.pages })
            .collect();
        let memory = vm.prepare(&offer.vm_name, &regions, &offer.machine)?;
        if memory.regions() != regions {
            return Err(MigrationError::Internal("the VM was built with other regions than offered".into()));
        }
        // Bases come from guest memory, so no slots are needed.
        Ok((
            Accept { encodings: allowed.bits(), history_slots: 0, max_batch_pages: offer.max_batch_pages },
            memory,
        ))
    }

    fn data_connections(
        &self,
        control: &Hello,
        session: &Session,
    ) -> Result<Vec<Reading<'a>>, MigrationError> {
        let mut set = ConnectionSet::new(control.session, session.connections);
        let mut data = Vec::new();
        let deadline = Instant::now() + self.config.peer_timeout;
        let limits = Limits::default().with_batch_pages(session.max_batch_pages);
        while !set.complete() {
            let stream = self.next_connection(deadline)?;
            let for_timeouts = stream.try_clone_stream();
            let Greeted { hello, writer, mut reading } = match self.greet(stream) {
                Ok(greeted) => greeted,
                Err(error) => {
                    warn!(%error, "turned a connection away");
                    continue;
                }
            };
            let version = choose_version(&hello).map_err(|e| refuse(&writer, ErrorCode::Version, e))?;
            if let Err(error) = set.admit(&hello) {
                // Somebody else's connection does not end this migration.
                warn!(error = %refuse(&writer, ErrorCode::Protocol, error), "turned a connection away");
                continue;
            }
            writer.send(&Message::HelloAck { version })?;
            reading.frames.set_limits(limits);
            // An epoch may leave a data connection silent for as long as it likes; the control connection tells whether the source is alive.
            for_timeouts
                .and_then(|stream| stream.set_timeouts(None, Some(self.config.peer_timeout)))
                .map_err(|e| link_error(SOURCE, "accepting a data connection", e))?;
            data.push(reading);
        }
        Ok(data)
    }
}

/// Tells the peer, and returns the error.
fn refuse(writer: &MessageWriter<'_>, code: ErrorCode, error: pagewarp_wire::WireError) -> MigrationError {
    let _ = writer.send(&Message::Error { code, message: error.to_string() });
    peer_error(error)
}

/// What it means that the source said this in place of going on.
pub(crate) fn gone(message: &Message) -> MigrationError {
    match message {
        Message::Cancel { reason } => {
            MigrationError::PeerReports(format!("the source keeps the VM: {reason}"))
        }
        Message::Error { message, .. } => MigrationError::PeerReports(message.clone()),
        other => MigrationError::Peer(format!("{} is not for the destination", other.kind())),
    }
}
