//! The destination's side of the handshake, and its control connection afterwards.

use std::fmt::Display;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pagewarp_codec::EncodingSet;
use pagewarp_wire::{
    Accept, ConnectionSet, DestinationState, ErrorCode, FrameReader, Hello, Limits, Message, Offer,
    PAGE_SIZE, Role, Session, choose_version,
};
use tracing::warn;

use crate::channel::Channel;
use crate::config::DestinationConfig;
use crate::destination::handover::say_why;
use crate::error::MigrationError;
use crate::flow::Flow;
use crate::link::{MessageWriter, Reading, WireBytes, link_error, peer_error, too_late};
use crate::patience::within;
use crate::transport::{Acceptor, SPEAKS_TLS, Stream, same_peer};
use crate::vm::{DestinationVm, GuestMemory, RegionInfo};

/// How the other end is called in messages.
pub(crate) const SOURCE: &str = "the source";
/// How often somebody who waits for a connection looks whether it should stop.
const LOOK: Duration = Duration::from_millis(200);

/// The same while a migration is under way, whose end should not wait for it.
const BUSY_LOOK: Duration = Duration::from_millis(50);

/// The longest that a new connection may take to say hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// While the VM is built the source hears this often that somebody is there.
const ALIVE_EVERY: Duration = Duration::from_secs(1);

/// The destination's control connection.
pub(crate) type Control<'a> = Channel<'a, DestinationState>;

/// A migration that both ends agreed on.
pub(crate) struct Accepted<'a> {
    pub(crate) started: Instant,
    pub(crate) name: String,
    pub(crate) control: Control<'a>,
    pub(crate) reading: Reading<'a>,
    pub(crate) opening: Opening,
    pub(crate) session: Session,
    pub(crate) allowed: EncodingSet,
    pub(crate) pipeline: bool,
    pub(crate) memory: Arc<dyn GuestMemory>,
}

/// What opened a session, and what its other connections have to have in common with it.
pub(crate) struct Opening {
    hello: Hello,
    identity: Option<Arc<str>>,
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
    /// To be registered once the connection is part of the migration; one that is turned away must close.
    stream: Box<dyn Stream>,
    writer: MessageWriter<'a>,
    reading: Reading<'a>,
}

