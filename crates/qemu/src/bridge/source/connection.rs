//! One connection of the source QEMU, and what its threads share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pagewarp_engine::flow::{Flow, Stopped, lock};

use crate::bridge::outbox::Outbox;
use crate::bridge::socket::Socket;
use crate::bridge::source::marks::Marks;
use crate::bridge::source::serialize::Parts;
use crate::protocol::frame::HEADER_LEN;
use crate::window::{Together, Window};

/// How often a connection that waits for room is looked at: whoever hangs up meanwhile wants nothing more delivered.
const LOOK: Duration = Duration::from_millis(5);

/// So many bytes of frames may always be on the way: less would be a burden on fast links.
const MIN_WIRE: u64 = 512 << 10;

/// What limits the bytes on their way.
struct Windows {
    /// Bytes of the stream.
    stream: Window,
    /// Bytes of frames. After pages that have not changed the stream has a large window, in which pages that do not compress would last for long.
    wire: Window,
}

impl Windows {
    fn room(&mut self, together: &Together) -> u64 {
        let wire_room = self.wire.size().max(MIN_WIRE).saturating_sub(self.wire.in_flight());
        // Tells the window whether the link is what limits.
        let _ = self.wire.room();
        let room = together.room(self.stream.room(), self.stream.in_flight());
        if wire_room > 0 { room } else { 0 }
    }
}

/// A connection of the source QEMU.
pub(crate) struct Connection {
    /// In the order in which QEMU opened them; 0 is the main channel.
    pub(crate) number: u16,
    pub(crate) qemu: Socket,
    /// Segments that are ready to be sent.
    pub(crate) outbox: Outbox<Box<Parts>>,
    windows: Mutex<Windows>,
    /// What is compared, if that was agreed on.
    pub(crate) marks: Mutex<Marks>,
    together: Arc<Together>,
    room: Condvar,
    /// Whether all that QEMU sent was taken from it.
    ended: AtomicBool,
    /// Bytes of frames handed to the link.
    pub(crate) sent_bytes: AtomicU64,
    /// Bytes of frames that the destination has received, as it says.
    pub(crate) received_bytes: AtomicU64,
}

impl Connection {
    /// `window` makes a window for the link.
    pub(crate) fn new(
        number: u16,
        qemu: Socket,
        window: impl Fn() -> Window,
        together: Arc<Together>,
    ) -> Connection {
        Connection {
            number,
            qemu,
            outbox: Outbox::new(),
            windows: Mutex::new(Windows { stream: window(), wire: window() }),
            marks: Mutex::new(Marks::new()),
            together,
            room: Condvar::new(),
            ended: AtomicBool::new(false),
            sent_bytes: AtomicU64::new(0),
            received_bytes: AtomicU64::new(0),
        }
    }

    /// Bytes that may be taken from QEMU now.
    pub(crate) fn room(&self) -> u64 {
        lock(&self.windows).room(&self.together)
    }

    /// Waits until there is room, at most for a moment.
    pub(crate) fn wait_for_room(&self, flow: &Flow) -> Result<(), Stopped> {
        flow.check()?;
        let full = |windows: &mut Windows| windows.room(&self.together) == 0;
        let waited = self.room.wait_timeout_while(lock(&self.windows), LOOK, full);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
        Ok(())
    }

    /// Bytes that were taken from QEMU and are not in the other one yet.
    pub(crate) fn in_flight(&self) -> u64 {
        lock(&self.windows).stream.in_flight()
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
        lock(&self.windows).stream.take(bytes as u64);
        self.together.take(bytes as u64);
    }

    /// A frame without its header of so many bytes is going to be sent.
    pub(crate) fn take_wire(&self, bytes: usize) {
        lock(&self.windows).wire.take((HEADER_LEN + bytes) as u64);
    }

    /// The destination QEMU has got so many bytes in all, and the destination bridge so many bytes of frames. Returns how many more the former are, or `Err` with
    /// what it was sent if that is not so many.
    pub(crate) fn deliver(&self, total: u64, received: u64) -> Result<u64, u64> {
        let mut windows = lock(&self.windows);
        let (before, now) = (windows.stream.in_flight(), Instant::now());
        windows.stream.deliver(total, now)?;
        let newly = before - windows.stream.in_flight();
        // It counts other frames too. What it says that cannot be is of no use to it.
        let received = received.min(windows.wire.taken());
        let _ = windows.wire.deliver(received, now);
        drop(windows);
        self.together.deliver(newly);
        self.room.notify_all();
        Ok(newly)
    }

    /// How many bytes of the stream may be on their way.
    pub(crate) fn window_bytes(&self) -> u64 {
        lock(&self.windows).stream.size()
    }

    /// Bytes of frames that are on the link, or in buffers in front of it.
    pub(crate) fn backlog(&self) -> u64 {
        self.sent_bytes.load(Relaxed).saturating_sub(self.received_bytes.load(Relaxed))
    }
}
