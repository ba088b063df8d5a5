//! A connection that is up.
//!
//! One thread reads while another writes. The state of TLS is under a lock that is held for as long as it takes to encrypt or decrypt, and never while a socket is
//! waited for. What keeps ciphertext in order are two more locks, one per direction, which the threads hold while they read or write the socket.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

use pagewarp_engine::flow::lock;
use pagewarp_engine::transport::{Stream, hung_up};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendFlags, send};
use rustls::{Connection, Error};

use super::identity::Identity;

/// Plain bytes that are encrypted and written at once: a few records, so that there is one system call for many.
const WRITE_BYTES: usize = 256 << 10;
/// Ciphertext that is read at once.
const READ_BYTES: usize = 128 << 10;
/// How long the last word may wait for room in the socket.
const LAST_WORD: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// A handle to a TLS connection.
pub(super) struct TlsStream {
    shared: Arc<Shared>,
}

struct Shared {
    socket: TcpStream,
    /// Locked last.
    tls: Mutex<Connection>,
    incoming: Mutex<Incoming>,
    outgoing: Mutex<Outgoing>,
    /// Whether the peer has ended its direction.
    ended: AtomicBool,
    /// Whether this side has ended the connection.
    closed: AtomicBool,
    identity: Arc<str>,
    round_trip: Option<Duration>,
}

/// Ciphertext on its way in.
struct Incoming {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    /// Whether there is no more.
    is_eof: bool,
    /// Why nothing that comes can be believed any more.
    failed: Option<Error>,
}

/// Ciphertext on its way out.
#[derive(Default)]
struct Outgoing {
    buffer: Vec<u8>,
    start: usize,
    /// Whether something could not be written to its end. What was taken is lost then, so that nothing may follow.
    is_broken: bool,
}

/// What there is to read.
enum Next {
    Data,
    /// The peer has ended its direction in order.
    End,
    /// Nothing more will come.
    Broken(io::Error),
    /// More ciphertext is needed.
    Hungry,
}

impl TlsStream {
    /// A connection whose handshake is done.
    pub(super) fn new(
        socket: TcpStream,
        mut tls: Connection,
        identity: &Identity,
        round_trip: Option<Duration>,
    ) -> TlsStream {
        tls.set_buffer_limit(Some(WRITE_BYTES));
        let incoming =
            Incoming { buffer: vec![0; READ_BYTES].into(), start: 0, end: 0, is_eof: false, failed: None };
        TlsStream {
            shared: Arc::new(Shared {
                socket,
                tls: Mutex::new(tls),
                incoming: Mutex::new(incoming),
                outgoing: Mutex::default(),
                ended: AtomicBool::new(false),
                closed: AtomicBool::new(false),
                identity: identity.to_string().into(),
                round_trip,
            }),
        }
    }
}

impl Shared {
    fn read(&self, into: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let wanted: usize = into.iter().map(|slice| slice.len()).sum();
        if wanted == 0 {
            return Ok(0);
        }
        let mut incoming = lock(&self.incoming);
        loop {
            let taken = self.take(&mut incoming, into, wanted);
            self.answer();
            if let Some(taken) = taken? {
                return Ok(taken);
            }
            self.fetch(&mut incoming)?;
        }
    }

