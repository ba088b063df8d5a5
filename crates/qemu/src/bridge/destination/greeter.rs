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

use pagewarp_engine::error::MigrationError;
use pagewarp_engine::flow::lock;
use pagewarp_engine::transport::{Acceptor, SPEAKS_TLS, Stream};
use tracing::{debug, info};

use crate::bridge::link::{Receiving, Sending, peer_error, settle};
use crate::protocol::frame::Kind;
use crate::protocol::hello::{Hello, Terms, encode_ack};

/// How long a connection may take to say what it is for.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections that may be silent at the same time.
const MAX_SILENT: usize = 64;
/// How long nobody is listened to while others may connect, and the other way round.
const TURN: Duration = Duration::from_millis(2);

/// A connection that has said what it is for.
pub(crate) struct Greeted {
    pub(crate) stream: Box<dyn Stream>,
    pub(crate) sending: Sending,
    pub(crate) receiving: Receiving,
    pub(crate) hello: Hello,
}

impl Greeted {
    /// Reads the first frame of a new connection.
    pub(crate) fn read(stream: Box<dyn Stream>) -> Result<Greeted, MigrationError> {
        const PEER: &str = "a source";
        let link = |source: io::Error| MigrationError::Link {
            peer: PEER.into(),
            doing: "setting up its connection".into(),
            source,
        };
        stream.set_timeouts(Some(HELLO_TIMEOUT), Some(HELLO_TIMEOUT)).map_err(link)?;
        let mut sending = Sending::new(stream.try_clone_stream().map_err(link)?, PEER.into());
        let mut receiving = Receiving::new(stream.try_clone_stream().map_err(link)?, PEER.into());
        let mut body = Vec::new();
        let first = receiving.receive(&mut body);
        if matches!(&first, Err(MigrationError::Peer(why)) if why == SPEAKS_TLS) {
            // It does not read frames, but sees that these bytes are none of TLS.
            let _ = sending.send_error(SPEAKS_TLS);
        }
        match first?.map(|header| header.kind) {
            Some(Kind::Hello) => {
                let hello = Hello::decode(&body).map_err(peer_error)?;
                Ok(Greeted { stream, sending, receiving, hello })
            }
            Some(kind) => Err(MigrationError::Peer(format!("a {kind:?} frame, expected Hello"))),
            None => Err(link(io::ErrorKind::UnexpectedEof.into())),
        }
    }

    /// Agrees, and waits for as long as it takes from now on, but not for a peer that is gone.
    pub(crate) fn accept(&mut self, terms: Terms, timeout: Duration) -> Result<(), MigrationError> {
        self.sending.send(Kind::HelloAck, &encode_ack(terms), &[])?;
        settle(&*self.stream, timeout).map_err(|source| MigrationError::Link {
            peer: "a source".into(),
            doing: "setting up its connection".into(),
            source,
        })
    }

    /// Says why not.
    pub(crate) fn refuse(mut self, why: &str) {
        info!(why, "refused a connection");
        // It may be gone.
        let _ = self.sending.send_error(why);
    }
}

type Listen<T> = dyn Fn(Box<dyn Stream>) -> Result<Option<T>, MigrationError> + Send + Sync;

/// Accepts connections and listens to all of them at the same time.
pub(crate) struct Greeter<T> {
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
    /// `listen` reads from a new connection what is wanted of it; `None` if that was answered already. It is ended after a few seconds.
    pub(crate) fn new(
        listen: impl Fn(Box<dyn Stream>) -> Result<Option<T>, MigrationError> + Send + Sync + 'static,
    ) -> Greeter<T> {
        let (to, ready) = channel();
        Greeter { listen: Arc::new(listen), silent: Arc::default(), next: 0, to, ready }
    }

