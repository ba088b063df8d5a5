//! The end that accepts connections, and takes those back that were broken.

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use pagewarp_engine::flow::lock;
use pagewarp_engine::transport::{Acceptor, Stream};
use tracing::{debug, warn};

use super::frame::{Answer, MAGIC, OPENING_LEN, Opening, Token, Wish};
use super::limit::Limit;
use super::stream::{Inner, LastingStream, Role};
use super::{GREETING, MAX_PATIENCE};

/// How often the thread that accepts looks whether it should stop.
const LOOK: Duration = Duration::from_millis(100);
/// Connections that have not said yet what they are.
const MAX_SILENT: usize = 64;
/// Connections that nobody has asked for yet.
const MAX_READY: usize = 64;

/// Accepts connections that outlast a loss of the network, and ordinary ones.
pub struct LastingAcceptor {
    below: Arc<dyn Acceptor>,
    shared: Arc<Shared>,
    ready: Mutex<Receiver<io::Result<Box<dyn Stream>>>>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    limit: Arc<Limit>,
    is_over: AtomicBool,
    known: Mutex<HashMap<Token, Weak<Inner>>>,
    silent: Mutex<VecDeque<Silent>>,
    to: SyncSender<io::Result<Box<dyn Stream>>>,
}

struct Silent {
    number: u64,
    since: Instant,
    stream: Box<dyn Stream>,
}

impl LastingAcceptor {
    /// Connections that `below` accepts. They may be broken for as long as the source says, but no longer than `patience`.
    pub fn new(below: Box<dyn Acceptor>, patience: Duration) -> io::Result<LastingAcceptor> {
        let (to, ready) = sync_channel(MAX_READY);
        let shared = Arc::new(Shared {
            limit: Arc::new(Limit::new(patience.min(MAX_PATIENCE))),
            is_over: AtomicBool::new(false),
            known: Mutex::default(),
            silent: Mutex::default(),
            to,
        });
        let below: Arc<dyn Acceptor> = below.into();
        let (accepting, listening) = (shared.clone(), below.clone());
        let thread =
            thread::Builder::new().name("accept".into()).spawn(move || accepting.run(&*listening))?;
        Ok(LastingAcceptor { below, shared, ready: Mutex::new(ready), thread: Some(thread) })
    }
}

impl Acceptor for LastingAcceptor {
    fn accept(&self, timeout: Duration) -> io::Result<Box<dyn Stream>> {
        match lock(&self.ready).recv_timeout(timeout) {
            Ok(ready) => ready,
            Err(RecvTimeoutError::Timeout) => {
                Err(io::Error::new(ErrorKind::TimedOut, "nobody connected in time"))
            }
            Err(RecvTimeoutError::Disconnected) => {
                Err(io::Error::other("the thread that accepts connections has ended"))
            }
        }
    }

    fn local(&self) -> String {
        self.below.local()
    }

    fn patience(&self) -> Duration {
        self.shared.limit.most()
    }

    fn limit_outage(&self, most: Option<Duration>) {
        self.shared.limit.set(most);
    }

    fn renew(&self) {
        self.below.renew();
    }
}

impl Drop for LastingAcceptor {
    fn drop(&mut self) {
        self.shared.is_over.store(true, SeqCst);
        if let Some(thread) = self.thread.take() {
            // It panicked, which was told already.
            let _ = thread.join();
        }
        for silent in lock(&self.shared.silent).drain(..) {
            let _ = silent.stream.shutdown();
        }
    }
}

impl Shared {
    fn run(self: Arc<Shared>, below: &dyn Acceptor) {
        let mut number = 0;
        while !self.is_over.load(SeqCst) {
            self.expire();
            match below.accept(LOOK) {
                Ok(stream) => {
                    self.clone().greet(number, stream);
                    number += 1;
                }
                Err(e) if e.kind() == ErrorKind::TimedOut => {}
                Err(error) => {
                    // Whoever waits for a connection decides what to do. If nobody does, there is time.
                    let _ = self.to.try_send(Err(error));
                    thread::sleep(LOOK);
                }
            }
        }
    }

