//! `pagewarp demo`.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail};
use pagewarp_gpu::AdapterKind;
use pagewarp_guest::{GuestConfig, Workload};

use crate::args::{DemoArgs, WorkloadChoice};
use crate::backend::{self, BackendName};
use crate::demo::guest::REPORT_MS;
use crate::demo::host::{HostInfo, kvm_works};
use crate::demo::report::{DemoReport, Run, Settings, speedup, table};
use crate::demo::{GuestKind, Lab, Mode, Step, interrupt};
use crate::exit::{Exit, Failure};
use crate::progress::ProgressDisplay;
use crate::say;
use crate::trace::TraceFile;
use crate::units::human_ms;

/// Runs `pagewarp demo`.
pub(super) fn demo(args: &DemoArgs) -> Result<()> {
    interrupt::watch()?;
    let modes = args.modes(has_gpu);
    let lab = lab(args, modes.iter().any(|mode| mode.on_gpu()))?;
    let host = HostInfo::detect();
    let (mut runs, mut trace) = (Vec::new(), None);
    let all = (1..=args.runs).flat_map(|number| modes.iter().map(move |&mode| (number, mode)));
    let count = args.runs as usize * modes.len();
    for (index, (number, mode)) in all.enumerate() {
        let traced = args.trace.is_some() && index + 1 == count;
        let run = one(&lab, mode, number, args.runs, traced)?;
        runs.push(run.0);
        trace = run.1;
    }
    let report = DemoReport {
        host,
        guest: lab.kind.name().to_owned(),
        settings: Settings {
            memory_bytes: lab.memory.0,
            link_bytes_per_s: lab.link.map(|rate| rate.bytes_per_s),
            workload: lab.guest.workload.name().to_owned(),
            guest_cmdline: (lab.kind == GuestKind::Builtin).then(|| lab.guest.cmdline()),
            downtime_limit_ms: lab.downtime_ms,
            connections: lab.connections,
            verify: lab.verify,
            history_bytes: lab.history.0,
            gpu_in_software: lab.gpu_in_software,
        },
        speedup: speedup(&runs),
        runs,
    };
    let json = serde_json::to_string_pretty(&report)? + "\n";
    let text = if args.json { json.clone() } else { table(&report) };
    let printed = std::io::stdout().write_all(text.as_bytes()).context("cannot print the report");
    let written = match &args.output {
        Some(file) => write_report(file, &json),
        None if args.json => Ok(()),
        None => keep_report(&json),
    };
    let traced = args.trace.as_ref().map_or(Ok(()), |file| write_trace(file, trace));
    // The measurements took minutes: each way out is tried before any failure ends the program.
    verdict(&report.runs)?;
    written?;
    traced?;
    printed
}

/// Whether there is a GPU that works. One in software does not count.
fn has_gpu() -> bool {
    backend::first_hardware(backend::adapters()).is_some_and(|adapter| backend::open_plain(&adapter).is_ok())
}

fn write_trace(file: &Path, trace: Option<TraceFile>) -> Result<()> {
    trace.context("the last run left no trace")?.write(file)?;
    say!("written to {}", file.display());
    Ok(())
}

fn write_report(file: &Path, json: &str) -> Result<()> {
    std::fs::write(file, json).with_context(|| {
        let message =
            format!("cannot write the report to `{}`; name another file with --output", file.display());
        Failure::new(Exit::Environment, message)
    })?;
    say!("written to {}", file.display());
    Ok(())
}

/// Puts the report where it is in nobody's way.
fn keep_report(json: &str) -> Result<()> {
    let dir = std::env::temp_dir();
    let failed = || {
        let message = format!("cannot write the report in `{}`; name a file with --output", dir.display());
        Failure::new(Exit::Environment, message)
    };
    let file =
        tempfile::Builder::new().prefix("pagewarp-demo-").suffix(".json").tempfile().with_context(failed)?;
    file.as_file().write_all(json.as_bytes()).with_context(failed)?;
    let (_, path) = file.keep().map_err(|error| error.error).with_context(failed)?;
    say!("written to {}", path.display());
    Ok(())
}

fn lab(args: &DemoArgs, on_gpu: bool) -> Result<Lab> {
    let number = match args.backend {
        BackendName::Gpu(number) => number,
        BackendName::Auto | BackendName::Cpu => None,
    };
    // Now, because a device that is not there must not be found out after minutes.
    let adapter = on_gpu.then(|| backend::pick(number)).transpose()?;
    let guest = GuestConfig {
        workload: match args.workload {
            WorkloadChoice::Kv => Workload::Kv,
            WorkloadChoice::Graph => Workload::Graph,
            WorkloadChoice::Uniform => Workload::Uniform,
            WorkloadChoice::Idle => Workload::Idle,
        },
        working_set_mib: args.working_set.map(|size| size.0 >> 20),
        write_rate: args.rate.0,
        report_ms: REPORT_MS,
        ..GuestConfig::default()
    };
    let kind = if !args.synthetic && kvm_works() { GuestKind::Builtin } else { GuestKind::Synthetic };
    if kind == GuestKind::Synthetic && !args.synthetic {
        say!(
            "NOTE: /dev/kvm cannot be used here (is it there, and are you in its group?): the synthetic guest stands in"
        );
    }
    Ok(Lab {
        program: std::env::current_exe().context("cannot tell where this program is")?,
        kind,
        memory: args.memory,
        vcpus: 1,
        guest,
        link: args.link.0,
        downtime_ms: args.downtime_ms,
        connections: args.connections,
        verify: args.verify,
        history: args.history,
        gpu: BackendName::Gpu(number),
        gpu_in_software: adapter.is_some_and(|adapter| adapter.kind() == AdapterKind::Software),
    })
}

/// One migration, with its progress on standard error.
fn one(lab: &Lab, mode: Mode, number: u32, of: u32, traced: bool) -> Result<(Run, Option<TraceFile>)> {
    let title = if of > 1 { format!("{mode} {number}/{of}") } else { mode.to_string() };
    let mut display = ProgressDisplay::for_stderr(false);
    let run = lab.run(mode, number, traced, &mut |step| match step {
        Step::Doing(what) => display.say(&format!("{title}: {what}")),
        Step::Migrating(progress) => display.update(progress),
    });
    display.finish();
    let (run, trace) = run.with_context(|| format!("the demo failed in mode {mode}"))?;
    match (run.total_ms, &run.error) {
        (Some(total), None) => say!("{title}: {} in total", human_ms(total)),
        (_, error) => say!("{title}: {}", error.as_deref().unwrap_or("no figures")),
    }
    Ok((run, trace))
}

/// The demo fails if a VM was damaged, or did not move in a mode that should have moved it.
fn verdict(runs: &[Run]) -> Result<()> {
    let baseline =
        |run: &Run| Mode::ALL.iter().any(|mode| mode.name() == run.mode && mode.may_not_converge());
    let failed = |run: &&Run| {
        if run.converged { !run.verified } else { !run.gave_up || !baseline(run) || !run.guest_clean }
    };
    let bad: Vec<String> =
        runs.iter().filter(failed).map(|run| format!("{} (run {})", run.mode, run.run)).collect();
    if !bad.is_empty() {
        bail!("not verified: {}; see the reasons above and in the JSON report", bad.join(", "));
    }
    Ok(())
}
