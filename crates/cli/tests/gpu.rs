//! VMs that move with a GPU on either side or both, and what happens if it fails. The device is lavapipe, in software, so that the tests
//! are the same on every host; they need /dev/kvm as well.
//!
//! `PAGEWARP_SEED` sets the seed of the random moments.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use pagewarp_cli::backend::{adapters, first_hardware, may_have_gpu};
use pagewarp_cli::demo::machine::Extras;
use pagewarp_cli::units::ByteSize;
use pagewarp_engine::report::SourceReport;
use pagewarp_testkit::rng::SplitMix64;
use serde_json::Value;

use support::{GPU_FAULTS, PROGRAM, Rig, have_kvm, setting, software_gpu};

const MEMORY: ByteSize = ByteSize(64 << 20);
/// How fast the guest writes. The device does less than 10,000 pages a second.
const PAGES_PER_S: u64 = 300;
/// Little, because the device takes long for pages with contents.
const FILL_PERCENT: Option<u8> = Some(20);
/// Pages in a batch: few, so that there are many moments at which something can happen, 256 in the first epoch.
const BATCH_PAGES: u64 = 64;

fn boot(backend: &str) -> Rig {
    Rig::boot_filled(MEMORY, PAGES_PER_S, FILL_PERCENT, backend.parse().unwrap())
}

/// Backends of both ends, as the report names them.
fn ends(report: &SourceReport) -> (&str, &str) {
    let word = |name: &'static str, backend: &str| backend.starts_with(name).then_some(name);
    let side = |backend: &str| word("gpu", backend).or_else(|| word("cpu", backend)).unwrap_or("neither");
    (side(&report.backend), side(&report.destination.as_ref().unwrap().backend))
}

/// Batches that the devices of source and destination were given at least, if both did what they should.
fn device_batches(report: &SourceReport) -> (u64, u64) {
    let batches: u64 = report.epochs.iter().map(|epoch| epoch.pages.div_ceil(BATCH_PAGES)).sum();
    let destination = report.destination.as_ref().unwrap();
    (batches.saturating_sub(report.spilled_batches), batches.saturating_sub(destination.spilled_batches))
}

/// Why the CPU took over, on the source and on the destination.
fn fallbacks(report: &SourceReport) -> (Option<&str>, Option<&str>) {
    (report.fallback.as_deref(), report.destination.as_ref().unwrap().fallback.as_deref())
}

#[test]
fn a_vm_moves_between_a_gpu_and_a_cpu_in_every_direction() {
    let gpu = software_gpu();
    if !have_kvm("a_vm_moves_between_a_gpu_and_a_cpu_in_every_direction") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let trace = |host: &str| dir.path().join(format!("{host}.json")).to_str().unwrap().to_owned();
    let mut rig = boot("auto");
    let batch_pages = BATCH_PAGES.to_string();
    let options = |backend| ["--batch-pages", &batch_pages, "--backend", backend];

    let report = rig.hop(&options("auto"));
    if first_hardware(adapters()).is_none() {
        assert_eq!(ends(&report), ("cpu", "cpu"), "`auto` takes no device in software");
    }
    if !may_have_gpu() {
        let refused = rig.send("127.0.0.1:1", &options(&gpu)).wait();
        assert_eq!(refused.code, Some(2), "{}", refused.stderr);
        assert!(refused.error().contains("started on a host without a GPU"), "{}", refused.stderr);
    }
    let report = rig.hop_to(&Extras::args(["--backend", &gpu]), &options("cpu"));
    assert_eq!((ends(&report), fallbacks(&report)), (("cpu", "gpu"), (None, None)));
    let there = Extras::args(["--backend", &gpu, "--trace", &trace("destination")]);
    let report = rig.hop_to(&there, &[&options(&gpu)[..], &["--trace", &trace("source")]].concat());
    assert_eq!((ends(&report), fallbacks(&report)), (("gpu", "gpu"), (None, None)));
    assert!(report.epochs.len() >= 2, "live: at least one epoch before the pause");
    let delta = ["same", "sparse-xor", "lz4-xor"].iter().filter_map(|name| report.encodings.get(*name));
    assert!(delta.map(|used| used.pages).sum::<u64>() > 0, "no deltas: {:?}", report.encodings);
    source_trace(&spans(Path::new(&trace("source")), "source"));
    destination_trace(&spans(Path::new(&trace("destination")), "destination"));

    let report = rig.hop_to(&Extras::args(["--backend", "cpu"]), &options(&gpu));
    assert_eq!((ends(&report), fallbacks(&report)), (("gpu", "cpu"), (None, None)));
}

/// A span: its name, its batch, beginning and end in microseconds.
type Span = (String, u64, f64, f64);

