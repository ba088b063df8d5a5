//! The stages after copy, either each on threads of its own or one after another on the caller's.

use pagewarp_codec::{Encoding, PAGE_SIZE};

use crate::compute;
use crate::error::MigrationError;
use crate::flow::{Flow, MeetingPoint, Outstanding, Stopped, lock};
use crate::metrics::StageMeter;
use crate::pool::Pool;
use crate::report::EncodingReport;
use crate::source::batch::Batch;
use crate::source::send::BatchSender;
use crate::source::serialize::Serializer;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicU64, Ordering::Relaxed};
use crate::sync::channel::{Receiver, Sender, bounded};
use crate::sync::thread::Scope;

/// Batches that may wait in front of each stage. Deeper queues only add to what is in flight when the VM pauses.
const QUEUE: usize = 4;

/// What the stages count.
#[derive(Debug)]
pub(crate) struct Counters {
    pub(crate) copy: StageMeter,
    pub(crate) serialize: StageMeter,
    pub(crate) send: StageMeter,
    pub(crate) control: StageMeter,
    /// Pages and payload bytes by encoding.
    encodings: Mutex<[EncodingReport; Encoding::ALL.len()]>,
    /// Bytes of batches encoded and not yet handed to a connection.
    queued_bytes: AtomicU64,
    /// Bytes of batches handed to the connections.
    sent_bytes: AtomicU64,
}

impl Counters {
    /// For this many threads in the stages.
    pub(crate) fn new(serializers: usize, senders: usize) -> Counters {
        Counters {
            copy: StageMeter::new(1),
            serialize: StageMeter::new(serializers),
            send: StageMeter::new(senders),
            control: StageMeter::new(2),
            encodings: Mutex::default(),
            queued_bytes: AtomicU64::new(0),
            sent_bytes: AtomicU64::new(0),
        }
    }

    /// Use of each encoding so far.
    pub(crate) fn encodings(&self) -> [EncodingReport; Encoding::ALL.len()] {
        *lock(&self.encodings)
    }

    /// Bytes of batches that were handed to the connections.
    pub(crate) fn sent_bytes(&self) -> u64 {
        self.sent_bytes.load(Relaxed)
    }

    /// Bytes of batches that wait for a connection.
    pub(crate) fn queued_bytes(&self) -> u64 {
        self.queued_bytes.load(Relaxed)
    }

    fn serialized(&self, batch: &Batch) {
        let encoded = &batch.job.encoded;
        let mut encodings = lock(&self.encodings);
        for (encoding, &len) in encoded.encodings.iter().zip(&encoded.lens) {
            let count = &mut encodings[usize::from(encoding.tag())];
            count.pages += 1;
            count.bytes += u64::from(len);
        }
        self.serialize.bytes(batch.pages.len() * PAGE_SIZE, encoded.payload.len());
        self.queued_bytes.fetch_add(encoded.payload.len() as u64, Relaxed);
    }

    fn sent(&self, payload: usize, bytes: usize) {
        self.send.bytes(payload, bytes);
        self.queued_bytes.fetch_sub(payload as u64, Relaxed);
        self.sent_bytes.fetch_add(bytes as u64, Relaxed);
    }
}

/// Where the copy stage puts its batches.
pub(crate) enum Stages<'a> {
    /// The stages work at once on different batches.
    Pipelined(Pipeline<'a>),
    /// One after another, on the caller's thread.
    Sequential(Box<Sequence<'a>>),
}

impl Stages<'_> {
    /// An empty batch.
    pub(crate) fn empty_batch(&mut self, flow: &Flow) -> Result<Batch, Stopped> {
        match self {
            Stages::Pipelined(pipeline) => pipeline.counters.copy.blocked_out(|| pipeline.pool.take(flow)),
            Stages::Sequential(sequence) => {
                flow.check()?;
                Ok(std::mem::take(&mut sequence.batch))
            }
        }
    }

    /// Hands a filled batch on.
    pub(crate) fn push(&mut self, batch: Batch, flow: &Flow) -> Result<(), Stopped> {
        match self {
            Stages::Pipelined(pipeline) => {
                pipeline.outstanding.add();
                pipeline.counters.copy.blocked_out(|| flow.send(&pipeline.to_serialize, batch))
            }
            Stages::Sequential(sequence) => sequence.run(batch).map_err(|e| flow.fail_unless_explained(e)),
        }
    }

    /// Returns an empty batch that was not used.
    pub(crate) fn give_back(&mut self, batch: Batch) {
        match self {
            Stages::Pipelined(pipeline) => pipeline.pool.give_back(batch),
            Stages::Sequential(sequence) => sequence.batch = batch,
        }
    }

    /// Ends the epoch: waits until everything pushed is encoded, so that its versions are in the history, and puts a barrier behind it
    /// on every connection. Does not wait for it to be sent.
    pub(crate) fn end_epoch(&mut self, flow: &Flow) -> Result<(), Stopped> {
        match self {
            Stages::Pipelined(pipeline) => pipeline.end_epoch(flow),
            Stages::Sequential(sequence) => sequence.end_epoch().map_err(|e| flow.fail_unless_explained(e)),
        }
    }
}

/// What waits in front of the send stage.
enum Outgoing {
    Batch(Batch),
    Barrier,
}

