//! The bridge on the destination host.

mod connection;
mod deserialize;
mod greeter;
mod memory;
mod receive;
mod restore;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::Scope;
use std::time::{Duration, Instant};

use pagewarp_engine::control::MigrationControl;
use pagewarp_engine::error::MigrationError;
use pagewarp_engine::flow::{Flow, StopOnPanic, Stopped, lock, spawn};
use pagewarp_engine::greeter::{Greeter, HELLO_TIMEOUT};
use pagewarp_engine::metrics::{StageMeter, anonymous_bytes, busiest, ms};
use pagewarp_engine::patience::within;
use pagewarp_engine::transport::{Acceptor, OUTAGE_OF_LAST_WORD, Stream, same_peer};
use tracing::{debug, info};

use self::connection::Connection;
use self::deserialize::Deserializing;
pub(crate) use self::greeter::Greeted;
use self::memory::Memory;
use crate::bridge::config::BridgeConfig;
use crate::bridge::report::{DestinationBridgeReport, stages};
use crate::bridge::socket::{Endpoint, Socket};
use crate::protocol::frame::Kind;
use crate::protocol::hello::{Purpose, SessionId, Terms};
use crate::return_path::ReturnPath;

/// How often the thread that accepts connections looks around.
const LOOK: Duration = Duration::from_millis(50);
/// What a migration stream begins with.
const STREAM_MAGIC: &[u8] = b"QEVM";
/// What a further source is told.
pub(crate) const BUSY: &str =
    "this destination is busy with another migration, and takes one at a time: its QEMU is there for one VM";
/// What errors call QEMU.
pub(crate) const QEMU: &str = "the destination QEMU";
/// How long connections may take to end once the main channel has.
const GRACE: Duration = Duration::from_secs(5);
/// How long it may take QEMU to say that it has loaded the VM after it has closed the connections of multifd: in between it may start the VM, with its
/// devices.
const CLOSED: Duration = Duration::from_secs(60);

/// The session that a bridge waits for.
#[derive(Clone, Debug)]
pub struct Awaited {
    /// What its connections have in common.
    pub session: SessionId,
    /// Whose they are, where that is known: see [`Stream::peer_identity`].
    pub identity: Option<Arc<str>>,
}

/// Waits for source bridges and passes what they send on to a destination QEMU.
pub struct DestinationBridge<'a> {
    acceptor: &'a dyn Acceptor,
    place: Endpoint,
    config: BridgeConfig,
    /// The session that was served last: of its connections some may have come too late.
    last: Mutex<Option<SessionId>>,
    /// From one migration to the next: those who are being told why they were turned away hear it to the end.
    greeter: Mutex<Greeter<Greeted>>,
}

