//! A lasting connection, seen by those who read and write it, and what both ends do when the one below breaks.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use pagewarp_engine::flow::lock;
use pagewarp_engine::transport::{Interruptions, Outage, Stream, Untrusted};
use rustix::io::Errno;
use tracing::{debug, warn};

use super::connect::{GIVEN_UP, Opener};
use super::frame::{HEADER_LEN, MAX_PIECE, Piece, Token, invalid};
use super::replay::Replay;
use super::{CONFIRM_EVERY, DETECT, MENDED, SOFT_WINDOW, WINDOW};

/// How often somebody who waits looks around.
const LOOK: Duration = Duration::from_millis(20);
/// The same, where somebody else is about to be done.
const SOON: Duration = Duration::from_millis(1);
/// Bytes that are taken off a connection that nobody reads, while confirmations are looked for. Nobody sends so many without being read.
const MAX_INBOX: usize = 32 << 20;
/// How many of them are acted upon at a time.
const MAX_LOOKS: usize = 64;
/// Bytes that a connection may carry before it is known to belong to a migration.
const FIRST_WORDS: u64 = 1024;
/// How long the end of a connection may take to be told.
const FAREWELL: Duration = Duration::from_millis(200);

/// Who mends a broken connection.
pub(super) enum Role {
    /// This end, by opening another one.
    Opens(Arc<Opener>),
    /// The other end.
    Accepts,
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

/// How long the other end has taken nothing, over connections that were there.
struct Stall {
    delivered: u64,
    lasts: Duration,
    looked: Instant,
}

impl Stall {
    fn new(delivered: u64) -> Stall {
        Stall { delivered, lasts: Duration::ZERO, looked: Instant::now() }
    }

    fn look(&mut self, delivered: u64, is_up: bool) {
        if delivered != self.delivered {
            (self.delivered, self.lasts) = (delivered, Duration::ZERO);
        } else if is_up {
            self.lasts += self.looked.elapsed();
        }
        self.skip();
    }

    /// The time since the last look does not count.
    fn skip(&mut self) {
        self.looked = Instant::now();
    }
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

    fn read(&self, bytes: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        if bytes.iter().all(|slice| slice.is_empty()) {
            return Ok(0);
        }
        loop {
            let (result, generation) = {
                let mut reading = lock(&self.reading);
                (self.read_below(&mut reading, bytes), reading.generation)
            };
            match result {
                Ok(n) => {
                    self.confirm_if_due();
                    return Ok(n);
                }
                Err(trouble) => self.mend(generation, trouble)?,
            }
        }
    }