/// What the threads of a pipeline share.
#[derive(Debug)]
pub(crate) struct Shared {
    pool: Pool<Batch>,
    /// Batches pushed and not yet queued for sending.
    outstanding: Outstanding,
    /// Where the connections wait for each other after a barrier, so that none takes two barriers of an epoch.
    meeting: MeetingPoint,
    connections: usize,
}

impl Shared {
    /// For this many serializers and connections.
    pub(crate) fn new(serializers: usize, depth: usize, connections: usize) -> Shared {
        Shared {
            pool: Pool::new(2 * QUEUE + serializers * depth + connections + 1),
            outstanding: Outstanding::default(),
            meeting: MeetingPoint::new(connections),
            connections,
        }
    }
}

/// The stages on threads of their own. Dropping it ends the threads once their queues are empty.
pub(crate) struct Pipeline<'a> {
    pool: &'a Pool<Batch>,
    outstanding: &'a Outstanding,
    counters: &'a Counters,
    connections: usize,
    to_serialize: Sender<Batch>,
    to_send: Sender<Outgoing>,
}

impl<'a> Pipeline<'a> {
    /// Starts a thread for each serializer and each connection.
    pub(crate) fn start<'scope>(
        scope: &'scope Scope<'scope, 'a>,
        flow: &'a Flow,
        shared: &'a Shared,
        counters: &'a Counters,
        serializers: Vec<Serializer<'a>>,
        senders: Vec<BatchSender<'a>>,
    ) -> Pipeline<'a> {
        let (to_serialize, serialize_queue) = bounded(QUEUE);
        let (to_send, send_queue) = bounded(QUEUE.max(shared.connections));
        for serializer in serializers {
            let (queue, next) = (serialize_queue.clone(), to_send.clone());
            let outstanding = &shared.outstanding;
            scope.spawn(move || {
                flow.guard(|| serialize_thread(serializer, &queue, &next, flow, counters, outstanding));
            });
        }
        for sender in senders {
            let queue = send_queue.clone();
            scope.spawn(move || flow.guard(|| send_thread(sender, &queue, flow, counters, shared)));
        }
        Pipeline {
            pool: &shared.pool,
            outstanding: &shared.outstanding,
            counters,
            connections: shared.connections,
            to_serialize,
            to_send,
        }
    }

    fn end_epoch(&mut self, flow: &Flow) -> Result<(), Stopped> {
        self.counters.copy.blocked_out(|| self.outstanding.wait_for_none(flow))?;
        (0..self.connections).try_for_each(|_| flow.send(&self.to_send, Outgoing::Barrier))
    }
}

fn serialize_thread(
    mut serializer: Serializer<'_>,
    queue: &Receiver<Batch>,
    next: &Sender<Outgoing>,
    flow: &Flow,
    counters: &Counters,
    outstanding: &Outstanding,
) -> Result<(), Stopped> {
    let meter = &counters.serialize;
    compute::run(&mut serializer, queue, meter, flow, |batch| {
        counters.serialized(&batch);
        meter.blocked_out(|| flow.send(next, Outgoing::Batch(batch)))?;
        outstanding.done();
        Ok(())
    })
}

fn send_thread(
    mut sender: BatchSender<'_>,
    queue: &Receiver<Outgoing>,
    flow: &Flow,
    counters: &Counters,
    shared: &Shared,
) -> Result<(), Stopped> {
    let meter = &counters.send;
    while let Some(item) = meter.blocked_in(|| flow.receive(queue))? {
        match item {
            Outgoing::Batch(batch) => {
                let bytes = meter.busy(|| sender.send(&batch)).map_err(|e| flow.fail_unless_explained(e))?;
                counters.sent(batch.job.encoded.payload.len(), bytes);
                shared.pool.give_back(batch);
            }
            Outgoing::Barrier => {
                meter.busy(|| sender.barrier()).map_err(|e| flow.fail_unless_explained(e))?;
                meter.blocked_in(|| shared.meeting.meet(flow))?;
            }
        }
    }
    Ok(())
}

/// The same stages, one after another.
pub(crate) struct Sequence<'a> {
    batch: Batch,
    serializer: Serializer<'a>,
    senders: Vec<BatchSender<'a>>,
    next: usize,
    counters: &'a Counters,
}

impl<'a> Sequence<'a> {
    pub(crate) fn new(
        serializer: Serializer<'a>,
        senders: Vec<BatchSender<'a>>,
        counters: &'a Counters,
    ) -> Sequence<'a> {
        Sequence { batch: Batch::default(), serializer, senders, next: 0, counters }
    }

    fn run(&mut self, batch: Batch) -> Result<(), MigrationError> {
        compute::submit(&mut self.serializer, batch, &self.counters.serialize)?;
        let encoded = compute::complete(&mut self.serializer, &self.counters.serialize)?;
        let batch =
            encoded.ok_or_else(|| MigrationError::Internal("a batch was lost in serialize".into()))?;
        self.counters.serialized(&batch);
        let sender = &mut self.senders[self.next];
        let bytes = self.counters.send.busy(|| sender.send(&batch))?;
        self.next = (self.next + 1) % self.senders.len();
        self.counters.sent(batch.job.encoded.payload.len(), bytes);
        self.batch = batch;
        Ok(())
    }

    fn end_epoch(&mut self) -> Result<(), MigrationError> {
        for sender in &mut self.senders {
            self.counters.send.busy(|| sender.barrier())?;
        }
        Ok(())
    }
}
