//! One lasting connection: what both ends know of it, and how it ends.

mod handle;
mod mending;
mod reading;
mod writing;

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, TryLockError};
use std::time::{Duration, Instant};

use pagewarp_engine::flow::lock;
use pagewarp_engine::transport::{Interruptions, Outage, Stream, Untrusted};
use rustix::io::Errno;

use super::DETECT;
use super::connect::{GIVEN_UP, Opener};
use super::frame::{HEADER_LEN, Piece, Token, invalid};
use super::limit::Limit;
use super::replay::Replay;

pub(super) use handle::LastingStream;

/// How often somebody who waits looks around.
const LOOK: Duration = Duration::from_millis(20);
/// Bytes that a connection may carry before it is known to belong to a migration.
const FIRST_WORDS: u64 = 1024;
/// How long the end of a connection may take to be told.
const FAREWELL: Duration = Duration::from_millis(200);

/// Who mends a broken connection.
pub(super) enum Role {
    /// This end, by opening another one.
    Opens(Arc<Opener>),
    /// The other end.
    Accepts(Arc<Limit>),
}

/// How many breaks there were, and what they cost, over all connections of a migration.
#[derive(Debug, Default)]
pub(super) struct Counts {
    breaks: AtomicU32,
    outage_ms: AtomicU64,
    sent_again: AtomicU64,
}

impl Counts {
    pub(super) fn get(&self) -> Interruptions {
        Interruptions {
            breaks: self.breaks.load(SeqCst),
            outage_ms: self.outage_ms.load(SeqCst),
            sent_again_bytes: self.sent_again.load(SeqCst),
        }
    }
}

enum Status {
    Up,
    Broken {
        /// Since when nothing has got through, which may be longer than it has been broken.
        since: Instant,
        /// When it broke.
        broke: Instant,
        why: String,
    },
    /// Nothing more can be read or written.
    Over {
        kind: ErrorKind,
        why: String,
        /// Whether the other end knows, or is being told. If not, it waits for another connection.
        told: bool,
    },
}

/// What has got through so far.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Progress {
    received: u64,
    delivered: u64,
}

struct State {
    status: Status,
    /// The last outage, until something has got through, or nothing is left that would have to.
    outage: Option<(Instant, Progress)>,
    /// When the present connection below became that.
    up_since: Instant,
    /// Counts the connections below.
    generation: u64,
    /// The present one.
    below: Box<dyn Stream>,
    /// Somebody is opening another.
    is_mending: bool,
    read_timeout: Option<Duration>,
    write_timeout: Option<Duration>,
}

struct Reading {
    below: Box<dyn Stream>,
    generation: u64,
    header: [u8; HEADER_LEN],
    header_len: usize,
    /// Bytes of the present piece that have not come yet.
    left: usize,
    /// Bytes that have come and were not asked for yet.
    inbox: VecDeque<u8>,
}

struct Writing {
    below: Box<dyn Stream>,
    generation: u64,
    replay: Replay,
}

/// A lasting connection.
pub(super) struct Inner {
    pub(super) token: Token,
    role: Role,
    peer: String,
    identity: Option<Arc<str>>,
    round_trip: Option<Duration>,
    /// How long it may be broken, for the accepting end.
    patience: Duration,
    counts: Arc<Counts>,
    /// Locked before `writing`, and both before `state`, where more than one is.
    reading: Mutex<Reading>,
    writing: Mutex<Writing>,
    state: Mutex<State>,
    changed: Condvar,
    /// Bytes of data received, and those the other end was told of.
    received: AtomicU64,
    confirmed: AtomicU64,
    /// Bytes of data that were sent, or are about to be.
    sent: AtomicU64,
    /// Bytes that the other end has received, as it says.
    delivered: AtomicU64,
    /// A confirmation is due, and whoever holds `writing` sends it.
    confirm: AtomicBool,
    /// The other end has closed in order.
    ended: AtomicBool,
}

/// Why an operation on the connection below did not succeed.
enum Trouble {
    /// It broke.
    Broken(io::Error),
    /// The caller hears of it.
    Final(io::Error),
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Trouble {
        // The peer is silent, or takes nothing, for longer than the caller wants to wait. Of a host that does not answer the kernel says nearly the same.
        let is_late = matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
            && error.raw_os_error() != Some(ETIMEDOUT);
        if is_late || is_untrusted(&error) { Trouble::Final(error) } else { Trouble::Broken(error) }
    }
}

const ETIMEDOUT: i32 = Errno::TIMEDOUT.raw_os_error();

/// Whether it is of no use to try again.
pub(super) fn is_untrusted(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<Untrusted>())
}

fn ended() -> io::Error {
    ErrorKind::UnexpectedEof.into()
}

/// A connection is not gone on with over this one.
fn unwanted() -> io::Error {
    io::Error::other("nobody wants it any more")
}

