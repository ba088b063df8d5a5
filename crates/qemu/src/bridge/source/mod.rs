//! The bridge on the source host.

mod connection;
mod copy;
mod farewell;
pub(crate) mod link;
mod marks;
mod pace;
mod send;
mod serialize;
pub(crate) mod verdict;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::Scope;
use std::time::{Duration, Instant};

use pagewarp_engine::control::MigrationControl;
use pagewarp_engine::error::MigrationError;
use pagewarp_engine::flow::{Flow, StopOnPanic, Stopped, lock, spawn};
use pagewarp_engine::metrics::{StageMeter, anonymous_bytes, busiest, ms};
use pagewarp_engine::transport::{Connector, OneDestination, Stream};
use tracing::{debug, info};

use self::connection::Connection;
use self::link::{Link, connect_while};
use self::pace::{Pace, Step};
use self::serialize::Serializing;
use self::verdict::{Ending, MainChannel, Seen};
use crate::bridge::config::BridgeConfig;
use crate::bridge::report::{SourceBridgeReport, stages};
use crate::bridge::socket::{Endpoint, Listener, OneWay, Socket, wait_readable};
use crate::policy::Policy;
use crate::protocol::MAX_CONNECTIONS;
use crate::protocol::hello::{Credit, Hello, Purpose, SessionId, Terms};
use crate::stream::Blocks;
use crate::window::{Slew, Together, Window};

/// How often the thread that accepts connections looks around.
const LOOK: Duration = Duration::from_millis(20);
/// How long connections may take to end once the main channel has.
const GRACE: Duration = Duration::from_secs(5);

/// Waits for migrations of the source QEMU on a socket and passes them on to a destination bridge.
pub struct SourceBridge<'a> {
    listener: Listener,
    place: Endpoint,
    connector: &'a dyn Connector,
    config: BridgeConfig,
    /// Connections that came before the last migration was over, and may be of the next one.
    early: Mutex<VecDeque<Socket>>,
    /// For how long QEMU was held back.
    held_back_ns: AtomicU64,
    /// Whether the migration under way is complete and compared.
    is_verified: AtomicBool,
}

