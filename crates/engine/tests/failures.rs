//! Migrations that fail: the VM stays on the source, unharmed, and the next attempt succeeds.

mod support;

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use pagewarp_codec::{
    Backend, BackendError, CpuBackend, Decoder, DecoderConfig, Done, EncodeJob, Encoder, EncoderConfig,
    EncodingSet, FakeBackend, FakeConfig,
};
use pagewarp_engine::config::OnLimit;
use pagewarp_engine::error::MigrationError;
use pagewarp_testkit::faulty::{ConnectionFaults, FaultKind, FaultPlan, FaultyConnector};
use pagewarp_testkit::image::Mutation;
use pagewarp_testkit::memory_vm::{MemoryVm, Moment};
use pagewarp_testkit::pipe::memory_link;
use pagewarp_testkit::probe::Step;
use pagewarp_testkit::rng::SplitMix64;

use support::{Lab, Outcome};

fn vm() -> MemoryVm {
    MemoryVm::new(&[1000, 77], 1).restless(20, Mutation::Bytes(5), 7)
}

/// The VM that stayed can still be migrated.
fn assert_next_succeeds(outcome: Outcome) {
    Lab::new(outcome.vm).run().assert_migrated();
}

#[test]
fn a_source_that_fails_at_any_step_keeps_its_vm() {
    for pipeline in [true, false] {
        for step in [
            Step::Machine,
            Step::DirtyLog,
            Step::LogStart,
            Step::LogFetch,
            Step::LogClear,
            Step::Read,
            Step::Pause,
            Step::SaveState,
        ] {
            let mut lab = Lab::new(vm());
            lab.source_config.pipeline = pipeline;
            let probe = lab.vm.probe();
            probe.fail(step);
            let outcome = lab.run();
            let (sent, _) = outcome.assert_stayed();
            assert!(matches!(sent, MigrationError::Vm(_)), "{step:?}: {sent}");
            probe.mend(step);
            assert_next_succeeds(outcome);
        }
    }
}

#[test]
fn a_destination_that_fails_before_the_commit_leaves_the_vm_on_the_source() {
    for pipeline in [true, false] {
        for step in [Step::Prepare, Step::Write, Step::LoadState] {
            let mut lab = Lab::new(vm());
            lab.source_config.pipeline = pipeline;
            lab.destination.probe().fail(step);
            let outcome = lab.run();
            let (sent, received) = outcome.assert_stayed();
            assert!(
                matches!(sent, MigrationError::PeerReports(_) | MigrationError::Refused(_)),
                "{step:?}: {sent}"
            );
            assert!(matches!(received, MigrationError::Vm(_)), "{step:?}: {received}");
            assert_next_succeeds(outcome);
        }
    }
}

#[test]
fn a_vm_that_does_not_start_after_the_commit_runs_nowhere_and_both_sides_say_so() {
    let lab = Lab::new(vm());
    lab.destination.probe().fail(Step::Run);
    let outcome = lab.run();
    assert!(matches!(outcome.received, Err(MigrationError::StartFailed(_))), "{:?}", outcome.received);
    let sent = outcome.sent.as_ref().unwrap_err();
    assert!(matches!(sent, MigrationError::InDoubt(why) if why.contains("does not start")), "{sent}");
    assert!(!outcome.vm.probe().is_running() && !outcome.destination.probe().is_running());
}

#[test]
fn a_vm_that_is_too_large_is_refused() {
    let mut lab = Lab::new(vm());
    lab.destination_config.max_memory_bytes = 1 << 20;
    let outcome = lab.run();
    let (sent, received) = outcome.assert_stayed();
    assert!(matches!(sent, MigrationError::Refused(why) if why.contains("at most 1048576")), "{sent}");
    assert!(matches!(received, MigrationError::Config(_)), "{received}");
    assert_next_succeeds(outcome);
}

