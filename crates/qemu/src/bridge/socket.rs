//! Sockets between QEMU and its bridge, on one host: Unix sockets, or TCP on loopback for those who cannot use them.

use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use pagewarp_engine::transport::{Stream, hung_up};
use pagewarp_engine::unix_socket::bind_private;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv};

/// Where QEMU and its bridge meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A Unix socket.
    Unix(PathBuf),
    /// A port of this host. Whoever may use the loopback network of this host can connect to it.
    Tcp(SocketAddr),
}

impl fmt::Display for Endpoint {
    /// As QEMU names it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Unix(path) => write!(f, "unix:{}", path.display()),
            Endpoint::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

impl Endpoint {
    /// Whether nobody on another host can reach it.
    pub fn is_local(&self) -> bool {
        match self {
            Endpoint::Unix(_) => true,
            Endpoint::Tcp(address) => {
                let ip = address.ip();
                ip.is_loopback() || ip == Ipv4Addr::LOCALHOST || ip == Ipv6Addr::LOCALHOST
            }
        }
    }

    /// Connects to a QEMU that listens there.
    pub(crate) fn connect(&self) -> io::Result<Socket> {
        Ok(match self {
            Endpoint::Unix(path) => Socket(UnixStream::connect(path)?.into()),
            Endpoint::Tcp(address) => {
                let stream = TcpStream::connect(address)?;
                stream.set_nodelay(true)?;
                bound_buffers(&stream)?;
                Socket(stream.into())
            }
        })
    }

    /// Listens there. A Unix socket is for this user alone, and one that nobody listens on any more is replaced.
    pub(crate) fn listen(&self) -> io::Result<Listener> {
        // A connection may be gone again between poll and accept, which must not block then.
        Ok(match self {
            Endpoint::Unix(path) => {
                if is_abandoned(path) {
                    std::fs::remove_file(path)?;
                }
                let listener = bind_private(path)?;
                listener.set_nonblocking(true)?;
                Listener::Unix(listener)
            }
            Endpoint::Tcp(address) => {
                let listener = TcpListener::bind(address)?;
                listener.set_nonblocking(true)?;
                // Connections have it from here, from their first byte on.
                bound_buffers(&listener)?;
                Listener::Tcp(listener)
            }
        })
    }
}

/// What a Unix socket has, unless somebody changed it (`net.core.wmem_default`); the kernel doubles it for its own needs.
const BUFFER: usize = 104 << 10;

/// What the destination QEMU may leave unread, for the kernel to double. It fills up only if that QEMU is slower than the link, so that QEMU at the source is not
/// misled by what it does not hold; and then, with no more than [`BUFFER`], both would wait to be woken every few pages. Not where
/// nothing but its socket tells whether QEMU has taken all: what it leaves there and closes the connection on would look as if it had.
const DEEP_BUFFER: usize = 512 << 10;

/// Keeps the kernel from growing the buffers of a TCP socket to MiBs: what is in them makes the link look faster to QEMU than it is. Nobody but QEMU can do
/// that for its own end, where Linux lets 2.6 MB wait to be sent on loopback: a Unix socket is better.
fn bound_buffers(socket: &impl AsFd) -> io::Result<()> {
    use rustix::net::sockopt;
    sockopt::set_socket_recv_buffer_size(socket, BUFFER)?;
    sockopt::set_socket_send_buffer_size(socket, BUFFER)?;
    Ok(())
}

fn is_abandoned(path: &Path) -> bool {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    is_socket && UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
}

/// Where the source QEMU connects to.
pub(crate) enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    pub(crate) fn accept(&self) -> io::Result<Socket> {
        match self {
            Listener::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(false)?;
                Ok(Socket(stream.into()))
            }
            Listener::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(false)?;
                stream.set_nodelay(true)?;
                Ok(Socket(stream.into()))
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Listener::Unix(listener) => listener.as_fd(),
            Listener::Tcp(listener) => listener.as_fd(),
        }
    }
}

/// A channel of multifd starts with these.
const MULTIFD: [u8; 4] = [0x11, 0x22, 0x33, 0x44];
/// A main channel starts with these.
const MAIN: [u8; 4] = *b"QEVM";

/// What a connection of QEMU is, by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Beginning {
    Main,
    Multifd,
    /// It has not said anything, or something that is encrypted.
    Unknown,
}

