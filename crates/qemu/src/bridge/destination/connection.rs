//! One connection on the destination host, and what its threads share.

use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use pagewarp_engine::flow::lock;

use crate::bridge::destination::deserialize::Parts;
use crate::bridge::link::Sending;
use crate::bridge::outbox::Outbox;

/// A connection from the source bridge.
pub(crate) struct Connection {
    /// In the order in which the source QEMU opened them; 0 is the main channel.
    pub(crate) number: u16,
    /// The way back.
    pub(crate) sending: Mutex<Sending>,
    /// Segments that are ready to be written into QEMU.
    pub(crate) outbox: Outbox<Box<Parts>>,
    pub(crate) received_bytes: AtomicU64,
    /// Whether the source has ended it in order: from then on it may hang up.
    pub(crate) ended: AtomicBool,
    /// Whether it has ended in order, and everything was written into QEMU.
    pub(crate) delivered: AtomicBool,
    /// Whether something is being written into QEMU and the source does not know yet that it was.
    writing: Mutex<bool>,
    written: Condvar,
}

impl Connection {
    pub(crate) fn new(number: u16, sending: Sending) -> Connection {
        Connection {
            number,
            sending: Mutex::new(sending),
            outbox: Outbox::new(),
            received_bytes: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            delivered: AtomicBool::new(false),
            writing: Mutex::new(false),
            written: Condvar::new(),
        }
    }

    /// Something is about to be written into QEMU, or was and the source knows.
    pub(crate) fn set_writing(&self, writing: bool) {
        *lock(&self.writing) = writing;
        self.written.notify_all();
    }

    /// Waits a little until the source knows of all that was written.
    pub(crate) fn wait_written(&self, most: Duration) {
        let waited = self.written.wait_timeout_while(lock(&self.writing), most, |writing| *writing);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}
