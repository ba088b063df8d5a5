//! A blocking client of the QEMU Machine Protocol: one JSON object a line, over a Unix socket.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, ErrorKind, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType,
};
use serde_json::{Value, json};

/// The longest line that is accepted of QEMU, in bytes. Answers to the commands used here take kilobytes.
pub const MAX_LINE: usize = 16 << 20;

/// Events kept for [`Qmp::next_event`]; the oldest give way. A migration has a few dozen.
const MAX_EVENTS: usize = 4096;

/// A QEMU that nobody else is connected to greets in no time.
const SOON: Duration = Duration::from_secs(1);

/// How much of a line that makes no sense is quoted.
const QUOTED: usize = 120;

/// What can go wrong between pagewarp and the monitor of a QEMU.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// Nothing to connect to.
    #[error(
        "cannot connect to a QMP socket at {path}: {source}; expected a QEMU started with -qmp unix:{path},server=on,wait=off, running, and its \
         socket accessible to this user"
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Somebody else is connected.
    #[error(
        "{path} sent no QMP greeting in {waited:?}; a QMP socket serves one client at a time, so disconnect the other one (libvirt, a script) \
         or give QEMU a second -qmp socket for pagewarp; or QEMU hangs"
    )]
    Busy {
        /// The socket.
        path: PathBuf,
        /// How long the greeting was waited for.
        waited: Duration,
    },
    /// Something other than QMP listens there.
    #[error(
        "{path} greeted with {seen:?} where a QMP greeting was expected; name the socket of -qmp, not that of -monitor, -serial or a guest agent"
    )]
    NotQmp {
        /// The socket.
        path: PathBuf,
        /// The beginning of what it sent.
        seen: String,
    },
    /// The connection ended.
    #[error(
        "QEMU closed its QMP socket while `{during}` was waited for: it ended or was killed; look at its exit status and its standard error"
    )]
    Gone {
        /// The command, or what else was waited for.
        during: String,
    },
    /// The connection broke.
    #[error(
        "the QMP connection failed during `{during}`: {source}; see whether QEMU still runs, then connect again"
    )]
    Io {
        /// The command, or what else was waited for.
        during: String,
        /// What the system said.
        source: io::Error,
    },
    /// No answer in time.
    #[error(
        "QEMU did not answer `{command}` in {waited:?}; it may be busy or hang: see whether it runs, and try again"
    )]
    TimedOut {
        /// The command.
        command: String,
        /// How long the answer was waited for.
        waited: Duration,
    },
    /// QEMU does not do that.
    #[error("QEMU refused `{command}`: {desc} ({class})")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's class of the error, most often `GenericError`.
        class: String,
        /// QEMU's description.
        desc: String,
    },
    /// An answer without something that every version of QEMU puts there.
    #[error(
        "QEMU's answer to `{command}` has no usable {expected}; expected a QEMU of version 6.2 to 10.2, so report this with QEMU's version"
    )]
    Unexpected {
        /// The command.
        command: String,
        /// What is missing or of another type.
        expected: &'static str,
    },
    /// Not JSON.
    #[error(
        "QEMU sent {seen:?} where a line of JSON was expected ({reason}); name the socket of -qmp, and connect again"
    )]
    BadJson {
        /// The beginning of the line.
        seen: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No end of a line.
    #[error(
        "QEMU sent more than {MAX_LINE} bytes without the end of a line; name the socket of -qmp, and connect again"
    )]
    LineTooLong,
}

/// A version of QEMU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// As 9 in 9.1.2.
    pub major: u32,
    /// As 1 in 9.1.2.
    pub minor: u32,
    /// As 2 in 9.1.2.
    pub micro: u32,
}

