//! One connection of the source QEMU, and what its threads share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, Ordering::Relaxed};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pagewarp_engine::flow::{Flow, Stopped, lock};

use crate::bridge::outbox::Outbox;
use crate::bridge::socket::Socket;
use crate::bridge::source::serialize::Work;
use crate::window::Window;

/// How often a connection that waits for room is looked at: whoever hangs up meanwhile wants nothing more delivered.
const LOOK: Duration = Duration::from_millis(5);

/// A connection of the source QEMU.
pub(crate) struct Connection {
    /// In the order in which QEMU opened them; 0 is the main channel.
    pub(crate) number: u16,
    pub(crate) qemu: Socket,
    /// Segments that are ready to be sent.
    pub(crate) outbox: Outbox<Work>,
    window: Mutex<Window>,
    room: Condvar,
    /// Whether all that QEMU sent was taken from it.
    ended: AtomicBool,
    /// Bytes of frames handed to the link.
    pub(crate) sent_bytes: AtomicU64,
    /// Bytes of frames that the destination has received, as it says.
    pub(crate) received_bytes: AtomicU64,
}

impl Connection {
    pub(crate) fn new(number: u16, qemu: Socket, window: Window) -> Connection {
        Connection {
            number,
            qemu,
            outbox: Outbox::new(),
            window: Mutex::new(window),
            room: Condvar::new(),
            ended: AtomicBool::new(false),
            sent_bytes: AtomicU64::new(0),
            received_bytes: AtomicU64::new(0),
        }
    }

    /// Bytes that may be taken from QEMU now.
    pub(crate) fn room(&self) -> u64 {
        lock(&self.window).room()
    }

    /// Waits until there is room, at most for a moment.
    pub(crate) fn wait_for_room(&self, flow: &Flow) -> Result<(), Stopped> {
        flow.check()?;
        let full = |window: &mut Window| window.room() == 0;
        let waited = self.room.wait_timeout_while(lock(&self.window), LOOK, full);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
        Ok(())
    }

    /// Bytes that were taken from QEMU and are not in the other one yet.
    pub(crate) fn in_flight(&self) -> u64 {
        lock(&self.window).in_flight()
    }

    /// QEMU has ended its direction, and all of it was taken.
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::Release);
    }

    /// Whether it has, and all of it is in the other QEMU.
    pub(crate) fn is_delivered(&self) -> bool {
        self.ended.load(Ordering::Acquire) && self.in_flight() == 0
    }

    /// So many bytes were taken from QEMU.
    pub(crate) fn take(&self, bytes: usize) {
        lock(&self.window).take(bytes as u64);
    }

    /// The destination QEMU has got so many bytes in all. Returns how many more that are, or `Err` with what it was sent if that is not so many.
    pub(crate) fn deliver(&self, total: u64) -> Result<u64, u64> {
        let mut window = lock(&self.window);
        let before = window.in_flight();
        let result = window.deliver(total, Instant::now()).map(|()| before - window.in_flight());
        drop(window);
        self.room.notify_all();
        result
    }

    /// How many bytes of the stream may be on their way.
    pub(crate) fn window_bytes(&self) -> u64 {
        lock(&self.window).size()
    }

    /// Bytes of frames that are on the link, or in buffers in front of it.
    pub(crate) fn backlog(&self) -> u64 {
        self.sent_bytes.load(Relaxed).saturating_sub(self.received_bytes.load(Relaxed))
    }
}
