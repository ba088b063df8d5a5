//! The serial console, COM1.
//!
//! A byte costs two exits to the hypervisor, so lines are queued and sent a few bytes at a time from the main
//! loop: a long line must not look like a pause.

use crate::cpu::{inb, outb};
use core::fmt;

const DATA: u16 = 0x3f8;
const FIFO_CONTROL: u16 = DATA + 2;
const LINE_STATUS: u16 = DATA + 5;
const TRANSMITTER_EMPTY: u8 = 0x20;
/// Status polls before a byte is sent regardless: there may be no UART behind the port.
const PATIENCE: u32 = 10_000;
const QUEUE: usize = 8192;

/// A queue of bytes for COM1.
pub struct Serial {
    queue: [u8; QUEUE],
    head: usize,
    len: usize,
    /// Lines that did not fit into the queue.
    pub dropped: u64,
    polls: u32,
}

impl Serial {
    pub const fn new() -> Self {
        Serial { queue: [0; QUEUE], head: 0, len: 0, dropped: 0, polls: 0 }
    }

    /// Clears and switches on the transmit FIFO.
    pub fn init(&mut self) {
        outb(FIFO_CONTROL, 0x07);
    }

    /// Queues a line (without its end); it is dropped whole if it does not fit.
    pub fn line(&mut self, text: fmt::Arguments) {
        let mut w = Writer { serial: self, written: 0, full: false };
        // Writing to the queue cannot fail; running out of room is kept in `full`.
        let _ = fmt::write(&mut w, text);
        w.put(b'\r');
        w.put(b'\n');
        let (written, full) = (w.written, w.full);
        if full {
            self.dropped += 1;
        } else {
            self.len += written;
        }
    }

    /// Sends up to `max` queued bytes, if the UART takes them.
    pub fn pump(&mut self, max: usize) {
        if self.len == 0 {
            return;
        }
        if inb(LINE_STATUS) & TRANSMITTER_EMPTY == 0 && self.polls < PATIENCE {
            self.polls += 1;
            return;
        }
        self.polls = 0;
        for _ in 0..max.min(self.len) {
            outb(DATA, self.queue[self.head]);
            self.head = (self.head + 1) % QUEUE;
            self.len -= 1;
        }
    }

    /// Sends everything.
    pub fn flush(&mut self) {
        while self.len > 0 {
            self.pump(16);
        }
    }
}

struct Writer<'a> {
    serial: &'a mut Serial,
    written: usize,
    full: bool,
}

impl Writer<'_> {
    fn put(&mut self, byte: u8) {
        let s = &mut *self.serial;
        if s.len + self.written >= QUEUE {
            self.full = true;
            return;
        }
        s.queue[(s.head + s.len + self.written) % QUEUE] = byte;
        self.written += 1;
    }
}

impl fmt::Write for Writer<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(|b| self.put(b));
        Ok(())
    }
}