/// The spans of a file, and checks that they are of this host and that those of one track do not overlap.
fn spans(file: &Path, host: &str) -> Vec<Span> {
    let json: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let events = json["traceEvents"].as_array().unwrap();
    assert_eq!(events[0]["args"]["name"], host);
    let mut ends: BTreeMap<u64, f64> = BTreeMap::new();
    let mut spans = Vec::new();
    for event in events.iter().filter(|event| event["ph"] == "X") {
        let number = |name: &str| event[name].as_f64().unwrap_or_else(|| panic!("{name} of {event}"));
        let (begin, length) = (number("ts"), number("dur"));
        let last = ends.insert(event["tid"].as_u64().unwrap(), begin + length);
        // Within the precision of a number of microseconds.
        assert!(last.is_none_or(|last| last <= begin + 0.01), "it begins before {last:?} ends: {event}");
        let batch = event["args"]["batch"].as_u64().unwrap();
        spans.push((event["name"].as_str().unwrap().to_owned(), batch, begin, begin + length));
    }
    spans
}

fn source_trace(spans: &[Span]) {
    let names: BTreeSet<&str> = spans.iter().map(|span| span.0.as_str()).collect();
    for name in ["copy", "upload", "kernel", "readback", "send"] {
        assert!(names.contains(name), "no span `{name}` on the source, only {names:?}");
    }
    let mut at_device: BTreeMap<u64, (f64, f64)> = BTreeMap::new();
    for (name, batch, begin, end) in spans {
        if ["upload", "kernel", "readback"].contains(&name.as_str()) {
            let whole = at_device.entry(*batch).or_insert((*begin, *end));
            *whole = (whole.0.min(*begin), whole.1.max(*end));
        }
    }
    let mut at_device: Vec<_> = at_device.into_values().collect();
    at_device.sort_by(|a, b| a.0.total_cmp(&b.0));
    let overlapping = at_device.windows(2).filter(|pair| pair[1].0 < pair[0].1).count();
    assert!(overlapping > 0, "no two of {} batches were with the device at once", at_device.len());
    eprintln!(
        "{overlapping} of {} batches came to the device before the one before had left",
        at_device.len()
    );
}

fn destination_trace(spans: &[Span]) {
    let names: BTreeSet<&str> = spans.iter().map(|span| span.0.as_str()).collect();
    for name in ["receive", "upload", "kernel", "readback", "restore"] {
        assert!(names.contains(name), "no span `{name}` on the destination, only {names:?}");
    }
}

/// A process is the destination of one migration and the source of the next, so that its fault hits both: every second pair of
/// neighbours has one at the source alone, at the destination alone, or at both.
#[test]
fn a_device_that_is_lost_at_any_moment_costs_nothing_but_its_help() {
    let gpu = software_gpu();
    if !have_kvm("a_device_that_is_lost_at_any_moment_costs_nothing_but_its_help") {
        return;
    }
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let seed = setting("PAGEWARP_SEED", since.subsec_nanos().into());
    println!("PAGEWARP_SEED={seed}");
    let mut random = SplitMix64::new(seed);
    let mut rig = boot(&gpu);
    let options = ["--backend", &gpu, "--batch-pages", &BATCH_PAGES.to_string()];
    let (mut here, mut on_either) = (None, [0, 0]);
    for hop in 0..20 {
        // Mostly moments that every migration reaches; some that it may never reach, if many batches spill.
        let range = if random.below(3) == 0 { 120 } else { 60 };
        let there = (hop % 3 != 2).then(|| random.below(range));
        let mut extras = Extras::args(["--backend", &gpu]);
        if let Some(job) = there {
            extras = extras.with_env(GPU_FAULTS, &format!("lose-after={job}"));
        }
        let report = rig.hop_to(&extras, &options);
        let (whys, given) = (fallbacks(&report), device_batches(&report));
        println!("hop {hop}: lost at {here:?} and {there:?} of at least {given:?}: {whys:?}");
        for (side, (lost_at, given, why)) in
            [(here, given.0, whys.0), (there, given.1, whys.1)].into_iter().enumerate()
        {
            match (lost_at, why) {
                (Some(job), None) => assert!(job >= given, "no word of the loss at job {job} of {given}"),
                (Some(_), Some(why)) => {
                    assert!(why.contains("lost") || why.contains("cannot work"), "{why}");
                    on_either[side] += 1;
                }
                (None, why) => assert_eq!(why, None),
            }
        }
        here = there;
    }
    assert!(on_either.iter().all(|&count| count >= 5), "{on_either:?}");
}