impl<'a> DestinationBridge<'a> {
    /// Passes on what comes through `acceptor` to the QEMU that listens, or will listen, at `place`.
    pub fn new(acceptor: &'a dyn Acceptor, place: Endpoint, config: BridgeConfig) -> DestinationBridge<'a> {
        let greeter = Mutex::new(Greeter::new(HELLO_TIMEOUT, |stream| Greeted::read(stream).map(Some)));
        DestinationBridge { acceptor, place, config, last: Mutex::default(), greeter }
    }

    /// Waits for a migration and passes it on, to its end. With `only`, none but that session is accepted.
    ///
    /// # Errors
    ///
    /// Whatever ended it early. The destination QEMU sees its connections end, and never runs the VM.
    pub fn run(
        &self,
        only: Option<&Awaited>,
        control: &MigrationControl,
    ) -> Result<DestinationBridgeReport, MigrationError> {
        let flow = Flow::new(control.clone());
        // One migration at a time.
        let mut greeter = lock(&self.greeter);
        if only.is_none() {
            self.acceptor.limit_outage(None);
        }
        let Ok(mut main) = self.wait_for_main(only, &mut greeter, &flow) else {
            return Err(flow.take_reason());
        };
        let started = Instant::now();
        let terms = self.config.terms().agree(main.hello.terms);
        let spilled_before = self.config.backend.spilled_batches();
        let deserializing = match Deserializing::new(&self.config.backend, &terms, self.config.threads) {
            Ok(deserializing) => deserializing,
            Err(error) => {
                main.refuse(&error.to_string());
                return Err(error.into());
            }
        };
        main.accept(terms, self.config.peer_timeout)?;
        info!(?terms, "bridging");
        let session = Session {
            flow,
            terms,
            deserializing,
            memory: Memory::default(),
            meters: Meters::default(),
            id: main.hello.session,
            identity: main.stream.peer_identity(),
            bridge: self,
            main_started: Mutex::default(),
            main_has_started: Condvar::new(),
            main_ended: AtomicBool::new(false),
            qemu_left: AtomicBool::new(false),
            is_by_hand: only.is_none(),
            opaque: AtomicBool::new(false),
            return_path: Mutex::default(),
            connections: Mutex::default(),
            alive: AtomicUsize::new(0),
            main_alive: AtomicUsize::new(0),
        };
        std::thread::scope(|scope| {
            let session = &session;
            let _stop = StopOnPanic(&session.flow);
            // Reasons are kept in the flow.
            for _ in 0..session.deserializing.workers() {
                let _ = spawn(scope, &session.flow, || {
                    session.meters.deserialize.cpu_only(|| session.deserializing.work(session))
                });
            }
            let _ = session.start(scope, main);
            if session.accept_more(scope, &mut greeter).is_err() {
                if control.is_cancelled() {
                    session.hasten();
                }
                session.cancelled();
            }
            session.deserializing.close();
        });
        session.finish(started, spilled_before)
    }

    fn wait_for_main(
        &self,
        only: Option<&Awaited>,
        greeter: &mut Greeter<Greeted>,
        flow: &Flow,
    ) -> Result<Greeted, Stopped> {
        loop {
            flow.check()?;
            if only.is_none() {
                self.acceptor.renew();
            }
            let Some(greeted) = self.accept(greeter, flow)? else { continue };
            let why = if has_left(&greeted, flow) {
                debug!("a connection whose source did not wait");
                continue;
            } else if only.is_some_and(|only| only.session != greeted.hello.session) {
                BUSY.to_owned()
            } else if let Some(Err(why)) =
                only.map(|only| same_peer(only.identity.as_deref(), &*greeted.stream))
            {
                why.0
            } else if *lock(&self.last) == Some(greeted.hello.session) {
                "this session is over".to_owned()
            } else if greeted.hello.purpose == Purpose::Bridge(0) {
                *lock(&self.last) = Some(greeted.hello.session);
                return Ok(greeted);
            } else {
                "this destination waits for the main connection of a bridge; `pagewarp qemu migrate` goes with `pagewarp qemu receive`, \
                 `pagewarp bridge source` with `pagewarp bridge destination`"
                    .to_owned()
            };
            greeted.dismiss(greeter, why);
        }
    }

    fn accept(&self, greeter: &mut Greeter<Greeted>, flow: &Flow) -> Result<Option<Greeted>, Stopped> {
        greeter.accept(self.acceptor, LOOK).map_err(|source| {
            flow.fail(MigrationError::Link {
                peer: format!("the source, at {}", self.acceptor.local()),
                doing: "waiting for its connection".into(),
                source,
            })
        })
    }
}

/// Whether the source of a new connection did not wait until somebody was here. One that broke is waited for, but not for as long as one that carries a migration: others
/// may want to be served.
fn has_left(greeted: &Greeted, flow: &Flow) -> bool {
    let until = Some(Instant::now() + HELLO_TIMEOUT);
    let is_wanted = || flow.check().is_ok();
    let left = within(&*greeted.stream, until, &is_wanted, || greeted.stream.is_hung_up());
    !matches!(left, Ok(Some(false)))
}

/// Counters of the stages.
#[derive(Default)]
pub(crate) struct Meters {
    pub(crate) receive: StageMeter,
    pub(crate) deserialize: StageMeter,
    pub(crate) restore: StageMeter,
}

/// One migration into the destination QEMU.
pub(crate) struct Session<'a> {
    pub(crate) flow: Flow,
    pub(crate) terms: Terms,
    pub(crate) deserializing: Deserializing,
    pub(crate) memory: Memory,
    pub(crate) meters: Meters,
    id: SessionId,
    identity: Option<Arc<str>>,
    bridge: &'a DestinationBridge<'a>,
    main_started: Mutex<bool>,
    main_has_started: Condvar,
    main_ended: AtomicBool,
    /// Whether QEMU has ended its direction of the main channel.
    qemu_left: AtomicBool,
    /// Whether there is no control connection, by which somebody else decides what is waited for.
    is_by_hand: bool,
    /// Whether the main channel is none that can be read: encrypted, for example.
    opaque: AtomicBool,
    return_path: Mutex<ReturnPath>,
    connections: Mutex<Vec<Arc<Connection>>>,
    /// Threads of connections that have not ended, and those of the main channel among them.
    alive: AtomicUsize,
    main_alive: AtomicUsize,
}

