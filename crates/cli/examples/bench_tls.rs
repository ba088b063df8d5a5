//! Measures what encryption, and connections that outlast breaks, cost a native migration: the same VM over the same shaped link, each way in turn.
//!
//! `cargo run --release -p pagewarp --example bench_tls -- --help`; figures are in `docs/migration-performance.md`. Takes root, for network
//! namespaces, /dev/kvm, and a `pagewarp` binary. JSON lines, one for each migration, go to `--out`.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use pagewarp_cli::backend::BackendName;
use pagewarp_cli::demo::guest::GuestWatch;
use pagewarp_cli::demo::host::HostInfo;
use pagewarp_cli::demo::machine::{BootConfig, Extras, Machine};
use pagewarp_cli::units::{ByteSize, Rate};
use pagewarp_engine::report::SourceReport;
use pagewarp_kvm::control::MigrateOptions;
use pagewarp_net::tls::certs::{LabSet, make};
use pagewarp_testkit::netns::{End, NetPair};
use serde_json::json;

#[derive(Parser)]
struct Args {
    /// The program [default: next to this one]
    #[arg(long)]
    pagewarp: Option<PathBuf>,
    /// Guest memory, all of it filled
    #[arg(long, default_value = "1G")]
    memory: ByteSize,
    /// Pages that the guest writes a second
    #[arg(long, default_value_t = 2000)]
    rate: u64,
    /// Rate of the link
    #[arg(long, default_value = "1Gbit")]
    link: Rate,
    /// Data connections
    #[arg(long, default_value_t = 4)]
    connections: usize,
    /// Migrations of each kind
    #[arg(long, default_value_t = 5)]
    repeat: usize,
    /// Where each migration's report goes
    #[arg(long)]
    out: PathBuf,
}

/// A kind of connection.
#[derive(Clone, Copy)]
struct Kind {
    name: &'static str,
    tls: bool,
    /// Whether a break is mended.
    lasting: bool,
}

const KINDS: [Kind; 4] = [
    Kind { name: "plain", tls: false, lasting: false },
    Kind { name: "plain, lasting", tls: false, lasting: true },
    Kind { name: "TLS", tls: true, lasting: false },
    Kind { name: "TLS, lasting", tls: true, lasting: true },
];

/// How long the guest may take to fill its memory.
const FILL: Duration = Duration::from_secs(120);

fn main() -> Result<()> {
    let args = Args::parse();
    let program = match &args.pagewarp {
        Some(program) => program.clone(),
        None => std::env::current_exe()?.with_file_name("../pagewarp"),
    };
    let program = program.canonicalize().with_context(|| format!("no program at {}", program.display()))?;
    let host = HostInfo::detect();
    let mut out = File::create(&args.out)?;
    let mut seen: [Vec<SourceReport>; KINDS.len()] = Default::default();
    for round in 0..args.repeat {
        for turn in 0..KINDS.len() {
            // None is always the first, or always after the same other one.
            let number = (round + turn) % KINDS.len();
            let kind = KINDS[number];
            let report = migrate(&args, &program, kind)?;
            let line = json!({
                "kind": kind.name, "round": round, "cpu": host.cpu, "date": host.date,
                "at": SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
                "memory_bytes": args.memory.0, "link_bytes_per_s": args.link.bytes_per_s, "report": report,
            });
            writeln!(out, "{line}")?;
            eprintln!("{}: {:.2} s, {:.2} s of CPU time", kind.name, report.total_ms / 1e3, cpu_s(&report));
            seen[number].push(report);
        }
    }
    println!(
        "| connections | total s | downtime ms | wire MiB | CPU s, both hosts |\n|---|---:|---:|---:|---:|"
    );
    for (kind, reports) in KINDS.iter().zip(&seen) {
        println!(
            "| {} | {} | {} | {} | {} |",
            kind.name,
            spread(reports, 2, |report| report.total_ms / 1e3),
            spread(reports, 0, |report| report.downtime_ms),
            spread(reports, 0, |report| report.wire_bytes as f64 / f64::from(1 << 20)),
            spread(reports, 2, cpu_s),
        );
    }
    Ok(())
}

/// CPU time of all stages on both hosts: encryption happens in those that send and receive.
fn cpu_s(report: &SourceReport) -> f64 {
    let there = report.destination.as_ref().map_or(0.0, |there| there.cpu_ms);
    (report.cpu_ms + there) / 1e3
}

/// The median, with the least and the most.
fn spread(reports: &[SourceReport], digits: usize, of: impl Fn(&SourceReport) -> f64) -> String {
    let mut all: Vec<f64> = reports.iter().map(of).collect();
    all.sort_by(f64::total_cmp);
    let [least, .., most] = &all[..] else { return all.iter().map(|x| format!("{x:.digits$}")).collect() };
    format!("{:.digits$} ({least:.digits$}–{most:.digits$})", all[all.len() / 2])
}

fn migrate(args: &Args, program: &Path, kind: Kind) -> Result<SourceReport> {
    let net = NetPair::new(Some(args.link.bytes_per_s * 8));
    let dir = tempfile::tempdir()?;
    let tls = dir.path().join("tls");
    make(
        &tls,
        &LabSet { hosts: vec![NetPair::DESTINATION.to_string()], client: "source".into(), days: 1 },
        false,
    )?;
    let boot = BootConfig {
        memory: args.memory,
        vcpus: 1,
        cmdline: format!("workload=kv rate={} seed=1 report_ms=100 fill=100", args.rate),
        backend: BackendName::Cpu,
    };
    let mut source =
        Machine::boot(&program_at(dir.path(), program, &net, End::Source)?, dir.path(), "source", &boot)?;
    let mut guest = GuestWatch::new(source.console())?;
    source.wait_for("the guest to fill its memory", FILL, |_| {
        guest.poll()?;
        Ok((guest.is_ready() && guest.reports() >= 20).then_some(()))
    })?;
    let mut told = Extras::args(["--backend", "cpu"]);
    if kind.tls {
        told.args.extend(["--tls-dir".into(), tls.clone().into()]);
    } else {
        told.args.push("--plaintext".into());
    }
    let there = program_at(dir.path(), program, &net, End::Destination)?;
    let mut destination = Machine::receive_with(&there, dir.path(), "destination", &told)?;
    let to = destination.listening()?;
    let usual = MigrateOptions::default();
    let options = MigrateOptions {
        connections: args.connections,
        history_bytes: args.memory.0,
        backend: "cpu".into(),
        plaintext: !kind.tls,
        tls_dir: kind.tls.then_some(tls),
        resume_timeout_ms: if kind.lasting { usual.resume_timeout_ms } else { 0 },
        ..usual
    };
    let report = source.migrate(&to, options, |_| {})?;
    guest.hop(destination.console())?;
    destination.wait_for("the guest to go on", FILL, |_| {
        guest.poll()?;
        Ok((guest.reports() >= 20).then_some(()))
    })?;
    ensure!(guest.problems().is_empty(), "{:?}", guest.problems());
    source.wait_for_end();
    destination.stop();
    Ok(report)
}

/// A script that becomes the program at one end of the link. A destination listens there.
fn program_at(dir: &Path, program: &Path, net: &NetPair, end: End) -> Result<PathBuf> {
    let path = dir.join(net.name(end));
    let script = format!(
        "#!/bin/bash\nargs=()\nfor arg; do\n[ \"$arg\" = 127.0.0.1:0 ] && arg={}:0\nargs+=(\"$arg\")\ndone\n\
         exec ip netns exec {} {} \"${{args[@]}}\"\n",
        NetPair::DESTINATION,
        net.name(end),
        program.display()
    );
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}