/// Why nothing more can be read or written, for whoever asks.
fn over(kind: ErrorKind, why: &str) -> io::Error {
    match kind {
        ErrorKind::InvalidData => invalid(why.to_owned()),
        // Of a peer that is late the kernel says nothing that is of use, and callers have words of their own.
        ErrorKind::WouldBlock | ErrorKind::TimedOut => kind.into(),
        kind => io::Error::new(kind, why),
    }
}

impl Inner {
    pub(super) fn new(
        token: Token,
        role: Role,
        peer: String,
        patience: Duration,
        counts: Arc<Counts>,
        below: Box<dyn Stream>,
    ) -> io::Result<Inner> {
        let (for_reading, for_writing) = (below.try_clone_stream()?, below.try_clone_stream()?);
        below.set_timeouts(None, None)?;
        below.detect_death(DETECT)?;
        Ok(Inner {
            token,
            role,
            peer,
            identity: below.peer_identity(),
            round_trip: below.round_trip(),
            patience,
            counts,
            reading: Mutex::new(Reading {
                below: for_reading,
                generation: 0,
                header: [0; HEADER_LEN],
                header_len: 0,
                left: 0,
                inbox: VecDeque::new(),
            }),
            writing: Mutex::new(Writing { below: for_writing, generation: 0, replay: Replay::default() }),
            state: Mutex::new(State {
                status: Status::Up,
                outage: None,
                up_since: Instant::now(),
                generation: 0,
                below,
                is_mending: false,
                read_timeout: None,
                write_timeout: None,
            }),
            changed: Condvar::new(),
            received: AtomicU64::new(0),
            confirmed: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            delivered: AtomicU64::new(0),
            confirm: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        })
    }

    fn check(&self) -> io::Result<()> {
        match &lock(&self.state).status {
            Status::Over { kind, why, .. } => Err(over(*kind, why)),
            _ => Ok(()),
        }
    }

    /// Nothing more can be done for it, which the other end does not know.
    fn give_up(&self, error: io::Error) -> io::Error {
        self.end(error, false)
    }

    fn end(&self, error: io::Error, told: bool) -> io::Error {
        let mut state = lock(&self.state);
        if let Status::Over { kind, why, .. } = &state.status {
            return over(*kind, why);
        }
        state.status = Status::Over { kind: error.kind(), why: error.to_string(), told };
        // What is gone needs no shutdown.
        let _ = state.below.shutdown();
        self.changed.notify_all();
        error
    }

    fn patience(&self) -> Duration {
        match &self.role {
            Role::Opens(opener) => opener.patience().min(self.patience),
            Role::Accepts(limit) => limit.get().min(self.patience),
        }
    }

    fn progress(&self) -> Progress {
        Progress { received: self.received.load(SeqCst), delivered: self.delivered.load(SeqCst) }
    }

    /// Whether it has carried more than anybody can say who has only just connected: of strangers who come and go nobody needs to hear.
    fn is_in_use(&self) -> bool {
        matches!(self.role, Role::Opens(_)) || self.received.load(SeqCst) > FIRST_WORDS
    }

    /// Ends it, in order if that is possible without waiting for long. Returns whether the other end was told.
    fn close(&self, in_order: bool) -> bool {
        let was_up = {
            let mut state = lock(&self.state);
            if let Status::Over { told, .. } = state.status {
                let _ = state.below.shutdown();
                return told;
            }
            let was_up = matches!(state.status, Status::Up);
            let why = "the connection was closed here".into();
            state.status = Status::Over { kind: ErrorKind::NotConnected, why, told: true };
            self.changed.notify_all();
            was_up
        };
        let told = was_up && in_order && self.say_close();
        let state = lock(&self.state);
        let _ = if in_order { state.below.shutdown() } else { state.below.reset() };
        told || self.ended.load(SeqCst)
    }

    fn say_close(&self) -> bool {
        let until = Instant::now() + FAREWELL;
        let mut writing = loop {
            match self.writing.try_lock() {
                Ok(writing) => break writing,
                Err(TryLockError::Poisoned(poisoned)) => break poisoned.into_inner(),
                Err(TryLockError::WouldBlock) if Instant::now() >= until => return false,
                Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(1)),
            }
        };
        let _ = writing.below.set_timeouts(None, Some(FAREWELL));
        let said = writing.below.write_all(&Piece::Close.encode());
        said.and_then(|()| writing.below.flush()).is_ok()
    }

    /// The other end has given up all connections of this group.
    pub(super) fn abandon(&self) {
        self.end(io::Error::new(GIVEN_UP, "the source has given the migration up"), true);
    }

    /// Whether it is broken now, for how long it has been, and how long it may be.
    pub(super) fn outage(&self) -> Option<Outage> {
        match lock(&self.state).status {
            Status::Broken { since, .. } => Some(Outage { lasts: since.elapsed(), most: self.patience() }),
            _ => None,
        }
    }

    pub(super) fn identity(&self) -> &Option<Arc<str>> {
        &self.identity
    }
}
