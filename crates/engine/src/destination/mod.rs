//! The destination: builds the VM, restores its memory epoch by epoch, and runs it once the source has committed.

mod damage;
mod deserialize;
mod gate;
mod handover;
mod restore;
mod session;
mod stages;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;

use crossbeam_channel::bounded;
use pagewarp_codec::{DecoderConfig, PAGE_SIZE};

use crate::config::DestinationConfig;
use crate::control::MigrationControl;
use crate::destination::damage::Damage;
use crate::destination::deserialize::{Deserializer, Deserializing};
use crate::destination::gate::Gate;
use crate::destination::handover::{HandOver, listen, report_back, say_why};
use crate::destination::restore::Restorer;
use crate::destination::session::{Accepted, Accepting};
use crate::destination::stages::{
    Counters, Next, QUEUE, Shared, deserialize_thread, receive_thread, restore_thread,
};
use crate::error::MigrationError;
use crate::flow::{Flow, StopOnPanic};
use crate::link::WireBytes;
use crate::metrics::{anonymous_bytes, busiest, ms, thread_cpu};
use crate::pool::Pool;
use crate::report::{DestinationReport, Phase, Progress};
use crate::stage_trace::Track;
use crate::transport::Acceptor;
use crate::vm::DestinationVm;

/// See [`crate::receive`].
pub(crate) fn receive(
    vm: &mut dyn DestinationVm,
    acceptor: &dyn Acceptor,
    config: &DestinationConfig,
    control: &MigrationControl,
) -> Result<DestinationReport, MigrationError> {
    control.update(|p| *p = Progress { phase: Phase::Connecting, ..Progress::default() });
    let flow = Flow::new(control.clone());
    acceptor.limit_outage(None);
    let bytes = WireBytes::default();
    let accepting = Accepting::new(acceptor, config, &flow, &bytes);
    let result =
        accepting.accept(vm).inspect_err(|_| flow.stop()).and_then(|accepted| run(vm, &accepting, accepted));
    control.update(|p| p.phase = if result.is_ok() { Phase::Done } else { Phase::Failed });
    result
}

fn run<'a>(
    vm: &mut dyn DestinationVm,
    accepting: &Accepting<'a>,
    accepted: Accepted<'a>,
) -> Result<DestinationReport, MigrationError> {
    let &Accepting { config, flow, bytes, .. } = accepting;
    let Accepted { started, name, control, reading, opening, session, allowed, pipeline, memory } = accepted;
    let connections = usize::from(session.connections);
    let memory_pages = session.regions.iter().map(|r| r.pages).sum();
    flow.control().update(|p| (p.phase, p.memory_pages) = (Phase::Precopy, memory_pages));
    let history_slots = if allowed.needs_base() {
        (config.history_bytes / PAGE_SIZE as u64).min(memory_pages).min(u64::from(u32::MAX - 1)) as u32
    } else {
        0
    };
    let decoder_config =
        DecoderConfig { allowed, max_batch_pages: session.max_batch_pages as usize, history_slots };
    // Without a pipeline each connection does everything for itself.
    let (workers, restorers) =
        if pipeline { (config.deserialize_threads, 1) } else { (connections, connections) };
    let spilled_before = config.backend.spilled_batches();
    let deserializing =
        Deserializing::new(&config.backend, decoder_config, workers, !pipeline, memory.clone())
            .map_err(MigrationError::from)
            .inspect_err(|error| {
                say_why(&control, error);
                flow.stop();
            })?;
    let track = |stage, index| Track::numbered(config.trace.as_ref(), stage, index);
    let deserializers = (0..deserializing.workers())
        .map(|index| deserializing.deserializer(track("deserialize", index)))
        .collect::<Result<Vec<_>, _>>()?;
    let in_flight: usize = deserializers.iter().map(Deserializer::depth).sum();
    let counters = Counters::new(connections, deserializers.len(), restorers);
    let gate = Gate::new(connections, session.regions.iter().map(|r| r.pages));
    let pool = Pool::new(2 * QUEUE + in_flight + connections + 1);
    let restorer = Restorer::new(memory.clone());
    let damage = Damage::default();
    let peak_anonymous = AtomicU64::new(anonymous_bytes());
    let shared = Shared {
        flow,
        counters: &counters,
        gate: &gate,
        pool: &pool,
        restorer: &restorer,
        damage: &damage,
        control: &control,
        session: &session,
    };
    let main_cpu = thread_cpu();

    thread::scope(|scope| {
        let (to_inbox, inbox) = bounded(QUEUE);
        scope.spawn(move || flow.guard(|| listen(reading, shared, &to_inbox)));
        scope.spawn(|| flow.guard(|| report_back(shared, bytes, started, &peak_anonymous)));
        let _stop_on_panic = StopOnPanic(flow);
        let mut hand_over = HandOver::new(vm, inbox, shared);
        // The control connection is listened to by now: a source that changes its mind before it has connected is heard.
        let data =
            accepting.data_connections(&opening, &session).or_else(|error| hand_over.give_up(error))?;
        scope.spawn(|| {
            flow.guard(|| {
                accepting.turn_others_away();
                accepting.hasten(shared.control);
            });
        });
        if pipeline {
            let (to_deserialize, deserialize_queue) = bounded(QUEUE);
            let (to_restore, restore_queue) = bounded(QUEUE);
            for (index, reading) in data.into_iter().enumerate() {
                let (next, track) = (Next::Queue(to_deserialize.clone()), track("receive", index));
                scope.spawn(move || flow.guard(|| receive_thread(reading, next, track, shared)));
            }
            for deserializer in deserializers {
                let (queue, next) = (deserialize_queue.clone(), to_restore.clone());
                scope.spawn(move || flow.guard(|| deserialize_thread(deserializer, &queue, &next, shared)));
            }
            let track = track("restore", 0);
            scope.spawn(move || flow.guard(|| restore_thread(&restore_queue, &track, shared)));
        } else {
            for (index, (reading, deserializer)) in data.into_iter().zip(deserializers).enumerate() {
                let next = Next::Inline(Box::new(deserializer), track("restore", index));
                let track = track("receive", index);
                scope.spawn(move || flow.guard(|| receive_thread(reading, next, track, shared)));
            }
        }
        let took = hand_over.until_committed()?;
        // If something failed here and the source had committed: it should hear that the VM runs.
        accepting.acceptor.limit_outage(None);
        hand_over.start()?;
        let mut report = stage_report(&counters);
        report.name = name;
        report.backend = config.backend.name();
        report.total_ms = ms(started.elapsed());
        report.load_state_ms = ms(took.load_state);
        report.verify_ms = took.verify.map(ms);
        report.wire_bytes = bytes.received();
        report.cpu_ms += ms(thread_cpu().saturating_sub(main_cpu));
        report.fallback = deserializing.fallback();
        report.fallback_batches = deserializing.fallback_batches();
        report.spilled_batches = config.backend.spilled_batches().saturating_sub(spilled_before);
        report.peak_anonymous_bytes = peak_anonymous.load(Relaxed).max(anonymous_bytes());
        // The VM runs here: whatever happens to the connection from now on changes nothing. But a source that could still hear it should not be left in doubt.
        hand_over.farewell(&report, config.peer_timeout.max(accepting.acceptor.patience()));
        flow.stop();
        Ok(report)
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
