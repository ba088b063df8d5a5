//! The deserialize stage: decodes the pages of segments, on threads that all connections share. Plain pages are only checked, and have no need of
//! them.
//!
//! A segment is taken up once those that it must come after are done; so no thread ever waits for a segment that may be stuck behind a
//! QEMU that does not read.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use pagewarp_codec::{
    BackendError, DecodeJob, Decoder, DecoderConfig, EncodedBatch, Encoding, History, PAGE_SIZE, Page,
    Resident, SharedBackend, SlotUse, plain_hash,
};
use pagewarp_engine::backends::{self, Decoders};
use pagewarp_engine::error::MigrationError;
use pagewarp_engine::flow::{Stopped, lock};
use pagewarp_engine::metrics::thread_cpu;
use tracing::warn;

use crate::bridge::destination::connection::Connection;
use crate::bridge::destination::{Meters, Session};
use crate::bridge::link::peer_error;
use crate::bridge::order::Order;
use crate::bridge::packing::Unpacker;
use crate::bridge::spare::Spare;
use crate::protocol::MAX_PAGES;
use crate::protocol::hello::Terms;
use crate::protocol::meta::{Form, PageTable};
use crate::segment::{Op, Segment};

/// The buffers of a segment on its way through the destination.
#[derive(Default)]
pub(crate) struct Parts {
    pub(crate) segment: Segment,
    pub(crate) number: u64,
    pub(crate) table: PageTable,
    pub(crate) encoded: EncodedBatch,
    pub(crate) packed: Vec<u8>,
    /// The length of the payload once it is decompressed.
    pub(crate) plain_len: usize,
    /// What it was charged for.
    pub(crate) charge: usize,
    bases: Vec<Page>,
    slots: Vec<SlotUse>,
}

/// What a segment costs beside its buffers.
const OVERHEAD: usize = 4096;

impl Parts {
    /// The memory of this segment until it is written into QEMU: what its buffers take by now, those that served longer segments too, and what they are going
    /// to take for a payload of this length.
    pub(crate) fn footprint(&self, payload_len: usize) -> usize {
        let Segment { ops, literals, words, pages, .. } = &self.segment;
        let (payload, packed, bases) = match self.table.form {
            Form::Plain => (0, 0, 0),
            Form::Encoded => (payload_len, 0, pages.len()),
            Form::Zstd | Form::Lz4 => (self.plain_len, payload_len, pages.len()),
        };
        OVERHEAD
            + size_of::<Op>() * ops.capacity()
            + literals.capacity()
            + size_of::<u64>() * words.capacity()
            + PAGE_SIZE * (pages.capacity() + self.bases.capacity().max(bases))
            + self.encoded.payload.capacity().max(payload)
            + self.packed.capacity().max(packed)
    }
}

struct Work {
    connection: Arc<Connection>,
    parts: Box<Parts>,
    /// Its place among all that arrived.
    arrival: u64,
}

/// What the deserializers of a session have in common.
pub(crate) struct Deserializing {
    config: DecoderConfig,
    queue: Mutex<Queue>,
    changed: Condvar,
    order: Order,
    history: History,
    decoders: Mutex<Vec<Box<dyn Decoder>>>,
    workers: usize,
    /// Whether decoders keep versions themselves. Once the CPU has taken over from one of them, the others would miss what it decodes.
    resident: AtomicBool,
    fallback: Mutex<Option<String>>,
    pub(crate) spare: Spare<Parts>,
    /// Time spent on decoding and pages decoded, for the source's policy.
    pub(crate) decode_ns: AtomicU64,
    pub(crate) decoded_pages: AtomicU64,
}

/// So many segments of a connection are looked at for one whose turn it is: they mostly come in turn.
const LOOK_AHEAD: usize = 8;

#[derive(Default)]
struct Queue {
    /// By connection.
    waiting: BTreeMap<u16, VecDeque<Work>>,
    arrivals: u64,
    closed: bool,
}

impl Queue {
    fn push(&mut self, connection: Arc<Connection>, parts: Box<Parts>) {
        let arrival = self.arrivals;
        self.arrivals += 1;
        self.waiting.entry(connection.number).or_default().push_back(Work { connection, parts, arrival });
    }

    fn is_empty(&self) -> bool {
        self.waiting.values().all(VecDeque::is_empty)
    }

    /// Where the first segment is whose turn it is: its connection, and its place there.
    fn turn(&self, order: &Order) -> Option<(u16, usize)> {
        let mut first: Option<(u64, u16, usize)> = None;
        for (&connection, waiting) in &self.waiting {
            let mut ahead = waiting.iter().take(LOOK_AHEAD).enumerate();
            let Some((at, work)) = ahead.find(|(_, work)| order.are_done(&work.parts.table.after)) else {
                continue;
            };
            if first.is_none_or(|(arrival, ..)| work.arrival < arrival) {
                first = Some((work.arrival, connection, at));
            }
        }
        first.map(|(_, connection, at)| (connection, at))
    }
}