#[test]
fn nobody_listens() {
    let lab = Lab::new(vm());
    let (connector, acceptor) = memory_link();
    drop(acceptor);
    let (_silent, nobody) = memory_link();
    let mut lab = lab;
    lab.destination_config.accept_timeout = Duration::from_millis(10);
    let outcome = lab.run_over(connector, nobody);
    let (sent, _) = outcome.assert_stayed();
    assert!(matches!(sent, MigrationError::Link { .. }), "{sent}");
}

#[test]
fn without_convergence_the_choice_is_the_callers() {
    let never = |on_limit| {
        let mut lab = Lab::new(vm());
        lab.source_config.downtime_limit = Duration::from_nanos(1);
        lab.source_config.max_epochs = Some(3);
        lab.source_config.on_limit = on_limit;
        lab.run()
    };
    let outcome = never(OnLimit::Cancel);
    let (sent, received) = outcome.assert_stayed();
    assert!(matches!(sent, MigrationError::NotConverged(why) if why.contains("3 epochs")), "{sent}");
    assert!(
        matches!(received, MigrationError::PeerReports(why) if why.contains("keeps the VM")),
        "{received}"
    );
    assert_next_succeeds(outcome);
    assert_eq!(never(OnLimit::StopAnyway).assert_migrated().epochs.len(), 4);
}

/// Cancels from the guest's script, which is asked at every fetch, after every copy and at the pause.
#[test]
fn cancel_at_any_moment_leaves_the_vm_on_the_source() {
    for pipeline in [true, false] {
        for moment in 0..60 {
            let mut lab = Lab::new(MemoryVm::new(&[1000, 77], 1));
            lab.source_config.pipeline = pipeline;
            let control = lab.source_control.clone();
            let (mut at, mut rng) = (0, SplitMix64::new(moment));
            lab.vm = lab.vm.script(move |_: Moment, guest| {
                if at == moment {
                    control.cancel();
                }
                at += 1;
                guest.mutate(0, rng.below(1000), Mutation::Bytes(3), &mut rng);
            });
            let outcome = lab.run();
            let (sent, received) = outcome.assert_stayed();
            assert!(matches!(sent, MigrationError::Cancelled), "{moment}: {sent}");
            assert!(matches!(received, MigrationError::PeerReports(_)), "{moment}: {received}");
            assert_next_succeeds(outcome);
        }
    }
}

#[test]
fn cancel_on_the_destination() {
    let mut lab = Lab::new(MemoryVm::new(&[1000, 77], 1));
    let control = lab.destination_control.clone();
    lab.vm = lab.vm.script(move |_, _| control.cancel());
    // Slow enough that the cancel comes in time.
    lab.source_config.bandwidth_bytes_per_s = Some(5_000_000);
    let outcome = lab.run();
    let (_, received) = outcome.assert_stayed();
    assert!(matches!(received, MigrationError::Cancelled), "{received}");
    assert_next_succeeds(outcome);
}

/// Cancels at a random moment of a short migration, so that some come around the commit.
#[test]
fn cancel_around_the_commit() {
    let mut moved = 0;
    for seed in 0..60 {
        let mut rng = SplitMix64::new(seed);
        let lab = Lab::new(MemoryVm::new(&[200], 1));
        let control =
            if seed % 2 == 0 { lab.source_control.clone() } else { lab.destination_control.clone() };
        let delay = Duration::from_micros(rng.below(12_000));
        let outcome = std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(delay);
                control.cancel();
            });
            lab.run()
        });
        check_any(&outcome, &format!("seed {seed}"));
        moved += u32::from(outcome.destination.probe().is_running());
    }
    println!("{moved} of 60 migrations were faster than their cancel");
}

#[test]
fn it_gives_up_when_everything_is_sent_and_the_limit_is_still_too_short() {
    let mut lab = Lab::new(MemoryVm::new(&[100], 1));
    lab.source_config.max_epochs = None;
    lab.source_config.downtime_limit = Duration::from_millis(1);
    let outcome = lab.run();
    let (sent, _) = outcome.assert_stayed();
    assert!(
        matches!(sent, MigrationError::NotConverged(why) if why.contains("everything was sent")),
        "{sent}"
    );
}

