//! Byte streams between the hosts. Blocking, one thread per direction; no async runtime on the data path.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::error::MigrationError;

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
}

/// Opens connections to the destination.
pub trait Connector: Send + Sync {
    /// Opens one more connection.
    fn connect(&self) -> io::Result<Box<dyn Stream>>;
    /// Whom it connects to, for messages.
    fn peer(&self) -> String;
}

/// Accepts connections from the source.
pub trait Acceptor: Send + Sync {
    /// Waits for the next connection, at most `timeout`: then an error of kind `TimedOut`.
    fn accept(&self, timeout: Duration) -> io::Result<Box<dyn Stream>>;
    /// Where it listens, for messages.
    fn local(&self) -> String;
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
        // Dissolving the association sends a reset at once. Some kernels refuse while a thread waits in a read: then an orderly end must do.
        let reset = rustix::net::connect_unspec(self);
        Stream::shutdown(self).or_else(|e| if reset.is_ok() { Ok(()) } else { Err(e) })
    }

    fn is_hung_up(&self) -> bool {
        hung_up(self)
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

/// Connects over TCP.
#[derive(Debug, Clone)]
pub struct TcpConnector {
    /// The destination.
    pub address: SocketAddr,
    /// How long one attempt may take.
    pub timeout: Duration,
}

impl Connector for TcpConnector {
    fn connect(&self) -> io::Result<Box<dyn Stream>> {
        let stream = TcpStream::connect_timeout(&self.address, self.timeout)?;
        stream.set_nodelay(true)?;
        Ok(Box::new(stream))
    }

    fn peer(&self) -> String {
        self.address.to_string()
    }
}

/// Listens on TCP.
#[derive(Debug)]
pub struct TcpAcceptor {
    listener: TcpListener,
}

impl TcpAcceptor {
    /// Listens on `address`.
    pub fn bind(address: SocketAddr) -> io::Result<TcpAcceptor> {
        let listener = TcpListener::bind(address)?;
        // A connection may be gone again between poll and accept, which must not block then.
        listener.set_nonblocking(true)?;
        Ok(TcpAcceptor { listener })
    }

    /// Where it listens; tells the port if 0 was asked for.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

impl Acceptor for TcpAcceptor {
    fn accept(&self, timeout: Duration) -> io::Result<Box<dyn Stream>> {
        let wait = Timespec {
            tv_sec: timeout.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        };
        let nobody = || io::Error::new(io::ErrorKind::TimedOut, "nobody connected in time");
        match poll(&mut [PollFd::new(&self.listener, PollFlags::IN)], Some(&wait)) {
            // A signal ends the wait early, which the caller takes for the time being over.
            Ok(0) | Err(rustix::io::Errno::INTR) => return Err(nobody()),
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        match self.listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                stream.set_nodelay(true)?;
                Ok(Box::new(stream))
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => {
                Err(nobody())
            }
            Err(e) => Err(e),
        }
    }

    fn local(&self) -> String {
        self.listener.local_addr().map_or_else(|e| format!("an unknown address ({e})"), |a| a.to_string())
    }
}
