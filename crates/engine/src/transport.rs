//! Byte streams between the hosts. Blocking, one thread per direction; no async runtime on the data path.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tracing::warn;

use crate::error::MigrationError;
use crate::seldom::Seldom;

/// How long a wait goes on though nobody wants it any more.
const STEP: Duration = Duration::from_millis(50);
/// How often, and how soon, a reset is tried again that a waiting thread prevented.
const RESET_TRIES: u32 = 50;
const RESET_PAUSE: Duration = Duration::from_micros(200);
/// Between attempts to accept a connection for which the system has no room.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(500);

/// The identity of a new session, which nobody can guess.
pub fn random_session() -> Result<[u8; 16], MigrationError> {
    let mut id = [0; 16];
    rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| MigrationError::Internal(format!("no random bytes from the kernel: {e}")))?;
    Ok(id)
}

/// A connection: a reliable, ordered byte stream with a half that can be cloned.
pub trait Stream: Read + Write + Send {
    /// A second handle to the same connection, so that one thread can read while another writes.
    fn try_clone_stream(&self) -> io::Result<Box<dyn Stream>>;
    /// Ends both directions; a blocked reader or writer on any handle returns.
    fn shutdown(&self) -> io::Result<()>;
    /// Bounds each read and write; `None` waits for ever.
    fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> io::Result<()>;
    /// Ends both directions and drops what was written and has not been sent, where the kind of connection can do that.
    fn reset(&self) -> io::Result<()> {
        self.shutdown()
    }
    /// Lets reads and writes fail, within about this time, when the peer's host cannot be reached any more, also while nothing is sent.
    fn detect_death(&self, _within: Duration) -> io::Result<()> {
        Ok(())
    }
    /// Whether the peer has ended its direction, or the connection broke, though there may be more to read. `false` if that cannot be told.
    fn is_hung_up(&self) -> bool {
        false
    }
    /// Waits until there is something to read, or the end, at most for this time; at once `true` if that cannot be told.
    fn wait_readable(&self, _timeout: Duration) -> io::Result<bool> {
        Ok(true)
    }
    /// Who the peer has proved to be, where the kind of connection asks for a proof. Two connections come from the same peer exactly if these are equal.
    fn peer_identity(&self) -> Option<Arc<str>> {
        None
    }
    /// How long a packet took to the peer's host and back when the connection was opened, if that was measured apart from what else opening took.
    fn round_trip(&self) -> Option<Duration> {
        None
    }
    /// Another handle to the socket, for somebody who goes on with it, if the connection is nothing but that: what is written into the socket from here on is what the peer
    /// reads, and the other way round.
    fn bare_socket(&self) -> io::Result<Option<OwnedFd>> {
        Ok(None)
    }
}

/// Why a peer is not trusted, or does not trust this host: no fault of the network, so that trying again is of no use. Inside an [`io::Error`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct Untrusted(pub String);

impl From<Untrusted> for io::Error {
    fn from(why: Untrusted) -> io::Error {
        io::Error::new(io::ErrorKind::PermissionDenied, why)
    }
}

/// What a peer has done that the protocol of a connection forbids: no fault of the network, so that trying again is of no use. Inside an [`io::Error`] of the kind
/// `InvalidData`.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct OutOfProtocol(pub String);

impl From<OutOfProtocol> for io::Error {
    fn from(what: OutOfProtocol) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, what)
    }
}

/// Whether a connection comes from whom the first one of its session came from. An error is for the peer; who the other one is goes to the log alone.
///
/// # Errors
///
/// It comes from somebody else.
pub fn same_peer(first: Option<&str>, stream: &dyn Stream) -> Result<(), Untrusted> {
    let identity = stream.peer_identity();
    if identity.as_deref() == first {
        return Ok(());
    }
    let name = |identity: Option<&str>| identity.unwrap_or("nobody known").to_owned();
    let (first, second) = (name(first), name(identity.as_deref()));
    warn!("a connection of {second} names the session of {first}");
    Err(Untrusted(format!(
        "the certificate of this connection, {second}, is not that of the session that it names"
    )))
}

/// Who the destination of a migration has proved to be with its first connection. All others must reach the same one: with a relay or a name with several addresses in
/// between, they might reach two hosts that both have a certificate for the name.
#[derive(Debug, Default)]
pub struct OneDestination(OnceLock<Option<Arc<str>>>);

impl OneDestination {
    /// Whether there has been a connection.
    pub fn is_known(&self) -> bool {
        self.0.get().is_some()
    }

