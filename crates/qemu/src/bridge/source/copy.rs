//! The copy stage: reads from the source QEMU and takes the stream apart.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use pagewarp_codec::PAGE_SIZE;
use pagewarp_engine::error::MigrationError;
use pagewarp_engine::flow::{Stopped, lock};
use pagewarp_engine::transport::Stream;
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

use crate::bridge::running::Running;
use crate::bridge::socket::wait_readable;
use crate::bridge::source::Session;
use crate::bridge::source::connection::Connection;
use crate::bridge::source::serialize::Parts;
use crate::bridge::source::verdict::Seen;
use crate::protocol::MAX_PAGES;
use crate::stream::{ConnectionKind, Limits, Stop, StreamReader};

/// Bytes read at once, at most. QEMU writes up to 256 KiB at a time.
const READ: usize = 256 << 10;
/// Literals and records of a segment, at most.
const LITERALS: usize = 128 << 10;
/// The stages of both bridges and the sockets between them: a segment in each should just fill the window.
const STAGES: u64 = 6;
/// Fewer pages than this are not worth a segment of their own while more are coming.
const MIN_PAGES: usize = 8;
/// How long the rest of an item is waited for before its beginning is sent.
const ITEM_PATIENCE: Duration = Duration::from_millis(2);
/// How long a segment grows at first before it is looked whether those who take it next could by now.
const GROW: Duration = Duration::from_micros(300);
/// How long a channel that carries nothing is waited for at a time.
const WAKE: Duration = Duration::from_millis(50);
/// How long QEMU may hang up unnoticed while nothing is read.
const LOOK: Duration = Duration::from_millis(5);

/// Reads one connection to its end. `Ok` if the source QEMU has ended it in order.
pub(crate) fn run(session: &Session<'_>, connection: &Arc<Connection>) -> Result<(), Stopped> {
    let mut copying = Copying {
        session,
        connection,
        reader: StreamReader::new(session.blocks.clone()),
        buffer: vec![0; READ + 2 * PAGE_SIZE],
        start: 0,
        fill: 0,
        parts: session.serializing.spare(),
        next: 0,
        running: session.verify.then(Running::new),
        packets: 0,
        is_torn: false,
        grow: GROW,
    };
    let result = copying.run();
    if let Some(reason) = copying.reader.raw() {
        session.note_raw(connection.number, reason);
    }
    let count = copying.next;
    result?;
    connection.end();
    if connection.number == 0 {
        session.main_ended()?;
    }
    connection.outbox.end(count);
    Ok(())
}

struct Copying<'a, 's> {
    session: &'a Session<'s>,
    connection: &'a Arc<Connection>,
    reader: StreamReader,
    buffer: Vec<u8>,
    /// What is between these was read and not taken apart yet.
    start: usize,
    fill: usize,
    parts: Box<Parts>,
    /// The number of the next segment.
    next: u64,
    /// What was taken apart, as it was read; if it is compared.
    running: Option<Running>,
    /// Packets of multifd with any contents that were seen before this segment.
    packets: u64,
    /// Whether the segment has parts of items that were not waited for.
    is_torn: bool,
    /// How long the segment grows before it is looked again.
    grow: Duration,
}

/// What a read came to.
enum Read {
    Bytes,
    Nothing,
    End,
}

impl Copying<'_, '_> {
    fn run(&mut self) -> Result<(), Stopped> {
        loop {
            let gone = self.is_main() && self.connection.qemu.is_hung_up();
            if gone {
                self.session.main_hung_up()?;
            }
            let room = self.connection.room();
            if room == 0 {
                self.submit();
                self.session.pace_pressed();
                let (meter, since) = (&self.session.meters.copy, Instant::now());
                meter.blocked_out(|| self.connection.wait_for_room(&self.session.flow))?;
                self.session.held_back(since.elapsed());
                continue;
            }
            let most = match self.session.slew_room() {
                Ok(most) => most.min(room),
                // What is no page is not much, and somebody waits for it: headers, the states of devices, the marks between the epochs of multifd.
                Err(_) if self.is_main() && (!self.reader.in_pages() || self.session.has_channels()) => room,
                Err(wait) => {
                    self.submit();
                    self.session.meters.copy.blocked_out(|| self.session.flow.sleep(wait.min(LOOK)))?;
                    continue;
                }
            };
            match self.read(most)? {
                Read::Bytes => {
                    if gone {
                        // There was more that had not even left this host.
                        self.session.main_hung_up()?;
                    }
                    self.take_apart();
                    self.see();
                }
                Read::Nothing => self.idle()?,
                Read::End => {
                    self.flush_rest();
                    self.see();
                    return Ok(());
                }
            }
        }
    }

