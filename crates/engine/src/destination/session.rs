//! The destination's side of the handshake, and its control connection afterwards.

use std::fmt::Display;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use pagewarp_codec::EncodingSet;
use pagewarp_wire::{
    Accept, ConnectionSet, DestinationPhase, DestinationState, ErrorCode, FrameReader, Hello, Limits,
    Message, Offer, PAGE_SIZE, Role, Session, choose_version,
};
use tracing::{debug, warn};

use crate::channel::Channel;
use crate::config::DestinationConfig;
use crate::destination::handover::say_why;
use crate::error::MigrationError;
use crate::flow::{Flow, lock};
use crate::greeter::{Greeter, HELLO_TIMEOUT};
use crate::link::{MessageWriter, Reading, WireBytes, link_error, peer_error, too_late};
use crate::patience::within;
use crate::seldom::Seldom;
use crate::transport::{Acceptor, OUTAGE_OF_LAST_WORD, SPEAKS_TLS, Stream, same_peer};
use crate::vm::{DestinationVm, GuestMemory, RegionInfo};

/// How the other end is called in messages.
pub(crate) const SOURCE: &str = "the source";
/// How often somebody who waits for a connection looks whether it should stop.
const LOOK: Duration = Duration::from_millis(200);
/// The same while a migration is under way, whose end does not wait for longer.
const LOOK_BESIDE: Duration = Duration::from_millis(50);

/// What a further source is told.
const BUSY: &str = "this destination is busy with another migration, and takes one; start `pagewarp receive` again for this VM, on a port of its own";
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
    greeter: Mutex<Greeter<Heard>>,
    turned_away: Seldom,
}

/// A connection that has said hello.
struct Heard {
    hello: Hello,
    stream: Box<dyn Stream>,
    frames: FrameReader,
    /// Bytes read from it.
    taken: u64,
}

/// The same, as a part of this migration.
struct Greeted<'a> {
    hello: Hello,
    /// To be registered once the connection is part of the migration; one that is turned away must close.
    stream: Box<dyn Stream>,
    writer: MessageWriter<'a>,
    reading: Reading<'a>,
}