impl<'a> Session<'a> {
    /// Ends the session for this reason, and tells the source.
    pub(crate) fn fail(&self, error: MigrationError) -> Stopped {
        let text = error.to_string();
        self.flow.stop_threads(error);
        self.last_word(&text)
    }

    /// It fails, and nobody waits for a lost network to say so. Unless QEMU may run the VM, and that is still to be said.
    fn hasten(&self) {
        if self.is_by_hand && !self.has_arrived() {
            self.bridge.acceptor.limit_outage(Some(OUTAGE_OF_LAST_WORD));
        }
    }

    /// Ends what waits for a peer, if the session was cancelled: a cancel wakes none of it. Who fails does that himself.
    fn cancelled(&self) {
        let is_cancelled = |reason: &MigrationError| matches!(reason, MigrationError::Cancelled);
        if self.flow.look_at_reason(is_cancelled) == Some(true) {
            self.last_word("the destination cancelled the migration");
        }
    }

    /// Tells the source why the session is over, and ends its connections.
    fn last_word(&self, text: &str) -> Stopped {
        let main = lock(&self.connections).first().cloned();
        // Somebody who holds the lock is stuck in a connection that is going to be shut down.
        if let Some(Ok(mut sending)) = main.as_ref().map(|main| main.sending.try_lock()) {
            let _ = sending.send_error(text);
        }
        self.flow.stop();
        Stopped
    }

    /// The main channel begins with this.
    pub(crate) fn main_begins(&self, bytes: &[u8]) {
        let opaque = bytes.len() >= STREAM_MAGIC.len() && !bytes.starts_with(STREAM_MAGIC);
        self.opaque.store(opaque, Ordering::Release);
    }

    /// QEMU said this on the main channel. `false` if nobody here can read it.
    pub(crate) fn watch_return_path(&self, bytes: &[u8]) -> bool {
        let readable = !self.opaque.load(Ordering::Acquire);
        if readable {
            lock(&self.return_path).read(bytes);
        }
        readable
    }

    /// Whether QEMU has all it needs: it says so itself, or everything was written into it, on all connections.
    fn has_arrived(&self) -> bool {
        let delivered = |connection: &Arc<Connection>| connection.delivered.load(Ordering::Acquire);
        if lock(&self.return_path).shut() == Some(0) {
            return true;
        }
        let connections = lock(&self.connections);
        !connections.is_empty() && connections.iter().all(delivered)
    }

    /// Notes what an unusual error means: nothing, once QEMU has everything.
    pub(crate) fn broken(&self, error: MigrationError) -> Stopped {
        if self.has_arrived() {
            debug!(%error, "after the end");
            return Stopped;
        }
        // A source QEMU gives up when it hears that the other one has, so that its end may be known here before anybody has tried to write.
        // What else a source does wrong has another reason.
        let from_source = matches!(&error, MigrationError::Link { peer, .. } if peer != QEMU);
        if from_source && self.qemu_left.load(Ordering::Acquire) {
            debug!(%error, "after the destination QEMU has left");
            return self.fail(MigrationError::Link {
                peer: QEMU.into(),
                doing: "reading from it".into(),
                source: io::ErrorKind::UnexpectedEof.into(),
            });
        }
        self.fail(error)
    }