    /// Reads what there is, at most so many bytes, without waiting.
    fn read(&mut self, most: u64) -> Result<Read, Stopped> {
        if self.start > 0 {
            self.buffer.copy_within(self.start..self.fill, 0);
            (self.start, self.fill) = (0, self.fill - self.start);
        }
        let most = most.min(READ as u64) as usize;
        let end = (self.fill + most).min(self.buffer.len());
        let (connection, space) = (self.connection, &mut self.buffer[self.fill..end]);
        let read = self.session.meters.copy.timed(|| recv(&connection.qemu, space, RecvFlags::DONTWAIT));
        match read.map(|(_, n)| n) {
            Ok(0) => Ok(Read::End),
            Ok(n) => {
                self.fill += n;
                self.grow = GROW;
                self.connection.take(n);
                self.session.slew_take(n as u64);
                self.session.counts.stream_bytes.fetch_add(n as u64, Relaxed);
                Ok(Read::Bytes)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(Read::Nothing),
            Err(error) => Err(self.session.flow.fail(MigrationError::Link {
                peer: "the source QEMU".into(),
                doing: "reading its stream".into(),
                source: error.into(),
            })),
        }
    }

    /// QEMU has nothing to send now: whatever it may be waiting for must not wait here.
    fn idle(&mut self) -> Result<(), Stopped> {
        // A segment that would wait for the encoders, or for the link, may as well grow meanwhile: QEMU writes no more than 128 KiB at a time.
        let may_grow = !self.parts.segment.is_empty()
            && (self.session.serializing.is_behind() || self.connection.outbox.is_behind());
        if !may_grow {
            self.submit();
        }
        let partial = self.start < self.fill;
        let wait = match partial.then_some(ITEM_PATIENCE) {
            _ if may_grow => Some(self.grow),
            // Shutting the main channel down wakes its reader. The others stay open when the migration fails (see `farewell`).
            None if !self.is_main() => Some(WAKE),
            patience => patience,
        };
        // A link that stands still is not looked at all the time.
        self.grow = (2 * self.grow).min(LOOK);
        let meter = &self.session.meters.copy;
        let is_readable =
            meter.blocked_in(|| wait_readable(&self.connection.qemu, wait)).map_err(|source| {
                self.session.flow.fail(MigrationError::Link {
                    peer: "the source QEMU".into(),
                    doing: "waiting for its stream".into(),
                    source,
                })
            })?;
        if !is_readable && partial && !may_grow {
            self.flush_rest();
        }
        self.session.flow.check()
    }

    fn take_apart(&mut self) {
        loop {
            let limits = self.limits();
            // A SYNC belongs to the epoch that it ends.
            self.parts.epoch = self.reader.epoch();
            let bytes = &self.buffer[self.start..self.fill];
            let (reader, segment) = (&mut self.reader, &mut self.parts.segment);
            let (taken, stop) = self.session.meters.copy.timed(|| reader.read(bytes, &limits, segment));
            self.taken(taken);
            match stop {
                Stop::Hungry => return,
                Stop::Full | Stop::Boundary => self.submit(),
            }
        }
    }

    /// Takes what is left as it is, though it may be the beginning of something.
    fn flush_rest(&mut self) {
        self.is_torn |= self.start < self.fill;
        while self.start < self.fill {
            let limits = self.limits();
            let taken =
                self.reader.flush(&self.buffer[self.start..self.fill], &limits, &mut self.parts.segment);
            self.taken(taken);
            self.submit();
        }
        self.submit();
    }

    /// So many bytes are in the segment now.
    fn taken(&mut self, bytes: usize) {
        if let Some(running) = &mut self.running {
            let bytes = &self.buffer[self.start..self.start + bytes];
            self.session.meters.copy.timed(|| running.update(bytes));
        }
        self.start += bytes;
    }

    /// Whether QEMU takes the segment to its end in any case. It does on the main channel, and with packets that carry anything; but it may close a channel of multifd before it has
    /// read the last packet, which carries nothing.
    fn is_needed(&mut self) -> bool {
        let packets = self.reader.packets_with_contents();
        let is_new = std::mem::replace(&mut self.packets, packets) != packets;
        let is_torn = std::mem::take(&mut self.is_torn);
        let is_parsed =
            self.reader.kind() == ConnectionKind::Multifd && self.reader.raw().is_none() && !is_torn;
        !is_parsed || is_new || !self.parts.segment.pages.is_empty()
    }

    fn is_main(&self) -> bool {
        self.connection.number == 0
    }

    /// Tells what is known of the main channel now.
    fn see(&self) {
        if self.is_main() {
            self.session.see_main(Seen::of(&self.reader));
        }
    }

    fn limits(&self) -> Limits {
        let pages = self.connection.window_bytes() / STAGES / PAGE_SIZE as u64;
        Limits { pages: (pages as usize).clamp(MIN_PAGES, MAX_PAGES), literal_bytes: LITERALS }
    }

    /// Hands the segment on, if there is anything in it.
    fn submit(&mut self) {
        if self.parts.segment.is_empty() {
            return;
        }
        let is_needed = self.is_needed();
        let mut parts = std::mem::replace(&mut self.parts, self.session.serializing.spare());
        parts.number = self.next;
        self.next += 1;
        if let Some(running) = &self.running {
            // Before anybody can have written it.
            lock(&self.connection.marks).segment(running.mark(), is_needed);
        }
        let len = parts.segment.stream_len();
        self.session.meters.copy.bytes(len, len);
        self.session.serializing.submit(self.connection.clone(), parts, &self.session.meters);
    }
}
