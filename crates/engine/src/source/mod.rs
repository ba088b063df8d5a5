//! The source: pre-copy in epochs, then the hand-over.

mod batch;
mod copy;
mod owned;
pub(crate) mod peer;
mod precopy;
mod send;
mod serialize;
mod session;
mod stages;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use pagewarp_codec::{EncoderConfig, Encoding, EncodingSet, PAGE_SIZE};
use pagewarp_wire::{Ack, ErrorCode, Message};
use tracing::{info, warn};

use crate::config::SourceConfig;
use crate::control::MigrationControl;
use crate::error::MigrationError;
use crate::flow::{Flow, StopOnPanic};
use crate::limiter::Limiter;
use crate::link::{Reading, WireBytes};
use crate::metrics::{anonymous_bytes, busiest, ms, thread_cpu};
use crate::report::{EncodingReport, Phase, Progress, SourceReport};
use crate::source::owned::Owned;
use crate::source::peer::Peer;
use crate::source::precopy::Precopy;
use crate::source::send::BatchSender;
use crate::source::serialize::Serializing;
use crate::source::session::{Control, Opened, Opening, PING_EVERY};
use crate::source::stages::{Counters, Pipeline, Sequence, Shared, Stages};
use crate::stage_trace::Track;
use crate::transport::{Connector, OneDestination};
use crate::vm::{DirtyLog, RegionInfo, SourceVm};

/// A destination may get nothing done for so many times as long as it may be silent.
const STALLS: u32 = 2;
/// How often the progress is refreshed.
const REFRESH: Duration = Duration::from_millis(200);

/// See [`crate::migrate`].
pub(crate) fn migrate(
    vm: &mut dyn SourceVm,
    connector: &dyn Connector,
    config: &SourceConfig,
    control: &MigrationControl,
) -> Result<SourceReport, MigrationError> {
    validate(config)?;
    let regions = vm.memory().regions();
    let memory_pages = regions.iter().map(|r| r.pages).sum();
    control.update(|p| *p = Progress { phase: Phase::Connecting, memory_pages, ..Progress::default() });
    let mut log = vm.dirty_log()?;
    let mut owned = Owned::default();
    let result = run(vm, &mut *log, &mut owned, &regions, connector, config, control);
    if result.is_err() {
        owned.give_back(&regions, &mut *log);
    }
    // Logging costs the guest; an error here changes nothing for the migration.
    if let Err(error) = log.stop() {
        warn!(%error, "the dirty log could not be stopped");
    }
    control.update(|p| p.phase = if result.is_ok() { Phase::Done } else { Phase::Failed });
    result
}

fn validate(config: &SourceConfig) -> Result<(), MigrationError> {
    let in_range = |what: &str, value: usize, most: usize| {
        if (1..=most).contains(&value) {
            return Ok(());
        }
        Err(MigrationError::Config(format!("{what} is {value}, expected 1 to {most}")))
    };
    in_range("the number of connections", config.connections, usize::from(pagewarp_wire::MAX_CONNECTIONS))?;
    in_range("the batch size in pages", config.batch_pages, pagewarp_wire::MAX_BATCH_PAGES as usize)?;
    in_range("the number of serialize threads", config.serialize_threads, 256)?;
    if config.bandwidth_bytes_per_s == Some(0) {
        return Err(MigrationError::Config("a bandwidth limit of 0 would never finish".into()));
    }
    Ok(())
}