impl Version {
    /// The first release of a series.
    pub const fn new(major: u32, minor: u32) -> Version {
        Version { major, minor, micro: 0 }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// Something QEMU tells unasked.
#[derive(Clone, Debug, PartialEq)]
pub struct QmpEvent {
    /// As `STOP`.
    pub name: String,
    /// Depends on the event; `null` if there is none.
    pub data: Value,
    /// When it happened by the clock of QEMU's host; `None` if QEMU could not tell.
    pub at: Option<SystemTime>,
}

impl QmpEvent {
    /// Reads an event; `None`: the line is something else.
    fn of(line: &Value) -> Option<QmpEvent> {
        let name = line.get("event")?.as_str()?.to_owned();
        let data = line.get("data").cloned().unwrap_or_default();
        let part = |key| line.get("timestamp")?.get(key)?.as_u64();
        let at = part("seconds").zip(part("microseconds")).and_then(|(seconds, us)| {
            // QEMU sends -1 for both where its clock fails, which is no u64.
            let since = Duration::from_secs(seconds).checked_add(Duration::from_micros(us))?;
            SystemTime::UNIX_EPOCH.checked_add(since)
        });
        Some(QmpEvent { name, data, at })
    }

    /// The new status, if this is the `MIGRATION` event.
    pub fn migration_status(&self) -> Option<&str> {
        if self.name == "MIGRATION" { self.data.get("status")?.as_str() } else { None }
    }
}

/// A connection to the monitor of a QEMU.
#[derive(Debug)]
pub struct Qmp {
    lines: Lines,
    version: Version,
    timeout: Duration,
    next_id: u64,
    events: VecDeque<QmpEvent>,
}

impl Qmp {
    /// Connects, waits for the greeting and leaves the negotiation mode, all within `timeout`; which is then also the timeout of each
    /// command.
    pub fn connect(path: impl AsRef<Path>, timeout: Duration) -> Result<Qmp, QmpError> {
        let path = path.as_ref();
        let deadline = Deadline::after(timeout);
        let busy = || QmpError::Busy { path: path.to_owned(), waited: timeout };
        let soon = Deadline::after(SOON);
        let mut is_told = false;
        let wait = || {
            if timeout > SOON && soon.remaining().is_none() && !std::mem::replace(&mut is_told, true) {
                say_busy(path, timeout);
            }
        };
        let stream = match connect(path, deadline, wait) {
            Ok(Some(stream)) => stream,
            Ok(None) => return Err(busy()),
            Err(source) => return Err(QmpError::Connect { path: path.to_owned(), source }),
        };
        Qmp::greeted(stream, path, deadline, timeout, is_told)
    }

    /// Waits for the greeting on a new connection and leaves the negotiation mode.
    pub(crate) fn over(stream: UnixStream, path: &Path, timeout: Duration) -> Result<Qmp, QmpError> {
        Qmp::greeted(stream, path, Deadline::after(timeout), timeout, false)
    }

    fn greeted(
        stream: UnixStream,
        path: &Path,
        deadline: Deadline,
        timeout: Duration,
        is_told: bool,
    ) -> Result<Qmp, QmpError> {
        let busy = || QmpError::Busy { path: path.to_owned(), waited: timeout };
        let mut lines = Lines { stream, buffer: Vec::new(), searched: 0 };
        let soon = Deadline::after(timeout.min(SOON));
        let mut greeting = lines.next(soon, "the greeting");
        if matches!(greeting, Ok(None)) && timeout > SOON {
            if !is_told {
                say_busy(path, timeout);
            }
            greeting = lines.next(deadline, "the greeting");
        }
        let greeting = match greeting {
            Ok(Some(line)) => line,
            Ok(None) => return Err(busy()),
            Err(QmpError::BadJson { seen, .. }) => {
                return Err(QmpError::NotQmp { path: path.to_owned(), seen });
            }
            Err(error) => return Err(error),
        };
        let Some(version) = version(&greeting) else {
            return Err(QmpError::NotQmp {
                path: path.to_owned(),
                seen: quoted(greeting.to_string().as_bytes()),
            });
        };
        let mut qmp = Qmp { lines, version, timeout, next_id: 0, events: VecDeque::new() };
        qmp.execute_by("qmp_capabilities", Value::Null, None, deadline, timeout)?;
        Ok(qmp)
    }

    /// The process at the other end, if it can be seen from here.
    pub fn peer_pid(&self) -> Option<i32> {
        let credentials = rustix::net::sockopt::socket_peercred(&self.lines.stream).ok()?;
        Some(credentials.pid.as_raw_nonzero().get())
    }

    /// The version that QEMU greeted with.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Sets how long each command may take from now on. Returns how long that was before.
    pub fn set_timeout(&mut self, timeout: Duration) -> Duration {
        std::mem::replace(&mut self.timeout, timeout)
    }

    /// Runs a command and returns what it returns. `arguments` is an object, or `null` where there are none.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_by(command, arguments, None, Deadline::after(self.timeout), self.timeout)
    }

    /// The same, and gives QEMU a file descriptor with it.
    pub fn execute_with(
        &mut self,
        command: &str,
        arguments: Value,
        descriptor: BorrowedFd<'_>,
    ) -> Result<Value, QmpError> {
        let deadline = Deadline::after(self.timeout);
        self.execute_by(command, arguments, Some(descriptor), deadline, self.timeout)
    }

    fn execute_by(
        &mut self,
        command: &str,
        arguments: Value,
        descriptor: Option<BorrowedFd<'_>>,
        deadline: Deadline,
        waited: Duration,
    ) -> Result<Value, QmpError> {
        let timed_out = || QmpError::TimedOut { command: command.to_owned(), waited };
        let id = self.next_id;
        self.next_id += 1;
        let mut request = json!({ "execute": command, "id": id });
        if !arguments.is_null() {
            request["arguments"] = arguments;
        }
        if !self.lines.send(&request, descriptor, deadline, command)? {
            return Err(timed_out());
        }
        let mut late = 0;
        loop {
            let Some(mut line) = self.lines.next(deadline, command)? else { return Err(timed_out()) };
            // What was there in time is read, but no more than that of a QEMU that never stops talking.
            late += usize::from(deadline.remaining().is_none());
            if late > MAX_EVENTS {
                return Err(timed_out());
            }
            if let Some(event) = QmpEvent::of(&line) {
                self.keep(event);
                continue;
            }
            if let Some(error) = line.get("error") {
                // QEMU leaves the id out where it could not read the command, and then there is no other command it can mean.
                if line.get("id").is_none_or(|seen| *seen == id) {
                    let text =
                        |key| error.get(key).and_then(Value::as_str).unwrap_or("no reason given").to_owned();
                    let (class, desc) = (text("class"), text("desc"));
                    return Err(QmpError::Refused { command: command.to_owned(), class, desc });
                }
            } else if line.get("id").is_some_and(|seen| *seen == id)
                && let Some(returned) = line.get_mut("return")
            {
                return Ok(returned.take());
            }
            // Anything else is the late answer to a command that timed out, or of no version of QMP so far.
        }
    }

    /// The next event, in the order they happened; `None`: none came in time.
    pub fn next_event(&mut self, timeout: Duration) -> Result<Option<QmpEvent>, QmpError> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        let deadline = Deadline::after(timeout);
        loop {
            let Some(line) = self.lines.next(deadline, "an event")? else { return Ok(None) };
            if let Some(event) = QmpEvent::of(&line) {
                return Ok(Some(event));
            }
        }
    }

