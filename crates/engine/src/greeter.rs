//! Connections that have not said yet what they are for.
//!
//! Anybody can connect and then say nothing, or a byte now and then. So each connection is read by a thread of its own, has so much time in all, and when too many are
//! silent the oldest goes: a source says hello at once, and waits for nobody.

use std::collections::VecDeque;
use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use tracing::debug;

use crate::error::MigrationError;
use crate::flow::lock;
use crate::transport::{Acceptor, Stream};

/// How long a connection may take to say what it is for.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections that may be silent at the same time.
pub const MAX_SILENT: usize = 64;
/// How long nobody is listened to while others may connect, and the other way round.
const TURN: Duration = Duration::from_millis(2);

type Listen<T> = dyn Fn(Box<dyn Stream>) -> Result<Option<T>, MigrationError> + Send + Sync;

/// Accepts connections and listens to all of them at the same time.
pub struct Greeter<T> {
    patience: Duration,
    listen: Arc<Listen<T>>,
    silent: Arc<Mutex<VecDeque<Silent>>>,
    next: u64,
    to: Sender<T>,
    ready: Receiver<T>,
}

struct Silent {
    number: u64,
    since: Instant,
    stream: Box<dyn Stream>,
}

impl<T: Send + 'static> Greeter<T> {
    /// `listen` reads from a new connection what is wanted of it; `None` if that was answered already. The connection is ended when that takes longer than `patience`.
    pub fn new(
        patience: Duration,
        listen: impl Fn(Box<dyn Stream>) -> Result<Option<T>, MigrationError> + Send + Sync + 'static,
    ) -> Greeter<T> {
        let (to, ready) = channel();
        Greeter { patience, listen: Arc::new(listen), silent: Arc::default(), next: 0, to, ready }
    }

    /// The next connection that has said what it wants, at most after `patience`; `None`: there was none.
    ///
    /// # Errors
    ///
    /// Nobody can connect any more, and nobody who has is left.
    pub fn accept(&mut self, acceptor: &dyn Acceptor, patience: Duration) -> io::Result<Option<T>> {
        let until = Instant::now() + patience;
        loop {
            if let Ok(greeted) = self.ready.try_recv() {
                return Ok(Some(greeted));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let is_idle = self.expire();
            match acceptor.accept(if is_idle { left } else { left.min(TURN) }) {
                Ok(stream) => self.take(stream),
                Err(e) if e.kind() == io::ErrorKind::TimedOut => {}
                // Whoever has connected is still heard.
                Err(_) if !is_idle => thread::sleep(TURN),
                Err(e) => return self.ready.try_recv().map(Some).map_err(|_| e),
            }
        }
    }

    /// How many connections are listened to.
    pub fn silent(&self) -> usize {
        lock(&self.silent).len()
    }

    /// Ends connections that have been silent for too long. Returns whether there is none left.
    fn expire(&self) -> bool {
        let mut silent = lock(&self.silent);
        while let Some(oldest) = silent.front()
            && (oldest.since.elapsed() > self.patience || silent.len() > MAX_SILENT)
            && let Some(oldest) = silent.pop_front()
        {
            debug!("a connection that does not say what it is for");
            // Ends the thread that reads it.
            let _ = oldest.stream.shutdown();
        }
        silent.is_empty()
    }

    /// Lets somebody who is turned away hear why: `say` tells him, and ends early if that takes too long. Nobody waits for it meanwhile.
    pub fn dismiss(&mut self, stream: Box<dyn Stream>, say: impl FnOnce(Box<dyn Stream>) + Send + 'static) {
        self.watch(stream, move |stream| {
            say(stream);
            Ok(None)
        });
    }

    fn take(&mut self, stream: Box<dyn Stream>) {
        let listen = self.listen.clone();
        self.watch(stream, move |stream| listen(stream));
    }

    /// Does something with a connection that may take as long as the other end likes, until its time is over.
    fn watch(
        &mut self,
        stream: Box<dyn Stream>,
        work: impl FnOnce(Box<dyn Stream>) -> Result<Option<T>, MigrationError> + Send + 'static,
    ) {
        let Ok(handle) = stream.try_clone_stream() else { return };
        let number = self.next;
        self.next += 1;
        lock(&self.silent).push_back(Silent { number, since: Instant::now(), stream: handle });
        let (silent, to) = (self.silent.clone(), self.to.clone());
        let spawned = thread::Builder::new().name("greet".into()).spawn(move || {
            let heard = work(stream);
            // Handed over first: whoever sees that nobody is silent any more finds it.
            let mut silent = lock(&silent);
            let at = silent.iter().position(|one| one.number == number);
            match heard {
                Ok(Some(greeted)) if at.is_some() => drop(to.send(greeted)),
                Ok(_) => {}
                Err(error) => debug!(%error, "a connection that is none of a source"),
            }
            at.and_then(|at| silent.remove(at));
        });
        if let Err(error) = spawned {
            debug!(%error, "no thread for a connection");
            lock(&self.silent).retain(|one| one.number != number);
        }
    }
}

impl<T> Drop for Greeter<T> {
    /// Ends the threads.
    fn drop(&mut self) {
        for silent in lock(&self.silent).drain(..) {
            let _ = silent.stream.shutdown();
        }
    }
}
