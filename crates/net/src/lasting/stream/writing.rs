//! Writing to a lasting connection: what is kept until it is confirmed, and confirming what was received.

use std::io::{self, ErrorKind, IoSlice, Write};
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use pagewarp_engine::flow::lock;
use pagewarp_engine::transport::Stream;

use super::{Inner, LOOK, Status, Trouble, Writing};
use crate::lasting::frame::{MAX_PIECE, Piece, invalid};
use crate::lasting::{CONFIRM_EVERY, SOFT_WINDOW, WINDOW};

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

impl Inner {
    pub(super) fn write(&self, bytes: &[IoSlice<'_>]) -> io::Result<usize> {
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
    pub(super) fn confirm_if_due(&self) {
        // Somebody else may confirm more in between.
        let confirmed = self.confirmed.load(SeqCst);
        if self.received.load(SeqCst).saturating_sub(confirmed) >= CONFIRM_EVERY {
            self.confirm.store(true, SeqCst);
            self.confirm_if_wanted();
        }
    }

    /// Whoever gives `writing` back must look, since others did not wait for it.
    pub(super) fn confirm_if_wanted(&self) {
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
    pub(super) fn torn(&self, writing: &MutexGuard<'_, Writing>, trouble: Trouble) -> Trouble {
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
}

/// Writes the first `len` bytes of these as one piece.
pub(super) fn write_piece(stream: &mut dyn Stream, bytes: &[IoSlice<'_>], len: usize) -> Result<(), Trouble> {
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