/// Connects, migrates, and leaves the VM paused if and only if it is not the source's any more.
fn run(
    vm: &mut dyn SourceVm,
    log: &mut dyn DirtyLog,
    owned: &mut Owned,
    regions: &[RegionInfo],
    connector: &dyn Connector,
    config: &SourceConfig,
    control: &MigrationControl,
) -> Result<SourceReport, MigrationError> {
    let started = Instant::now();
    connector.renew();
    let peer_name = connector.peer();
    let flow = Flow::new(control.clone());
    let bytes = WireBytes::default();
    let limiter = config.bandwidth_bytes_per_s.map(Limiter::new);
    let opening = Opening {
        connector,
        config,
        flow: &flow,
        peer: &peer_name,
        bytes: &bytes,
        limiter: limiter.as_ref(),
        destination: OneDestination::default(),
    };
    let Opened { control: channel, reading, data, session } =
        opening.open(vm, regions).inspect_err(|_| flow.stop())?;
    let allowed = EncodingSet::from_bits(session.encodings)
        .ok_or_else(|| MigrationError::Peer("the destination accepted encodings that do not exist".into()))?;
    let batch_pages = session.max_batch_pages as usize;
    let page_counts: Vec<u64> = regions.iter().map(|r| r.pages).collect();
    let encoder_config = EncoderConfig {
        allowed,
        history_slots: history_slots(config.history_bytes, allowed, &page_counts),
        max_batch_pages: batch_pages,
    };
    let workers = if config.pipeline { config.serialize_threads } else { 1 };
    let spilled_before = config.backend.spilled_batches();
    let serializing = Serializing::new(&config.backend, encoder_config, workers, &page_counts)
        .map_err(MigrationError::from)
        .inspect_err(|error| {
            say_why(&channel, error);
            flow.stop();
        })?;
    let counters = Counters::new(serializing.workers(), if config.pipeline { data.len() } else { 1 });
    let peer = Peer::new(regions, session.verify, STALLS * config.peer_timeout);
    let region_ids: Vec<u32> = regions.iter().map(|r| r.id).collect();
    let track = |stage, index| Track::numbered(config.trace.as_ref(), stage, index);
    let senders = data.into_iter().enumerate();
    let senders: Vec<_> =
        senders.map(|(index, writer)| BatchSender::new(writer, &region_ids, track("send", index))).collect();
    let connections = senders.len();
    let serializers: Vec<_> =
        (0..serializing.workers()).map(|index| serializing.serializer(track("serialize", index))).collect();
    let depth = serializers.iter().map(|s| s.depth()).max().unwrap_or(1);
    let shared = Shared::new(serializers.len(), depth, connections);
    let peak_anonymous = AtomicU64::new(anonymous_bytes());
    let main_cpu = thread_cpu();

    let finished = thread::scope(|scope| {
        scope.spawn(|| {
            flow.guard(|| counters.control.cpu_only(|| listen(reading, &channel, &peer, &flow, &counters)));
        });
        scope.spawn(|| {
            flow.guard(|| {
                let meter = &counters.control;
                meter.cpu_only(|| watch(&channel, &peer, &flow, &bytes, started, &peak_anonymous));
            });
        });
        scope.spawn(|| flow.guard(|| watch_outages(connector, &flow)));
        let _stop_on_panic = StopOnPanic(&flow);
        let stages = if config.pipeline {
            Stages::Pipelined(Pipeline::start(scope, &flow, &shared, &counters, serializers, senders))
        } else {
            let serializer = serializers.into_iter().next().expect("a backend makes at least one encoder");
            Stages::Sequential(Box::new(Sequence::new(serializer, senders, &counters)))
        };
        let precopy = Precopy {
            vm,
            log,
            owned,
            regions,
            config,
            batch_pages,
            serializers: serializing.workers() as u32,
            flow: &flow,
            connector,
            channel: &channel,
            peer: &peer,
            counters: &counters,
            bytes: &bytes,
            serializing: &serializing,
            track: Track::of(config.trace.as_ref(), "copy"),
            batches: 0,
            resent_pages: 0,
            verifying: Duration::ZERO,
            started,
        };
        let result = precopy.run(stages);
        if let Err(error) = &result {
            say_why(&channel, error);
        }
        flow.stop();
        result
    })?;

    let mut stages = BTreeMap::from([
        ("copy".to_owned(), counters.copy.report()),
        ("serialize".to_owned(), counters.serialize.report()),
        ("send".to_owned(), counters.send.report()),
    ]);
    let bound_by = busiest(&stages);
    stages.insert("control".to_owned(), counters.control.report());
    // In the pipeline the caller's thread copies and controls; sequentially it also does everything else.
    let caller_cpu = ms(finished.thread_cpu.saturating_sub(main_cpu));
    let elsewhere = |name: &str| if config.pipeline { stages[name].cpu_ms } else { 0.0 };
    let cpu_ms = caller_cpu + elsewhere("serialize") + elsewhere("send") + stages["control"].cpu_ms;
    info!(name = vm.name(), total_ms = finished.total_ms, downtime_ms = finished.downtime_ms, "migrated");
    Ok(SourceReport {
        name: vm.name(),
        backend: config.backend.name(),
        connections: connections as u32,
        pipeline: config.pipeline,
        allowed_encodings: allowed.to_string(),
        total_ms: finished.total_ms,
        downtime_ms: finished.downtime_ms,
        downtime_limit_ms: ms(config.downtime_limit),
        guest_bytes: counters.serialize.bytes_in(),
        wire_bytes: finished.wire_bytes,
        cpu_ms,
        stages,
        bound_by,
        encodings: encodings_by_name(&counters),
        epochs: finished.epochs,
        verified: finished.verify.map(|_| true),
        verify_ms: finished.verify.map(ms),
        fallback: serializing.fallback(),
        fallback_batches: serializing.fallback_batches(),
        spilled_batches: config.backend.spilled_batches().saturating_sub(spilled_before),
        resent_pages: finished.resent_pages,
        history_bytes: serializing.slots_in_use() * PAGE_SIZE as u64,
        peak_anonymous_bytes: peak_anonymous.load(Relaxed),
        interruptions: connector.interruptions(),
        destination: Some(finished.destination),
    })
}

