//! The source's side of the handshake, and its control connection afterwards.

use std::io;
use std::time::{Duration, Instant};

use pagewarp_wire::{
    Channel as Carries, FrameReader, Hello, Limits, Message, Offer, Region, Role, Session, SourceState,
};

use crate::channel::Channel;
use crate::config::SourceConfig;
use crate::error::MigrationError;
use crate::flow::Flow;
use crate::limiter::Limiter;
use crate::link::{BatchWriter, MessageWriter, Reading, WireBytes, link_error, peer_error, too_late};
use crate::patience::within;
use crate::source::say_why;
use crate::transport::{Connector, OneDestination, Stream, random_session};
use crate::vm::{RegionInfo, SourceVm};

/// The source's control connection.
pub(crate) type Control<'a> = Channel<'a, SourceState>;

/// A migration that both ends agreed on.
pub(crate) struct Opened<'a> {
    pub(crate) control: Control<'a>,
    pub(crate) reading: Reading<'a>,
    pub(crate) data: Vec<BatchWriter<'a>>,
    pub(crate) session: Session,
}

/// What opening a session needs.
pub(crate) struct Opening<'a> {
    pub(crate) connector: &'a dyn Connector,
    pub(crate) config: &'a SourceConfig,
    pub(crate) flow: &'a Flow,
    pub(crate) peer: &'a str,
    pub(crate) bytes: &'a WireBytes,
    pub(crate) limiter: Option<&'a Limiter>,
    pub(crate) destination: OneDestination,
}

impl<'a> Opening<'a> {
    /// Connects, agrees, and opens the data connections.
    pub(crate) fn open(
        &self,
        vm: &dyn SourceVm,
        regions: &[RegionInfo],
    ) -> Result<Opened<'a>, MigrationError> {
        let id = random_session()?;
        let (stream, writer, mut reading) = self.connect(Carries::Control)?;
        let control = Control::new(SourceState::new(), writer);
        let config = self.config;
        control.send(&Message::Hello(Hello::new(Role::Control, id)))?;
        // It is answered at once, however long the rest may take.
        self.waiting(&*stream, Some(config.peer_timeout), || self.expect(&control, &mut reading))?;
        let offer = Offer {
            vm_name: vm.name(),
            page_size: pagewarp_wire::PAGE_SIZE,
            regions: regions
                .iter()
                .map(|r| Region { id: r.id, name: r.name.clone(), pages: r.pages })
                .collect(),
            encodings: config.encodings.bits(),
            history_slots: 0,
            max_batch_pages: config.batch_pages as u32,
            connections: config.connections as u16,
            pipeline: config.pipeline,
            verify: config.verify,
            downtime_limit_ms: config.downtime_limit.as_millis().try_into().unwrap_or(u32::MAX),
            machine: vm.machine()?,
        };
        control.send(&Message::Offer(offer.clone()))?;
        let accepted = self.waiting(&*stream, None, || self.expect(&control, &mut reading))?;
        let Message::Accept(accept) = accepted else {
            return Err(MigrationError::Internal(
                "the state machine took something else for an Accept".into(),
            ));
        };
        let session = Session::new(&offer, &accept).map_err(peer_error)?;
        let data = (0..session.connections)
            .map(|index| self.open_data(Hello::new(Role::Data { index }, id)))
            .collect::<Result<_, _>>()
            // It waits for these, and would take the end of the first for a broken network.
            .inspect_err(|error| say_why(&control, error))?;
        Ok(Opened { control, reading, data, session })
    }

    fn connect(
        &self,
        channel: Carries,
    ) -> Result<(Box<dyn Stream>, MessageWriter<'a>, Reading<'a>), MigrationError> {
        self.flow.check().map_err(|_| self.flow.take_reason())?;
        let prepare = || -> io::Result<[Box<dyn Stream>; 4]> {
            let stream = self.connector.connect_while(&|| self.flow.check().is_ok())?;
            self.destination.check(&*stream)?;
            // Once it is open nobody reads a data connection, so the limit on reads hurts none that is silent.
            stream.set_timeouts(Some(self.config.peer_timeout), Some(self.config.peer_timeout))?;
            let handle = || stream.try_clone_stream();
            Ok([handle()?, handle()?, handle()?, stream])
        };
        let prepared =
            prepare().map_err(|e| self.unless_stopped(link_error(self.peer, "connecting", advised(e))));
        let [for_flow, for_writer, for_reader, stream] = prepared?;
        self.flow.register(for_flow);
        let frames = FrameReader::opening(channel, Limits::default());
        let writer = MessageWriter::new(for_writer, self.peer, self.bytes);
        Ok((stream, writer, Reading::new(frames, for_reader, self.peer, self.bytes)))
    }

    /// Waits for the destination, for so long in all, and no longer than somebody wants the migration.
    fn waiting<T>(
        &self,
        stream: &dyn Stream,
        patience: Option<Duration>,
        work: impl FnOnce() -> Result<T, MigrationError>,
    ) -> Result<T, MigrationError> {
        let until = patience.map(|patience| Instant::now() + patience);
        let done = within(stream, until, &|| self.flow.check().is_ok(), work);
        done.map_err(|e| link_error(self.peer, "connecting", e))?
            .unwrap_or_else(|| Err(self.unless_stopped(too_late(self.peer, "receiving"))))
    }

    /// The error, or why all was stopped, which explains it.
    fn unless_stopped(&self, error: MigrationError) -> MigrationError {
        if self.flow.check().is_ok() { error } else { self.flow.take_reason() }
    }

    /// The next message, which must be the one that the state machine waits for.
    fn expect(&self, control: &Control<'_>, reading: &mut Reading<'_>) -> Result<Message, MigrationError> {
        loop {
            let message = reading.next()?;
            control.received(&message)?;
            match refusal(message)? {
                // Building a large VM takes its time; the destination shows that it is alive.
                Message::Ping { id } => control.pong(id)?,
                other => return Ok(other),
            }
        }
    }

    fn open_data(&self, hello: Hello) -> Result<BatchWriter<'a>, MigrationError> {
        let (stream, writer, mut reading) = self.connect(Carries::Data)?;
        writer.send(&Message::Hello(hello))?;
        let patience = Some(self.config.peer_timeout);
        match refusal(self.waiting(&*stream, patience, || reading.next())?)? {
            Message::HelloAck { .. } => {
                Ok(writer.into_batch_writer(self.limiter.map(|limiter| (limiter, self.flow))))
            }
            other => Err(MigrationError::Peer(format!(
                "{} on a new data connection, HelloAck was due",
                other.kind()
            ))),
        }
    }
}

/// Nobody listens there: what to do about it.
fn advised(error: io::Error) -> io::Error {
    if error.kind() != io::ErrorKind::ConnectionRefused {
        return error;
    }
    let advice = "start `pagewarp receive` there first, on this port; if it runs, see whether a firewall refuses the port";
    io::Error::new(error.kind(), format!("{error}; {advice}"))
}

/// An error message becomes an error.
fn refusal(message: Message) -> Result<Message, MigrationError> {
    match message {
        Message::Error { message, .. } => Err(MigrationError::Refused(message)),
        other => Ok(other),
    }
}

/// How often the source shows that it is alive.
pub(crate) const PING_EVERY: Duration = Duration::from_secs(1);
