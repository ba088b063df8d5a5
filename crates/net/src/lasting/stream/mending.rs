//! What both ends do when the connection below breaks.

use std::io::{self, ErrorKind, IoSlice};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use pagewarp_engine::flow::lock;
use pagewarp_engine::transport::Stream;
use tracing::{debug, warn};

use super::writing::write_piece;
use super::{Inner, LOOK, Reading, Role, State, Status, Trouble, Writing, over, unwanted};
use crate::lasting::connect::{GIVEN_UP, Opener};
use crate::lasting::frame::invalid;
use crate::lasting::{DETECT, MENDED};

/// How often somebody looks who waits for another one that is about to be done.
const SOON: Duration = Duration::from_millis(1);

impl Inner {
    /// The connection below, of this generation, is broken: waits until there is another, or none will come.
    pub(super) fn mend(&self, generation: u64, trouble: Trouble) -> io::Result<()> {
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

    /// Notes that the connection below is broken, and wakes whoever waits for it. Returns since when nothing has got through: one that can be opened again and again, and
    /// carries nothing, is no better than one that cannot.
    pub(super) fn broken(&self, state: &mut State, why: &str) -> Instant {
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
            Role::Accepts(_) if self.is_in_use() => {
                warn!(
                    "connection {number} with {peer} lost ({why}); waiting for up to {patience:?} for it to connect again"
                );
            }
            Role::Accepts(_) => debug!(number, why, "a new connection broke"),
        }
        self.changed.notify_all();
        since
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
    pub(in crate::lasting) fn resume(
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
}

/// `reading` is locked after `writing` here: whoever holds it does not wait for `writing`, as the connection below is shut down and confirmations are sent only if
/// nobody writes.
fn lock_late(reading: &Mutex<Reading>) -> MutexGuard<'_, Reading> {
    lock(reading)
}