#[test]
fn the_time_limit_holds_within_an_epoch() {
    let mut lab = Lab::new(vm());
    lab.source_config.bandwidth_bytes_per_s = Some(100_000);
    lab.source_config.max_time = Some(Duration::from_millis(200));
    let outcome = lab.run();
    let (sent, _) = outcome.assert_stayed();
    assert!(matches!(sent, MigrationError::NotConverged(why) if why.contains("not enough")), "{sent}");
    // A twentieth of a second at a time: the limiter does not hold up the end.
    assert_next_succeeds(outcome);
}

#[test]
fn too_many_connections_are_refused() {
    let mut lab = Lab::new(vm());
    lab.source_config.connections = 5;
    lab.destination_config.max_connections = 4;
    let outcome = lab.run();
    let (sent, _) = outcome.assert_stayed();
    assert!(matches!(sent, MigrationError::Refused(why) if why.contains("at most 4")), "{sent}");
}

#[test]
fn the_destination_may_accept_smaller_batches() {
    let mut lab = Lab::new(vm());
    lab.source_config.batch_pages = 4096;
    lab.destination_config.max_batch_pages = 7;
    lab.run().assert_migrated();
}

/// A backend with a defect: its workers panic.
struct Panicking(CpuBackend);

struct PanickingEncoder(Box<dyn Encoder>);

impl Encoder for PanickingEncoder {
    fn depth(&self) -> usize {
        self.0.depth()
    }

    fn in_flight(&self) -> usize {
        self.0.in_flight()
    }

    fn submit(&mut self, job: EncodeJob) {
        self.0.submit(job);
    }

    fn complete(&mut self) -> Option<Done<EncodeJob>> {
        panic!("this encoder has a defect (on purpose)");
    }
}

impl Backend for Panicking {
    fn name(&self) -> String {
        "panicking".into()
    }

    fn encoders(&self, config: EncoderConfig, workers: usize) -> Result<Vec<Box<dyn Encoder>>, BackendError> {
        let encoders = self.0.encoders(config, workers)?;
        Ok(encoders.into_iter().map(|e| Box::new(PanickingEncoder(e)) as Box<dyn Encoder>).collect())
    }

    fn decoders(&self, config: DecoderConfig, workers: usize) -> Result<Vec<Box<dyn Decoder>>, BackendError> {
        self.0.decoders(config, workers)
    }
}

#[test]
fn a_thread_that_panics_ends_the_migration_and_not_the_vm() {
    let mut lab = Lab::new(vm());
    lab.source_config.backend = Arc::new(Panicking(CpuBackend::new()));
    let outcome = lab.run();
    let (sent, _) = outcome.assert_stayed();
    assert!(matches!(sent, MigrationError::Internal(why) if why.contains("has a defect")), "{sent}");
    assert_next_succeeds(outcome);
}

/// A VM that panics takes its thread with it, but leaves nobody waiting.
#[test]
fn a_vm_that_panics_leaves_nobody_waiting() {
    let lab = Lab::new(MemoryVm::new(&[100], 1).script(|_, _| panic!("this VM has a defect (on purpose)")));
    let panicked = std::thread::spawn(move || lab.run()).join();
    assert!(panicked.is_err(), "the panic is the caller's to handle");
}

#[test]
fn a_vm_that_cannot_be_resumed_is_reported_as_paused() {
    let lab = Lab::new(vm());
    lab.destination.probe().fail(Step::LoadState);
    lab.vm.probe().fail(Step::Resume);
    let outcome = lab.run();
    let sent = outcome.sent.as_ref().unwrap_err();
    assert!(matches!(sent, MigrationError::StillPaused { .. }), "{sent}");
    assert!(!outcome.vm.probe().is_running() && !outcome.destination.probe().is_running());
}

/// Building the VM may take longer than a silent peer is waited for.
#[test]
fn a_destination_that_builds_slowly_is_not_silent() {
    let mut lab = Lab::new(vm());
    lab.source_config.peer_timeout = Duration::from_millis(1500);
    lab.destination.probe().delay(Step::Prepare, Duration::from_millis(3000));
    lab.run().assert_migrated();
}