    fn keep(&mut self, event: QmpEvent) {
        if self.events.len() == MAX_EVENTS
            && let Some(lost) = self.events.pop_front()
        {
            tracing::warn!("more than {MAX_EVENTS} events of QEMU wait to be read; dropped {}", lost.name);
        }
        self.events.push_back(event);
    }
}

/// `None`: no such thing as a greeting.
fn version(greeting: &Value) -> Option<Version> {
    let qemu = greeting.get("QMP")?.get("version")?.get("qemu")?;
    let part = |key| u32::try_from(qemu.get(key)?.as_u64()?).ok();
    Some(Version { major: part("major")?, minor: part("minor")?, micro: part("micro")? })
}

fn say_busy(path: &Path, timeout: Duration) {
    tracing::warn!(
        "{} is busy: another client (libvirt, a script) is connected, or QEMU hangs; waiting up to {timeout:?}",
        path.display()
    );
}

/// `None`: others wait in front of us until the deadline. `wait` is called now and then meanwhile.
fn connect(path: &Path, deadline: Deadline, mut wait: impl FnMut()) -> io::Result<Option<UnixStream>> {
    let address = SocketAddrUnix::new(path)?;
    // A blocking connect would wait without end where the queue of the listener is full, and QEMU's holds one client.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    loop {
        match rustix::net::connect(&socket, &address) {
            Ok(()) => break,
            Err(Errno::AGAIN | Errno::INTR) if deadline.remaining().is_some() => {
                wait();
                thread::sleep(Duration::from_millis(10));
            }
            Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        }
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(Some(stream))
}

/// The beginning of a line, for a message.
fn quoted(line: &[u8]) -> String {
    let cut = &line[..line.len().min(QUOTED)];
    let mut text = String::from_utf8_lossy(cut).into_owned();
    if cut.len() < line.len() {
        text.push('…');
    }
    text
}

/// When waiting ends; never, if that is too far away to be said.
#[derive(Clone, Copy, Debug)]
struct Deadline(Option<Instant>);