    /// Takes what has come, as much as is wanted and there; `None`: nothing yet.
    fn take(
        &self,
        incoming: &mut Incoming,
        into: &mut [IoSliceMut<'_>],
        wanted: usize,
    ) -> io::Result<Option<usize>> {
        let mut taken = 0;
        let (mut slice, mut at) = (0, 0);
        let mut tls = lock(&self.tls);
        loop {
            match self.advance(incoming, &mut tls) {
                Next::Data => {
                    while at == into[slice].len() {
                        (slice, at) = (slice + 1, 0);
                    }
                    let n = tls.reader().read(&mut into[slice][at..])?;
                    (taken, at) = (taken + n, at + n);
                    if taken == wanted {
                        return Ok(Some(taken));
                    }
                }
                _ if taken > 0 => return Ok(Some(taken)),
                Next::End => return Ok(Some(0)),
                Next::Broken(error) => return Err(error),
                Next::Hungry => return Ok(None),
            }
        }
    }

    /// Decrypts until there is something to read, or more ciphertext is needed.
    fn advance(&self, incoming: &mut Incoming, tls: &mut Connection) -> Next {
        loop {
            if let Some(error) = &incoming.failed {
                return Next::Broken(broken(error));
            }
            match tls.process_new_packets() {
                Ok(state) if state.plaintext_bytes_to_read() > 0 => return Next::Data,
                Ok(state) if state.peer_has_closed() => {
                    self.ended.store(true, Ordering::Release);
                    return Next::End;
                }
                Ok(_) => {}
                Err(error) => {
                    incoming.failed = Some(error);
                    continue;
                }
            }
            if incoming.start == incoming.end {
                if incoming.is_eof {
                    return Next::Broken(cut_off());
                }
                return Next::Hungry;
            }
            match tls.read_tls(&mut &incoming.buffer[incoming.start..incoming.end]) {
                Ok(n) => incoming.start += n,
                Err(error) => return Next::Broken(error),
            }
        }
    }

    /// Waits for more ciphertext.
    fn fetch(&self, incoming: &mut Incoming) -> io::Result<()> {
        loop {
            match (&self.socket).read(&mut incoming.buffer) {
                Ok(n) => {
                    (incoming.start, incoming.end, incoming.is_eof) = (0, n, n == 0);
                    return Ok(());
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Whether there is something to read, or the end, without waiting for more than `timeout`.
    fn wait_readable(&self, timeout: Duration) -> io::Result<bool> {
        let until = Instant::now() + timeout;
        let mut incoming = match self.incoming.try_lock() {
            Ok(incoming) => incoming,
            // Another thread reads, and takes what comes.
            Err(_) => return Stream::wait_readable(&self.socket, timeout),
        };
        let mut is_late = false;
        loop {
            let next = self.advance(&mut incoming, &mut lock(&self.tls));
            self.answer();
            if !matches!(next, Next::Hungry) {
                return Ok(true);
            }
            // What is there may be a part of a record, or no data at all, and that without end.
            let left = until.saturating_duration_since(Instant::now());
            if is_late || !Stream::wait_readable(&self.socket, left)? {
                return Ok(false);
            }
            is_late = left.is_zero();
            self.fetch(&mut incoming)?;
        }
    }

    fn write(&self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        let from = &from[..pieces_of(from, WRITE_BYTES)];
        if from.iter().all(|slice| slice.is_empty()) {
            return Ok(0);
        }
        let mut outgoing = lock(&self.outgoing);
        if outgoing.is_broken || self.closed.load(Ordering::Acquire) {
            let why = "the connection was ended, or an earlier write was not finished";
            return Err(io::Error::new(io::ErrorKind::BrokenPipe, why));
        }
        let taken = {
            let mut tls = lock(&self.tls);
            let taken = tls.writer().write_vectored(from)?;
            outgoing.fill(&mut tls)?;
            taken
        };
        outgoing.write(&self.socket)?;
        Ok(taken)
    }

    /// Sends what TLS itself has to say, if that is possible without waiting. If not, it goes before what is written next.
    fn answer(&self) {
        if !lock(&self.tls).wants_write() {
            return;
        }
        if let Some(mut outgoing) = self.try_outgoing()
            && outgoing.fill(&mut lock(&self.tls)).is_ok()
        {
            outgoing.send_now(&self.socket);
        }
    }

    fn try_outgoing(&self) -> Option<MutexGuard<'_, Outgoing>> {
        let outgoing = match self.outgoing.try_lock() {
            Ok(outgoing) => outgoing,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            // A thread is writing.
            Err(TryLockError::WouldBlock) => return None,
        };
        (!outgoing.is_broken).then_some(outgoing)
    }

    /// Says that nothing follows. A thread that is stuck in a write cannot be overtaken: then the peer finds out that the connection was cut off.
    fn say_end(&self) {
        if self.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        let Some(mut outgoing) = self.try_outgoing() else { return };
        let filled = {
            let mut tls = lock(&self.tls);
            tls.send_close_notify();
            outgoing.fill(&mut tls)
        };
        if filled.is_ok() && !outgoing.send_now(&self.socket) {
            let _ = poll(&mut [PollFd::new(&self.socket, PollFlags::OUT)], Some(&LAST_WORD));
            outgoing.send_now(&self.socket);
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.say_end();
    }
}

impl Outgoing {
    /// Takes the ciphertext that there is.
    fn fill(&mut self, tls: &mut Connection) -> io::Result<()> {
        if self.start == self.buffer.len() {
            self.buffer.clear();
            self.start = 0;
        }
        while tls.wants_write() {
            tls.write_tls(&mut self.buffer)?;
        }
        Ok(())
    }

    /// Writes all of it.
    fn write(&mut self, mut socket: &TcpStream) -> io::Result<()> {
        while self.start < self.buffer.len() {
            match socket.write(&self.buffer[self.start..]) {
                Ok(n) => self.start += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    self.is_broken = true;
                    return Err(e);
                }
            }
        }
        Ok(())
    }

    /// Sends as much as there is room for. Returns whether that is all.
    fn send_now(&mut self, socket: &TcpStream) -> bool {
        while self.start < self.buffer.len() {
            match send(socket, &self.buffer[self.start..], SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(n) => self.start += n,
                Err(_) => return false,
            }
        }
        true
    }
}

/// How many of the first slices hold so many bytes, or a little more.
fn pieces_of(slices: &[IoSlice<'_>], bytes: usize) -> usize {
    let mut sum = 0;
    slices
        .iter()
        .position(|slice| {
            sum += slice.len();
            sum >= bytes
        })
        .map_or(slices.len(), |last| last + 1)
}

fn broken(error: &Error) -> io::Error {
    let why = match error {
        Error::AlertReceived(alert) => format!("the peer ended the TLS connection ({alert:?})"),
        other => format!("what arrived is not what the peer sent: {other}"),
    };
    io::Error::new(io::ErrorKind::InvalidData, why)
}

fn cut_off() -> io::Error {
    let why = "the connection was cut off: the peer was killed or lost, or somebody in between ended it";
    io::Error::new(io::ErrorKind::UnexpectedEof, why)
}

impl Read for TlsStream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.shared.read(&mut [IoSliceMut::new(into)])
    }

    fn read_vectored(&mut self, into: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.shared.read(into)
    }
}

impl Write for TlsStream {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.shared.write(&[IoSlice::new(from)])
    }

    fn write_vectored(&mut self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        self.shared.write(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        // Nothing is kept back.
        Ok(())
    }
}

impl Stream for TlsStream {
    fn try_clone_stream(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(TlsStream { shared: self.shared.clone() }))
    }

    fn shutdown(&self) -> io::Result<()> {
        self.shared.say_end();
        self.shared.socket.shutdown(Shutdown::Both)
    }

    fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> io::Result<()> {
        Stream::set_timeouts(&self.shared.socket, read, write)
    }

    fn reset(&self) -> io::Result<()> {
        self.shared.closed.store(true, Ordering::Release);
        Stream::reset(&self.shared.socket)
    }

    fn detect_death(&self, within: Duration) -> io::Result<()> {
        Stream::detect_death(&self.shared.socket, within)
    }

    fn is_hung_up(&self) -> bool {
        self.shared.ended.load(Ordering::Acquire) || hung_up(&self.shared.socket)
    }

    fn wait_readable(&self, timeout: Duration) -> io::Result<bool> {
        self.shared.wait_readable(timeout)
    }

    fn peer_identity(&self) -> Option<Arc<str>> {
        Some(self.shared.identity.clone())
    }

    fn round_trip(&self) -> Option<Duration> {
        self.shared.round_trip
    }
}