    /// QEMU has ended its direction of the main channel.
    pub(crate) fn qemu_left(&self) {
        self.qemu_left.store(true, Ordering::Release);
    }

    /// QEMU takes no more from a connection that is not the main one. It closes those of multifd once it has loaded the VM, before it says so,
    /// and without reading the last SYNC of each: then the news is about to come. If it failed, the main channel breaks as well.
    pub(crate) fn closed_by_qemu(&self, error: MigrationError) -> Stopped {
        let until = Instant::now() + CLOSED;
        while !self.has_arrived() && !self.qemu_left.load(Ordering::Acquire) && Instant::now() < until {
            if self.flow.sleep(LOOK).is_err() {
                return Stopped;
            }
        }
        self.broken(error)
    }

    /// The source bridge has gone without ending the session.
    pub(crate) fn gave_up(&self) -> Stopped {
        self.broken(MigrationError::PeerReports(
            "the source ended the migration before it was complete; what had not been delivered was dropped, and the VM stays with the source".into(),
        ))
    }

    pub(crate) fn place(&self) -> &Endpoint {
        &self.bridge.place
    }

    pub(crate) fn patience(&self) -> Duration {
        self.bridge.config.peer_timeout
    }

    /// The source has ended the main channel in order.
    pub(crate) fn main_ended(&self) {
        self.main_ended.store(true, Ordering::Release);
    }

    /// The first bytes of the main channel have been written into QEMU.
    pub(crate) fn main_started(&self) {
        *lock(&self.main_started) = true;
        self.main_has_started.notify_all();
    }

    pub(crate) fn has_main_started(&self) -> bool {
        *lock(&self.main_started)
    }

    pub(crate) fn wait_for_main(&self) -> Result<(), Stopped> {
        self.flow.wait(&self.main_started, &self.main_has_started, |started| *started).map(drop)
    }

    /// So many bytes of a connection have been written into QEMU, in this time, and this is their hash.
    pub(crate) fn delivered(
        &self,
        connection: &Connection,
        total: u64,
        spent: Duration,
        hash: u64,
    ) -> Result<(), Stopped> {
        let credit = restore::credit(self, connection, total, spent, hash);
        restore::send(self, connection, Kind::Credit, &credit.encode())
    }

    pub(crate) fn send(&self, connection: &Connection, kind: Kind, body: &[u8]) -> Result<(), Stopped> {
        restore::send(self, connection, kind, body)
    }