/// A connection of QEMU.
#[derive(Debug)]
pub(crate) struct Socket(OwnedFd);

impl Socket {
    pub(crate) fn try_clone(&self) -> io::Result<Socket> {
        self.0.try_clone().map(Socket)
    }

    /// Lets more bytes wait in front of QEMU: as many as the system lets any process have, or more with the right to that. If it does not, it only takes longer. For a Unix socket.
    pub(crate) fn deepen(&self) {
        use rustix::net::sockopt::{
            set_socket_send_buffer_size, set_socket_send_buffer_size_force, socket_send_buffer_size,
        };
        let now = socket_send_buffer_size(self).unwrap_or(usize::MAX);
        if now >= 2 * DEEP_BUFFER || set_socket_send_buffer_size_force(self, DEEP_BUFFER).is_ok() {
            return;
        }
        // Where somebody has set another default, the most that may be asked for can be less.
        if now <= 2 * BUFFER {
            let _ = set_socket_send_buffer_size(self, DEEP_BUFFER);
        }
    }

    /// Whether the peer is gone and has left nothing that could be the start of a main channel: a connection of a migration that is over.
    pub(crate) fn is_left_over(&self) -> bool {
        hung_up(self) && self.first_bytes().is_none_or(|first| first == MULTIFD)
    }

    /// What it begins like.
    pub(crate) fn beginning(&self) -> Beginning {
        match self.first_bytes() {
            Some(MULTIFD) => Beginning::Multifd,
            Some(MAIN) => Beginning::Main,
            _ => Beginning::Unknown,
        }
    }

    /// What it says first, without taking it; `None` if it has said nothing.
    fn first_bytes(&self) -> Option<[u8; 4]> {
        let mut first = [0; 4];
        match recv(&self.0, &mut first, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((_, n)) => (n > 0).then_some(first),
            Err(_) => None,
        }
    }

    pub(crate) fn end(&self, direction: Shutdown) -> io::Result<()> {
        let how = match direction {
            Shutdown::Read => rustix::net::Shutdown::Read,
            Shutdown::Write => rustix::net::Shutdown::Write,
            Shutdown::Both => rustix::net::Shutdown::Both,
        };
        Ok(rustix::net::shutdown(&self.0, how)?)
    }
}