impl Deadline {
    fn after(timeout: Duration) -> Deadline {
        Deadline(Instant::now().checked_add(timeout))
    }

    /// `None`: it is over.
    fn remaining(self) -> Option<Duration> {
        let Some(at) = self.0 else { return Some(Duration::MAX) };
        // Sockets take a timeout of zero for none at all.
        at.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
    }

    /// The same as a timeout of a socket.
    fn socket_timeout(self) -> Option<Option<Duration>> {
        // More seconds than a day are as good as none to wait for a line, and some make the system refuse.
        self.remaining().map(|left| Some(left.min(Duration::from_secs(86_400))))
    }
}

/// The socket, as lines of JSON.
#[derive(Debug)]
struct Lines {
    stream: UnixStream,
    buffer: Vec<u8>,
    /// So many bytes of the buffer are known to hold no end of a line.
    searched: usize,
}

impl Lines {
    /// The next line; `None`: it did not come in time, and may still come.
    fn next(&mut self, deadline: Deadline, during: &str) -> Result<Option<Value>, QmpError> {
        let failed = |source| QmpError::Io { during: during.to_owned(), source };
        let mut chunk = [0; 16 << 10];
        let mut late = 0;
        loop {
            while let Some(line) = self.take_line() {
                // An empty line, or what is left of one that ended in CR LF.
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return serde_json::from_slice(&line)
                    .map(Some)
                    .map_err(|e| QmpError::BadJson { seen: quoted(&line), reason: e.to_string() });
            }
            if self.buffer.len() > MAX_LINE {
                return Err(QmpError::LineTooLong);
            }
            // Without time to wait, what is there is read all the same.
            let read = match deadline.socket_timeout() {
                Some(timeout) => {
                    self.stream.set_read_timeout(timeout).map_err(failed)?;
                    self.stream.read(&mut chunk)
                }
                None if late > MAX_LINE => return Ok(None),
                None => match rustix::net::recv(&self.stream, &mut chunk[..], RecvFlags::DONTWAIT) {
                    Ok((n, _)) => {
                        late += n;
                        Ok(n)
                    }
                    Err(Errno::AGAIN) => return Ok(None),
                    Err(error) => Err(error.into()),
                },
            };
            match read {
                Ok(0) => return Err(QmpError::Gone { during: during.to_owned() }),
                Ok(n) => self.buffer.extend_from_slice(&chunk[..n]),
                Err(e) if e.kind() == ErrorKind::ConnectionReset => {
                    return Err(QmpError::Gone { during: during.to_owned() });
                }
                Err(e) if passing(&e) => {}
                Err(e) => return Err(failed(e)),
            }
        }
    }

    fn take_line(&mut self) -> Option<Vec<u8>> {
        let Some(at) = self.buffer[self.searched..].iter().position(|&byte| byte == b'\n') else {
            self.searched = self.buffer.len();
            return None;
        };
        let rest = self.buffer.split_off(self.searched + at + 1);
        self.searched = 0;
        Some(std::mem::replace(&mut self.buffer, rest))
    }

    /// Sends a line, and a descriptor with its first byte; `false`: QEMU did not take it in time.
    fn send(
        &mut self,
        line: &Value,
        mut descriptor: Option<BorrowedFd<'_>>,
        deadline: Deadline,
        during: &str,
    ) -> Result<bool, QmpError> {
        let failed = |source| QmpError::Io { during: during.to_owned(), source };
        let line = format!("{line}\n");
        let mut left = line.as_bytes();
        while !left.is_empty() {
            let Some(timeout) = deadline.socket_timeout() else { return Ok(false) };
            self.stream.set_write_timeout(timeout).map_err(failed)?;
            match send_with(&self.stream, left, descriptor) {
                Ok(n) => {
                    left = &left[n..];
                    descriptor = None;
                }
                Err(e) if matches!(e.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {
                    return Err(QmpError::Gone { during: during.to_owned() });
                }
                Err(e) if passing(&e) => {}
                Err(e) => return Err(failed(e)),
            }
        }
        Ok(true)
    }
}

/// Sends a part of these bytes, and a descriptor with them.
fn send_with(stream: &UnixStream, bytes: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = descriptor.as_slice();
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("no room for a descriptor"));
    }
    Ok(rustix::net::sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?)
}

/// Whether to look at the clock and try again.
fn passing(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests;