impl Deserializing {
    /// Sets up decoders for up to `workers` threads. If the backend cannot be set up at all, the CPU does its work.
    pub(crate) fn new(
        backend: &SharedBackend,
        terms: &Terms,
        workers: usize,
    ) -> Result<Deserializing, BackendError> {
        let wanted = DecoderConfig {
            allowed: terms.encodings,
            max_batch_pages: MAX_PAGES,
            history_slots: terms.history_slots,
        };
        let Decoders { config, decoders, fallback } = backends::decoders(backend, wanted, workers)?;
        Ok(Deserializing {
            config,
            queue: Mutex::default(),
            changed: Condvar::new(),
            order: Order::default(),
            history: History::new(terms.history_slots, Resident::default()),
            workers: decoders.len(),
            resident: AtomicBool::new(config.history_slots > 0),
            decoders: Mutex::new(decoders),
            fallback: Mutex::new(fallback),
            spare: Spare::default(),
            decode_ns: AtomicU64::new(0),
            decoded_pages: AtomicU64::new(0),
        })
    }

    pub(crate) fn workers(&self) -> usize {
        self.workers
    }

    pub(crate) fn fallback(&self) -> Option<String> {
        lock(&self.fallback).clone()
    }

    /// Takes a segment.
    pub(crate) fn submit(
        &self,
        connection: Arc<Connection>,
        parts: Box<Parts>,
        meters: &Meters,
    ) -> Result<(), MigrationError> {
        if parts.table.form != Form::Plain {
            lock(&self.queue).push(connection, parts);
            self.changed.notify_one();
            return Ok(());
        }
        // There is so little to do that another thread would take longer to be woken, and to fetch the pages from this one's cache.
        let seen = meters.receive.timed(|| plain_hash(&parts.segment.pages));
        let expected = parts.encoded.plain_hash;
        if seen != expected {
            let damaged = format!("plain pages with the hash {seen:#018x}, expected {expected:#018x}");
            return Err(MigrationError::Damaged(damaged));
        }
        let len = parts.segment.stream_len();
        meters.deserialize.bytes(len, len);
        self.finish(connection, parts);
        Ok(())
    }

    /// There will be no more segments.
    pub(crate) fn close(&self) {
        lock(&self.queue).closed = true;
        self.changed.notify_all();
    }

    /// Works until the queue is closed and everything is finished.
    pub(crate) fn work(&self, session: &Session<'_>) -> Result<(), Stopped> {
        let decoder = lock(&self.decoders).pop();
        let decoder = decoder.ok_or_else(|| {
            session.fail(MigrationError::Internal("more deserializers than decoders".into()))
        })?;
        let unpacker = Unpacker::new().map_err(|error| session.fail(error))?;
        let in_flight = VecDeque::new();
        Deserializer { shared: self, session, decoder, unpacker, successor: None, in_flight }.run()
    }

    /// Takes the first segment whose turn it is.
    fn next(&self, wait: bool, session: &Session<'_>) -> Result<Option<Work>, Stopped> {
        let mut turn = None;
        let mut queue = if wait {
            let ready = |queue: &mut Queue| {
                turn = queue.turn(&self.order);
                turn.is_some() || (queue.closed && queue.is_empty())
            };
            let meter = &session.meters.deserialize;
            meter.blocked_in(|| session.flow.wait(&self.queue, &self.changed, ready))?
        } else {
            let queue = lock(&self.queue);
            turn = queue.turn(&self.order);
            queue
        };
        Ok(turn.and_then(|(connection, at)| queue.waiting.get_mut(&connection)?.remove(at)))
    }

    fn finish(&self, connection: Arc<Connection>, parts: Box<Parts>) {
        let number = parts.number;
        self.order.done(connection.number, number);
        // Whoever looks for a segment whose turn it is either sees this one done, or is waiting by now.
        let may_be_waited_for = !lock(&self.queue).is_empty();
        if may_be_waited_for {
            self.changed.notify_all();
        }
        connection.outbox.put(number, parts);
    }
}

/// One thread's work.
struct Deserializer<'a> {
    shared: &'a Deserializing,
    session: &'a Session<'a>,
    decoder: Box<dyn Decoder>,
    unpacker: Unpacker,
    /// The CPU's, which takes over when the other one has given back everything.
    successor: Option<Box<dyn Decoder>>,
    in_flight: VecDeque<Work>,
}