    /// Whether a new connection reaches the same host as the first one, which this may be.
    ///
    /// # Errors
    ///
    /// It reaches another one.
    pub fn check(&self, stream: &dyn Stream) -> Result<(), Untrusted> {
        let seen = stream.peer_identity();
        let first = self.0.get_or_init(|| seen.clone());
        if seen == *first {
            return Ok(());
        }
        let name = |identity: &Option<Arc<str>>| identity.as_deref().unwrap_or("nobody known").to_owned();
        Err(Untrusted(format!(
            "this connection reaches another host than the first one of the migration: its certificate is that of {}, and the first one's that of {}; look at what \
             is in between, such as a load balancer or a name with several addresses, and name one host",
            name(&seen),
            name(first)
        )))
    }
}

/// Whether a peer that begins like this speaks TLS: a handshake message, or an alert, of version 3.
pub fn speaks_tls(first_bytes: &[u8]) -> bool {
    matches!(first_bytes, [21 | 22, 3, 0..=4, ..])
}

/// What to say of such a peer where no TLS is spoken.
pub const SPEAKS_TLS: &str =
    "it speaks TLS, and this host was not told to; pass --tls-dir on both hosts or on neither";

/// Opens connections to the destination.
pub trait Connector: Send + Sync {
    /// Opens one more connection.
    fn connect(&self) -> io::Result<Box<dyn Stream>>;
    /// The same, but gives up soon after `go_on` says no, where the kind of connection can do that.
    fn connect_while(&self, _go_on: &dyn Fn() -> bool) -> io::Result<Box<dyn Stream>> {
        self.connect()
    }
    /// Whether it can open connections whose [`bare_socket`](Stream::bare_socket) can be given to somebody else. Encrypted ones, for example, are always more than a socket.
    fn opens_bare(&self) -> bool {
        false
    }
    /// Opens such a connection, and gives up soon after `go_on` says no. An error of kind `Unsupported` where there are none.
    fn connect_bare(&self, _go_on: &dyn Fn() -> bool) -> io::Result<Box<dyn Stream>> {
        Err(io::ErrorKind::Unsupported.into())
    }
    /// Whom it connects to, for messages.
    fn peer(&self) -> String;
    /// From now on a connection may be broken for so long at most, where it could be mended; `None`: for as long as it was told at first. While the VM stands still nobody
    /// wants to wait for long.
    fn limit_outage(&self, _most: Option<Duration>) {}
    /// What became of the connections of the present migration, or the last one.
    fn interruptions(&self) -> Interruptions {
        Interruptions::default()
    }
    /// Whether a connection is broken now, and tried to be mended.
    fn outage(&self) -> Option<Outage> {
        None
    }
    /// To be called before each migration: what this is made of, as certificates, may have been renewed since the last one. During a migration it must not change.
    fn renew(&self) {}
}

/// How long a connection may be broken while the VM stands still for the hand-over.
pub const OUTAGE_WHILE_PAUSED: Duration = Duration::from_secs(5);
/// How long a connection may be broken when all that is left to be said over it is why the destination gives up.
pub const OUTAGE_OF_LAST_WORD: Duration = Duration::from_secs(1);

/// A connection that is broken, and tried to be mended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outage {
    /// For how long it has been; of several, the longest.
    pub lasts: Duration,
    /// How long it may be.
    pub most: Duration,
}

/// Breaks of connections that were mended, or were tried to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interruptions {
    /// How many there were, over all connections.
    pub breaks: u32,
    /// Milliseconds until they were mended, over all connections.
    pub outage_ms: u64,
    /// Bytes that were sent a second time.
    pub sent_again_bytes: u64,
}

/// Accepts connections from the source.
pub trait Acceptor: Send + Sync {
    /// Waits for the next connection, at most `timeout`: then an error of kind `TimedOut`.
    fn accept(&self, timeout: Duration) -> io::Result<Box<dyn Stream>>;
    /// Where it listens, for messages.
    fn local(&self) -> String;
    /// How long a connection may be broken at most, where it could be mended.
    fn patience(&self) -> Duration {
        Duration::ZERO
    }
    /// See [`Connector::limit_outage`]: a destination that has given up does not wait until it can say so.
    fn limit_outage(&self, _most: Option<Duration>) {}
    /// To be called now and then while a migration is waited for: see [`Connector::renew`].
    fn renew(&self) {}
}

