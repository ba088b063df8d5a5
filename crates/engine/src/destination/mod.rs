//! The destination: builds the VM, restores its memory epoch by epoch, and runs it once the source has committed.

mod deserialize;
mod gate;
mod restore;
mod session;
mod stages;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use pagewarp_codec::{DecoderConfig, PAGE_SIZE};
use pagewarp_wire::{Ack, ErrorCode, MAX_DIGESTS, MAX_STATE_LEN, Message, Outcome, StateAssembler};
use tracing::{debug, info, warn};

use crate::config::DestinationConfig;
use crate::control::MigrationControl;
use crate::destination::deserialize::Deserializer;
use crate::destination::gate::Gate;
use crate::destination::restore::Restorer;
use crate::destination::session::{Accepted, Accepting, Control, gone};
use crate::destination::stages::{
    Counters, Next, Pool, QUEUE, Shared, deserialize_thread, receive_thread, restore_thread,
};
use crate::error::MigrationError;
use crate::flow::Flow;
use crate::link::{Reading, WireBytes, peer_error};
use crate::metrics::{anonymous_bytes, busiest, ms, thread_cpu};
use crate::report::{DestinationReport, Phase, Progress};
use crate::transport::Acceptor;
use crate::vm::DestinationVm;

/// How often the source hears what has been restored.
const ACK_EVERY: Duration = Duration::from_millis(25);
/// The source hears something at least this often, so that it knows that this end is alive.
const ALIVE_EVERY: Duration = Duration::from_secs(1);

/// See [`crate::receive`].
pub(crate) fn receive(
    vm: &mut dyn DestinationVm,
    acceptor: &dyn Acceptor,
    config: &DestinationConfig,
    control: &MigrationControl,
) -> Result<DestinationReport, MigrationError> {
    control.update(|p| *p = Progress { phase: Phase::Connecting, ..Progress::default() });
    let flow = Flow::new(control.clone());
    let bytes = WireBytes::default();
    let accepted = Accepting { acceptor, config, flow: &flow, bytes: &bytes }.accept(vm);
    let result =
        accepted.inspect_err(|_| flow.stop()).and_then(|accepted| run(vm, accepted, config, &flow, &bytes));
    control.update(|p| p.phase = if result.is_ok() { Phase::Done } else { Phase::Failed });
    result
}

fn run<'a>(
    vm: &mut dyn DestinationVm,
    accepted: Accepted<'a>,
    config: &DestinationConfig,
    flow: &'a Flow,
    bytes: &'a WireBytes,
) -> Result<DestinationReport, MigrationError> {
    let Accepted { started, name, control, reading, data, session, allowed, pipeline, memory } = accepted;
    let memory_pages = session.regions.iter().map(|r| r.pages).sum();
    flow.control().update(|p| (p.phase, p.memory_pages) = (Phase::Precopy, memory_pages));
    let decoder_config = DecoderConfig { allowed, max_batch_pages: session.max_batch_pages as usize };
    let workers = if pipeline { config.deserialize_threads } else { data.len() };
    let mut decoders = config
        .backend
        .decoders(decoder_config, workers)
        .map_err(MigrationError::from)
        .inspect_err(|e| last_word(&control, flow, e))?;
    if !pipeline && decoders.len() < workers {
        // Without a pipeline each connection decodes for itself, on the CPU if the backend has too few decoders.
        use pagewarp_codec::{Backend, CpuBackend};
        decoders.extend(CpuBackend::new().decoders(decoder_config, workers - decoders.len())?);
    }
    let deserializers: Vec<_> = decoders
        .into_iter()
        .map(|decoder| Deserializer::new(memory.clone(), decoder, decoder_config))
        .collect();
    let in_flight: usize = deserializers.iter().map(Deserializer::depth).sum();
    let counters = Counters::new(data.len(), deserializers.len());
    let gate = Gate::new(data.len(), session.regions.iter().map(|r| r.pages));
    let pool = Pool::new(2 * QUEUE + in_flight + data.len() + 1);
    let restorer = Restorer::new(memory.clone(), session.verify);
    let peak_anonymous = AtomicU64::new(anonymous_bytes());
    let shared = Shared {
        flow,
        counters: &counters,
        gate: &gate,
        pool: &pool,
        restorer: &restorer,
        control: &control,
        session: &session,
    };
    let main_cpu = thread_cpu();

    thread::scope(|scope| {
        scope.spawn(|| counters.control.cpu_only(|| report_back(shared, bytes, started, &peak_anonymous)));
        if pipeline {
            let (to_deserialize, deserialize_queue) = bounded(QUEUE);
            let (to_restore, restore_queue) = bounded(QUEUE);
            for reading in data {
                let next = Next::Queue(to_deserialize.clone());
                scope.spawn(move || receive_thread(reading, next, shared));
            }
            for deserializer in deserializers {
                let (queue, next) = (deserialize_queue.clone(), to_restore.clone());
                scope.spawn(move || deserialize_thread(deserializer, &queue, &next, shared));
            }
            scope.spawn(move || restore_thread(&restore_queue, shared));
        } else {
            for (reading, deserializer) in data.into_iter().zip(deserializers) {
                scope.spawn(move || receive_thread(reading, Next::Inline(Box::new(deserializer)), shared));
            }
        }
        let mut main = Main { vm, reading, shared, state: StateAssembler::new(MAX_STATE_LEN) };
        let result = main.until_committed().and_then(|load_state| {
            main.start()?;
            let mut report = stage_report(&counters);
            report.name = name;
            report.backend = config.backend.name();
            report.total_ms = ms(started.elapsed());
            report.load_state_ms = ms(load_state);
            report.wire_bytes = bytes.received();
            report.cpu_ms += ms(thread_cpu().saturating_sub(main_cpu));
            report.peak_anonymous_bytes = peak_anonymous.load(Relaxed).max(anonymous_bytes());
            // The VM runs here: whatever happens to the connection from now on changes nothing.
            if let Err(error) = main.farewell(&report) {
                warn!(%error, "the VM runs here, but the source may not know it");
            }
            Ok(report)
        });
        let result = result.map_err(|error| {
            // If another thread failed first, its reason is the better one: ours is only that the connection was shut down.
            flow.stop_threads(error);
            let error = flow.take_reason();
            last_word(&control, flow, &error);
            error
        });
        flow.stop();
        result
    })
}

