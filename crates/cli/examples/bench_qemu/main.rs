//! Measures live migrations of QEMU's VMs: by QEMU alone, in its modes, and through pagewarp. The same VM, the same link, the same run.
//!
//! `make bench-qemu`, or `cargo run --release -p pagewarp --example bench_qemu -- --help`; `docs/qemu-performance.md` says what is measured
//! and how. Takes root, for network namespaces, and a `pagewarp` binary.
#![forbid(unsafe_code)]

mod args;
mod course;
mod machines;
mod migrate;
mod mode;
mod process;
mod record;
mod relay;
mod table;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Parser;
use pagewarp_cli::demo::host::HostInfo;

use args::{Args, Load};
use record::{Host, Outcome, Record, Run, Settings};

fn main() -> ExitCode {
    match bench(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench_qemu: {error}");
            ExitCode::FAILURE
        }
    }
}

fn bench(args: &Args) -> Result<(), String> {
    if let [from, to] = &args.relay[..] {
        return relay::relay(from, to, relay::copy);
    }
    if let [from, to] = &args.relay_splice[..] {
        return relay::relay(from, to, relay::splice_through);
    }
    if let [from, to] = &args.relay_peek[..] {
        return relay::relay(from, to, relay::peek_and_splice);
    }
    if let Some(path) = &args.from {
        let text = fs::read_to_string(path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
        let record: Record = serde_json::from_str(&text)
            .map_err(|e| format!("{} is no record of this benchmark: {e}", path.display()))?;
        print!("{}", table::markdown(&record));
        return Ok(());
    }
    let pagewarp = pagewarp(args)?;
    let host = HostInfo::detect();
    let out = args.out.clone().unwrap_or_else(|| unused(&host.date));
    let mut record = Record {
        command: std::env::args().collect(),
        host: Host::of(host),
        qemu_version: String::new(),
        settings: Settings::of(args),
        runs: Vec::new(),
    };
    // Before hours of work rather than after.
    save(&record, &out)?;
    let all = args.loads().len() * args.links.len() * args.repeat as usize * args.modes.len();
    for load in args.loads() {
        for &link in &args.links {
            for repetition in 0..args.repeat {
                // Each repetition begins with another mode: whichever comes first may find more or less of the host's memory at hand.
                let mut modes = args.modes.clone();
                modes.rotate_left(repetition as usize % args.modes.len());
                for mode in modes {
                    let mut run = Run::new(mode, &load, link, repetition, unix_seconds());
                    eprint!("[{}/{all}] {load}, {link}, {mode}: ", record.runs.len() + 1);
                    perform(&mut run, args, &pagewarp, &load);
                    eprintln!("{}", run.summary());
                    if record.qemu_version.is_empty() {
                        record.qemu_version.clone_from(&run.qemu_version);
                    }
                    record.runs.push(run);
                    save(&record, &out)?;
                }
            }
        }
    }
    print!("{}", table::markdown(&record));
    eprintln!("every single run is in {}", out.display());
    Ok(())
}

/// One migration, from starting the VM to its end. Whatever goes wrong is noted in `run`.
fn perform(run: &mut Run, args: &Args, pagewarp: &Path, load: &Load) {
    // The test harness panics where QEMU does not start or the guest finds its memory damaged. All processes end with what is dropped.
    let result = catch_unwind(AssertUnwindSafe(|| migrate::perform(run, args, pagewarp, load)));
    let failed = match result {
        Ok(Ok(outcome)) => {
            run.outcome = outcome;
            return;
        }
        Ok(Err(error)) => error,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("a panic").to_owned()
        }
    };
    run.outcome = Outcome::Failed;
    run.error = Some(failed);
}

/// The binary to measure.
fn pagewarp(args: &Args) -> Result<PathBuf, String> {
    let path = match &args.pagewarp {
        Some(path) => path.clone(),
        None => {
            let here =
                std::env::current_exe().map_err(|e| format!("cannot tell where this program lies: {e}"))?;
            // target/release/examples/bench_qemu
            here.ancestors().nth(2).unwrap_or(Path::new(".")).join("pagewarp")
        }
    };
    // It is started in a shell's place, from wherever.
    path.canonicalize().map_err(|e| {
        format!("no pagewarp at {}: {e}; build it with `cargo build --release -p pagewarp`, or name it with --pagewarp", path.display())
    })
}

/// A name under which nothing is stored yet.
fn unused(date: &str) -> PathBuf {
    let name = |number| match number {
        1 => format!("docs/data/qemu-bench-{date}.json"),
        _ => format!("docs/data/qemu-bench-{date}-{number}.json"),
    };
    (1..).map(|number| PathBuf::from(name(number))).find(|path| !path.exists()).unwrap_or_default()
}

fn save(record: &Record, path: &Path) -> Result<(), String> {
    let cannot = |e: &dyn std::fmt::Display| format!("cannot write {}: {e}", path.display());
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(|e| cannot(&e))?;
    }
    let text = serde_json::to_string_pretty(record).map_err(|e| cannot(&e))?;
    fs::write(path, text + "\n").map_err(|e| cannot(&e))
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