impl Stream for TcpStream {
    fn try_clone_stream(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(self.try_clone()?))
    }

    fn shutdown(&self) -> io::Result<()> {
        TcpStream::shutdown(self, Shutdown::Both)
    }

    fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(read)?;
        self.set_write_timeout(write)
    }

    fn detect_death(&self, within: Duration) -> io::Result<()> {
        use rustix::net::sockopt;
        let probe = (within / 6).max(Duration::from_secs(1));
        sockopt::set_socket_keepalive(self, true)?;
        sockopt::set_tcp_keepidle(self, probe)?;
        sockopt::set_tcp_keepintvl(self, probe)?;
        sockopt::set_tcp_keepcnt(self, 5)?;
        // This bounds data that is never acknowledged, and with it the probes.
        sockopt::set_tcp_user_timeout(self, within.as_millis().try_into().unwrap_or(u32::MAX))?;
        Ok(())
    }

    fn reset(&self) -> io::Result<()> {
        // Dissolving the association sends a reset at once, and drops what waits to be sent.
        let mut reset = rustix::net::connect_unspec(self);
        let mut ended = Ok(());
        // Some kernels (Linux 6.5, and others of that time) refuse that while threads wait for the connection. They are woken by its end, which comes after what waits
        // to be sent: so it is tried again.
        for _ in 0..RESET_TRIES {
            if reset != Err(Errno::BUSY) {
                break;
            }
            ended = Stream::shutdown(self);
            std::thread::sleep(RESET_PAUSE);
            reset = rustix::net::connect_unspec(self);
        }
        match reset {
            Ok(()) => Ok(()),
            Err(_) => Stream::shutdown(self).or(ended),
        }
    }

    fn is_hung_up(&self) -> bool {
        hung_up(self)
    }

    fn wait_readable(&self, timeout: Duration) -> io::Result<bool> {
        ready(self, PollFlags::IN, timeout)
    }

    fn bare_socket(&self) -> io::Result<Option<OwnedFd>> {
        Ok(Some(self.as_fd().try_clone_to_owned()?))
    }
}

impl Stream for UnixStream {
    fn try_clone_stream(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(self.try_clone()?))
    }

    fn shutdown(&self) -> io::Result<()> {
        UnixStream::shutdown(self, Shutdown::Both)
    }

    fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(read)?;
        self.set_write_timeout(write)
    }

    fn is_hung_up(&self) -> bool {
        hung_up(self)
    }
}

/// Whether the peer has ended its direction of a socket, or the connection broke, though there may be more to read.
pub fn hung_up(stream: &impl AsFd) -> bool {
    let end = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok_and(|n| n > 0) && fds[0].revents().intersects(end)
}