    /// The next connection that has said what it wants, at most after `patience`; `None`: there was none.
    pub(crate) fn accept(&mut self, acceptor: &dyn Acceptor, patience: Duration) -> io::Result<Option<T>> {
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
                Err(e) => return Err(e),
            }
        }
    }

    /// Ends connections that have been silent for too long. Returns whether there is none left.
    fn expire(&self) -> bool {
        let mut silent = lock(&self.silent);
        while let Some(oldest) = silent.front()
            && (oldest.since.elapsed() > HELLO_TIMEOUT || silent.len() > MAX_SILENT)
            && let Some(oldest) = silent.pop_front()
        {
            debug!("a connection that does not say what it is for");
            // Ends the thread that reads it.
            let _ = oldest.stream.shutdown();
        }
        silent.is_empty()
    }

    fn take(&mut self, stream: Box<dyn Stream>) {
        let Ok(handle) = stream.try_clone_stream() else { return };
        let number = self.next;
        self.next += 1;
        lock(&self.silent).push_back(Silent { number, since: Instant::now(), stream: handle });
        let (listen, silent, to) = (self.listen.clone(), self.silent.clone(), self.to.clone());
        let spawned = thread::Builder::new().spawn(move || {
            let heard = listen(stream);
            let was_waited_for = {
                let mut silent = lock(&silent);
                let at = silent.iter().position(|one| one.number == number);
                at.and_then(|at| silent.remove(at)).is_some()
            };
            match heard {
                Ok(Some(greeted)) if was_waited_for => drop(to.send(greeted)),
                Ok(_) => {}
                Err(error) => debug!(%error, "a connection that is none of a source"),
            }
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

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::TcpStream;

    use pagewarp_codec::EncodingSet;
    use pagewarp_engine::transport::TcpAcceptor;

    use super::*;
    use crate::protocol::hello::Purpose;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn hello() -> Hello {
        let terms = Terms { encodings: EncodingSet::ALL, zstd: true, verify: false, history_slots: 7 };
        Hello { session: [3; 16], purpose: Purpose::Control, terms }
    }

    #[test]
    fn nobody_waits_for_connections_that_say_nothing() {
        let acceptor = TcpAcceptor::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = acceptor.local_addr().unwrap();
        let mut greeter = Greeter::new(|stream| Greeted::read(stream).map(Some));
        let silent: Vec<_> = (0..MAX_SILENT + 20).map(|_| TcpStream::connect(address).unwrap()).collect();
        (&silent[0]).write_all(b"PW").unwrap();
        let mut sending = Sending::new(Box::new(TcpStream::connect(address).unwrap()), "us".into());
        sending.send(Kind::Hello, &hello().encode(), &[]).unwrap();
        let started = Instant::now();
        let greeted = loop {
            match greeter.accept(&acceptor, Duration::from_millis(50)).unwrap() {
                Some(greeted) => break greeted,
                None => assert!(started.elapsed() < PATIENCE, "the one that speaks is heard"),
            }
        };
        assert_eq!(greeted.hello, hello());
        assert!(lock(&greeter.silent).len() <= MAX_SILENT + 1);
        drop(greeter);
        silent[silent.len() - 1].set_read_timeout(Some(PATIENCE)).unwrap();
        // All are ended.
        for mut stream in silent {
            let n = io::Read::read(&mut stream, &mut [0]);
            assert!(matches!(n, Ok(0)) || n.is_err_and(|e| e.kind() != io::ErrorKind::WouldBlock));
        }
    }

    #[test]
    fn a_connection_that_drips_is_ended() {
        let acceptor = TcpAcceptor::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let mut dripping = TcpStream::connect(acceptor.local_addr().unwrap()).unwrap();
        let mut greeter = Greeter::new(|stream| Greeted::read(stream).map(Some));
        let started = Instant::now();
        // Each byte comes before a read would time out.
        while dripping.write_all(b"P").is_ok() {
            assert!(greeter.accept(&acceptor, Duration::from_millis(500)).unwrap().is_none());
            assert!(started.elapsed() < PATIENCE, "it is still listened to");
        }
    }
}