/// A source that goes away before its data connections are open says so, and the destination need not wait for them.
#[test]
fn a_source_that_gives_up_while_connecting_is_heard() {
    let (connector, acceptor) = memory_link();
    let mut lab = Lab::new(vm());
    lab.source_config.connections = 3;
    // The second data connection cannot be opened.
    let connector = FaultyConnector::new(connector, ConnectionFaults::new().refuse(2));
    lab.destination_config.peer_timeout = Duration::from_secs(60);
    let outcome = lab.run_over(connector, acceptor);
    let (sent, received) = outcome.assert_stayed();
    assert!(matches!(sent, MigrationError::Link { .. }), "{sent}");
    println!("destination: {received}");
    assert_next_succeeds(outcome);
}

/// The dirty bits that were taken and not delivered are in the log again.
#[test]
fn dirty_bits_are_given_back() {
    let mut lab = Lab::new(vm());
    lab.destination.probe().fail(Step::LoadState);
    lab.source_config.bandwidth_bytes_per_s = None;
    let outcome = lab.run();
    outcome.assert_stayed();
    use pagewarp_engine::bitmap::PageBitmap;
    use pagewarp_engine::vm::SourceVm;
    let mut log = outcome.vm.dirty_log().unwrap();
    log.start().unwrap();
    let mut dirty = PageBitmap::new(1000);
    log.fetch(0, &mut dirty).unwrap();
    assert!(!dirty.is_empty(), "the pages of the last epoch were not acknowledged");
}

#[test]
fn a_lost_device_is_replaced_by_the_cpu_on_either_side() {
    for lose_after in 0..70 {
        let device = || {
            Arc::new(FakeBackend::new(FakeConfig { lose_after: Some(lose_after), ..FakeConfig::default() }))
        };
        let mut lab = Lab::new(vm());
        lab.source_config.verify = true;
        lab.source_config.serialize_threads = 1 + lose_after as usize % 3;
        lab.source_config.pipeline = lose_after % 4 != 3;
        lab.source_config.downtime_limit = Duration::from_nanos(1);
        lab.source_config.max_epochs = Some(4);
        lab.source_config.on_limit = OnLimit::StopAnyway;
        lab.source_config.backend = device();
        lab.destination_config.backend = device();
        let outcome = lab.run();
        let report = outcome.assert_migrated();
        assert_eq!(report.verified, Some(true));
        assert!(report.fallback_batches > 0, "{lose_after}");
    }
}

/// Which of the ends has a device that computes wrongly. What the source's does wrongly travels again, what the destination's does wrongly
/// never has to.
#[test]
fn a_device_that_computes_wrongly_is_replaced_by_the_cpu() {
    let mut damaged = 0;
    for seed in 0..30 {
        let device = |wrong: bool| {
            let corrupt_one_in = NonZeroU64::new(10).filter(|_| wrong);
            Arc::new(FakeBackend::new(FakeConfig { seed, corrupt_one_in, ..FakeConfig::default() }))
        };
        let (wrong_here, wrong_there) = (seed % 3 != 1, seed % 3 != 0);
        let (source, destination) = (device(wrong_here), device(wrong_there));
        let mut lab = Lab::new(vm());
        lab.source_config.verify = true;
        lab.source_config.serialize_threads = 1 + seed as usize % 2;
        lab.destination_config.deserialize_threads = 1 + seed as usize % 2;
        lab.source_config.pipeline = seed % 5 != 4;
        lab.source_config.downtime_limit = Duration::from_nanos(1);
        lab.source_config.max_epochs = Some(3);
        lab.source_config.on_limit = OnLimit::StopAnyway;
        lab.source_config.backend = source.clone();
        lab.destination_config.backend = destination.clone();
        let outcome = lab.run();
        let report = outcome.assert_migrated();
        assert_eq!(report.verified, Some(true), "seed {seed}");
        if source.corrupted() > 0 {
            assert!(report.resent_pages > 0 && report.fallback.is_some(), "seed {seed}: {report:?}");
            damaged += 1;
        } else {
            assert_eq!((report.resent_pages, report.fallback.clone()), (0, None), "seed {seed}");
        }
        let there = report.destination.as_ref().expect("a report");
        // A batch that was damaged before it came tells nothing of the device there.
        let must_fall_back = destination.corrupted() > 0 && source.corrupted() == 0;
        assert!(there.fallback.is_some() || !must_fall_back, "seed {seed}: {there:?}");
        assert!(there.fallback.is_none() || destination.corrupted() > 0, "seed {seed}: {there:?}");
    }
    assert!(damaged > 5, "{damaged}");
}