impl Deserializer<'_> {
    fn run(&mut self) -> Result<(), Stopped> {
        loop {
            if self.successor.is_none() && self.decoder.has_room() {
                match self.shared.next(self.in_flight.is_empty(), self.session)? {
                    Some(work) => {
                        self.begin(work)?;
                        continue;
                    }
                    None if self.in_flight.is_empty() => return Ok(()),
                    None => {}
                }
            }
            self.complete()?;
        }
    }

    fn begin(&mut self, mut work: Work) -> Result<(), Stopped> {
        let meter = &self.session.meters.deserialize;
        let parts = &mut *work.parts;
        let cpu = thread_cpu();
        let job = meter.timed(|| self.job(parts));
        let job = job.map_err(|e| self.session.fail(e))?;
        self.in_flight.push_back(work);
        let decoder = &mut self.decoder;
        let waited = meter.timed_on_device(|| {
            decoder.submit(job);
            let waited = decoder.take_device_wait();
            (waited, waited)
        });
        self.count_time(cpu, waited);
        Ok(())
    }

    /// Makes a job of a segment: decompresses its payload and fetches the versions that it needs.
    fn job(&mut self, parts: &mut Parts) -> Result<DecodeJob, MigrationError> {
        let Parts { table, encoded, packed, plain_len, bases, slots, segment, number, .. } = parts;
        let unpacker = &mut self.unpacker;
        if table.form.is_packed() {
            encoded.payload.resize(*plain_len, 0);
            unpacker.unpack(table.form, packed, &mut encoded.payload).map_err(peer_error)?;
        }
        bases.clear();
        slots.clear();
        for (&encoding, &slot) in encoded.encodings.iter().zip(&table.slots) {
            if encoding.needs_base()
                && let Some(slot) = slot
            {
                self.shared.history.with_slot(slot, |version| bases.push(*version));
            }
            // A decoder may keep fewer versions than the history has.
            slots.push(match slot.filter(|&slot| slot < self.shared.config.history_slots) {
                None => SlotUse::None,
                Some(slot) if encoding.needs_base() => SlotUse::Delta(slot),
                Some(slot) => SlotUse::Store(slot),
            });
        }
        // Never asked too early: a segment is taken up when those that its versions come from are finished.
        if !self.shared.resident.load(Relaxed) {
            slots.clear();
        }
        Ok(DecodeJob {
            encoded: std::mem::take(encoded),
            number: *number,
            bases: std::mem::take(bases),
            slots: std::mem::take(slots),
            pages: std::mem::take(&mut segment.pages),
        })
    }

    fn complete(&mut self) -> Result<(), Stopped> {
        let Some(mut work) = self.in_flight.pop_front() else { return Ok(()) };
        let meter = &self.session.meters.deserialize;
        let cpu = thread_cpu();
        let decoder = &mut self.decoder;
        let (done, waited) = meter.timed_on_device(|| {
            let (done, waited) = (decoder.complete(), decoder.take_device_wait());
            ((done, waited), waited)
        });
        let done = done
            .ok_or_else(|| self.session.fail(MigrationError::Internal("a decoder has lost a job".into())))?;
        let job = match done.result {
            Ok(()) => done.job,
            Err(error) => self.decode_again(done.job, &error)?,
        };
        let parts = &mut *work.parts;
        parts.bases = job.bases;
        parts.slots = job.slots;
        parts.encoded = job.encoded;
        parts.segment.pages = job.pages;
        meter.timed(|| {
            let versions = parts.encoded.encodings.iter().zip(&parts.table.slots);
            for (page, (&encoding, slot)) in parts.segment.pages.iter().zip(versions) {
                // What is the same is there already.
                if let (Some(slot), true) = (*slot, encoding != Encoding::Same) {
                    self.shared.history.with_slot(slot, |version| version.0.copy_from_slice(&page.0));
                }
            }
        });
        meter.bytes(parts.encoded.payload.len(), parts.segment.stream_len());
        self.shared.decoded_pages.fetch_add(parts.segment.pages.len() as u64, Relaxed);
        self.count_time(cpu, waited);
        self.shared.finish(work.connection, work.parts);
        if self.in_flight.is_empty()
            && let Some(decoder) = self.successor.take()
        {
            self.decoder = decoder;
        }
        Ok(())
    }

    /// The backend failed, or what it made is not what was sent: the CPU tries, and takes over if that helps.
    fn decode_again(&mut self, job: DecodeJob, error: &BackendError) -> Result<DecodeJob, Stopped> {
        let config = DecoderConfig { history_slots: 0, ..self.shared.config };
        let decoder = self.successor.take().map_or_else(|| backends::cpu_decoder(config), Ok);
        let mut decoder = decoder.map_err(|e| self.session.fail(e.into()))?;
        let none = || self.session.fail(MigrationError::Internal("the CPU backend has lost a job".into()));
        decoder.submit(job);
        let done = self.session.meters.deserialize.timed(|| decoder.complete()).ok_or_else(none)?;
        if let Err(error) = done.result {
            let error = match error {
                // QEMU cannot be asked to send it again.
                BackendError::Peer(error) => MigrationError::Damaged(format!(
                    "{error}; if the source encodes on a GPU, let it try again with --backend cpu"
                )),
                error => error.into(),
            };
            return Err(self.session.fail(error));
        }
        let mut fallback = lock(&self.shared.fallback);
        if fallback.is_none() {
            warn!(%error, "going on with the CPU backend");
            *fallback = Some(error.to_string());
        }
        drop(fallback);
        self.shared.resident.store(false, Relaxed);
        self.successor = Some(decoder);
        Ok(done.job)
    }

    /// Counts the CPU time since `cpu`, and that of a device.
    fn count_time(&self, cpu: Duration, waited: Duration) {
        let time = thread_cpu().saturating_sub(cpu) + waited;
        self.shared.decode_ns.fetch_add(time.as_nanos() as u64, Relaxed);
    }
}
