//! The order of things on one data connection: batches of an epoch, its barrier, batches of the next.

use crate::batch::BatchMeta;
use crate::error::{WireError, malformed};
use crate::message::Message;

/// What travelled on one connection since its last barrier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Epoch {
    epoch: u32,
    batches: u64,
    pages: u64,
}

impl Epoch {
    fn count(&mut self, pages: u64) {
        self.batches += 1;
        self.pages += pages;
    }

    fn next(&mut self) -> Result<(), WireError> {
        let epoch =
            self.epoch.checked_add(1).ok_or_else(|| malformed("epoch", "2^32", "at most 2^32 - 1"))?;
        *self = Epoch { epoch, ..Epoch::default() };
        Ok(())
    }
}

/// Counts what the source sends on one data connection.
#[derive(Clone, Debug, Default)]
pub struct DataSender {
    current: Epoch,
}

impl DataSender {
    /// For a new connection, at epoch 0.
    pub fn new() -> DataSender {
        DataSender::default()
    }

    /// Counts a batch about to be sent.
    ///
    /// # Errors
    /// If it belongs to another epoch than the current one.
    pub fn batch(&mut self, epoch: u32, pages: usize) -> Result<(), WireError> {
        same_epoch(epoch, self.current.epoch)?;
        self.current.count(pages as u64);
        Ok(())
    }

    /// The barrier that ends the current epoch; the next one begins.
    ///
    /// # Errors
    /// If there was no further epoch to begin.
    pub fn barrier(&mut self) -> Result<Message, WireError> {
        let Epoch { epoch, batches, pages } = self.current;
        self.current.next()?;
        Ok(Message::Barrier { epoch, batches, pages })
    }
}

/// Checks what the destination receives on one data connection.
#[derive(Clone, Debug, Default)]
pub struct DataReceiver {
    current: Epoch,
}

impl DataReceiver {
    /// For a new connection, at epoch 0.
    pub fn new() -> DataReceiver {
        DataReceiver::default()
    }

    /// Takes a batch.
    ///
    /// # Errors
    /// If it belongs to another epoch than the current one.
    pub fn batch(&mut self, meta: &BatchMeta) -> Result<(), WireError> {
        same_epoch(meta.epoch, self.current.epoch)?;
        self.current.count(meta.pages.len() as u64);
        Ok(())
    }

    /// Takes a message, which must be the barrier of the current epoch with the right counts, and returns that epoch.
    ///
    /// # Errors
    /// If it is anything else.
    pub fn barrier(&mut self, message: &Message) -> Result<u32, WireError> {
        let &Message::Barrier { epoch, batches, pages } = message else {
            return Err(WireError::Unexpected {
                state: "receiving batches",
                message: message.kind(),
                expected: "Batch or Barrier",
            });
        };
        same_epoch(epoch, self.current.epoch)?;
        let Epoch { batches: our_batches, pages: our_pages, .. } = self.current;
        if (batches, pages) != (our_batches, our_pages) {
            return Err(malformed(
                "counts of a Barrier",
                format_args!("{batches} batches, {pages} pages"),
                format_args!("{our_batches} batches, {our_pages} pages, as received"),
            ));
        }
        self.current.next()?;
        Ok(epoch)
    }

    /// The epoch whose batches are due.
    pub fn epoch(&self) -> u32 {
        self.current.epoch
    }
}

fn same_epoch(seen: u32, expected: u32) -> Result<(), WireError> {
    if seen == expected { Ok(()) } else { Err(malformed("epoch on a data connection", seen, expected)) }
}
