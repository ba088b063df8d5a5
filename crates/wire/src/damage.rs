//! Batches that arrived damaged: until when `Ready` has to wait.

use crate::error::{WireError, malformed};

/// The latest epoch of which a batch was damaged.
///
/// Both ends can tell from the messages of the control connection alone whether the pages have come again: the source
/// hears of damage in epoch *e* before the `EpochDone` of *e*, which it waits for before it begins epoch *e* + 2. With
/// that epoch, at the latest, it has sent the pages again. So after the last epoch *l* only damage in *l* − 1 and *l* counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Damage {
    latest: Option<u32>,
}

impl Damage {
    /// A batch of `epoch` was damaged, when `done` of `started` epochs were done.
    pub(crate) fn note(&mut self, epoch: u32, done: u32, started: u32) -> Result<(), WireError> {
        if epoch != done || epoch >= started {
            return Err(malformed(
                "epoch of Damaged",
                epoch,
                format_args!("{done}, the first that is not done"),
            ));
        }
        self.latest = Some(epoch);
        Ok(())
    }

    /// Whether everything started is done, and pages may be missing all the same.
    pub(crate) fn must_send_again(self, started: u32, done: u32) -> bool {
        started == done && self.latest.is_some_and(|epoch| epoch.saturating_add(2) >= started)
    }

    /// `Ok` if `Ready` may be said after `started` epochs, all of them done.
    pub(crate) fn allow_ready(self, started: u32) -> Result<(), WireError> {
        if self.must_send_again(started, started) {
            return Err(malformed(
                "Ready",
                "although batches were damaged",
                "a further epoch with their pages",
            ));
        }
        Ok(())
    }

    /// `Ok` if digests of the memory may be sent, because nothing more is to come: all of `started` epochs are done, and whole.
    pub(crate) fn allow_digests(self, started: u32, done: u32) -> Result<(), WireError> {
        if started != done {
            let expected = format_args!("after EpochDone of epoch {}", started.saturating_sub(1)).to_string();
            return Err(malformed("Digests", "before the last epoch was done", expected));
        }
        if self.must_send_again(started, done) {
            return Err(malformed(
                "Digests",
                "although batches were damaged",
                "a further epoch with their pages",
            ));
        }
        Ok(())
    }
}

/// Checks that `epoch` is the one after `started` epochs, of which all but one are done: so the source knows of all damage before the
/// last epoch when it begins one.
pub(crate) fn next_epoch(epoch: u32, started: u32, done: u32) -> Result<(), WireError> {
    if epoch != started || epoch == u32::MAX {
        return Err(malformed("epoch of EpochStart", epoch, started));
    }
    if epoch > done.saturating_add(1) {
        let expected = format_args!("after EpochDone of epoch {done}").to_string();
        return Err(malformed("EpochStart", format_args!("for epoch {epoch} too early"), expected));
    }
    Ok(())
}