/// Waits until there is something to read or to accept, or the connection is at its end; `None` for as long as that takes.
pub(crate) fn wait_readable(socket: &impl AsFd, patience: Option<Duration>) -> io::Result<bool> {
    let timeout = patience.map(|p| Timespec { tv_sec: p.as_secs() as i64, tv_nsec: p.subsec_nanos().into() });
    match poll(&mut [PollFd::new(socket, PollFlags::IN)], timeout.as_ref()) {
        Ok(n) => Ok(n > 0),
        Err(Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Read for Socket {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let (n, _) = recv(&self.0, bytes, RecvFlags::empty())?;
        Ok(n)
    }
}

impl Write for &Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(rustix::net::send(&self.0, bytes, SendFlags::NOSIGNAL)?)
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        Ok(rustix::io::writev(&self.0, pieces)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (&*self).write(bytes)
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        (&*self).write_vectored(pieces)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for Socket {
    fn try_clone_stream(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(self.try_clone()?))
    }

    fn shutdown(&self) -> io::Result<()> {
        self.end(Shutdown::Both)
    }

    fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> io::Result<()> {
        use rustix::net::sockopt::{Timeout, set_socket_timeout};
        set_socket_timeout(&self.0, Timeout::Recv, read)?;
        set_socket_timeout(&self.0, Timeout::Send, write)?;
        Ok(())
    }

    fn is_hung_up(&self) -> bool {
        hung_up(self)
    }
}

/// A channel of multifd, which QEMU only writes to: shutting it down wakes who writes to it, and lets QEMU go on writing.
pub(crate) struct OneWay(pub(crate) Socket);

impl Read for OneWay {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.0.read(bytes)
    }
}

impl Write for OneWay {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for OneWay {
    fn try_clone_stream(&self) -> io::Result<Box<dyn Stream>> {
        self.0.try_clone_stream()
    }

    fn shutdown(&self) -> io::Result<()> {
        self.0.end(Shutdown::Write)
    }

    fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> io::Result<()> {
        self.0.set_timeouts(read, write)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn talk(endpoint: &Endpoint) {
        let listener = endpoint.listen().expect("the place is free");
        let endpoint = match &listener {
            Listener::Tcp(listener) => Endpoint::Tcp(listener.local_addr().expect("it listens")),
            Listener::Unix(_) => endpoint.clone(),
        };
        let mut here = endpoint.connect().expect("it listens");
        let mut there = loop {
            match listener.accept() {
                Ok(socket) => break socket,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
                Err(e) => panic!("{e}"),
            }
        };
        let pieces = [IoSlice::new(b"a"), IoSlice::new(b"bc")];
        assert_eq!(here.write_vectored(&pieces).expect("there is room"), 3);
        here.end(Shutdown::Write).expect("it is open");
        let mut text = String::new();
        there.read_to_string(&mut text).expect("it was sent");
        assert_eq!(text, "abc");
        there.write_all(b"d").expect("the other direction is open");
    }

    #[test]
    fn both_kinds_carry_bytes_and_an_end() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("socket");
        // One that was left behind is replaced.
        drop(UnixListener::bind(&path).expect("a free path"));
        talk(&Endpoint::Unix(path.clone()));
        let mode = std::fs::metadata(&path).expect("it was made").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "it is for this user alone");
        talk(&Endpoint::Tcp((Ipv4Addr::LOCALHOST, 0).into()));
    }

    /// Nobody reads: what piles up at the bridge's end must not be much, whichever end that is.
    #[test]
    fn buffers_are_small_on_loopback_too() {
        const MUCH: u64 = 1 << 20;
        let fill = |near: &mut Socket| {
            near.set_timeouts(None, Some(Duration::from_millis(200))).expect("it is open");
            let mut taken = 0;
            while let Ok(n) = near.write(&[0; 16 << 10]) {
                taken += n as u64;
                assert!(taken < 64 * MUCH, "there is no end to the buffers");
            }
            taken
        };
        let listener = Endpoint::Tcp((Ipv4Addr::LOCALHOST, 0).into()).listen().expect("a free port");
        let Listener::Tcp(tcp) = &listener else { panic!("it listens on TCP") };
        let mut qemu =
            Socket(TcpStream::connect(tcp.local_addr().expect("it listens")).expect("it listens").into());
        let bridge = loop {
            match listener.accept() {
                Ok(socket) => break socket,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
                Err(e) => panic!("{e}"),
            }
        };
        fill(&mut qemu);
        let received = rustix::io::ioctl_fionread(&bridge).expect("it is a socket");
        assert!((1..MUCH).contains(&received), "{received} bytes");

        let qemu = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let mut bridge = Endpoint::Tcp(qemu.local_addr().expect("it listens")).connect().expect("it listens");
        let sent = fill(&mut bridge);
        assert!(sent < MUCH, "{sent} bytes");
    }

    #[test]
    fn left_over_connections_are_recognised() {
        let dir = tempfile::tempdir().expect("a directory");
        let listener = Endpoint::Unix(dir.path().join("socket")).listen().expect("a free path");
        for (sent, closed, left_over) in [
            (&b""[..], false, false),
            (b"", true, true),
            (&[0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1], false, false),
            (&[0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1], true, true),
            // Without a return path QEMU may be through before anybody looks.
            (b"QEVM\0\0\0\x03", true, false),
        ] {
            let mut near = UnixStream::connect(dir.path().join("socket")).expect("it listens");
            near.write_all(sent).expect("there is room");
            let near = (!closed).then_some(near);
            let far = listener.accept().expect("it has connected");
            assert_eq!(far.is_left_over(), left_over, "{sent:?} {closed}");
            drop(near);
        }
    }

    #[test]
    fn names_are_those_of_qemu() {
        assert_eq!(Endpoint::Unix("/run/x".into()).to_string(), "unix:/run/x");
        let tcp = Endpoint::Tcp((Ipv4Addr::LOCALHOST, 49152).into());
        assert_eq!(tcp.to_string(), "tcp:127.0.0.1:49152");
        assert!(tcp.is_local());
        assert!(!Endpoint::Tcp((Ipv4Addr::UNSPECIFIED, 1).into()).is_local());
    }
}