impl<'a> SourceBridge<'a> {
    /// Listens at `place`; a Unix socket is for this user alone, and one left behind by a process that is gone is replaced.
    pub fn bind(
        place: Endpoint,
        connector: &'a dyn Connector,
        config: BridgeConfig,
    ) -> io::Result<SourceBridge<'a>> {
        Ok(SourceBridge {
            listener: place.listen()?,
            place,
            connector,
            config,
            early: Mutex::default(),
            held_back_ns: AtomicU64::new(0),
            is_verified: AtomicBool::new(false),
        })
    }

    /// Waits for a migration and passes it on, to its end. `session` is what its connections have in common.
    ///
    /// # Errors
    ///
    /// Whatever ended it early. The source QEMU sees its connections end, and goes on with the VM.
    pub fn run(
        &self,
        session: SessionId,
        control: &MigrationControl,
    ) -> Result<SourceBridgeReport, MigrationError> {
        self.run_towards(session, &OneDestination::default(), control)
    }

    /// The same, to the destination that other connections of the migration may have reached already.
    pub(crate) fn run_towards(
        &self,
        session: SessionId,
        destination: &OneDestination,
        control: &MigrationControl,
    ) -> Result<SourceBridgeReport, MigrationError> {
        let flow = Flow::new(control.clone());
        let Ok(qemu) = self.accept_main(&flow) else { return Err(flow.take_reason()) };
        let mut left = Left::default();
        let result = self.pass_on(qemu, session, destination, flow, &mut left);
        if result.is_err() {
            let early = farewell::let_go(self, left, control);
            lock(&self.early).extend(early);
        }
        result
    }

    /// Passes the migration on whose main channel this is. Whatever comes of it, `left` are the others afterwards, and the main one was ended.
    fn pass_on(
        &self,
        qemu: Socket,
        session: SessionId,
        destination: &OneDestination,
        flow: Flow,
        left: &mut Left,
    ) -> Result<SourceBridgeReport, MigrationError> {
        let started = Instant::now();
        if !destination.is_known() {
            self.connector.renew();
        }
        let connected = self.connect(session, 0, destination, &flow);
        let Ok((link, terms, round_trip)) = connected.map_err(|e| flow.fail(e)) else {
            return Err(flow.take_reason());
        };
        self.is_verified.store(false, Ordering::Release);
        let policy = Policy::new(self.config.policy(&terms));
        let spilled_before = self.config.backend.spilled_batches();
        let serializing = Serializing::new(&self.config.backend, terms, self.config.threads, policy)?;
        let session = Session {
            serializing,
            id: session,
            peer: self.connector.peer(),
            blocks: Blocks::default(),
            meters: Meters::default(),
            counts: Counts::default(),
            pace: Mutex::new(Pace::new(round_trip, self.config.threads, started)),
            slew: Mutex::new(Slew::new(started)),
            together: Arc::default(),
            main: Mutex::default(),
            connections: Mutex::default(),
            refused: Mutex::default(),
            alive: AtomicUsize::new(0),
            main_alive: AtomicUsize::new(0),
            raw: Mutex::default(),
            clean: Arc::default(),
            verify: terms.verify,
            destination,
            bridge: self,
            flow,
        };
        info!(peer = session.peer, ?terms, ?round_trip, "bridging");
        std::thread::scope(|scope| {
            let _stop = StopOnPanic(&session.flow);
            let session = &session;
            // Reasons are kept in the flow.
            for _ in 0..session.serializing.workers() {
                let _ = spawn(scope, &session.flow, || {
                    let meter = &session.meters.serialize;
                    meter.cpu_only(|| session.serializing.work(&session.flow, meter))
                });
            }
            let _ = session.start(scope, qemu, link, round_trip);
            if session.accept_more(scope).is_err() {
                // A cancel wakes nobody who waits for a peer. Whatever failed has done so, and once more does no harm.
                session.flow.stop();
            }
            session.serializing.close();
        });
        left.taken.extend(lock(&session.connections).iter().skip(1).cloned());
        left.others.append(&mut lock(&session.refused));
        session.finish(started, spilled_before)
    }

    /// For how long QEMU had more to send than there was room for, so far; of several connections, all together.
    pub(crate) fn held_back(&self) -> Duration {
        Duration::from_nanos(self.held_back_ns.load(Ordering::Relaxed))
    }

    /// Whether the destination QEMU has the VM, and all pages were written into it as they were read.
    pub(crate) fn is_verified(&self) -> bool {
        self.is_verified.load(Ordering::Acquire)
    }

    fn accept_main(&self, flow: &Flow) -> Result<Socket, Stopped> {
        loop {
            flow.check()?;
            let early = lock(&self.early).pop_front();
            let next = if early.is_some() { Ok(early) } else { self.accept() };
            match next.map_err(|e| self.cannot_accept(flow, e))? {
                Some(stream) if stream.is_left_over() => {
                    debug!("a connection of a migration of QEMU that is over");
                }
                Some(stream) => return Ok(stream),
                None => {}
            }
        }
    }

    fn cannot_accept(&self, flow: &Flow, source: io::Error) -> Stopped {
        let peer = format!("the source QEMU at {}", self.place);
        flow.fail(MigrationError::Link { peer, doing: "waiting for its connection".into(), source })
    }

    /// Waits a moment for a connection of QEMU.
    fn accept(&self) -> io::Result<Option<Socket>> {
        if !wait_readable(&self.listener, Some(LOOK))? {
            return Ok(None);
        }
        match self.listener.accept() {
            Ok(socket) => Ok(Some(socket)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Opens a connection to the destination bridge, for connection `number` of QEMU. Returns what was agreed and the round trip.
    fn connect(
        &self,
        session: SessionId,
        number: u16,
        destination: &OneDestination,
        flow: &Flow,
    ) -> Result<(Link, Terms, Duration), MigrationError> {
        let hello = Hello { session, purpose: Purpose::Bridge(number), terms: self.config.offer() };
        let go_on = || flow.check().is_ok();
        connect_while(self.connector, &hello, destination, self.config.peer_timeout, &go_on)
    }
}

/// Channels of a migration that has failed.
#[derive(Default)]
struct Left {
    /// Those that were bridged.
    taken: Vec<Arc<Connection>>,
    /// Those that the destination could not be reached for.
    others: Vec<Socket>,
}

/// Counters of the stages.
#[derive(Default)]
pub(crate) struct Meters {
    pub(crate) copy: StageMeter,
    pub(crate) serialize: StageMeter,
    pub(crate) send: StageMeter,
}

#[derive(Default)]
pub(crate) struct Counts {
    pub(crate) stream_bytes: AtomicU64,
}

/// One migration of the source QEMU.
pub(crate) struct Session<'a> {
    pub(crate) flow: Flow,
    pub(crate) serializing: Serializing,
    pub(crate) blocks: Blocks,
    pub(crate) meters: Meters,
    pub(crate) counts: Counts,
    pub(crate) peer: String,
    id: SessionId,
    pace: Mutex<Pace>,
    slew: Mutex<Slew>,
    together: Arc<Together>,
    main: Mutex<MainChannel>,
    connections: Mutex<Vec<Arc<Connection>>>,
    /// Channels of QEMU that could not be bridged: they must not end before it has noticed.
    refused: Mutex<Vec<Socket>>,
    /// Threads of connections that have not ended, and those of the main channel among them.
    alive: AtomicUsize,
    main_alive: AtomicUsize,
    raw: Mutex<BTreeMap<u16, String>>,
    /// Whether connections to the destination are ended in order, or reset.
    clean: Arc<AtomicBool>,
    /// Whether what is written into the destination QEMU is compared with what was read.
    pub(crate) verify: bool,
    destination: &'a OneDestination,
    bridge: &'a SourceBridge<'a>,
}

impl Session<'_> {
    /// Notes what an unusual error means: nothing, once the migration is complete.
    pub(crate) fn broken(&self, error: MigrationError) -> Stopped {
        if self.is_complete() {
            debug!(%error, "after the end");
            return Stopped;
        }
        self.flow.fail(error)
    }

    /// The source QEMU had more to send than there was room for.
    pub(crate) fn pace_pressed(&self) {
        lock(&self.pace).press();
    }

    /// It had to wait for so long.
    pub(crate) fn held_back(&self, time: Duration) {
        self.bridge.held_back_ns.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Bytes that may be taken from the source QEMU now, on all connections; if there are none, how long to wait for more.
    pub(crate) fn slew_room(&self) -> Result<u64, Duration> {
        lock(&self.slew).room(Instant::now())
    }

    /// So many bytes were taken from the source QEMU.
    pub(crate) fn slew_take(&self, bytes: u64) {
        lock(&self.slew).take(bytes);
    }

    /// The destination got on.
    pub(crate) fn credit(&self, connection: u16, credit: &Credit, received: u64, delivered: u64) {
        let backlog = lock(&self.connections).iter().map(|connection| connection.backlog()).sum();
        let step = Step { received, delivered, backlog };
        let encode = self.meters.serialize.working_time() / self.serializing.workers() as u32;
        let interval = lock(&self.pace).credit(connection, credit, &step, encode, Instant::now());
        if let Some(interval) = interval {
            self.serializing.interval(&interval);
        }
    }

    /// What was written into the destination QEMU on this connection is not what was read. Whatever else is known by now, that is the news.
    pub(crate) fn differs(&self, connection: u16, agreed: u64, written: u64) -> Stopped {
        // Without a commit that waits for the comparison, it may run there.
        let known = if self.is_complete() { "; the destination QEMU has taken it for the VM" } else { "" };
        self.flow.fail(MigrationError::Differs(format!(
            "connection {connection} of QEMU, between byte {agreed} and byte {written} of its stream{known}"
        )))
    }

    /// To be asked whenever something was compared, and now and then.
    pub(crate) fn look_whether_verified(&self) {
        if self.verify && self.is_complete() && self.all_agree() {
            self.bridge.is_verified.store(true, Ordering::Release);
        }
    }

    fn all_agree(&self) -> bool {
        lock(&self.connections).iter().all(|connection| lock(&connection.marks).agree())
    }

    fn any_differs(&self) -> bool {
        lock(&self.connections).iter().any(|connection| lock(&connection.marks).differ())
    }

    /// Connection `number` was not taken apart to its end.
    pub(crate) fn note_raw(&self, number: u16, reason: &str) {
        lock(&self.raw).insert(number, reason.to_owned());
    }

    /// The destination QEMU said this on the main channel; the source QEMU has not heard of it yet.
    pub(crate) fn answer(&self, bytes: &[u8]) {
        lock(&self.main).answer(bytes);
    }

    /// The source QEMU has got what was said on the main channel.
    pub(crate) fn passed_on(&self) {
        lock(&self.main).passed_on();
        self.look_whether_verified();
    }

    /// The main channel was read up to here.
    pub(crate) fn see_main(&self, seen: Seen) {
        lock(&self.main).see(seen);
    }

    /// The source QEMU has hung up on the main channel, and there may be more to read. If it did so before the migration was complete, everything
    /// on its way is dropped at once: the VM runs on the source.
    pub(crate) fn main_hung_up(&self) -> Result<(), Stopped> {
        let in_flight = self.in_flight();
        let verdict = lock(&self.main).hung_up(in_flight);
        verdict.map_err(|error| self.flow.fail(error))
    }

    /// The source QEMU has ended its direction of the main channel, and all of it was read.
    pub(crate) fn main_ended(&self) -> Result<(), Stopped> {
        let in_flight = self.in_flight();
        let verdict = lock(&self.main).ended(in_flight);
        verdict.map_err(|error| self.flow.fail(error))
    }

    /// Whether there are connections beside the main channel, which carry the pages then.
    pub(crate) fn has_channels(&self) -> bool {
        lock(&self.connections).len() > 1
    }

    /// Bytes of the stream that the destination QEMU has not got, on all connections.
    fn in_flight(&self) -> u64 {
        lock(&self.connections).iter().map(|connection| connection.in_flight()).sum()
    }

    /// Whether all connections were read to their end, and all of it is in the destination QEMU.
    fn is_delivered(&self) -> bool {
        lock(&self.connections).iter().all(|connection| connection.is_delivered())
    }

    fn wire_bytes(&self) -> u64 {
        lock(&self.connections).iter().map(|connection| connection.sent_bytes.load(Ordering::Relaxed)).sum()
    }

    /// Whether nothing that happens now can make the migration fail.
    fn is_complete(&self) -> bool {
        let (is_confirmed, has_ended) = {
            let main = lock(&self.main);
            (main.is_confirmed(), main.ending().is_some())
        };
        is_confirmed || (has_ended && self.is_delivered())
    }

    /// Accepts further connections of QEMU until all are at their end.
    fn accept_more<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) -> Result<(), Stopped> {
        let mut main_gone = None;
        loop {
            self.flow.check()?;
            self.look_whether_verified();
            self.flow.control().update(|progress| {
                progress.guest_bytes = self.counts.stream_bytes.load(Ordering::Relaxed);
                progress.wire_bytes = self.wire_bytes();
            });
            if self.alive.load(Ordering::Acquire) == 0 {
                return Ok(());
            }
            if self.main_alive.load(Ordering::Acquire) == 0 {
                let since: Instant = *main_gone.get_or_insert_with(Instant::now);
                if since.elapsed() > GRACE {
                    self.clean.store(true, Ordering::Release);
                    self.flow.stop();
                    return Ok(());
                }
            }
            let Some(qemu) = self.bridge.accept().map_err(|e| self.bridge.cannot_accept(&self.flow, e))?
            else {
                continue;
            };
            let number = lock(&self.connections).len();
            if number == MAX_CONNECTIONS {
                lock(&self.refused).push(qemu);
                return Err(self.flow.fail(MigrationError::Config(format!(
                    "the source QEMU opens more than {MAX_CONNECTIONS} connections; use fewer multifd channels"
                ))));
            }
            match self.bridge.connect(self.id, number as u16, self.destination, &self.flow) {
                Ok((link, _, round_trip)) => self.start(scope, qemu, link, round_trip)?,
                Err(error) => {
                    lock(&self.refused).push(qemu);
                    return Err(self.flow.fail(error));
                }
            }
        }
    }

    /// Starts the threads of a connection.
    fn start<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        qemu: Socket,
        link: Link,
        round_trip: Duration,
    ) -> Result<(), Stopped> {
        let Link { stream, sending, receiving } = link;
        let handle = match qemu.try_clone() {
            Ok(handle) => handle,
            Err(error) => {
                lock(&self.refused).push(qemu);
                let why = MigrationError::Internal(format!("no descriptors left: {error}"));
                return Err(self.flow.fail(why));
            }
        };
        let is_main = lock(&self.connections).is_empty();
        // Before the link: QEMU should know at once when it is over, while the destination may take its time.
        self.flow.register(if is_main { Box::new(handle) } else { Box::new(OneWay(handle)) });
        self.flow.register(Box::new(Severed { stream, clean: self.clean.clone() }));
        let now = Instant::now();
        let window = || Window::new(round_trip, self.bridge.config.delay, now);
        let connection = {
            let mut connections = lock(&self.connections);
            let connection =
                Arc::new(Connection::new(connections.len() as u16, qemu, window, self.together.clone()));
            connections.push(connection.clone());
            connection
        };
        debug!(number = connection.number, "a connection of QEMU");
        self.alive.fetch_add(3, Ordering::AcqRel);
        self.main_alive.fetch_add(if is_main { 3 } else { 0 }, Ordering::AcqRel);
        let ended = move || {
            self.main_alive.fetch_sub(is_main.into(), Ordering::AcqRel);
            self.alive.fetch_sub(1, Ordering::AcqRel);
        };
        let (copying, returning) = (connection.clone(), connection.clone());
        spawn(scope, &self.flow, move || {
            let _ = self.meters.copy.cpu_only(|| copy::run(self, &copying));
            ended();
        })?;
        spawn(scope, &self.flow, move || {
            let _ = self.meters.send.cpu_only(|| send::run(self, &connection, sending));
            ended();
        })?;
        spawn(scope, &self.flow, move || {
            let _ = self.meters.send.cpu_only(|| send::run_back(self, &returning, receiving));
            ended();
        })
    }

    fn finish(self, started: Instant, spilled_before: u64) -> Result<SourceBridgeReport, MigrationError> {
        let (is_handed_over, ending) = {
            let main = lock(&self.main);
            (main.is_handed_over(), main.ending())
        };
        let is_over = is_handed_over || (ending.is_some() && self.is_delivered());
        self.clean.store(is_over, Ordering::Release);
        self.flow.stop();
        if self.any_differs() {
            // It was said at once, and no end is a good one then.
            return Err(self.flow.end(MigrationError::Differs("a connection of QEMU".into())));
        }
        if !is_over {
            return Err(self.flow.end(MigrationError::PeerReports(format!(
                "the destination ended the migration with {} bytes of QEMU's stream not delivered",
                self.in_flight()
            ))));
        }
        if self.verify && !self.all_agree() {
            return Err(self.flow.end(MigrationError::Differs(
                "the destination bridge has not said that it has written everything".into(),
            )));
        }
        self.look_whether_verified();
        let wire_bytes = self.wire_bytes();
        let connections = lock(&self.connections);
        let stages = stages([
            ("copy", &self.meters.copy, connections.len()),
            ("serialize", &self.meters.serialize, self.serializing.workers()),
            ("send", &self.meters.send, connections.len()),
        ]);
        Ok(SourceBridgeReport {
            complete: is_handed_over || matches!(ending, Some(Ending::Confirmed | Ending::Unconfirmed)),
            backend: self.bridge.config.backend.name(),
            connections: connections.len() as u32,
            total_ms: ms(started.elapsed()),
            stream_bytes: self.counts.stream_bytes.load(Ordering::Relaxed),
            pages: self.serializing.levels().values().map(|level| level.pages).sum(),
            zero_records: self.serializing.zero_records(),
            wire_bytes,
            link_bytes_per_s: self.serializing.link_bytes_per_s(),
            cpu_ms: stages.values().map(|stage| stage.cpu_ms).sum(),
            bound_by: busiest(&stages),
            stages,
            levels: self.serializing.levels(),
            encodings: self.serializing.encodings(),
            history_bytes: self.serializing.slots_in_use() * pagewarp_codec::PAGE_SIZE as u64,
            fallback: self.serializing.fallback(),
            spilled_batches: self.bridge.config.backend.spilled_batches().saturating_sub(spilled_before),
            passed_raw: lock(&self.raw).clone(),
            verified: self.verify.then_some(true),
            interruptions: self.bridge.connector.interruptions(),
            anonymous_bytes: anonymous_bytes(),
        })
    }
}

/// A connection to the destination that is reset when the session fails: what has not been delivered then must not be.
struct Severed {
    stream: Box<dyn Stream>,
    clean: Arc<AtomicBool>,
}

impl io::Read for Severed {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.stream.read(bytes)
    }
}

impl io::Write for Severed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

impl Stream for Severed {
    fn try_clone_stream(&self) -> io::Result<Box<dyn Stream>> {
        self.stream.try_clone_stream()
    }

    fn shutdown(&self) -> io::Result<()> {
        if self.clean.load(Ordering::Acquire) { self.stream.shutdown() } else { self.stream.reset() }
    }

    fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> io::Result<()> {
        self.stream.set_timeouts(read, write)
    }
}