/// Waits for one of these events, or an error, at most for this time.
fn ready(stream: &impl AsFd, events: PollFlags, timeout: Duration) -> io::Result<bool> {
    match poll(&mut [PollFd::new(stream, events)], Some(&timespec(timeout))) {
        Ok(n) => Ok(n > 0),
        Err(Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn timespec(time: Duration) -> Timespec {
    Timespec { tv_sec: time.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: time.subsec_nanos().into() }
}

/// Connects over TCP.
#[derive(Debug, Clone)]
pub struct TcpConnector {
    /// The destination.
    pub address: SocketAddr,
    /// How long one attempt may take.
    pub timeout: Duration,
}

impl TcpConnector {
    /// Opens one more connection, for somebody who wants the socket itself.
    pub fn connect_tcp(&self) -> io::Result<TcpStream> {
        let stream = TcpStream::connect_timeout(&self.address, self.timeout)?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// The same, but gives up soon after `go_on` says no.
    pub fn connect_tcp_while(&self, go_on: &dyn Fn() -> bool) -> io::Result<TcpStream> {
        let family = if self.address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
        match rustix::net::connect(&socket, &self.address) {
            Ok(()) | Err(Errno::INPROGRESS | Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let until = Instant::now() + self.timeout;
        while !ready(&socket, PollFlags::OUT, STEP)? {
            if !go_on() {
                return Err(io::Error::other("nobody wants the connection any more"));
            }
            if Instant::now() >= until {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        rustix::net::sockopt::socket_error(&socket)??;
        let stream = TcpStream::from(socket);
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

impl Connector for TcpConnector {
    fn connect(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(self.connect_tcp()?))
    }

    fn connect_while(&self, go_on: &dyn Fn() -> bool) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(self.connect_tcp_while(go_on)?))
    }

    fn opens_bare(&self) -> bool {
        true
    }

    fn connect_bare(&self, go_on: &dyn Fn() -> bool) -> io::Result<Box<dyn Stream>> {
        self.connect_while(go_on)
    }

    fn peer(&self) -> String {
        self.address.to_string()
    }
}

/// Listens on TCP.
#[derive(Debug)]
pub struct TcpAcceptor {
    listener: TcpListener,
    shortages: Seldom,
}

impl TcpAcceptor {
    /// Listens on `address`.
    pub fn bind(address: SocketAddr) -> io::Result<TcpAcceptor> {
        let listener = TcpListener::bind(address)?;
        // A connection may be gone again between poll and accept, which must not block then.
        listener.set_nonblocking(true)?;
        Ok(TcpAcceptor { listener, shortages: Seldom::default() })
    }

    /// Where it listens; tells the port if 0 was asked for.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// The connection that waits to be accepted, and where it comes from. Does not wait for one.
    pub fn accept_tcp(&self) -> io::Result<Option<(TcpStream, SocketAddr)>> {
        match self.listener.accept() {
            Ok((stream, from)) => {
                stream.set_nonblocking(false)?;
                stream.set_nodelay(true)?;
                Ok(Some((stream, from)))
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => {
                Ok(None)
            }
            // Strangers' connections may be what takes the descriptors. They are ended after a while, and nothing is lost until then.
            Err(e) if is_shortage(&e) => {
                self.shortages.tell(|more| {
                    warn!("a connection cannot be accepted now: {e}; raise the limit (ulimit -n) if that goes on{more}");
                });
                std::thread::sleep(SHORTAGE_PAUSE);
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }
}

/// Whether the system lacks what others may give back.
fn is_shortage(error: &io::Error) -> bool {
    let shortages = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    error.raw_os_error().is_some_and(|code| shortages.iter().any(|shortage| shortage.raw_os_error() == code))
}

impl AsFd for TcpAcceptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Acceptor for TcpAcceptor {
    fn accept(&self, timeout: Duration) -> io::Result<Box<dyn Stream>> {
        let nobody = || io::Error::new(io::ErrorKind::TimedOut, "nobody connected in time");
        // A signal ends the wait early, which the caller takes for the time being over.
        if !ready(&self.listener, PollFlags::IN, timeout)? {
            return Err(nobody());
        }
        let (stream, _) = self.accept_tcp()?.ok_or_else(nobody)?;
        Ok(Box::new(stream))
    }

    fn local(&self) -> String {
        self.listener.local_addr().map_or_else(|e| format!("an unknown address ({e})"), |a| a.to_string())
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let far = listener.accept().unwrap().0;
        far.set_read_timeout(Some(PATIENCE)).unwrap();
        (near, far)
    }

    #[test]
    fn a_reset_drops_what_was_not_sent_though_threads_wait() {
        let (near, mut far) = pair();
        let (mut reading, mut writing) = (near.try_clone().unwrap(), near.try_clone().unwrap());
        let reader = thread::spawn(move || reading.read(&mut [0]));
        // The peer does not read, so that this waits in the end.
        let writer = thread::spawn(move || {
            let mut written = 0;
            while let Ok(n) = writing.write(&[0; 1 << 16]) {
                written += n;
            }
            written
        });
        thread::sleep(Duration::from_millis(200));
        Stream::reset(&near).unwrap();
        let written = writer.join().unwrap();
        let _ = reader.join().unwrap();
        let start = Instant::now();
        while !far.is_hung_up() {
            assert!(start.elapsed() < PATIENCE, "the peer hears of it at once");
            thread::sleep(Duration::from_millis(1));
        }
        let mut got = Vec::new();
        let end = far.read_to_end(&mut got);
        assert_eq!(end.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        assert!(got.len() < written, "{} of {written} bytes arrived", got.len());
    }

    #[test]
    fn a_connection_that_nobody_wants_any_more_is_given_up() {
        // Nobody accepts, and the queue is full after a few: the rest would have to wait.
        let listener = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        rustix::net::bind(&listener, &SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let listener = TcpListener::from(listener);
        let connector = TcpConnector { address: listener.local_addr().unwrap(), timeout: PATIENCE };
        let mut kept = Vec::new();
        let start = Instant::now();
        let error = loop {
            let since = Instant::now();
            match connector.connect_while(&|| since.elapsed() < Duration::from_millis(200)) {
                Ok(stream) => kept.push(stream),
                Err(error) => break error,
            }
            assert!(kept.len() < 100, "somebody accepts");
        };
        assert!(start.elapsed() < PATIENCE, "{error}");
        assert_eq!(error.kind(), io::ErrorKind::Other);
    }

    #[test]
    fn a_connection_in_steps_is_like_any_other() {
        let acceptor = TcpAcceptor::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let connector = TcpConnector { address: acceptor.local_addr().unwrap(), timeout: PATIENCE };
        let mut near = connector.connect_while(&|| true).unwrap();
        let mut far = acceptor.accept(PATIENCE).unwrap();
        assert!(!far.wait_readable(Duration::ZERO).unwrap());
        near.write_all(b"x").unwrap();
        assert!(far.wait_readable(PATIENCE).unwrap());
        far.read_exact(&mut [0]).unwrap();
        drop(acceptor);
        assert_eq!(connector.connect_while(&|| true).err().unwrap().kind(), io::ErrorKind::ConnectionRefused);
    }
}