impl<'a> Accepting<'a> {
    /// Waits for a source, agrees with it, and builds the VM.
    pub(crate) fn accept(&self, vm: &mut dyn DestinationVm) -> Result<Accepted<'a>, MigrationError> {
        let Greeted { hello, stream, writer, mut reading } = self.wait_for_source()?;
        let identity = stream.peer_identity();
        let watched = stream.try_clone_stream().map_err(|e| link_error(SOURCE, "accepting", e))?;
        self.flow.register(stream);
        let started = Instant::now();
        let control = Control::new(DestinationState::new(), writer);
        control.received(&Message::Hello(hello.clone()))?;
        let version = choose_version(&hello).map_err(peer_error)?;
        control.send(&Message::HelloAck { version })?;
        let offer =
            self.offer(&control, &*watched, &mut reading).inspect_err(|error| say_why(&control, error))?;
        let (accept, memory) = self.consider(vm, &offer, &control).inspect_err(|error| {
            let message = Message::Error { code: ErrorCode::Refused, message: error.to_string() };
            // The source hears why, if it is still there.
            let _ = control.send(&message);
        })?;
        let allowed = EncodingSet::from_bits(accept.encodings)
            .ok_or_else(|| MigrationError::Internal("accepted encodings that do not exist".into()))?;
        let session = Session::new(&offer, &accept).map_err(peer_error)?;
        control.send(&Message::Accept(accept))?;
        let (name, pipeline) = (offer.vm_name, offer.pipeline);
        let opening = Opening { hello, identity };
        Ok(Accepted { started, name, control, reading, opening, session, allowed, pipeline, memory })
    }

    /// The first connection that opens a migration. Others (a port scanner, say) are turned away and do no harm.
    fn wait_for_source(&self) -> Result<Greeted<'a>, MigrationError> {
        let deadline = Instant::now() + self.config.accept_timeout;
        loop {
            let stream = self.next_connection(deadline)?;
            match self.greet(stream) {
                Ok(greeted) if greeted.hello.role == Role::Control => match choose_version(&greeted.hello) {
                    Ok(_) => return Ok(greeted),
                    Err(error) => turn_away(&greeted.writer, ErrorCode::Version, &error),
                },
                Ok(greeted) => {
                    let why = "no migration is under way that this connection could belong to";
                    turn_away(&greeted.writer, ErrorCode::Protocol, &why);
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

    /// Reads the hello of a new connection, which has a short time for it: whoever says nothing, or drips, or breaks the connection, must not keep others waiting.
    fn greet(&self, stream: Box<dyn Stream>) -> Result<Greeted<'a>, MigrationError> {
        let halves = || -> io::Result<[Box<dyn Stream>; 2]> {
            Ok([stream.try_clone_stream()?, stream.try_clone_stream()?])
        };
        let accepting = |e| link_error(SOURCE, "accepting", e);
        let [for_writer, for_reader] = halves().map_err(accepting)?;
        let frames = FrameReader::accepting(Limits::default());
        let mut reading = Reading::new(frames, for_reader, SOURCE, self.bytes);
        let patience = HELLO_TIMEOUT.min(self.config.peer_timeout);
        stream.set_timeouts(Some(patience), Some(patience)).map_err(accepting)?;
        let writer = MessageWriter::new(for_writer, SOURCE, self.bytes);
        let first = self.waiting(&*stream, patience, || reading.next());
        if matches!(&first, Err(MigrationError::Peer(why)) if why == SPEAKS_TLS) {
            // It does not read frames, but sees that these bytes are none of TLS.
            let message = Message::Error { code: ErrorCode::Protocol, message: SPEAKS_TLS.into() };
            let _ = writer.send(&message);
        }
        let Message::Hello(hello) = first? else {
            return Err(MigrationError::Internal("the frame reader took something else for a Hello".into()));
        };
        let timeout = Some(self.config.peer_timeout);
        stream.set_timeouts(timeout, timeout).map_err(accepting)?;
        Ok(Greeted { hello, stream, writer, reading })
    }

    /// Waits for the peer, for so long in all.
    fn waiting<T>(
        &self,
        stream: &dyn Stream,
        patience: Duration,
        work: impl FnOnce() -> Result<T, MigrationError>,
    ) -> Result<T, MigrationError> {
        let is_wanted = || self.flow.check().is_ok();
        let done = within(stream, Some(Instant::now() + patience), &is_wanted, work);
        done.map_err(|e| link_error(SOURCE, "accepting", e))?
            .unwrap_or_else(|| Err(too_late(SOURCE, "receiving")))
    }

    /// Nothing keeps a source from making its offer at once.
    fn offer(
        &self,
        control: &Control<'_>,
        stream: &dyn Stream,
        reading: &mut Reading<'_>,
    ) -> Result<Offer, MigrationError> {
        self.waiting(stream, self.config.peer_timeout, || {
            loop {
                let message = reading.next()?;
                control.received(&message)?;
                match message {
                    Message::Offer(offer) => return Ok(offer),
                    Message::Ping { id } => control.send(&Message::Pong { id })?,
                    other => return Err(gone(&other)),
                }
            }
        })
    }

    /// Builds the VM if the offer is acceptable.
    fn consider(
        &self,
        vm: &mut dyn DestinationVm,
        offer: &Offer,
        control: &Control<'_>,
    ) -> Result<(Accept, Arc<dyn GuestMemory>), MigrationError> {
        let config = self.config;
        let pages: u64 = offer.regions.iter().map(|r| r.pages).sum();
        let memory_bytes = pages.saturating_mul(u64::from(PAGE_SIZE));
        if memory_bytes > config.max_memory_bytes {
            return Err(MigrationError::Config(format!(
                "the VM has {memory_bytes} bytes of memory and this destination takes at most {}; raise its limit",
                config.max_memory_bytes
            )));
        }
        if usize::from(offer.connections) > config.max_connections {
            return Err(MigrationError::Config(format!(
                "the source wants {} data connections and this destination takes at most {}; use fewer",
                offer.connections, config.max_connections
            )));
        }
        // A newer source may offer encodings that this build does not know.
        let known =
            EncodingSet::from_bits(offer.encodings & EncodingSet::ALL.bits()).unwrap_or(EncodingSet::RAW);
        let accept = Accept {
            encodings: known.intersection(config.encodings).bits(),
            // Bases come from guest memory, so no slots are needed.
            history_slots: 0,
            max_batch_pages: offer.max_batch_pages.min(config.max_batch_pages as u32),
        };
        let regions: Vec<_> = offer
            .regions
            .iter()
            .map(|r| RegionInfo { id: r.id, name: r.name.clone(), pages: r.pages })
            .collect();
        let memory = while_alive(control, || vm.prepare(&offer.vm_name, &regions, &offer.machine))?;
        if memory.regions() != regions {
            return Err(MigrationError::Internal("the VM was built with other regions than offered".into()));
        }
        Ok((accept, memory))
    }

    /// Tells others who connect while the migration is under way that there is no use in waiting.
    pub(crate) fn turn_others_away(&self) {
        let why = "this destination is busy with the migration of another session";
        // After that the listener is soon somebody else's.
        while self.flow.check().is_ok() && !self.flow.is_committed() {
            match self.acceptor.accept(BUSY_LOOK) {
                Ok(stream) => match self.greet(stream) {
                    Ok(greeted) => turn_away(&greeted.writer, ErrorCode::Busy, &why),
                    Err(error) => warn!(%error, "turned a connection away"),
                },
                Err(e) if e.kind() == io::ErrorKind::TimedOut => {}
                // There is time: nobody is waited for.
                Err(_) => thread::sleep(BUSY_LOOK),
            }
        }
    }

    /// Waits for the data connections of the session that `opening` opened.
    pub(crate) fn data_connections(
        &self,
        opening: &Opening,
        session: &Session,
    ) -> Result<Vec<Reading<'a>>, MigrationError> {
        let mut set = ConnectionSet::new(opening.hello.session, session.connections);
        let mut data = Vec::new();
        let deadline = Instant::now() + self.config.peer_timeout;
        let limits = Limits::default().with_batch_pages(session.max_batch_pages);
        while !set.complete() {
            let stream = self.next_connection(deadline)?;
            let Greeted { hello, stream, writer, mut reading } = match self.greet(stream) {
                Ok(greeted) => greeted,
                Err(error) => {
                    warn!(%error, "turned a connection away");
                    continue;
                }
            };
            // Somebody else's connection does not end this migration, and if he knows its session.
            if let Err(why) = same_peer(opening.identity.as_deref(), &*stream) {
                turn_away(&writer, ErrorCode::Protocol, &why);
                continue;
            }
            if let Err(error) = set.admit(&hello) {
                turn_away(&writer, ErrorCode::Protocol, &error);
                continue;
            }
            let version = choose_version(&hello).map_err(|error| {
                turn_away(&writer, ErrorCode::Version, &error);
                peer_error(error)
            })?;
            writer.send(&Message::HelloAck { version })?;
            reading.frames.set_limits(limits);
            // An epoch may leave a data connection silent for as long as it likes; the control connection tells whether the source is alive.
            stream
                .set_timeouts(None, Some(self.config.peer_timeout))
                .map_err(|e| link_error(SOURCE, "accepting a data connection", e))?;
            self.flow.register(stream);
            data.push(reading);
        }
        Ok(data)
    }
}

/// Tells whoever connected why that was of no use.
fn turn_away(writer: &MessageWriter<'_>, code: ErrorCode, why: &dyn Display) {
    warn!("turned a connection away: {why}");
    let _ = writer.send(&Message::Error { code, message: why.to_string() });
}

/// Does long work while the source hears that somebody is there.
fn while_alive<T>(control: &Control<'_>, work: impl FnOnce() -> T) -> T {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let pinging = scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                thread::park_timeout(ALIVE_EVERY);
                // If the source is gone, the answer to its offer will find out.
                let _ = control.send(&Message::Ping { id: 0 });
            }
        });
        let result = work();
        done.store(true, Ordering::Release);
        pinging.thread().unpark();
        result
    })
}

/// What it means that the source said this in place of going on.
pub(crate) fn gone(message: &Message) -> MigrationError {
    match message {
        Message::Cancel { reason } => {
            MigrationError::PeerReports(format!("the source keeps the VM: {reason}"))
        }
        Message::Error { code: ErrorCode::Differs, message } => MigrationError::Differs(message.clone()),
        Message::Error { message, .. } => MigrationError::PeerReports(message.clone()),
        other => MigrationError::Peer(format!("{} is not for the destination", other.kind())),
    }
}