impl<'a> Accepting<'a> {
    pub(crate) fn new(
        acceptor: &'a dyn Acceptor,
        config: &'a DestinationConfig,
        flow: &'a Flow,
        bytes: &'a WireBytes,
    ) -> Accepting<'a> {
        let patience = HELLO_TIMEOUT.min(config.peer_timeout);
        let turned_away = Seldom::default();
        let greeter = Greeter::new(patience, move |stream| {
            // Those who turn up without being a source are of no interest beyond that.
            let tell = |error: &MigrationError| {
                turned_away.tell(|more| warn!(%error, "turned a connection away{more}"));
            };
            Ok(hear(stream, patience).inspect_err(tell).ok())
        });
        Accepting {
            acceptor,
            config,
            flow,
            bytes,
            greeter: Mutex::new(greeter),
            turned_away: Seldom::default(),
        }
    }

    /// Waits for a source with a VM that may come here, agrees with it, and builds the VM.
    pub(crate) fn accept(&self, vm: &mut dyn DestinationVm) -> Result<Accepted<'a>, MigrationError> {
        let deadline = Instant::now() + self.config.accept_timeout;
        loop {
            if let Some(accepted) = self.agree(self.wait_for_source(deadline)?, vm)? {
                return Ok(accepted);
            }
        }
    }

    /// Agrees with a source and builds its VM. `None`: it is none that may come here, and was turned away.
    fn agree(
        &self,
        source: Greeted<'a>,
        vm: &mut dyn DestinationVm,
    ) -> Result<Option<Accepted<'a>>, MigrationError> {
        let Greeted { hello, stream, writer, mut reading } = source;
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
        if !self.config.takes(&offer.vm_name) {
            // Whom it would take is nobody else's business.
            let why =
                format!("the VM `{}` is none that this destination takes (--allow-vm there)", offer.vm_name);
            self.turned_away.tell(|more| warn!("turned a source away: {why}{more}"));
            let _ = control.send(&Message::Error { code: ErrorCode::Refused, message: why });
            self.flow.forget_connections();
            return Ok(None);
        }
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
        Ok(Some(Accepted { started, name, control, reading, opening, session, allowed, pipeline, memory }))
    }

    /// The first connection that opens a migration. Others (a port scanner, say) are turned away and do no harm.
    fn wait_for_source(&self, deadline: Instant) -> Result<Greeted<'a>, MigrationError> {
        loop {
            let heard = self.next_connection(deadline, true)?;
            match heard.hello.role {
                Role::Control => match choose_version(&heard.hello) {
                    Ok(_) => {
                        if let Some(greeted) = self.take(heard) {
                            return Ok(greeted);
                        }
                    }
                    Err(error) => self.turn_away(heard, ErrorCode::Version, &error),
                },
                Role::Data { .. } => {
                    let why = "no migration is under way that this connection could belong to";
                    self.turn_away(heard, ErrorCode::Protocol, &why);
                }
            }
        }
    }

    /// The next connection that has said hello. While a source is waited for, the acceptor may be renewed.
    fn next_connection(&self, deadline: Instant, may_renew: bool) -> Result<Heard, MigrationError> {
        let waiting = |e| link_error(SOURCE, "waiting for a connection", e);
        loop {
            self.flow.check().map_err(|_| self.flow.take_reason())?;
            if may_renew {
                self.acceptor.renew();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(waiting(io::Error::new(io::ErrorKind::TimedOut, "nobody connected in time")));
            }
            if let Some(heard) = lock(&self.greeter).accept(self.acceptor, LOOK.min(left)).map_err(waiting)? {
                return Ok(heard);
            }
        }
    }

    /// Makes a connection one of this migration. `None`: it broke.
    fn take(&self, heard: Heard) -> Option<Greeted<'a>> {
        let Heard { hello, stream, frames, taken } = heard;
        let prepare = || -> io::Result<[Box<dyn Stream>; 2]> {
            let timeout = Some(self.config.peer_timeout);
            stream.set_timeouts(timeout, timeout)?;
            Ok([stream.try_clone_stream()?, stream.try_clone_stream()?])
        };
        match prepare() {
            Ok([for_writer, for_reader]) => Some(Greeted {
                hello,
                writer: MessageWriter::new(for_writer, SOURCE, self.bytes),
                reading: Reading::continued(frames, for_reader, SOURCE, self.bytes, taken),
                stream,
            }),
            Err(error) => {
                warn!(%error, "turned a connection away");
                None
            }
        }
    }

    /// Tells whoever connected why that was of no use.
    fn turn_away(&self, heard: Heard, code: ErrorCode, why: &dyn Display) {
        self.turned_away.tell(|more| warn!("turned a connection away: {why}{more}"));
        let message = Message::Error { code, message: why.to_string() };
        lock(&self.greeter).dismiss(heard.stream, move |stream| {
            let _ = MessageWriter::new(stream, SOURCE, &WireBytes::default()).send(&message);
        });
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
                    Message::Ping { id } => control.pong(id)?,
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
            let heard = self.next_connection(deadline, false)?;
            let hello = &heard.hello;
            if hello.session != opening.hello.session && hello.role == Role::Control {
                self.turn_away(heard, ErrorCode::Busy, &BUSY);
                continue;
            }
            // Somebody else's connection does not end this migration, and if he knows its session.
            if let Err(why) = same_peer(opening.identity.as_deref(), &*heard.stream) {
                self.turn_away(heard, ErrorCode::Protocol, &why);
                continue;
            }
            if let Err(error) = set.admit(hello) {
                self.turn_away(heard, ErrorCode::Protocol, &error);
                continue;
            }
            let version = match choose_version(hello) {
                Ok(version) => version,
                Err(error) => {
                    self.turn_away(heard, ErrorCode::Version, &error);
                    return Err(peer_error(error));
                }
            };
            let broke = || MigrationError::Peer("a data connection broke at once".into());
            let Greeted { stream, writer, mut reading, .. } = self.take(heard).ok_or_else(broke)?;
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

    /// Tells further sources that they come too late, until this migration is over.
    pub(crate) fn turn_others_away(&self) {
        while self.flow.check().is_ok() {
            let next = lock(&self.greeter).accept(self.acceptor, LOOK_BESIDE);
            match next {
                Ok(Some(heard)) => self.turn_away(heard, ErrorCode::Busy, &BUSY),
                Ok(None) => {}
                Err(error) => {
                    debug!(%error, "nobody else can connect");
                    let _ = self.flow.sleep(LOOK);
                }
            }
        }
    }

    /// If it was cancelled here, nobody waits for a lost network to say so, as every thread would that sends something. Unless the source may have committed: then it is
    /// to hear what became of that, and be heard.
    pub(crate) fn hasten(&self, control: &Control<'_>) {
        let may_be_committed = || {
            use DestinationPhase::{Committed, Done, Ready, Running};
            control.with_state(|state| matches!(state.phase(), Ready | Committed | Running | Done))
        };
        if self.flow.control().is_cancelled() && !may_be_committed() {
            self.acceptor.limit_outage(Some(OUTAGE_OF_LAST_WORD));
            // It may have become so just now, with the limit taken away too early.
            if may_be_committed() {
                self.acceptor.limit_outage(None);
            }
        }
    }
}

/// Reads the hello of a new connection, which has a short time for it.
fn hear(stream: Box<dyn Stream>, patience: Duration) -> Result<Heard, MigrationError> {
    let clone = || stream.try_clone_stream().map_err(|e| link_error(SOURCE, "accepting", e));
    let bytes = WireBytes::default();
    let mut reading = Reading::new(FrameReader::accepting(Limits::default()), clone()?, SOURCE, &bytes);
    stream.set_timeouts(Some(patience), Some(patience)).map_err(|e| link_error(SOURCE, "accepting", e))?;
    // Whoever drips is ended by the greeter.
    let first = reading.next();
    if matches!(&first, Err(MigrationError::Peer(why)) if why == SPEAKS_TLS) {
        // It does not read frames, but sees that these bytes are none of TLS.
        let message = Message::Error { code: ErrorCode::Protocol, message: SPEAKS_TLS.into() };
        let _ = MessageWriter::new(clone()?, SOURCE, &bytes).send(&message);
    }
    let Message::Hello(hello) = first? else {
        return Err(MigrationError::Internal("the frame reader took something else for a Hello".into()));
    };
    Ok(Heard { hello, frames: reading.frames, taken: bytes.received(), stream })
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
