//! The serialize stage: decides how hard to compress each segment, encodes its pages and makes frames, on threads that all
//! connections share. What passes as it is has no need of them.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use pagewarp_codec::{
    Backend, BackendError, CpuBackend, EncodeJob, EncodedBatch, Encoder, EncoderConfig, Encoding,
    SharedBackend, SlotUse, plain_hash,
};
use pagewarp_engine::backends::{self, Encoders};
use pagewarp_engine::error::MigrationError;
use pagewarp_engine::flow::{Flow, Stopped, lock};
use pagewarp_engine::metrics::{StageMeter, thread_cpu};
use pagewarp_engine::report::EncodingReport;
use tracing::{trace, warn};

use crate::bridge::order::Order;
use crate::bridge::packing::Packer;
use crate::bridge::report::LevelReport;
use crate::bridge::source::Meters;
use crate::bridge::source::connection::Connection;
use crate::bridge::spare::Spare;
use crate::policy::{self, Class, Interval, Level, Policy};
use crate::protocol::MAX_PAGES;
use crate::protocol::hello::Terms;
use crate::protocol::meta::{self, After, Form, LiteralForm, PageTable};
use crate::segment::{Op, Segment};
use crate::slots::{Plan, SlotTable};

/// Literals from this length on are worth zstd: the description of the VM at the end of a stream, for example.
const ZSTD_FROM: usize = 4096;

/// The buffers of a segment on its way through the source.
#[derive(Default)]
pub(crate) struct Parts {
    pub(crate) segment: Segment,
    /// The number of the segment on its connection.
    pub(crate) number: u64,
    /// Its epoch there.
    pub(crate) epoch: u32,
    plan: Plan,
    table: PageTable,
    encoded: EncodedBatch,
    class: Class,
    level: Level,
    /// What encoding has taken so far.
    work: policy::Work,
    /// The frame.
    pub(crate) meta: Vec<u8>,
    packed: Vec<u8>,
}

impl Parts {
    /// Takes out what an encoder needs.
    fn job(&mut self) -> EncodeJob {
        EncodeJob {
            number: self.number,
            pages: std::mem::take(&mut self.segment.pages),
            slots: std::mem::take(&mut self.plan.slots),
            allowed: Some(self.level.encodings()),
            encoded: std::mem::take(&mut self.encoded),
        }
    }

    /// Puts back what an encoder had.
    fn take_back(&mut self, job: EncodeJob) {
        self.segment.pages = job.pages;
        self.plan.slots = job.slots;
        self.encoded = job.encoded;
    }

    /// The payload of the frame, if it is not the plain pages.
    pub(crate) fn payload(&self) -> Option<&[u8]> {
        match self.table.form {
            Form::Plain => None,
            Form::Encoded => Some(&self.encoded.payload),
            Form::Zstd | Form::Lz4 => Some(&self.packed),
        }
    }
}

/// A segment and its connection.
struct Work {
    connection: Arc<Connection>,
    parts: Box<Parts>,
}

impl Work {
    /// How others refer to the segment.
    fn user(&self) -> After {
        After { connection: self.connection.number, segment: self.parts.number }
    }
}

/// What the serializers of a session have in common.
pub(crate) struct Serializing {
    terms: Terms,
    config: EncoderConfig,
    workers: usize,
    queue: Mutex<Queue>,
    arrived: Condvar,
    table: Mutex<SlotTable>,
    policy: Mutex<Policy>,
    order: Order,
    encoders: Mutex<Vec<Box<dyn Encoder>>>,
    fallback: Mutex<Option<String>>,
    spare: Spare<Parts>,
    zero_records: AtomicU64,
    levels: [LevelCount; Level::ALL.len()],
    encodings: [LevelCount; Encoding::ALL.len()],
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Work>,
    closed: bool,
}

#[derive(Default)]
struct LevelCount {
    segments: AtomicU64,
    pages: AtomicU64,
    bytes: AtomicU64,
}

impl LevelCount {
    fn add(&self, pages: usize, bytes: usize) {
        self.segments.fetch_add(1, Relaxed);
        self.pages.fetch_add(pages as u64, Relaxed);
        self.bytes.fetch_add(bytes as u64, Relaxed);
    }
}