/// Slots that fit the budget, and no more than there are pages.
fn history_slots(budget: u64, allowed: EncodingSet, region_pages: &[u64]) -> u32 {
    if !allowed.needs_base() {
        return 0;
    }
    let pages: u64 = region_pages.iter().sum();
    // The last number means "no slot".
    (budget / PAGE_SIZE as u64).min(pages).min(u64::from(u32::MAX - 1)) as u32
}

fn encodings_by_name(counters: &Counters) -> BTreeMap<String, EncodingReport> {
    let used = Encoding::ALL.into_iter().zip(counters.encodings()).filter(|(_, report)| report.pages > 0);
    used.map(|(encoding, report)| (encoding.name().to_owned(), report)).collect()
}

/// Tells the destination why it ends, unless nobody is there to hear it. The second word is not sent.
fn say_why(channel: &Control<'_>, error: &MigrationError) {
    if let Some(message) = last_word(error) {
        // The peer may be gone, which it then knows without our word.
        let _ = channel.send(&message);
    }
}

/// What the destination is told about an error.
fn last_word(error: &MigrationError) -> Option<Message> {
    let failed = |code| Some(Message::Error { code, message: error.to_string() });
    match error {
        MigrationError::Cancelled | MigrationError::NotConverged(_) => {
            Some(Message::Cancel { reason: error.to_string() })
        }
        MigrationError::Damaged(_) => failed(ErrorCode::Damaged),
        // The code says the rest.
        MigrationError::Differs(pages) => {
            Some(Message::Error { code: ErrorCode::Differs, message: pages.clone() })
        }
        MigrationError::Peer(_) => failed(ErrorCode::Protocol),
        MigrationError::Vm(_) => failed(ErrorCode::Vm),
        MigrationError::Backend(_) => failed(ErrorCode::Backend),
        MigrationError::Internal(_) => failed(ErrorCode::Internal),
        _ => None,
    }
}

/// Reads the control connection until the migration is over.
fn listen(mut reading: Reading<'_>, channel: &Control<'_>, peer: &Peer, flow: &Flow, counters: &Counters) {
    let mut take = || {
        let message = reading.next()?;
        channel.received(&message)?;
        match &message {
            Message::Ack(ack) => check_ack(ack, counters)?,
            &Message::Ping { id } => channel.pong(id)?,
            _ => {}
        }
        peer.note(message, counters.queued_bytes() > 0)
    };
    loop {
        if let Err(error) = take() {
            // Before the end of the migration this is a failure. Afterwards nobody looks, and our last word may be on its way: what the
            // destination says before it has heard that is no reason to shut the connection.
            flow.fail_if_first(error);
            return;
        }
    }
}

/// Shows that a connection is lost, which all others wait for.
fn watch_outages(connector: &dyn Connector, flow: &Flow) {
    while flow.sleep(REFRESH).is_ok() {
        let outage = connector.outage();
        flow.control().update(|p| p.set_outage(outage));
    }
}

/// What was never sent cannot have been restored. Pages are counted before they leave, so that no honest answer is ahead of the count.
fn check_ack(ack: &Ack, counters: &Counters) -> Result<(), MigrationError> {
    let sent = counters.copy.bytes_out() / PAGE_SIZE as u64;
    if ack.pages > sent {
        let what = format!("an Ack for {} pages, expected at most {sent}, as sent", ack.pages);
        return Err(MigrationError::Peer(what));
    }
    Ok(())
}

/// Shows that the source is alive, refreshes the progress, and makes sure that a stop is heard by threads that wait for the network.
fn watch(
    channel: &Control<'_>,
    peer: &Peer,
    flow: &Flow,
    bytes: &WireBytes,
    started: Instant,
    peak_anonymous: &AtomicU64,
) {
    let mut last_ping: Option<Instant> = None;
    let mut last = (Instant::now(), 0);
    while flow.sleep(REFRESH).is_ok() {
        if last_ping.is_none_or(|at| at.elapsed() >= PING_EVERY) {
            last_ping = Some(Instant::now());
            if let Err(error) = channel.send(&peer.ping()) {
                flow.fail_unless_heard(error);
                break;
            }
        }
        let (now, sent) = (Instant::now(), bytes.sent());
        let rate = (sent - last.1) as f64 / (now - last.0).as_secs_f64();
        last = (now, sent);
        peak_anonymous.fetch_max(anonymous_bytes(), Relaxed);
        flow.control().update(|p| {
            p.wire_bytes = sent;
            p.wire_bytes_per_s = rate;
            p.elapsed_ms = ms(started.elapsed());
        });
    }
    // Whoever waits for the network does not notice the stop: say the last word for them and wake them. But whoever has taken the reason
    // is awake and about to do both: the connections must last until then.
    if let Some(message) = flow.look_at_reason(last_word) {
        if let Some(message) = message {
            let _ = channel.send(&message);
        }
        flow.stop();
    }
}