/// What the stages counted; the CPU time is that of the threads that are not the caller's.
fn stage_report(counters: &Counters) -> DestinationReport {
    let mut stages = BTreeMap::from([
        ("receive".to_owned(), counters.receive.report()),
        ("deserialize".to_owned(), counters.deserialize.report()),
        ("restore".to_owned(), counters.restore.report()),
    ]);
    let bound_by = busiest(&stages);
    stages.insert("control".to_owned(), counters.control.report());
    DestinationReport {
        guest_bytes: counters.restored().pages * PAGE_SIZE as u64,
        cpu_ms: stages.values().map(|stage| stage.cpu_ms).sum(),
        stages,
        bound_by,
        ..DestinationReport::default()
    }
}

/// Tells the source why it ends and shuts the connections down.
fn last_word(control: &Control<'_>, flow: &Flow, error: &MigrationError) {
    say_why(control, error);
    flow.stop();
}

/// Tells the source why it ends, unless nobody is there to hear it. The second word is not sent.
fn say_why(control: &Control<'_>, error: &MigrationError) {
    let code = match error {
        MigrationError::Damaged(_) => ErrorCode::Damaged,
        MigrationError::Peer(_) => ErrorCode::Protocol,
        MigrationError::Vm(_) | MigrationError::StartFailed(_) => ErrorCode::Vm,
        MigrationError::Backend(_) => ErrorCode::Backend,
        MigrationError::Cancelled => ErrorCode::Refused,
        MigrationError::Internal(_) => ErrorCode::Internal,
        _ => return,
    };
    let _ = control.send(&Message::Error { code, message: error.to_string() });
}

