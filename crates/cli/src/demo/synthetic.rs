//! One migration of the synthetic guest, where there is no KVM: threads that write a shared memory, both ends in this process, but
//! through the same engine and over the same shaped TCP link.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use pagewarp_codec::{PAGE_SIZE, Trace};
use pagewarp_engine::config::DestinationConfig;
use pagewarp_engine::control::MigrationControl;
use pagewarp_engine::transport::{TcpAcceptor, TcpConnector};
use pagewarp_engine::vm::SourceVm;
use pagewarp_guest::{Workload, WriteRate};
use pagewarp_testkit::synthetic::{SyntheticConfig, SyntheticDestination, SyntheticGuest};

use super::report::Run;
use super::{Lab, Mode, Step, interrupt, link_stage};
use crate::backend::{self, Role, Task};
use crate::exit::{of_migration, one_line};
use crate::trace::{Host, TraceFile};

const POLL: Duration = Duration::from_millis(200);
/// How long the guest is watched at the destination.
const WATCH: Duration = Duration::from_secs(3);
/// How long it runs before the migration.
const RUN_IN: Duration = Duration::from_secs(1);
/// `max` in writes a second: more than two threads do.
const UNLIMITED: u64 = 10_000_000;

/// See [`Lab::run`].
pub(super) fn run(
    lab: &Lab,
    mode: Mode,
    number: u32,
    traced: bool,
    on_step: &mut dyn FnMut(Step<'_>),
) -> Result<(Run, Option<TraceFile>)> {
    on_step(Step::Doing("filling the synthetic guest's memory"));
    let mut guest = SyntheticGuest::start(config(lab)).context("cannot start the synthetic guest")?;
    thread::sleep(RUN_IN);
    let acceptor = TcpAcceptor::bind(([127, 0, 0, 1], 0).into()).context("cannot listen on loopback")?;
    let link = lab.link_to(acceptor.local_addr()?).context("cannot start the shaped link")?;
    let options = lab.options(mode);
    let traces = traced.then(|| (Trace::new(), Trace::new()));
    let backend = |role, trace: &Option<Trace>| {
        let task = Task { role, threads: options.serialize_threads, link_bytes_per_s: None };
        backend::choose(lab.backend(mode), None, task, trace.clone())
    };
    let (source_trace, destination_trace) = traces.clone().unzip();
    let mut source_config =
        options.source_config(backend(Role::Encode, &source_trace)?).map_err(|e| anyhow!(e))?;
    source_config.trace = source_trace;
    let mut destination_config = DestinationConfig::new(backend(Role::Decode, &destination_trace)?);
    destination_config.trace = destination_trace;
    let connector = TcpConnector { address: link.address(), timeout: source_config.peer_timeout };
    let (control, receiving) = (MigrationControl::new(), MigrationControl::new());
    let mut destination = SyntheticDestination::new(lab.memory.0);

    on_step(Step::Doing("migrating"));
    let (sent, received) = thread::scope(|scope| {
        let receive = {
            let (destination, receiving) = (&mut destination, &receiving);
            scope.spawn(move || {
                pagewarp_engine::receive(destination, &acceptor, &destination_config, receiving)
            })
        };
        let send = {
            let (guest, control) = (&mut guest, &control);
            scope.spawn(move || pagewarp_engine::migrate(guest, &connector, &source_config, control))
        };
        while !send.is_finished() {
            on_step(Step::Migrating(&control.progress()));
            if interrupt::check().is_err() {
                control.cancel();
            }
            thread::sleep(POLL);
        }
        let sent = send.join();
        if !matches!(sent, Ok(Ok(_))) {
            receiving.cancel();
        }
        (sent, receive.join())
    });
    interrupt::check()?;
    let sent = sent.map_err(|_| anyhow!("the source panicked"))?.map_err(of_migration);
    let received = received.map_err(|_| anyhow!("the destination panicked"))?;

    on_step(Step::Doing("watching and checking the guest"));
    let mut result = match &sent {
        Ok(report) => Run::from_source(mode, number, report, link_stage(&link, lab.link)),
        Err(error) => Run::not_moved(mode, number, error),
    };
    let mut running = match (&sent, received) {
        (Err(_), _) => guest,
        (Ok(_), Ok(_)) => destination.into_guest().context("the destination has no guest")?,
        (Ok(_), Err(error)) => {
            return Err(error).context("the source says that the guest has moved, the destination does not");
        }
    };
    result.guest_pause_ms = sent.is_ok().then(|| running.longest_pause().as_secs_f64() * 1000.0);
    let (before, start) = (running.writes(), Instant::now());
    while start.elapsed() < WATCH {
        interrupt::check()?;
        thread::sleep(POLL);
    }
    result.guest_alive =
        running.is_running() && (running.writes() > before || running.config().writes_per_s == 0);
    running.pause().context("cannot pause the synthetic guest")?;
    let checked = running.self_check();
    result.guest_clean = checked.is_ok();
    let digests_agree = result.digests_agree == lab.verify.then_some(true);
    result.verified = digests_agree && result.guest_alive && result.guest_clean;
    let problem = checked.err().map(|error| one_line(&error.into()));
    result.error = [result.error.take(), problem].into_iter().flatten().reduce(|a, b| format!("{a}; {b}"));
    let trace = traces.map(|(source, destination)| {
        TraceFile::of(Host::Source, &source).merged(TraceFile::of(Host::Destination, &destination))
    });
    Ok((result, trace))
}

/// What comes nearest to what the built-in guest was to do.
fn config(lab: &Lab) -> SyntheticConfig {
    let pages = lab.memory.0 / PAGE_SIZE as u64;
    let defaults = SyntheticConfig::default();
    SyntheticConfig {
        region_pages: vec![pages],
        writes_per_s: match (lab.guest.workload, lab.guest.write_rate) {
            (Workload::Idle, _) => 0,
            (_, WriteRate::PagesPerS(rate)) => rate,
            (_, WriteRate::MibPerS(rate)) => rate << 8,
            (_, WriteRate::Unlimited) => UNLIMITED,
        },
        working_set_pages: lab
            .guest
            .working_set_mib
            .map_or(pages / 2, |mib| (mib << 8).clamp(u64::from(defaults.writers), pages)),
        ..defaults
    }
}
