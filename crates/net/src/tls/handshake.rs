//! From a TCP connection to one that both ends trust, in bounded time.
//!
//! In TLS 1.3 a client believes that the handshake is done before the server has looked at its certificate. So the destination says one word when it has: welcome, or
//! why not. The source waits for it, and what is wrong with its certificate is known where the connection is opened.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use pagewarp_engine::transport::Untrusted;
use rustls::Connection;

use super::config::PROTOCOL;
use super::explain::Words;
use super::identity::{Identity, printable};

/// How long a wait goes on though nobody wants it any more.
const STEP: Duration = Duration::from_millis(50);
/// What a TLS record begins with in a handshake: a handshake message, or an alert.
const FIRST_BYTES: [u8; 2] = [22, 21];
/// The destination's word: it follows nothing, or a length of two bytes (little-endian) and a reason.
const WELCOME: u8 = 0;
const REFUSED: u8 = 1;
/// The longest reason.
pub(super) const MAX_REASON: usize = 1024;
/// How long the peer has for reading why it was refused, and how much of what it says meanwhile is thrown away.
const LINGER: Duration = Duration::from_millis(500);
const MAX_LINGER_BYTES: usize = 64 << 10;

/// A handshake that is under way.
pub(super) struct Handshake<'a> {
    pub(super) socket: &'a TcpStream,
    pub(super) tls: Connection,
    pub(super) words: Words<'a>,
    pub(super) until: Instant,
    /// Whether somebody wants the connection.
    pub(super) go_on: &'a dyn Fn() -> bool,
    /// Whether the peer has said anything.
    pub(super) heard: bool,
}