/// Tells the source what has been restored, refreshes the progress, and makes sure that a stop is heard by threads that wait for
/// the network.
fn report_back(shared: Shared<'_>, bytes: &WireBytes, started: Instant, peak_anonymous: &AtomicU64) {
    let Shared { flow, counters, control, .. } = shared;
    let (mut last, mut last_sent) = (Ack::default(), Instant::now());
    let mut refreshed = (Instant::now(), 0);
    while flow.sleep(ACK_EVERY).is_ok() {
        let ack = counters.restored();
        if (ack != last || last_sent.elapsed() >= ALIVE_EVERY) && !flow.is_committed() {
            (last, last_sent) = (ack, Instant::now());
            if let Err(error) = control.send(&Message::Ack(ack)) {
                // Whoever reads the connection finds out why.
                debug!(%error, "no acknowledgement");
                break;
            }
        }
        let since = refreshed.0.elapsed();
        if since >= Duration::from_millis(200) {
            let received = bytes.received();
            peak_anonymous.fetch_max(anonymous_bytes(), Relaxed);
            flow.control().update(|p| {
                p.guest_bytes = ack.pages * PAGE_SIZE as u64;
                p.wire_bytes = received;
                p.wire_bytes_per_s = (received - refreshed.1) as f64 / since.as_secs_f64();
                p.elapsed_ms = ms(started.elapsed());
            });
            refreshed = (Instant::now(), received);
        }
    }
    while flow.sleep(ALIVE_EVERY).is_ok() {}
    // Whoever waits for the network does not notice the stop: say the last word for them and wake them.
    flow.look_at_reason(|reason| say_why(control, reason));
    flow.stop();
}

/// The thread that reads the control connection and owns the VM.
struct Main<'m, 'a> {
    vm: &'m mut dyn DestinationVm,
    reading: Reading<'a>,
    shared: Shared<'m>,
    state: StateAssembler,
}

impl Main<'_, '_> {
    fn next(&mut self) -> Result<Message, MigrationError> {
        let message = self.reading.next()?;
        self.shared.control.received(&message)?;
        Ok(message)
    }

    /// Goes on until the source gives the VM away. Returns the time that loading the state took.
    fn until_committed(&mut self) -> Result<Duration, MigrationError> {
        let Shared { flow, gate, control, .. } = self.shared;
        let (mut state, mut load_time) = (Vec::new(), Duration::ZERO);
        loop {
            match self.next()? {
                Message::EpochStart { epoch, pages } => {
                    flow.control().update(|p| (p.epoch, p.epoch_pages) = (epoch, pages));
                }
                Message::DeviceState { total_len, offset, bytes } => {
                    self.state.piece(total_len, offset, &bytes).map_err(peer_error)?;
                }
                Message::StateEnd { len, xxh3 } => {
                    let whole = std::mem::replace(&mut self.state, StateAssembler::new(MAX_STATE_LEN));
                    state = whole.finish(len, xxh3).map_err(peer_error)?;
                }
                Message::Prepare { epoch, .. } => {
                    flow.control().update(|p| p.phase = Phase::Switchover);
                    gate.wait_past(epoch, flow).map_err(|_| flow.take_reason())?;
                    let began = Instant::now();
                    self.vm.load_state(&state)?;
                    load_time = began.elapsed();
                    // The last moment at which a cancel on this side is heard.
                    flow.check().map_err(|_| flow.take_reason())?;
                    control.send(&Message::Ready)?;
                }
                Message::Commit => {
                    flow.commit();
                    flow.control().update(|p| p.phase = Phase::Committed);
                    return Ok(load_time);
                }
                Message::Ping { id } => control.send(&Message::Pong { id })?,
                Message::Pong { .. } => {}
                other => return Err(gone(&other)),
            }
        }
    }

    /// Runs the VM: it is ours.
    fn start(&mut self) -> Result<(), MigrationError> {
        debug_assert_eq!(self.shared.control.outcome(), Outcome::RunOnDestination);
        self.vm.run().map_err(|error| MigrationError::StartFailed(error.to_string()))?;
        info!("the VM runs here");
        Ok(())
    }

    /// Tells the source that the VM runs here, and what it looks like.
    fn farewell(&mut self, report: &DestinationReport) -> Result<(), MigrationError> {
        let Shared { control, restorer, session, .. } = self.shared;
        let json = serde_json::to_vec(report).map_err(|e| MigrationError::Internal(e.to_string()))?;
        control.send(&Message::Running { report: json })?;
        if session.verify {
            for (index, region) in session.regions.iter().enumerate() {
                let digests = restorer.digests(index).unwrap_or_default();
                for (chunk, digests) in digests.chunks(MAX_DIGESTS).enumerate() {
                    let first_page = (chunk * MAX_DIGESTS) as u64;
                    control.send(&Message::Digests {
                        region: region.id,
                        first_page,
                        digests: digests.to_vec(),
                    })?;
                }
            }
            control.send(&Message::DigestsEnd)?;
        }
        loop {
            match self.next()? {
                Message::Bye => return Ok(()),
                Message::Ping { id } => control.send(&Message::Pong { id })?,
                Message::Pong { .. } => {}
                other => return Err(gone(&other)),
            }
        }
    }
}