impl Serializing {
    /// Sets up encoders for up to `workers` threads. If the backend cannot be set up at all, the CPU does its work.
    pub(crate) fn new(
        backend: &SharedBackend,
        terms: Terms,
        workers: usize,
        policy: Policy,
    ) -> Result<Serializing, BackendError> {
        let wanted = EncoderConfig {
            allowed: terms.encodings,
            history_slots: terms.history_slots,
            max_batch_pages: MAX_PAGES,
        };
        let Encoders { config, encoders, fallback } = backends::encoders(backend, wanted, workers)?;
        Ok(Serializing {
            terms,
            config,
            workers: encoders.len(),
            queue: Mutex::default(),
            arrived: Condvar::new(),
            table: Mutex::new(SlotTable::new(config.history_slots)),
            policy: Mutex::new(policy),
            order: Order::default(),
            encoders: Mutex::new(encoders),
            fallback: Mutex::new(fallback),
            spare: Spare::default(),
            zero_records: AtomicU64::new(0),
            levels: Default::default(),
            encodings: Default::default(),
        })
    }

    pub(crate) fn workers(&self) -> usize {
        self.workers
    }

    /// Empty buffers. There are as many as segments fit into the windows of the connections.
    pub(crate) fn spare(&self) -> Box<Parts> {
        self.spare.take()
    }

    /// The segment was sent.
    pub(crate) fn give_back(&self, mut parts: Box<Parts>) {
        parts.segment.clear();
        self.spare.give_back(parts);
    }

    /// Takes a segment. Those of a connection must come in order, and they are planned in this order.
    pub(crate) fn submit(&self, connection: Arc<Connection>, parts: Box<Parts>, meters: &Meters) {
        let mut work = Work { connection, parts };
        let mut queue = lock(&self.queue);
        meters.copy.timed(|| self.plan(&mut work));
        if work.parts.table.form != Form::Plain {
            queue.waiting.push_back(work);
            drop(queue);
            self.arrived.notify_one();
            return;
        }
        drop(queue);
        // There is so little to do that another thread would take longer to be woken, and to fetch the pages from this one's cache.
        let clock = Clock::start();
        let wire_bytes = meters.copy.timed(|| {
            work.parts.encoded.plain_hash = plain_hash(&work.parts.segment.pages);
            self.frame(&mut work.parts)
        });
        self.finish(work, wire_bytes, clock, Duration::ZERO, &meters.serialize);
    }

    /// Whether there are segments that nobody has begun to encode: one more would have to wait.
    pub(crate) fn is_behind(&self) -> bool {
        !lock(&self.queue).waiting.is_empty()
    }

    /// There will be no more segments.
    pub(crate) fn close(&self) {
        lock(&self.queue).closed = true;
        self.arrived.notify_all();
    }

    /// What the link has done.
    pub(crate) fn interval(&self, interval: &Interval) {
        let mut policy = lock(&self.policy);
        policy.interval(interval);
        trace!(?interval, ?policy, "an interval");
    }

    pub(crate) fn link_bytes_per_s(&self) -> Option<f64> {
        lock(&self.policy).link_bytes_per_s()
    }

    pub(crate) fn slots_in_use(&self) -> u64 {
        lock(&self.table).in_use()
    }

    /// Records of zero pages so far.
    pub(crate) fn zero_records(&self) -> u64 {
        self.zero_records.load(Relaxed)
    }

    pub(crate) fn fallback(&self) -> Option<String> {
        lock(&self.fallback).clone()
    }

    pub(crate) fn levels(&self) -> BTreeMap<String, LevelReport> {
        let report = |count: &LevelCount| LevelReport {
            segments: count.segments.load(Relaxed),
            pages: count.pages.load(Relaxed),
            wire_bytes: count.bytes.load(Relaxed),
        };
        Level::ALL
            .into_iter()
            .zip(&self.levels)
            .map(|(level, count)| (level.name().to_owned(), report(count)))
            .collect()
    }

    pub(crate) fn encodings(&self) -> BTreeMap<String, EncodingReport> {
        let report = |count: &LevelCount| EncodingReport {
            pages: count.pages.load(Relaxed),
            bytes: count.bytes.load(Relaxed),
        };
        let all = Encoding::ALL.into_iter().zip(&self.encodings);
        all.map(|(encoding, count)| (encoding.name().to_owned(), report(count)))
            .filter(|(_, r)| r.pages > 0)
            .collect()
    }

    /// Works until the queue is closed and everything is finished.
    pub(crate) fn work(&self, flow: &Flow, meter: &StageMeter) -> Result<(), Stopped> {
        // Together: the encoders are replaced under this lock.
        let (generation, encoder) = {
            let table = lock(&self.table);
            (table.generation(), lock(&self.encoders).pop())
        };
        let encoder = encoder
            .ok_or_else(|| flow.fail(MigrationError::Internal("more serializers than encoders".into())))?;
        let packer = Packer::new().map_err(|error| flow.fail(error))?;
        Serializer { shared: self, flow, meter, encoder, packer, generation, in_flight: VecDeque::new() }
            .run()
    }