    /// Accepts further connections of the session until all are at their end.
    fn accept_more<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        greeter: &mut Greeter<Greeted>,
    ) -> Result<(), Stopped>
    where
        'a: 'scope,
    {
        let mut main_gone = None;
        loop {
            self.flow.check()?;
            if self.qemu_left.load(Ordering::Acquire) {
                self.hasten();
            }
            self.flow.control().update(|progress| {
                progress.guest_bytes = self.meters.restore.bytes_out();
                progress.wire_bytes = self.meters.receive.bytes_in();
            });
            if self.alive.load(Ordering::Acquire) == 0 {
                return Ok(());
            }
            if self.main_alive.load(Ordering::Acquire) == 0 {
                let since: Instant = *main_gone.get_or_insert_with(Instant::now);
                if since.elapsed() > GRACE {
                    self.flow.stop();
                    return Ok(());
                }
            }
            let Some(mut greeted) = self.bridge.accept(greeter, &self.flow)? else { continue };
            let next = lock(&self.connections).len();
            if greeted.hello.session != self.id {
                greeted.dismiss(greeter, BUSY.to_owned());
            } else if let Err(why) = same_peer(self.identity.as_deref(), &*greeted.stream) {
                greeted.dismiss(greeter, why.0);
            } else if greeted.hello.purpose != Purpose::Bridge(next as u16) {
                greeted.dismiss(greeter, "a connection out of order".to_owned());
            } else {
                let accepted = greeted.accept(self.terms, self.patience());
                accepted.map_err(|e| self.broken(e))?;
                self.start(scope, greeted)?;
            }
        }
    }

    /// Starts the threads of a connection.
    fn start<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>, greeted: Greeted) -> Result<(), Stopped>
    where
        'a: 'scope,
    {
        let Greeted { stream, sending, receiving, .. } = greeted;
        let descriptors =
            |error: io::Error| self.fail(MigrationError::Internal(format!("no descriptors left: {error}")));
        self.flow.register(stream.try_clone_stream().map_err(descriptors)?);
        let connection = {
            let mut connections = lock(&self.connections);
            let connection = Arc::new(Connection::new(connections.len() as u16, sending));
            connections.push(connection.clone());
            connection
        };
        debug!(number = connection.number, "a connection of QEMU");
        let is_main = connection.number == 0;
        let started = move || {
            self.alive.fetch_add(1, Ordering::AcqRel);
            self.main_alive.fetch_add(is_main.into(), Ordering::AcqRel);
        };
        let ended = move || {
            self.main_alive.fetch_sub(is_main.into(), Ordering::AcqRel);
            self.alive.fetch_sub(1, Ordering::AcqRel);
        };
        started();
        started();
        let receiver = connection.clone();
        spawn(scope, &self.flow, move || {
            let result = self.meters.receive.cpu_only(|| receive::run(self, &receiver, receiving));
            if result.is_err() && is_main && self.has_arrived() {
                // The source is gone and QEMU has everything: nobody will end the other threads.
                self.flow.stop();
            }
            ended();
        })?;
        let opened = {
            let connection = connection.clone();
            move |qemu: Socket| -> Result<(), Stopped> {
                self.flow.register(qemu.try_clone_stream().map_err(descriptors)?);
                // One that failed meanwhile has shut down what was registered before.
                self.flow.check()?;
                let connection = connection.clone();
                started();
                spawn(scope, &self.flow, move || {
                    let _ = self.meters.restore.cpu_only(|| restore::run_back(self, &connection, qemu));
                    ended();
                })
            }
        };
        spawn(scope, &self.flow, move || {
            let _ = self.meters.restore.cpu_only(|| restore::run(self, &connection, &*stream, opened));
            ended();
        })
    }

    fn finish(
        self,
        started: Instant,
        spilled_before: u64,
    ) -> Result<DestinationBridgeReport, MigrationError> {
        self.flow.stop();
        if !self.has_arrived() {
            return Err(self.flow.end(MigrationError::PeerReports(
                "the session ended with parts of the stream not delivered; the VM stays with the source"
                    .into(),
            )));
        }
        let connections = lock(&self.connections);
        let stages = stages([
            ("receive", &self.meters.receive, connections.len()),
            ("deserialize", &self.meters.deserialize, self.deserializing.workers()),
            ("restore", &self.meters.restore, connections.len()),
        ]);
        Ok(DestinationBridgeReport {
            // If not, the source went away after QEMU had everything.
            complete: self.main_ended.load(Ordering::Acquire),
            backend: self.bridge.config.backend.name(),
            connections: connections.len() as u32,
            total_ms: ms(started.elapsed()),
            stream_bytes: stages["restore"].bytes_out,
            wire_bytes: connections.iter().map(|c| c.received_bytes.load(Ordering::Acquire)).sum(),
            cpu_ms: stages.values().map(|stage| stage.cpu_ms).sum(),
            bound_by: busiest(&stages),
            stages,
            fallback: self.deserializing.fallback(),
            spilled_batches: self.bridge.config.backend.spilled_batches().saturating_sub(spilled_before),
            anonymous_bytes: anonymous_bytes(),
        })
    }
}
