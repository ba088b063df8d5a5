//! Reading from a lasting connection: pieces, confirmations, the end.

use std::io::{self, ErrorKind, IoSliceMut, Read};
use std::sync::PoisonError;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use pagewarp_engine::flow::lock;
use pagewarp_engine::transport::Stream;

use super::{Inner, LOOK, Reading, Status, Trouble, ended, over};
use crate::lasting::SOFT_WINDOW;
use crate::lasting::frame::{HEADER_LEN, Piece, invalid};

/// Bytes that are taken off a connection that nobody reads, while confirmations are looked for. Nobody sends so many without being read.
const MAX_INBOX: usize = 32 << 20;
/// How many of them are acted upon at a time.
const MAX_LOOKS: usize = 64;

impl Inner {
    pub(super) fn read(&self, bytes: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
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
    pub(super) fn look_for_confirmation(&self, reading: &mut Reading, must: bool) -> Result<(), Trouble> {
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

    /// Whether the other end has closed the connection or will not go on with it. A broken connection is waited for.
    pub(in crate::lasting) fn is_hung_up(&self) -> bool {
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