    /// Takes the next segment.
    fn next(&self, wait: bool, flow: &Flow, meter: &StageMeter) -> Result<Option<Work>, Stopped> {
        let mut queue = if wait {
            let ready = |queue: &mut Queue| queue.closed || !queue.waiting.is_empty();
            meter.blocked_in(|| flow.wait(&self.queue, &self.arrived, ready))?
        } else {
            lock(&self.queue)
        };
        Ok(queue.waiting.pop_front())
    }

    /// Decides how hard the segment is compressed, and which history slots it uses.
    fn plan(&self, work: &mut Work) {
        let user = work.user();
        let Parts { segment, epoch, plan, table, class, level, work: spent, .. } = &mut *work.parts;
        table.clear();
        *spent = policy::Work::default();
        (*class, *level) = (Class::First, Level::Pass);
        if segment.pages.is_empty() {
            return;
        }
        let mut slots = lock(&self.table);
        let is_again = 2 * slots.count_bases(&segment.places, *epoch, user) >= segment.pages.len();
        let kind = if is_again { Class::Again } else { Class::First };
        let chosen = lock(&self.policy).choose(kind, Instant::now());
        (*class, *level) = (kind, chosen);
        if chosen != Level::Pass {
            slots.plan(&segment.places, *epoch, user, plan);
            table.form = Form::Encoded;
        }
    }

    /// The encoders of `generation` are lost. The first to say so starts the next generation, on the CPU.
    fn lose(&self, generation: u64, error: &BackendError) -> Result<(), BackendError> {
        let mut table = lock(&self.table);
        if table.generation() == generation {
            warn!(%error, "going on with the CPU backend");
            lock(&self.fallback).get_or_insert_with(|| error.to_string());
            *lock(&self.encoders) = CpuBackend::new().encoders(self.config, self.workers)?;
            table.invalidate();
        }
        Ok(())
    }
}

/// Measures what a step takes.
struct Clock {
    wall: Instant,
    cpu: Duration,
}

impl Clock {
    fn start() -> Clock {
        Clock { wall: Instant::now(), cpu: thread_cpu() }
    }

    /// Adds the time since the start, of which `waited` was spent waiting for a device.
    fn stop(self, waited: Duration, work: &mut policy::Work) {
        work.busy += thread_cpu().saturating_sub(self.cpu) + waited;
        work.wall += self.wall.elapsed();
    }
}

/// One thread's work.
struct Serializer<'a> {
    shared: &'a Serializing,
    flow: &'a Flow,
    meter: &'a StageMeter,
    encoder: Box<dyn Encoder>,
    packer: Packer,
    generation: u64,
    in_flight: VecDeque<Work>,
}