#[test]
fn a_device_that_stalls_or_has_no_memory_or_computes_wrongly_damages_nothing() {
    let gpu = software_gpu();
    if !have_kvm("a_device_that_stalls_or_has_no_memory_or_computes_wrongly_damages_nothing") {
        return;
    }
    let mut rig = boot(&gpu);
    let options = ["--backend", &gpu, "--batch-pages", &BATCH_PAGES.to_string()];
    let healthy = Extras::args(["--backend", &gpu]);
    let mut with = |faults: &str| {
        let to = rig.hop_to(&healthy.clone().with_env(GPU_FAULTS, faults), &options);
        assert_eq!(to.fallback, None, "the source is healthy");
        let from = rig.hop_to(&healthy, &options);
        let destination = from.destination.as_ref().unwrap();
        assert_eq!(destination.fallback, None, "the destination is healthy");
        println!(
            "{faults}: {:?} {}, {:?}",
            from.fallback,
            from.resent_pages,
            to.destination.as_ref().unwrap().fallback
        );
        (from, to.destination.unwrap())
    };

    let (source, destination) = with("stall-after=20,stall-timeout-ms=300");
    for why in [source.fallback, destination.fallback] {
        assert!(why.as_ref().is_some_and(|why| why.contains("lost")), "{why:?}");
    }

    // Versions find no room on the device, which costs deltas and nothing else, or the CPU takes over: both are fine.
    with("no-memory-after=10");

    // What was encoded wrongly is noticed at the destination and sent again; what was decoded wrongly is decoded again.
    let (source, destination) = with("corrupt-one-in=30");
    assert!(source.resent_pages > 0, "damaged batches are sent again");
    assert!(destination.fallback_batches > 0, "damaged batches are decoded again");
}

#[test]
fn devices_tells_software_from_gpus_and_measures_it() {
    let gpu = software_gpu();
    let done = Command::new(PROGRAM).args(["devices", "--json"]).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let json: Value = serde_json::from_slice(&done.stdout).unwrap();
    let devices = json["devices"].as_array().unwrap();
    let software = devices.iter().find(|device| device["backend"] == gpu.as_str()).unwrap();
    assert_eq!((software["kind"].as_str(), software["usable"].as_bool()), (Some("software"), Some(true)));
    for measured in [software, &json["cpu"]] {
        for rate in ["encode_gb_per_s", "decode_gb_per_s"] {
            assert!(measured[rate].as_f64() > Some(0.0), "{rate} of {measured:#}");
        }
    }
    if devices.iter().all(|device| device["kind"] == "software") {
        assert_eq!((&json["auto"]["send"], &json["auto"]["receive"]), (&"cpu".into(), &"cpu".into()));
    }
}

#[test]
fn a_host_without_a_window_system_is_nothing_to_complain_about() {
    // Cargo sets the first.
    let mut devices = Command::new(PROGRAM);
    devices.arg("devices").env_remove("NODEVICE_SELECT").env_remove("XDG_RUNTIME_DIR").env_remove("DISPLAY");
    let output = devices.output().unwrap();
    assert!(output.status.success());
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[test]
fn the_demo_runs_on_a_device_in_software_if_it_is_told_to() {
    let gpu = software_gpu();
    let dir = tempfile::tempdir().unwrap();
    let done = Command::new(PROGRAM)
        .current_dir(dir.path())
        .args(["demo", "--synthetic", "--memory", "16M", "--rate", "200", "--link", "none", "--json"])
        .args(["--modes", "pipelined-compressed", "--backend", &gpu, "--trace", "trace.json"])
        .output()
        .unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let report: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(report["settings"]["gpu_in_software"], true);
    let runs = report["runs"].as_array().unwrap();
    assert_eq!(
        runs.iter().map(|run| run["mode"].as_str().unwrap()).collect::<Vec<_>>(),
        ["pipelined-compressed", "pipelined-gpu"]
    );
    for host in ["source", "destination"] {
        assert!(runs[0]["backend"][host].as_str().unwrap().starts_with("cpu"), "{:#}", runs[0]);
        assert!(runs[1]["backend"][host].as_str().unwrap().starts_with("gpu"), "{:#}", runs[1]);
        assert!(runs[1]["spilled_batches"][host].is_u64() && runs[1]["fallback"][host].is_null());
    }
    assert_eq!(runs[1]["verified"], true);

    let trace: Value =
        serde_json::from_slice(&std::fs::read(dir.path().join("trace.json")).unwrap()).unwrap();
    let kernels = |pid: u64| {
        let events = trace["traceEvents"].as_array().unwrap().iter();
        events.filter(|event| event["pid"] == pid && event["name"] == "kernel").count()
    };
    assert!(kernels(1) > 0 && kernels(2) > 0, "of the last run, and of both hosts");
}
