//! The destination's stages: receive, deserialize, restore, each on threads of its own or all on the connection's.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crossbeam_channel::{Receiver, Sender};
use pagewarp_codec::{Encoding, PAGE_SIZE};
use pagewarp_wire::{Ack, BatchMeta, DataReceiver, HEADER_LEN, Kind, Message, Session};

use crate::compute;
use crate::destination::damage::Damage;
use crate::destination::deserialize::Deserializer;
use crate::destination::gate::Gate;
use crate::destination::restore::{Incoming, Restorer};
use crate::destination::session::Control;
use crate::error::MigrationError;
use crate::flow::{Flow, Stopped};
use crate::link::{Reading, peer_error};
use crate::metrics::StageMeter;
use crate::pool::Pool;
use crate::stage_trace::Track;

/// Batches that may wait in front of each stage.
pub(crate) const QUEUE: usize = 4;

/// What the stages count.
#[derive(Debug)]
pub(crate) struct Counters {
    pub(crate) receive: StageMeter,
    pub(crate) deserialize: StageMeter,
    pub(crate) restore: StageMeter,
    pub(crate) control: StageMeter,
    /// Batches received, which numbers them.
    received: AtomicU64,
    batches: AtomicU64,
    wire_bytes: AtomicU64,
    pages: AtomicU64,
}

impl Counters {
    /// For this many threads in the stages.
    pub(crate) fn new(connections: usize, deserializers: usize, restorers: usize) -> Counters {
        Counters {
            receive: StageMeter::new(connections),
            deserialize: StageMeter::new(deserializers),
            restore: StageMeter::new(restorers),
            control: StageMeter::new(1),
            received: AtomicU64::new(0),
            batches: AtomicU64::new(0),
            wire_bytes: AtomicU64::new(0),
            pages: AtomicU64::new(0),
        }
    }

    /// What has been restored, or dropped because it was damaged.
    pub(crate) fn restored(&self) -> Ack {
        Ack {
            batches: self.batches.load(Relaxed),
            wire_bytes: self.wire_bytes.load(Relaxed),
            pages: self.pages.load(Relaxed),
        }
    }
}

/// What all stage threads share.
#[derive(Clone, Copy)]
pub(crate) struct Shared<'a> {
    pub(crate) flow: &'a Flow,
    pub(crate) counters: &'a Counters,
    pub(crate) gate: &'a Gate,
    pub(crate) pool: &'a Pool<Incoming>,
    pub(crate) restorer: &'a Restorer,
    pub(crate) damage: &'a Damage,
    pub(crate) control: &'a Control<'a>,
    pub(crate) session: &'a Session,
}

/// What happens to a batch after it was received.
pub(crate) enum Next<'a> {
    /// Another thread deserializes it.
    Queue(Sender<Incoming>),
    /// This thread does the rest.
    Inline(Box<Deserializer<'a>>, Track),
}

/// Reads one data connection until the migration is over.
pub(crate) fn receive_thread<'a>(reading: Reading<'a>, next: Next<'a>, track: Track, shared: Shared<'a>) {
    let mut receiver = Receiving {
        reading,
        next,
        track,
        shared,
        epoch: DataReceiver::new(),
        meta: BatchMeta::default(),
        raw_meta: Vec::new(),
    };
    while receiver.frame().is_ok() {}
}

struct Receiving<'a> {
    reading: Reading<'a>,
    next: Next<'a>,
    track: Track,
    shared: Shared<'a>,
    epoch: DataReceiver,
    meta: BatchMeta,
    raw_meta: Vec<u8>,
}