    /// Ends connections that have been silent for too long, and forgets what is over.
    fn expire(&self) {
        let mut silent = lock(&self.silent);
        while let Some(oldest) = silent.front()
            && (oldest.since.elapsed() > GREETING || silent.len() > MAX_SILENT)
            && let Some(oldest) = silent.pop_front()
        {
            debug!("a connection that does not say what it is for");
            // Ends the thread that reads it.
            let _ = oldest.stream.shutdown();
        }
        drop(silent);
        lock(&self.known).retain(|_, inner| inner.strong_count() > 0);
    }

    fn greet(self: Arc<Shared>, number: u64, stream: Box<dyn Stream>) {
        let Ok(handle) = stream.try_clone_stream() else { return };
        lock(&self.silent).push_back(Silent { number, since: Instant::now(), stream: handle });
        let shared = self.clone();
        let spawned = thread::Builder::new().name("greet".into()).spawn(move || {
            if let Err(error) = shared.hear(number, stream) {
                debug!(%error, "a connection that was not wanted");
            }
            shared.heard(number);
        });
        if let Err(error) = spawned {
            warn!(%error, "no thread for a new connection");
            self.heard(number);
        }
    }

    /// It has said what it is. `false` if that took too long.
    fn heard(&self, number: u64) -> bool {
        let mut silent = lock(&self.silent);
        let at = silent.iter().position(|one| one.number == number);
        at.and_then(|at| silent.remove(at)).is_some()
    }

    fn hear(&self, number: u64, mut stream: Box<dyn Stream>) -> io::Result<()> {
        stream.set_timeouts(Some(GREETING), Some(GREETING))?;
        let mut bytes = [0; OPENING_LEN];
        let mut len = 0;
        while len < MAGIC.len() && bytes[..len] == MAGIC[..len] {
            match stream.read(&mut bytes[len..MAGIC.len()])? {
                0 => break,
                n => len += n,
            }
        }
        if bytes[..len] != MAGIC[..] {
            // Somebody who speaks the protocol above without this one, or no pagewarp at all: that protocol finds out.
            let too_late = !self.heard(number);
            if too_late || len == 0 {
                return Err(ErrorKind::TimedOut.into());
            }
            let begin = Arc::new(Mutex::new(bytes[..len].to_vec()));
            return self.hand_on(Box::new(Begun { begin, stream }));
        }
        stream.read_exact(&mut bytes[MAGIC.len()..])?;
        let opening = Opening::decode(&bytes)?;
        if !self.heard(number) {
            return Err(ErrorKind::TimedOut.into());
        }
        match opening.wish {
            Wish::Open => self.open(&opening, stream),
            Wish::Resume { received } => self.resume(opening.token, received, stream),
            Wish::Abandon => self.abandon(&opening.token, stream),
        }
    }

    fn hand_on(&self, stream: Box<dyn Stream>) -> io::Result<()> {
        self.to.try_send(Ok(stream)).map_err(|error| match error {
            TrySendError::Full(_) => io::Error::other("too many connections that nobody asked for"),
            TrySendError::Disconnected(_) => io::Error::other("nobody asks for connections any more"),
        })
    }

    fn open(&self, opening: &Opening, stream: Box<dyn Stream>) -> io::Result<()> {
        let patience = opening.patience.min(self.limit.most());
        let token = opening.token;
        let mut answering = stream.try_clone_stream()?;
        let counts = Arc::default();
        let role = Role::Accepts(self.limit.clone());
        let inner = Inner::new(token, role, "the source".into(), patience, counts, stream)?;
        let inner = Arc::new(inner);
        let lasting = LastingStream::new(inner.clone(), |_| {});
        let is_new = {
            let mut known = lock(&self.known);
            let is_new = !known.contains_key(&token);
            known.entry(token).or_insert_with(|| Arc::downgrade(&inner));
            is_new
        };
        if !is_new {
            answering.write_all(&Answer::Over.encode())?;
            return Err(io::Error::other("a new connection with the name of an old one"));
        }
        answering.write_all(&Answer::Go { received: 0, patience }.encode())?;
        answering.flush()?;
        self.hand_on(Box::new(lasting))
    }