impl Serializer<'_> {
    fn run(&mut self) -> Result<(), Stopped> {
        loop {
            if self.encoder.has_room() {
                match self.shared.next(self.in_flight.is_empty(), self.flow, self.meter)? {
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
        let parts = &mut *work.parts;
        // Versions that this segment uses may still be on their way into the history.
        while !self.shared.order.are_done(&parts.plan.after) {
            if self.in_flight.is_empty() {
                self.meter.blocked_in(|| self.shared.order.wait(&parts.plan.after, self.flow))?;
            } else {
                self.complete()?;
            }
        }
        self.check_generation()?;
        let is_current = parts.plan.generation == self.generation;
        if !is_current {
            // The versions it was planned with are gone, and with them its slots.
            parts.plan.slots.fill(SlotUse::None);
        }
        let job = parts.job();
        let clock = Clock::start();
        let encoder = &mut self.encoder;
        let waited = self.meter.timed_on_device(|| {
            encoder.submit(job);
            let waited = encoder.take_device_wait();
            (waited, waited)
        });
        clock.stop(waited, &mut parts.work);
        self.in_flight.push_back(work);
        Ok(())
    }

    /// Waits for the oldest segment in flight and hands it on.
    fn complete(&mut self) -> Result<(), Stopped> {
        let Some(mut work) = self.in_flight.pop_front() else { return Ok(()) };
        let clock = Clock::start();
        let encoder = &mut self.encoder;
        let (done, waited) = self.meter.timed_on_device(|| {
            let (done, waited) = (encoder.complete(), encoder.take_device_wait());
            ((done, waited), waited)
        });
        let done =
            done.ok_or_else(|| self.flow.fail(MigrationError::Internal("an encoder has lost a job".into())))?;
        work.parts.take_back(done.job);
        if let Err(error) = done.result {
            self.shared.lose(self.generation, &error).map_err(|e| self.flow.fail(e.into()))?;
            return self.encode_alone(work);
        }
        self.finish(work, clock, waited);
        Ok(())
    }

    /// The backend was lost: takes an encoder of the present generation. What is in flight comes back as failed and is encoded alone.
    fn check_generation(&mut self) -> Result<(), Stopped> {
        let generation = lock(&self.shared.table).generation();
        if generation == self.generation {
            return Ok(());
        }
        while !self.in_flight.is_empty() {
            self.complete()?;
        }
        let encoder = lock(&self.shared.encoders).pop();
        self.encoder = encoder.ok_or_else(|| {
            self.flow.fail(MigrationError::Internal("more serializers than encoders".into()))
        })?;
        self.generation = generation;
        Ok(())
    }

    /// Encodes a segment on the CPU and without any version sent before.
    fn encode_alone(&mut self, mut work: Work) -> Result<(), Stopped> {
        let parts = &mut *work.parts;
        parts.plan.slots.fill(SlotUse::None);
        let config = EncoderConfig { history_slots: 0, ..self.shared.config };
        let mut encoder = backends::cpu_encoder(config).map_err(|e| self.flow.fail(e.into()))?;
        let clock = Clock::start();
        encoder.submit(parts.job());
        let done = self.meter.timed(|| encoder.complete());
        let done = done.ok_or_else(|| {
            self.flow.fail(MigrationError::Internal("the CPU backend has lost a job".into()))
        })?;
        parts.take_back(done.job);
        self.finish(work, clock, Duration::ZERO);
        Ok(())
    }

    /// Makes the frame and hands it to the connection. `clock` runs since the last step of encoding began, `waited` for a device.
    fn finish(&mut self, mut work: Work, clock: Clock, waited: Duration) {
        let user = work.user();
        let wire_bytes = self.meter.timed(|| {
            self.shared.pack(&mut work.parts, user, &mut self.packer);
            self.shared.frame(&mut work.parts)
        });
        self.shared.finish(work, wire_bytes, clock, waited, self.meter);
    }
}

impl Serializing {
    /// Says which slots the encoded pages use, and compresses them together.
    fn pack(&self, parts: &mut Parts, user: After, packer: &mut Packer) {
        let Parts { plan, table, encoded, level, packed, .. } = parts;
        let mut slots = None;
        for (slot, &encoding) in plan.slots.iter().map(|slot| slot.slot()).zip(&encoded.encodings) {
            let is_gone = match slot {
                // A zero page is as cheap without a base.
                Some(slot) if encoding == Encoding::Zero => {
                    slots.get_or_insert_with(|| lock(&self.table)).give_back(slot, user)
                }
                _ => false,
            };
            table.slots.push(slot.filter(|_| !is_gone));
        }
        drop(slots);
        // Also if no slot is left: whoever uses one of them next counts on this segment to have waited for those before.
        table.after.extend_from_slice(&plan.after);
        let form = level.packing();
        if self.terms.allow(form) && packer.pack(form, &encoded.payload, packed) {
            table.form = form;
        }
        for (encoding, &len) in encoded.encodings.iter().zip(&encoded.lens) {
            self.encodings[usize::from(encoding.tag())].add(1, len.into());
        }
    }

    /// Makes the frame. Returns its length without the header.
    fn frame(&self, parts: &mut Parts) -> usize {
        let Parts { segment, table, encoded, meta, .. } = parts;
        let zeros = segment.ops.iter().map(|op| if let Op::ZeroRecords(n) = op { u64::from(*n) } else { 0 });
        self.zero_records.fetch_add(zeros.sum(), Relaxed);
        let is_long = segment.literals.len() >= ZSTD_FROM;
        let literals = if is_long && self.terms.zstd { LiteralForm::Zstd } else { LiteralForm::Lz4 };
        meta.clear();
        meta::encode(segment, table, encoded, literals, meta);
        let payload = parts.payload().map_or(std::mem::size_of_val(&parts.segment.pages[..]), <[u8]>::len);
        parts.meta.len() + payload
    }

    /// Hands a frame to its connection, and learns from it.
    fn finish(&self, mut work: Work, wire_bytes: usize, clock: Clock, waited: Duration, meter: &StageMeter) {
        meter.bytes(work.parts.segment.stream_len(), wire_bytes);
        clock.stop(waited, &mut work.parts.work);
        let parts = &work.parts;
        let pages = parts.segment.pages.len();
        if pages > 0 {
            let mut policy = lock(&self.policy);
            policy.encoded(parts.class, parts.level, pages, parts.work, wire_bytes, Instant::now());
            drop(policy);
            self.levels[parts.level as usize].add(pages, wire_bytes);
        }
        let user = work.user();
        self.order.done(user.connection, user.segment);
        let connection = work.connection.clone();
        connection.take_wire(wire_bytes);
        connection.outbox.put(user.segment, work.parts);
    }
}
