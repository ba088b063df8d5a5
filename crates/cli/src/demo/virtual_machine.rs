//! One migration of the built-in guest, under KVM, between two processes.

use std::time::Duration;

use anyhow::{Context, Result};
use pagewarp_kvm::control::MigrateOptions;

use super::guest::{GuestWatch, REPORT_MS};
use super::machine::{BootConfig, Extras, Machine};
use super::report::Run;
use super::{Lab, Mode, Step, interrupt, link_stage};
use crate::exit::one_line;
use crate::trace::TraceFile;

/// How long the guest is watched at the destination.
const WATCH_MS: u64 = 3000;
/// Reports at the source before the migration starts, so that the guest is in its stride.
const REPORTS_BEFORE: usize = 8;
/// Time for the guest to boot, besides that for filling its memory.
const BOOT_TIMEOUT: Duration = Duration::from_secs(60);
/// Memory that even a slow host's guest fills in a second.
const FILL_BYTES_PER_S: u64 = 16 << 20;
/// How long the guest may take to report that often. Long, because the host may be busy with anything.
const WATCH_TIMEOUT: Duration = Duration::from_secs(60);

/// See [`Lab::run`].
pub(super) fn run(
    lab: &Lab,
    mode: Mode,
    number: u32,
    traced: bool,
    on_step: &mut dyn FnMut(Step<'_>),
) -> Result<(Run, Option<TraceFile>)> {
    let dir = tempfile::Builder::new()
        .prefix("pagewarp-demo-")
        .tempdir()
        .context("cannot create a temporary directory")?;
    on_step(Step::Doing("booting the guest"));
    let boot = BootConfig {
        memory: lab.memory,
        vcpus: lab.vcpus,
        cmdline: lab.guest.cmdline(),
        backend: lab.backend(mode),
    };
    let mut source = Machine::boot(&lab.program, dir.path(), "source", &boot)?;
    let mut guest = GuestWatch::new(source.console())?;
    let fill = BOOT_TIMEOUT + Duration::from_secs(lab.memory.0 / FILL_BYTES_PER_S);
    source.wait_for("the guest to fill its memory", fill, |_| {
        guest.poll()?;
        Ok((guest.is_ready() && guest.reports() >= REPORTS_BEFORE || !guest.problems().is_empty())
            .then_some(()))
    })?;

    let traces = ["source", "destination"].map(|host| dir.path().join(format!("{host}.trace")));
    let mut told = Extras::args(["--backend", &lab.backend(mode).to_string()]);
    if traced {
        told.args.extend(["--trace".into(), traces[1].clone().into()]);
    }
    let mut destination = Machine::receive_with(&lab.program, dir.path(), "destination", &told)?;
    let address = destination.listening()?.parse().context("the destination listens on something odd")?;
    let link = lab.link_to(address).context("cannot start the shaped link")?;
    on_step(Step::Doing("migrating"));
    let options = MigrateOptions { trace_file: traced.then(|| traces[0].clone()), ..lab.options(mode) };
    let migrated = source.migrate(&link.address().to_string(), options, |progress| {
        on_step(Step::Migrating(progress));
    });
    interrupt::check()?;
    let watched = if migrated.is_ok() { &mut destination } else { &mut source };
    if migrated.is_ok() {
        guest.hop(watched.console())?;
    } else {
        guest.mark()?;
    }

    on_step(Step::Doing("watching the guest"));
    let wanted = WATCH_MS.div_ceil(REPORT_MS) as usize;
    let alive = watched.wait_for("the guest to go on", WATCH_TIMEOUT, |_| {
        guest.poll()?;
        Ok((guest.reports() >= wanted || !guest.problems().is_empty()).then_some(()))
    });
    interrupt::check()?;
    let mut result = match &migrated {
        Ok(report) => Run::from_source(mode, number, report, link_stage(&link, lab.link)),
        Err(error) => Run::not_moved(mode, number, error),
    };
    result.guest_alive = alive.is_ok() && guest.reports() >= wanted;
    result.guest_clean = guest.problems().is_empty();
    result.guest_pause_ms = migrated.as_ref().ok().and_then(|_| guest.hop_pause_ms());
    let digests_agree = result.digests_agree == lab.verify.then_some(true);
    result.verified = digests_agree && result.guest_alive && result.guest_clean;
    let problem = guest.problems().first().cloned().or_else(|| alive.err().map(|e| one_line(&e)));
    result.error = [result.error.take(), problem].into_iter().flatten().reduce(|a, b| format!("{a}; {b}"));
    if migrated.is_ok() {
        source.wait_for_end();
    } else {
        source.stop();
    }
    destination.stop();
    // Of a migration that failed, one end may never have begun.
    let trace = traces.iter().filter_map(|file| TraceFile::read(file).ok()).reduce(TraceFile::merged);
    Ok((result, trace))
}