    fn find(&self, token: &Token, stream: &dyn Stream) -> Option<Arc<Inner>> {
        let inner = lock(&self.known).get(token).and_then(Weak::upgrade)?;
        // Who has a name that cannot be guessed, but is not who has opened it, has stolen it.
        let is_same = *inner.identity() == stream.peer_identity();
        if !is_same {
            warn!(now = ?stream.peer_identity(), before = ?inner.identity(), "somebody else wants to go on with a connection; refused");
        }
        is_same.then_some(inner)
    }

    fn resume(&self, token: Token, delivered: u64, mut stream: Box<dyn Stream>) -> io::Result<()> {
        let mut answering = stream.try_clone_stream()?;
        let Some(inner) = self.find(&token, &*stream) else {
            return stream.write_all(&Answer::Over.encode());
        };
        let patience = self.limit.most();
        let resumed = inner.resume(stream, delivered, |received| {
            answering.write_all(&Answer::Go { received, patience }.encode())?;
            answering.flush()
        });
        match resumed {
            Ok(true) => Ok(()),
            Ok(false) => answering.write_all(&Answer::Over.encode()),
            // An answer may have been given, or another connection was quicker: the lasting one is not over, and what came after an answer would be read as a piece.
            Err(error) => {
                let _ = answering.shutdown();
                Err(error)
            }
        }
    }

    fn abandon(&self, token: &Token, mut stream: Box<dyn Stream>) -> io::Result<()> {
        if self.find(token, &*stream).is_some() {
            let group: Vec<_> = lock(&self.known)
                .iter()
                .filter(|(other, _)| other.group == token.group)
                .filter_map(|(_, inner)| inner.upgrade())
                .collect();
            group.iter().for_each(|inner| inner.abandon());
        }
        stream.write_all(&Answer::Over.encode())
    }
}

/// A connection of which the first bytes were read.
struct Begun {
    begin: Arc<Mutex<Vec<u8>>>,
    stream: Box<dyn Stream>,
}

impl Read for Begun {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.read_vectored(&mut [IoSliceMut::new(bytes)])
    }

    fn read_vectored(&mut self, bytes: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let mut begin = lock(&self.begin);
        if begin.is_empty() {
            drop(begin);
            return self.stream.read_vectored(bytes);
        }
        let n = (&begin[..]).read_vectored(bytes)?;
        begin.drain(..n);
        Ok(n)
    }
}

impl Write for Begun {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.write(bytes)
    }

    fn write_vectored(&mut self, bytes: &[IoSlice<'_>]) -> io::Result<usize> {
        self.stream.write_vectored(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

impl Stream for Begun {
    fn try_clone_stream(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(Begun { begin: self.begin.clone(), stream: self.stream.try_clone_stream()? }))
    }

    fn shutdown(&self) -> io::Result<()> {
        self.stream.shutdown()
    }

    fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> io::Result<()> {
        self.stream.set_timeouts(read, write)
    }

    fn reset(&self) -> io::Result<()> {
        self.stream.reset()
    }

    fn detect_death(&self, within: Duration) -> io::Result<()> {
        self.stream.detect_death(within)
    }

    fn is_hung_up(&self) -> bool {
        self.stream.is_hung_up()
    }

    fn wait_readable(&self, timeout: Duration) -> io::Result<bool> {
        if lock(&self.begin).is_empty() { self.stream.wait_readable(timeout) } else { Ok(true) }
    }

    fn peer_identity(&self) -> Option<Arc<str>> {
        self.stream.peer_identity()
    }

    fn round_trip(&self) -> Option<Duration> {
        self.stream.round_trip()
    }

    fn bare_socket(&self) -> io::Result<Option<OwnedFd>> {
        // What was read from it already nobody else could read.
        if lock(&self.begin).is_empty() { self.stream.bare_socket() } else { Ok(None) }
    }
}