    fn read_below(&self, reading: &mut Reading, bytes: &mut [IoSliceMut<'_>]) -> Result<usize, Trouble> {
        if !reading.inbox.is_empty() {
            return Ok(reading.inbox.read_vectored(bytes)?);
        }
        if self.ended.load(SeqCst) {
            return Ok(0);
        }
        self.usable(reading)?;
        while reading.left == 0 {
            self.header(reading)?;
            if self.ended.load(SeqCst) {
                return Ok(0);
            }
        }
        let n = read_at_most(&mut *reading.below, bytes, reading.left)?;
        if n == 0 {
            return Err(Trouble::Broken(ended()));
        }
        self.received(reading, n);
        Ok(n)
    }

    /// Whether the connection below may be read. From a broken one nothing may be taken any more, though there may be something in it: the other end is told how much
    /// has come, and sends the rest again.
    fn usable(&self, reading: &Reading) -> Result<(), Trouble> {
        let state = lock(&self.state);
        match &state.status {
            Status::Up if state.generation == reading.generation => Ok(()),
            Status::Over { kind, why, .. } => Err(Trouble::Final(over(*kind, why))),
            _ => Err(Trouble::Broken(ended())),
        }
    }

    fn received(&self, reading: &mut Reading, n: usize) {
        reading.left -= n;
        self.received.fetch_add(n as u64, SeqCst);
    }

    /// Reads the header of the next piece and does what it says. Where it stops half way, the rest is read later.
    fn header(&self, reading: &mut Reading) -> Result<(), Trouble> {
        while reading.header_len < HEADER_LEN {
            match reading.below.read(&mut reading.header[reading.header_len..]) {
                Ok(0) => return Err(Trouble::Broken(ended())),
                Ok(n) => reading.header_len += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        reading.header_len = 0;
        let piece = Piece::decode(&reading.header);
        match piece.map_err(|error| Trouble::Final(self.give_up(error)))? {
            Piece::Data(len) => reading.left = len,
            Piece::Confirm(total) => {
                let (before, sent) = (self.delivered.load(SeqCst), self.sent.load(SeqCst));
                if !(before..=sent).contains(&total) {
                    let what =
                        format!("{total} bytes confirmed, of {sent} that were sent, after {before} before");
                    return Err(Trouble::Final(self.give_up(invalid(what))));
                }
                self.delivered.store(total, SeqCst);
                self.changed.notify_all();
            }
            Piece::Close => self.ended.store(true, SeqCst),
        }
        Ok(())
    }

    /// Takes what is there off the connection below, for want of somebody who reads: confirmations are acted upon, the rest is kept.
    fn take_in(&self, reading: &mut Reading) -> Result<(), Trouble> {
        if self.ended.load(SeqCst) {
            return Ok(());
        }
        self.usable(reading)?;
        if reading.left == 0 {
            return self.header(reading);
        }
        let mut bytes = vec![0; reading.left.min(64 << 10)];
        match reading.below.read(&mut bytes)? {
            0 => return Err(Trouble::Broken(ended())),
            n => {
                if reading.inbox.len() + n > MAX_INBOX {
                    let what = format!("more than {MAX_INBOX} bytes that nobody reads");
                    // These are lost. The other end keeps to the protocol here, and takes nothing itself.
                    return Err(Trouble::Final(self.give_up(io::Error::other(what))));
                }
                reading.inbox.extend(&bytes[..n]);
                self.received(reading, n);
            }
        }
        Ok(())
    }

    /// Waits for confirmations, if there has to be one, and acts upon those that are there.
    fn look_for_confirmation(&self, reading: &mut Reading, must: bool) -> Result<(), Trouble> {
        self.usable(reading)?;
        let mut wait = if must { LOOK } else { Duration::ZERO };
        for _ in 0..MAX_LOOKS {
            // For the sake of what can wait not much is taken in before them.
            if !must && reading.inbox.len() >= SOFT_WINDOW {
                break;
            }
            if !reading.below.wait_readable(wait)? {
                break;
            }
            self.take_in(reading)?;
            wait = Duration::ZERO;
        }
        Ok(())
    }

    fn write(&self, bytes: &[IoSlice<'_>]) -> io::Result<usize> {
        let total: usize = bytes.iter().map(|slice| slice.len()).sum();
        let len = total.min(MAX_PIECE);
        if len == 0 {
            return Ok(0);
        }
        let (result, generation) = {
            let mut writing = self.room(len)?;
            writing.replay.push(bytes, len);
            // Before the first of them leaves, so that no honest confirmation is ahead of it.
            self.sent.store(writing.replay.end(), SeqCst);
            let result = write_piece(&mut *writing.below, bytes, len);
            (result.map_err(|trouble| self.torn(&writing, trouble)), writing.generation)
        };
        if let Err(trouble) = result {
            // It is sent again with everything else that has not arrived.
            self.mend(generation, trouble)?;
        }
        self.confirm_if_wanted();
        Ok(len)
    }

    /// Waits until so many bytes may be sent.
    fn room(&self, len: usize) -> io::Result<MutexGuard<'_, Writing>> {
        let mut stall = Stall::new(self.delivered.load(SeqCst));
        loop {
            let mut writing = lock(&self.writing);
            let delivered = self.delivered.load(SeqCst);
            if !writing.replay.confirm(delivered) {
                let (end, waiting) = (writing.replay.end(), writing.replay.len());
                drop(writing);
                return Err(self.give_up(invalid(format!(
                    "{delivered} bytes confirmed, with {waiting} of {end} bytes not confirmed"
                ))));
            }
            self.check()?;
            let used = writing.replay.len();
            let has_room = used == 0 || used + len <= WINDOW;
            if has_room && used < SOFT_WINDOW {
                return Ok(writing);
            }
            // Reading comes first, and whoever reads may want to write.
            let generation = writing.generation;
            let kept = has_room.then_some(writing);
            match self.reading.try_lock() {
                Ok(mut reading) => {
                    let result = self.look_for_confirmation(&mut reading, !has_room);
                    drop(reading);
                    if let Err(trouble) = result {
                        drop(kept);
                        // Not to be forgotten with each break: over one that breaks again and again nothing may ever be taken.
                        self.check_stall(&mut stall)?;
                        self.mend(generation, trouble)?;
                        stall.skip();
                        continue;
                    }
                }
                // Somebody reads.
                Err(TryLockError::WouldBlock | TryLockError::Poisoned(_)) if !has_room => {
                    let state = lock(&self.state);
                    drop(self.changed.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner));
                }
                Err(_) => {}
            }
            if let Some(writing) = kept {
                return Ok(writing);
            }
            self.check_stall(&mut stall)?;
        }
    }

    /// Whether the other end has taken nothing for longer than the caller wants to wait. An outage does not count: it has a patience of its own.
    fn check_stall(&self, stall: &mut Stall) -> io::Result<()> {
        let (timeout, is_up) = {
            let state = lock(&self.state);
            (state.write_timeout, matches!(state.status, Status::Up))
        };
        stall.look(self.delivered.load(SeqCst), is_up);
        if timeout.is_some_and(|timeout| stall.lasts > timeout) {
            return Err(ErrorKind::TimedOut.into());
        }
        Ok(())
    }

    /// Tells the other end how much was received, if it is time to.
    fn confirm_if_due(&self) {
        // Somebody else may confirm more in between.
        let confirmed = self.confirmed.load(SeqCst);
        if self.received.load(SeqCst).saturating_sub(confirmed) >= CONFIRM_EVERY {
            self.confirm.store(true, SeqCst);
            self.confirm_if_wanted();
        }
    }

    /// Whoever gives `writing` back must look, since others did not wait for it.
    fn confirm_if_wanted(&self) {
        while self.confirm.load(SeqCst) {
            let mut writing = match self.writing.try_lock() {
                Ok(writing) => writing,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                // He will.
                Err(TryLockError::WouldBlock) => return,
            };
            if self.confirm.swap(false, SeqCst) {
                let total = self.received.load(SeqCst);
                self.confirmed.store(total, SeqCst);
                if let Err(error) = writing.below.write_all(&Piece::Confirm(total).encode()) {
                    // The other end is told again when it is mended.
                    self.torn(&writing, Trouble::Broken(error));
                }
            }
        }
    }

    /// A piece may have been written in part, which cannot be taken back, and must not be followed by anything: that would be read as a part of it.
    fn torn(&self, writing: &MutexGuard<'_, Writing>, trouble: Trouble) -> Trouble {
        match trouble {
            Trouble::Final(error) => Trouble::Final(self.give_up(error)),
            Trouble::Broken(error) => {
                let mut state = lock(&self.state);
                if state.generation == writing.generation && matches!(state.status, Status::Up) {
                    self.broken(&mut state, &error.to_string());
                }
                Trouble::Broken(error)
            }
        }
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

    /// The connection below, of this generation, is broken: waits until there is another, or none will come.
    fn mend(&self, generation: u64, trouble: Trouble) -> io::Result<()> {
        let error = match trouble {
            Trouble::Broken(error) => error,
            Trouble::Final(error) => return Err(error),
        };
        let mut state = lock(&self.state);
        loop {
            if let Status::Over { kind, why, .. } = &state.status {
                return Err(over(*kind, why));
            }
            if state.generation > generation && matches!(state.status, Status::Up) {
                return Ok(());
            }
            let since = self.broken(&mut state, &error.to_string());
            let patience = self.patience();
            if patience.is_zero() || since.elapsed() >= patience {
                let why = match &state.status {
                    Status::Broken { why, .. } => why.clone(),
                    _ => error.to_string(),
                };
                let tried = if patience.is_zero() {
                    String::new()
                } else {
                    format!(", and it could not be mended in {patience:?}")
                };
                drop(state);
                // Not what broke it: callers have words of their own for an end, or for a peer that is late.
                let what = format!("{why}{tried}");
                return Err(self.give_up(io::Error::new(ErrorKind::ConnectionAborted, what)));
            }
            match &self.role {
                Role::Opens(opener) if !state.is_mending => {
                    state.is_mending = true;
                    drop(state);
                    let opened = self.open_again(opener, since);
                    state = lock(&self.state);
                    state.is_mending = false;
                    if let Err(error) = opened {
                        drop(state);
                        // The other end has said so itself.
                        let told = error.kind() == GIVEN_UP;
                        return Err(self.end(error, told));
                    }
                }
                _ => {
                    let waited = self.changed.wait_timeout(state, LOOK);
                    state = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
            }
        }
    }

    fn patience(&self) -> Duration {
        match &self.role {
            Role::Opens(opener) => opener.patience().min(self.patience),
            Role::Accepts => self.patience,
        }
    }

    /// Notes that the connection below is broken, and wakes whoever waits for it. Returns since when nothing has got through: one that can be opened again and again, and
    /// carries nothing, is no better than one that cannot.
    fn broken(&self, state: &mut State, why: &str) -> Instant {
        if let Status::Broken { since, .. } = state.status {
            return since;
        }
        let (broke, progress) = (Instant::now(), self.progress());
        let since = match state.outage {
            Some((since, before)) if before == progress && state.up_since.elapsed() < MENDED => since,
            _ => broke,
        };
        state.outage = Some((since, progress));
        state.status = Status::Broken { since, broke, why: why.to_owned() };
        let _ = state.below.shutdown();
        self.counts.breaks.fetch_add(1, SeqCst);
        let (patience, number, peer) = (self.patience(), self.token.number, &self.peer);
        match self.role {
            _ if patience.is_zero() => {}
            Role::Opens(_) => {
                warn!("connection {number} to {peer} lost ({why}); trying again for up to {patience:?}");
            }
            Role::Accepts if self.is_in_use() => {
                warn!(
                    "connection {number} with {peer} lost ({why}); waiting for up to {patience:?} for it to connect again"
                );
            }
            Role::Accepts => debug!(number, why, "a new connection broke"),
        }
        self.changed.notify_all();
        since
    }

    fn progress(&self) -> Progress {
        Progress { received: self.received.load(SeqCst), delivered: self.delivered.load(SeqCst) }
    }

    /// Whether it has carried more than anybody can say who has only just connected: of strangers who come and go nobody needs to hear.
    fn is_in_use(&self) -> bool {
        matches!(self.role, Role::Opens(_)) || self.received.load(SeqCst) > FIRST_WORDS
    }

    /// Opens connections until one works, or it is no use.
    fn open_again(&self, opener: &Opener, since: Instant) -> io::Result<()> {
        let is_wanted = || self.check().is_ok() && since.elapsed() < self.patience();
        // Nobody reads any more: the connection below is shut down.
        let received = {
            let _reading = lock(&self.reading);
            self.received.load(SeqCst)
        };
        let Some((below, delivered)) = opener.resume(self.token, received, &self.identity, &is_wanted)?
        else {
            // Whoever looks at the state finds out why.
            return Ok(());
        };
        self.install(below, delivered)
    }

    /// The other end has opened a connection to go on with this one. `answer` is told how much this end has received. `false`: there is nothing to go on with, and no answer
    /// was given.
    pub(super) fn resume(
        &self,
        below: Box<dyn Stream>,
        delivered: u64,
        answer: impl FnOnce(u64) -> io::Result<()>,
    ) -> io::Result<bool> {
        let generation = {
            let mut state = lock(&self.state);
            if matches!(state.status, Status::Over { .. }) {
                return Ok(false);
            }
            self.broken(&mut state, "the source opened another one");
            state.generation
        };
        {
            // Whoever reads stops now, and what has come by then counts.
            let _reading = self.reading_of(generation)?;
            answer(self.received.load(SeqCst))?;
        }
        self.install(below, delivered).map(|()| true)
    }

    /// `reading`, while the connection below, of this generation, is broken. If another one takes its place meanwhile, somebody may be reading that for long.
    fn reading_of(&self, generation: u64) -> io::Result<MutexGuard<'_, Reading>> {
        loop {
            let guard = match self.reading.try_lock() {
                Ok(guard) => Some(guard),
                Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) => None,
            };
            let state = lock(&self.state);
            if state.generation != generation || !matches!(state.status, Status::Broken { .. }) {
                return Err(unwanted());
            }
            match guard {
                Some(guard) => return Ok(guard),
                None => drop(self.changed.wait_timeout(state, SOON).unwrap_or_else(PoisonError::into_inner)),
            }
        }
    }

    /// Goes on over another connection. The other end has `delivered` bytes.
    fn install(&self, below: Box<dyn Stream>, delivered: u64) -> io::Result<()> {
        below.detect_death(DETECT)?;
        let (for_reading, for_writing) = (below.try_clone_stream()?, below.try_clone_stream()?);
        // If another one was quicker, it may be written to for long.
        if !matches!(lock(&self.state).status, Status::Broken { .. }) {
            return Err(unwanted());
        }
        let mut writing = lock(&self.writing);
        let broke = {
            let mut reading = lock_late(&self.reading);
            let mut state = lock(&self.state);
            // Nothing is changed before: another one may have been quicker.
            let Status::Broken { broke, .. } = state.status else {
                return Err(unwanted());
            };
            if !writing.replay.confirm(delivered) {
                let (end, waiting) = (writing.replay.end(), writing.replay.len());
                return Err(invalid(format!(
                    "the other end has {delivered} bytes, with {waiting} of {end} not confirmed"
                )));
            }
            self.delivered.store(delivered, SeqCst);
            writing.below = for_writing;
            // The caller's limits hold for the new one as for the old.
            below.set_timeouts(state.read_timeout, state.write_timeout)?;
            state.generation += 1;
            state.below = below;
            state.status = Status::Up;
            state.up_since = Instant::now();
            if writing.replay.len() == 0 {
                state.outage = None;
            }
            reading.below = for_reading;
            reading.generation = state.generation;
            (reading.header_len, reading.left) = (0, 0);
            writing.generation = state.generation;
            broke
        };
        self.confirmed.store(self.received.load(SeqCst), SeqCst);
        let outage = broke.elapsed();
        self.counts.outage_ms.fetch_add(outage.as_millis() as u64, SeqCst);
        let again = writing.replay.len();
        self.counts.sent_again.fetch_add(again as u64, SeqCst);
        // As loud as the news that it was lost.
        if self.is_in_use() {
            let (number, peer) = (self.token.number, &self.peer);
            warn!("connection {number} with {peer} goes on, after {outage:?}; {again} bytes are sent again");
        }
        self.changed.notify_all();
        let Writing { below, replay, .. } = &mut *writing;
        let mut pieces = replay.pieces();
        let sent =
            pieces.try_for_each(|piece| write_piece(&mut **below, &[IoSlice::new(piece)], piece.len()));
        drop(pieces);
        if let Err(trouble) = sent {
            debug!("it broke again");
            // A break is mended by whoever waits for this.
            if let Trouble::Final(error) = self.torn(&writing, trouble) {
                return Err(error);
            }
        }
        drop(writing);
        self.confirm_if_wanted();
        Ok(())
    }

    /// Whether the other end has closed the connection or will not go on with it. A broken connection is waited for.
    pub(super) fn is_hung_up(&self) -> bool {
        loop {
            if self.ended.load(SeqCst) {
                return true;
            }
            let (is_broken, generation) = {
                let state = lock(&self.state);
                match state.status {
                    Status::Over { .. } => return true,
                    Status::Up if !state.below.is_hung_up() => return false,
                    Status::Up => (false, state.generation),
                    Status::Broken { .. } => (true, state.generation),
                }
            };
            // What is still in it tells whether it is the end or a break.
            let result = match self.reading.try_lock() {
                _ if is_broken => Err(Trouble::Broken(ended())),
                Ok(mut reading) => self.take_in(&mut reading),
                Err(_) => {
                    let state = lock(&self.state);
                    drop(self.changed.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner));
                    continue;
                }
            };
            if let Err(trouble) = result
                && self.mend(generation, trouble).is_err()
            {
                return true;
            }
        }
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

/// `reading` is locked after `writing` here: whoever holds it does not wait for `writing`, as the connection below is shut down and confirmations are sent only if
/// nobody writes.
fn lock_late(reading: &Mutex<Reading>) -> MutexGuard<'_, Reading> {
    lock(reading)
}

/// Reads into the first of these, as many bytes in all as are wanted at most.
fn read_at_most(
    stream: &mut dyn Stream,
    bytes: &mut [IoSliceMut<'_>],
    most: usize,
) -> Result<usize, Trouble> {
    loop {
        let mut total = 0;
        let fitting = bytes.iter().take_while(|slice| {
            total += slice.len();
            total <= most
        });
        let fitting = fitting.count();
        let result = if fitting == 0 {
            let first = bytes.iter_mut().find(|slice| !slice.is_empty());
            let Some(first) = first else { return Ok(0) };
            let len = first.len().min(most);
            stream.read(&mut first[..len])
        } else {
            stream.read_vectored(&mut bytes[..fitting])
        };
        match result {
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            other => return Ok(other?),
        }
    }
}

/// Writes the first `len` bytes of these as one piece.
fn write_piece(stream: &mut dyn Stream, bytes: &[IoSlice<'_>], len: usize) -> Result<(), Trouble> {
    let header = Piece::Data(len).encode();
    let mut slices = Vec::with_capacity(bytes.len() + 1);
    slices.push(IoSlice::new(&header));
    let mut left = len;
    for slice in bytes {
        let slice = &slice[..slice.len().min(left)];
        left -= slice.len();
        if !slice.is_empty() {
            slices.push(IoSlice::new(slice));
        }
    }
    let mut rest = &mut slices[..];
    while !rest.is_empty() {
        // `IOV_MAX` of Linux.
        let many = rest.len().min(1024);
        match stream.write_vectored(&rest[..many]) {
            Ok(0) => return Err(Trouble::Broken(ErrorKind::WriteZero.into())),
            Ok(n) => IoSlice::advance_slices(&mut rest, n),
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(stream.flush()?)
}

/// A handle to a lasting connection.
pub(super) struct LastingStream {
    shared: Arc<Shared>,
}

/// What all handles have in common; the last one closes the connection.
struct Shared {
    inner: Arc<Inner>,
    /// Hears, each time that it is closed, whether the other end was told that it is over.
    closed: Box<dyn Fn(bool) + Send + Sync>,
}

impl Shared {
    fn close(&self, in_order: bool) {
        (self.closed)(self.inner.close(in_order));
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.close(true);
    }
}

impl LastingStream {
    pub(super) fn new(inner: Arc<Inner>, closed: impl Fn(bool) + Send + Sync + 'static) -> LastingStream {
        LastingStream { shared: Arc::new(Shared { inner, closed: Box::new(closed) }) }
    }

    fn inner(&self) -> &Inner {
        &self.shared.inner
    }
}

impl Read for LastingStream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.inner().read(&mut [IoSliceMut::new(bytes)])
    }

    fn read_vectored(&mut self, bytes: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.inner().read(bytes)
    }
}

impl Write for LastingStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.inner().write(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, bytes: &[IoSlice<'_>]) -> io::Result<usize> {
        self.inner().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for LastingStream {
    fn try_clone_stream(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(LastingStream { shared: self.shared.clone() }))
    }

    fn shutdown(&self) -> io::Result<()> {
        self.shared.close(true);
        Ok(())
    }

    fn reset(&self) -> io::Result<()> {
        self.shared.close(false);
        Ok(())
    }

    fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> io::Result<()> {
        let mut state = lock(&self.inner().state);
        (state.read_timeout, state.write_timeout) = (read, write);
        match state.status {
            Status::Up => state.below.set_timeouts(read, write),
            // The next one gets them.
            _ => Ok(()),
        }
    }

    fn detect_death(&self, within: Duration) -> io::Result<()> {
        let state = lock(&self.inner().state);
        match state.status {
            Status::Up => state.below.detect_death(within.min(DETECT)),
            _ => Ok(()),
        }
    }

    fn is_hung_up(&self) -> bool {
        self.inner().is_hung_up()
    }

    fn wait_readable(&self, timeout: Duration) -> io::Result<bool> {
        let inner = self.inner();
        // Somebody reads already, and so would this one have to wait for him.
        let Ok(reading) = inner.reading.try_lock() else { return Ok(true) };
        if !reading.inbox.is_empty() || inner.ended.load(SeqCst) || inner.check().is_err() {
            return Ok(true);
        }
        reading.below.wait_readable(timeout)
    }

    fn peer_identity(&self) -> Option<Arc<str>> {
        self.inner().identity.clone()
    }

    fn round_trip(&self) -> Option<Duration> {
        self.inner().round_trip
    }
}