/// The last epoch, sent while the VM is paused, arrives damaged: it comes again before the VM runs there.
#[test]
fn damage_in_the_last_epoch_is_repaired_before_the_hand_over() {
    let mut in_last = 0;
    for seed in 0..40 {
        let corrupt_one_in = NonZeroU64::new(70 + seed);
        let device = Arc::new(FakeBackend::new(FakeConfig { seed, corrupt_one_in, ..FakeConfig::default() }));
        let mut lab = Lab::new(vm());
        lab.source_config.verify = true;
        lab.source_config.batch_pages = 16;
        lab.source_config.backend = device.clone();
        let outcome = lab.run();
        let report = outcome.assert_migrated();
        assert_eq!(report.verified, Some(true), "seed {seed}");
        assert_eq!(report.resent_pages > 0, device.corrupted() > 0, "seed {seed}: {report:?}");
        // Epochs after the last one have no estimate of the downtime either.
        in_last +=
            usize::from(report.epochs.iter().filter(|e| e.estimated_downtime_ms.is_none()).count() > 1);
    }
    assert!(in_last > 0, "no batch was damaged late enough");
}

/// One flipped bit in the middle of a batch.
#[test]
fn a_batch_that_the_network_damages_is_sent_again() {
    let (connector, acceptor) = memory_link();
    let faults = ConnectionFaults::new().plan(1, FaultPlan::none().on_write(5000, FaultKind::FlipBit(3)));
    let mut lab = Lab::new(vm());
    lab.source_config.verify = true;
    let outcome = lab.run_over(FaultyConnector::new(connector, faults), acceptor);
    let report = outcome.assert_migrated();
    assert_eq!(report.verified, Some(true));
    assert!(report.resent_pages > 0, "{report:?}");
}

/// A CPU or a network that damages something in every epoch is not a matter of the backend: it ends, and the VM stays.
#[test]
fn damage_that_does_not_end_fails_the_migration() {
    let mut plan = FaultPlan::none();
    // Far apart, so that few hit a frame's header, which is no damage of a batch; and more often than the pages come again.
    for at in (3000..60_000_000).step_by(60_000) {
        plan = plan.on_write(at, FaultKind::FlipBit(3));
    }
    let (connector, acceptor) = memory_link();
    let mut lab = Lab::new(vm());
    lab.source_config.encodings = EncodingSet::RAW;
    lab.source_config.downtime_limit = Duration::from_nanos(1);
    lab.source_config.max_epochs = Some(30);
    let outcome =
        lab.run_over(FaultyConnector::new(connector, ConnectionFaults::new().plan(1, plan)), acceptor);
    let (sent, received) = outcome.assert_stayed();
    println!("source: {sent}\ndestination: {received}");
    assert!(
        matches!(
            sent,
            MigrationError::Damaged(_) | MigrationError::PeerReports(_) | MigrationError::Link { .. }
        ),
        "{sent}"
    );
    assert_next_succeeds(outcome);
}

/// A destination whose decoders cannot be made.
#[test]
fn a_backend_that_cannot_start_is_replaced_by_the_cpu() {
    let broken = || Arc::new(FakeBackend::new(FakeConfig { lose_after: Some(0), ..FakeConfig::default() }));
    let mut lab = Lab::new(vm());
    lab.source_config.verify = true;
    lab.source_config.backend = broken();
    lab.destination_config.backend = broken();
    let outcome = lab.run();
    let report = outcome.assert_migrated();
    assert_eq!(report.verified, Some(true));
    assert!(report.fallback.is_some(), "{report:?}");
    assert!(report.destination.as_ref().is_some_and(|there| there.fallback.is_some()), "{report:?}");
}