impl Receiving<'_> {
    fn frame(&mut self) -> Result<(), Stopped> {
        let Shared { flow, counters, gate, pool, .. } = self.shared;
        let meter = &counters.receive;
        let header = meter.blocked_in(|| self.reading.header()).map_err(|e| self.lost(e))?;
        if header.kind() == Kind::Batch {
            let mut batch = meter.blocked_out(|| pool.take(flow))?;
            let begin = self.track.begin();
            batch.job.number = counters.received.fetch_add(1, Relaxed);
            meter.busy(|| self.batch(&header, &mut batch)).map_err(|e| self.lost(e))?;
            self.track.end("receive", batch.job.number, begin);
            meter.bytes(batch.wire_bytes as usize, batch.job.encoded.payload.len());
            meter.blocked_in(|| gate.wait_announced(flow))?;
            gate.enter(batch.region, &batch.pages).map_err(|why| self.lost(MigrationError::Peer(why)))?;
            return self.hand_on(batch);
        }
        let epoch = self
            .reading
            .message(&header)
            .and_then(|message| self.epoch.barrier(&message).map_err(peer_error))
            .map_err(|e| self.lost(e))?;
        meter.blocked_in(|| gate.wait_announced(flow))?;
        if meter.blocked_in(|| gate.pass(flow))? {
            self.shared.damage.end_epoch(epoch).map_err(|e| self.lost(e))?;
            let done = Message::EpochDone { epoch };
            // It may be refused because the source has just said that it ends, and why.
            self.shared.control.send(&done).map_err(|e| flow.fail_unless_heard(e))?;
            gate.open();
        }
        Ok(())
    }

    /// Reads the rest of a batch.
    fn batch(&mut self, header: &pagewarp_wire::Header, batch: &mut Incoming) -> Result<(), MigrationError> {
        let session = self.shared.session;
        // Both lengths were checked against the limits with the header.
        self.raw_meta.resize(header.meta_len(), 0);
        self.reading.fill(&mut self.raw_meta)?;
        self.reading
            .frames
            .batch_meta(header, &self.raw_meta, session, &mut self.meta)
            .map_err(peer_error)?;
        self.epoch.batch(&self.meta).map_err(peer_error)?;
        let encoded = &mut batch.job.encoded;
        encoded.payload.resize(header.payload_len(), 0);
        self.reading.fill(&mut encoded.payload)?;
        encoded.encodings.clear();
        for &tag in &self.meta.tags {
            let encoding = Encoding::from_tag(tag).ok_or_else(|| {
                MigrationError::Internal(format!("tag {tag} was agreed on and is not known"))
            })?;
            encoded.encodings.push(encoding);
        }
        std::mem::swap(&mut encoded.lens, &mut self.meta.lens);
        std::mem::swap(&mut batch.pages, &mut self.meta.pages);
        encoded.plain_hash = self.meta.plain_hash;
        batch.region =
            session.regions.iter().position(|region| region.id == self.meta.region).ok_or_else(|| {
                MigrationError::Internal(format!("region {} is not known", self.meta.region))
            })?;
        (batch.epoch, batch.damage) = (self.meta.epoch, None);
        batch.wire_bytes = (HEADER_LEN + header.body_len()) as u64;
        Ok(())
    }

    fn hand_on(&mut self, batch: Incoming) -> Result<(), Stopped> {
        let Shared { flow, counters, .. } = self.shared;
        match &mut self.next {
            Next::Queue(queue) => counters.receive.blocked_out(|| flow.send(queue, batch)),
            Next::Inline(deserializer, track) => {
                let meter = &counters.deserialize;
                let decoded = compute::submit(&mut **deserializer, batch, meter)
                    .and_then(|()| compute::complete(&mut **deserializer, meter))
                    .map_err(|e| flow.stop_threads(e))?;
                decoded.map_or(Ok(()), |batch| restore(batch, track, &self.shared))
            }
        }
    }

    /// The connection is of no use any more. After the last epoch that means nothing.
    fn lost(&self, error: MigrationError) -> Stopped {
        match error {
            MigrationError::Link { .. } if self.shared.gate.is_closed() => Stopped,
            MigrationError::Link { .. } => self.shared.flow.fail_unless_explained(error),
            other => self.shared.flow.stop_threads(other),
        }
    }
}

/// Decodes batches until the receivers are gone.
pub(crate) fn deserialize_thread(
    mut deserializer: Deserializer<'_>,
    queue: &Receiver<Incoming>,
    next: &Sender<Incoming>,
    shared: Shared<'_>,
) -> Result<(), Stopped> {
    let Shared { flow, counters, .. } = shared;
    let meter = &counters.deserialize;
    compute::run(&mut deserializer, queue, meter, flow, |batch| {
        meter.bytes(batch.job.encoded.payload.len(), batch.pages.len() * PAGE_SIZE);
        meter.blocked_out(|| flow.send(next, batch))
    })
}

/// Restores batches until the deserializers are gone.
pub(crate) fn restore_thread(
    queue: &Receiver<Incoming>,
    track: &Track,
    shared: Shared<'_>,
) -> Result<(), Stopped> {
    while let Some(batch) = shared.counters.restore.blocked_in(|| shared.flow.receive(queue))? {
        restore(batch, track, &shared)?;
    }
    Ok(())
}

/// Restores a batch; one that was damaged is dropped, and the source hears of it before it hears that the epoch is done.
fn restore(mut batch: Incoming, track: &Track, shared: &Shared<'_>) -> Result<(), Stopped> {
    let Shared { flow, counters, gate, pool, restorer, damage, control, session } = *shared;
    match batch.damage.take() {
        None => {
            let begin = track.begin();
            let restored = counters.restore.busy(|| restorer.restore(&mut batch));
            restored.map_err(|e| flow.stop_threads(e.into()))?;
            track.end("restore", batch.job.number, begin);
            let bytes = batch.pages.len() * PAGE_SIZE;
            counters.restore.bytes(bytes, bytes);
        }
        Some(reason) => {
            let (epoch, region) = (batch.epoch, session.regions[batch.region].id);
            damage.note(batch.pages.len(), &reason);
            let message = Message::Damaged { epoch, region, pages: batch.pages.clone(), reason };
            control.send(&message).map_err(|e| flow.fail_unless_explained(e))?;
        }
    }
    counters.pages.fetch_add(batch.pages.len() as u64, Relaxed);
    counters.wire_bytes.fetch_add(batch.wire_bytes, Relaxed);
    counters.batches.fetch_add(1, Relaxed);
    gate.restored();
    pool.give_back(batch);
    Ok(())
}