impl Handshake<'_> {
    /// Shakes hands. Returns who the peer is.
    pub(super) fn shake(&mut self) -> io::Result<Identity> {
        self.socket.set_read_timeout(Some(STEP))?;
        self.socket.set_write_timeout(Some(STEP))?;
        self.pump(|tls| Ok(!tls.is_handshaking()))?;
        if self.tls.alpn_protocol() != Some(PROTOCOL) {
            return Err(Untrusted(self.words.other_program()).into());
        }
        let cert = self.tls.peer_certificates().and_then(<[_]>::first);
        let cert = cert.ok_or_else(|| Untrusted(format!("{} has shown no certificate", self.words.peer)))?;
        Ok(Identity::of(cert))
    }

    /// Waits for the destination's word.
    pub(super) fn await_welcome(&mut self) -> io::Result<()> {
        let mut word = Vec::new();
        self.pump(|tls| {
            // One byte at a time: what comes after it is not for us.
            while wanted(&word) > word.len() {
                let mut byte = [0];
                match tls.reader().read(&mut byte) {
                    Ok(0) => return Err(io::ErrorKind::ConnectionAborted.into()),
                    Ok(_) => word.push(byte[0]),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                    Err(e) => return Err(e),
                }
            }
            Ok(true)
        })?;
        match verdict(&word) {
            Verdict::Welcome => Ok(()),
            Verdict::Refused(why) => {
                Err(Untrusted(format!("{} refused this host: {why}", self.words.peer)).into())
            }
            Verdict::Unknown => Err(Untrusted(self.words.other_program()).into()),
        }
    }

    /// Says that the source is welcome.
    pub(super) fn welcome(&mut self) -> io::Result<()> {
        self.say(&[WELCOME])
    }

    /// Says why the source is not.
    pub(super) fn refuse(&mut self, why: &str) -> io::Result<()> {
        let why = &why.as_bytes()[..why.len().min(MAX_REASON)];
        let mut word = vec![REFUSED];
        word.extend((why.len() as u16).to_le_bytes());
        word.extend(why);
        self.tls.writer().write_all(&word)?;
        self.tls.send_close_notify();
        self.flush()
    }

    /// Leaves the socket as it was.
    pub(super) fn done(self) -> io::Result<Connection> {
        self.socket.set_read_timeout(None)?;
        self.socket.set_write_timeout(None)?;
        Ok(self.tls)
    }

    fn say(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.tls.writer().write_all(bytes)?;
        self.flush()
    }

    /// Reads and writes until it is `done`.
    fn pump(&mut self, mut done: impl FnMut(&mut Connection) -> io::Result<bool>) -> io::Result<()> {
        let mut bytes = [0; 4096];
        loop {
            self.flush()?;
            if done(&mut self.tls)? {
                return Ok(());
            }
            match self.socket.read(&mut bytes) {
                Ok(0) => return Err(self.ended()),
                Ok(n) => self.take(&bytes[..n])?,
                Err(e) if is_step(&e) => {}
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Err(self.ended()),
                Err(e) => return Err(e),
            }
            self.check_time()?;
        }
    }

    fn take(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        if !self.heard && !FIRST_BYTES.contains(&bytes[0]) {
            let why = self.words.not_tls(bytes);
            // The answer of TLS to that is an alert, by which a pagewarp without TLS knows what this is.
            let _ = self.tls.read_tls(&mut bytes);
            let _ = self.tls.process_new_packets();
            let _ = self.flush();
            return Err(Untrusted(why).into());
        }
        self.heard = true;
        while !bytes.is_empty() {
            self.tls.read_tls(&mut bytes)?;
            if let Err(error) = self.tls.process_new_packets() {
                // The peer hears why, if it listens.
                let _ = self.flush();
                return Err(Untrusted(self.words.error(&error)).into());
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut self.socket) {
                Ok(_) => {}
                Err(e) if is_step(&e) => self.check_time()?,
                // What it said before it went is worth more.
                Err(e) if is_gone(&e) => return Ok(()),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn check_time(&self) -> io::Result<()> {
        if !(self.go_on)() {
            return Err(io::Error::other("nobody wants the connection any more"));
        }
        if Instant::now() >= self.until {
            let why = format!("{} took too long for the TLS handshake", self.words.peer);
            return Err(io::Error::new(io::ErrorKind::TimedOut, why));
        }
        Ok(())
    }

    fn ended(&self) -> io::Error {
        let why = if self.heard {
            "it ended the connection in the middle of the TLS handshake"
        } else {
            "it ended the connection instead of a TLS handshake; it may not speak TLS (then pass --tls-dir there as well), or be too busy"
        };
        io::Error::new(io::ErrorKind::ConnectionAborted, why)
    }
}

/// What the destination's word says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Welcome,
    /// Why, in words that can be printed.
    Refused(String),
    /// No pagewarp speaks like this.
    Unknown,
}

/// Reads the destination's word, which is [`wanted`] bytes long.
pub(super) fn verdict(word: &[u8]) -> Verdict {
    match word {
        [WELCOME] => Verdict::Welcome,
        [REFUSED, _, _, why @ ..] => Verdict::Refused(printable(&String::from_utf8_lossy(why))),
        _ => Verdict::Unknown,
    }
}

/// How long the destination's word is, as far as it is known.
pub(super) fn wanted(word: &[u8]) -> usize {
    match *word {
        [REFUSED] | [REFUSED, _] => 3,
        [REFUSED, low, high, ..] => 3 + usize::from(u16::from_le_bytes([low, high])).min(MAX_REASON),
        _ => 1,
    }
}

fn is_step(error: &io::Error) -> bool {
    use io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(error.kind(), Interrupted | TimedOut | WouldBlock)
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

/// Ends a connection so that the peer can read what it was told last: with bytes unread here it would be reset, and the news be lost.
pub(super) fn linger(socket: &TcpStream) {
    let until = Instant::now() + LINGER;
    let mut socket = socket;
    let mut left = MAX_LINGER_BYTES;
    let mut bytes = [0; 4096];
    if socket.shutdown(Shutdown::Write).is_err() || socket.set_read_timeout(Some(STEP)).is_err() {
        return;
    }
    while left > 0 && Instant::now() < until {
        match socket.read(&mut bytes) {
            Ok(0) => return,
            Ok(n) => left = left.saturating_sub(n),
            Err(e) if is_step(&e) => {}
            Err(_) => return,
        }
    }
}