/// One random fault on one of the connections of each trial. Whatever happens, exactly one side runs the VM, and if both sides say that
/// it moved, its memory is right.
#[test]
fn any_fault_on_any_connection() {
    let mut moved = 0;
    for seed in 0..150 {
        let mut rng = SplitMix64::new(seed);
        let (connections, horizon) = (1 + rng.index(3), 1 << (5 + rng.below(16)));
        let faults = ConnectionFaults::new()
            .plan(rng.index(connections + 1), FaultPlan::seeded(rng.next_u64(), horizon));
        let (connector, acceptor) = memory_link();
        let mut lab = Lab::new(vm());
        lab.source_config.connections = connections;
        lab.source_config.pipeline = rng.below(4) > 0;
        lab.source_config.peer_timeout = Duration::from_millis(300);
        lab.destination_config.peer_timeout = Duration::from_millis(300);
        let outcome = lab.run_over(FaultyConnector::new(connector, faults), acceptor);
        check_any(&outcome, &format!("seed {seed}"));
        moved += u32::from(outcome.destination.probe().is_running());
    }
    assert!(
        (10..150).contains(&moved),
        "{moved} of 150 migrations succeeded: the faults are not well placed"
    );
}

/// Whatever the ends say, it must be true.
fn check_any(outcome: &Outcome, trial: &str) {
    let (here, there) = (outcome.vm.probe().is_running(), outcome.destination.probe().is_running());
    let told = format!(
        "{trial}: source {:?}, destination {:?}",
        outcome.sent.as_ref().err(),
        outcome.received.as_ref().err()
    );
    assert!(outcome.vm.probe().ledger().most_running() == 1, "two VMs ran at once; {told}");
    match (&outcome.sent, &outcome.received) {
        (Ok(_), Ok(_)) => drop(outcome.assert_migrated()),
        (Err(MigrationError::InDoubt(_)), received) => {
            assert!(!here && there == received.is_ok(), "{told}");
        }
        (Err(_), Err(_)) => drop(outcome.assert_stayed()),
        _ => panic!("the ends disagree; {told}"),
    }
}

/// Faults at places that are known to matter: the hello, the offer, the middle of a batch.
#[test]
fn damage_is_named() {
    for (connection, at, kind) in [
        (0, 3, FaultKind::FlipBit(1)),
        (0, 20, FaultKind::FlipBit(0)),
        (0, 100, FaultKind::FlipBit(7)),
        (1, 5, FaultKind::FlipBit(3)),
        (1, 100, FaultKind::FlipBit(3)),
        (1, 5000, FaultKind::Skip(1)),
        (1, 5000, FaultKind::Duplicate(7)),
        (1, 5000, FaultKind::Insert(vec![0; 100])),
        (1, 5000, FaultKind::Cut),
        (1, 5000, FaultKind::Truncate),
    ] {
        let what = format!("{kind:?} at byte {at} of connection {connection}");
        let (connector, acceptor) = memory_link();
        let faults = ConnectionFaults::new().plan(connection, FaultPlan::none().on_write(at, kind));
        let mut lab = Lab::new(vm());
        lab.source_config.peer_timeout = Duration::from_millis(500);
        lab.destination_config.peer_timeout = Duration::from_millis(500);
        lab.destination_config.accept_timeout = Duration::from_secs(2);
        let outcome = lab.run_over(FaultyConnector::new(connector, faults), acceptor);
        let (sent, received) = outcome.assert_stayed();
        println!("{what}:\n  source: {sent}\n  destination: {received}");
        for error in [sent, received] {
            assert!(!matches!(error, MigrationError::Internal(_)), "{what}: {error}");
        }
        assert_next_succeeds(outcome);
    }
}
