//! VMs that move between QEMU processes with a GPU on either side or both, and what happens if it fails. The device is lavapipe, in software, as in
//! the tests of `gpu.rs`. Takes root, because of the network namespaces.
//!
//! `PAGEWARP_SEED` sets the seed of the random moments.

mod support;

use std::ops::Range;

use pagewarp_cli::exit::Exit;
use pagewarp_qemu::bridge::DestinationBridgeReport;
use pagewarp_qemu::manage::QemuReport;
use pagewarp_testkit::rng::SplitMix64;

use support::qemu::{Computing, Hosts, bridge_of};
use support::{Sent, one_error, setting, software_gpu};

const MEMORY_MIB: u64 = 64;
/// How fast the guest writes. The device does a thousand pages a second, if others are busy as well.
const PAGES_PER_S: u64 = 200;
/// Little, because the device takes long for pages with contents.
const FILL_PERCENT: u8 = 8;
/// Enough for the device never to wait for the link.
const RATE: u64 = 1_000_000_000;
/// Batches after which a device is lost: in the first epoch, and in a later one, when it has versions that deltas refer to. A migration has about 450 of them,
/// half of them in the first epoch; fewer where the device is fast enough for long ones.
const EARLY: Range<u64> = 0..40;
const LATE: Range<u64> = 260..360;
/// What both ends are told. Compiling the kernels of a device in software may take long on a busy machine, and the peer waits meanwhile. Several threads share
/// the history on the device.
const BOTH: [&str; 4] = ["--peer-timeout", "60", "--threads", "2"];
/// What the source is told. Left alone, it would find out that a device in software is too slow to be worth it.
const ALWAYS: [&str; 3] = ["--json", "--compression", "lz4"];

fn boot() -> Hosts {
    Hosts::boot_filled(MEMORY_MIB, PAGES_PER_S, FILL_PERCENT, RATE)
}

fn cpu() -> Computing {
    Computing::default()
}

fn gpu() -> Computing {
    Computing { backend: software_gpu(), faults: None }
}

fn faulty(faults: &str) -> Computing {
    Computing { faults: Some(faults.to_owned()), ..gpu() }
}

/// Moves the VM to a fresh QEMU, over one connection or over so many channels of multifd beside it, which must succeed.
fn hop(hosts: &mut Hosts, source: &Computing, destination: &Computing, channels: u32) -> QemuReport {
    let count = channels.to_string();
    let options: &[&str] = if channels == 0 { &[] } else { &["--multifd", &count] };
    let there = hosts.fresh();
    let (receiving, to) = hosts.receive_by(destination, &there, &BOTH);
    let sent = hosts.migrate_by(source, &to, &[&BOTH[..], &ALWAYS, options].concat()).wait();
    let received = receiving.wait();
    assert_eq!(sent.code, Some(0), "source: {}\ndestination: {}", sent.stderr, received.stderr);
    assert_eq!(received.code, Some(0), "{}", received.stderr);
    hosts.moved(there);
    let report: QemuReport = serde_json::from_str(&sent.stdout).unwrap();
    println!(
        "{:.0} ms, {} epochs, batches at the devices {:?}, {:?}",
        report.total_ms,
        report.epochs,
        device_batches(&report),
        bridge_of(&report).encodings
    );
    // Whatever happened to a device, nothing passed without having been encoded and decoded.
    let bridge = bridge_of(&report);
    assert_eq!(bridge.connections, channels + 1);
    assert!(bridge.complete && bridge.passed_raw.is_empty(), "{bridge:?}");
    assert_eq!(bridge.encodings.values().map(|used| used.pages).sum::<u64>(), bridge.pages);
    report
}

fn theirs(report: &QemuReport) -> &DestinationBridgeReport {
    report.destination.as_ref().and_then(|side| side.bridge.as_ref()).expect("the destination's account")
}

/// Backends of both ends, as the report names them.
fn ends(report: &QemuReport) -> [&str; 2] {
    [&bridge_of(report).backend, &theirs(report).backend]
        .map(|name| name.split_whitespace().next().unwrap_or(""))
}

/// Why the CPU took over, on the source and on the destination.
fn fallbacks(report: &QemuReport) -> [Option<&str>; 2] {
    [bridge_of(report).fallback.as_deref(), theirs(report).fallback.as_deref()]
}

/// Batches that the devices of source and destination were given, if both did what they should.
fn device_batches(report: &QemuReport) -> [u64; 2] {
    let batches = bridge_of(report).levels["lz4"].segments;
    [bridge_of(report).spilled_batches, theirs(report).spilled_batches].map(|spilled| batches - spilled)
}

/// Pages that were sent as what has changed since a version sent before.
fn deltas(report: &QemuReport) -> u64 {
    let used = |name: &&str| bridge_of(report).encodings.get(*name);
    ["same", "sparse-xor", "lz4-xor"].iter().filter_map(used).map(|used| used.pages).sum()
}

/// Over one connection, then back over several. The CPUs do not help: whatever was encoded and decoded, the devices have done, and their histories had the
/// versions for it.
#[test]
fn a_vm_goes_over_one_connection_and_returns_over_three_with_a_gpu_on_both_sides() {
    let alone = faulty("no-spill");
    let mut hosts = boot();
    for channels in [0, 2] {
        let report = hop(&mut hosts, &alone, &alone, channels);
        assert_eq!((ends(&report), fallbacks(&report)), (["gpu", "gpu"], [None, None]));
        for name in [&bridge_of(&report).backend, &theirs(&report).backend] {
            assert!(!name.contains("cpu"), "{name}");
        }
        assert!(report.epochs >= 2 && bridge_of(&report).history_bytes > 0);
        assert!(deltas(&report) > 0, "no deltas: {:?}", bridge_of(&report).encodings);
    }
}

#[test]
fn a_vm_moves_between_a_gpu_and_a_cpu_in_both_directions() {
    let mut hosts = boot();
    for (channels, source, destination) in [(0, gpu(), cpu()), (0, cpu(), gpu()), (2, gpu(), gpu())] {
        let report = hop(&mut hosts, &source, &destination, channels);
        let expected = [&source, &destination].map(|side| if side.backend == "cpu" { "cpu" } else { "gpu" });
        assert_eq!((ends(&report), fallbacks(&report)), (expected, [None, None]));
        assert!(deltas(&report) > 0, "no deltas: {:?}", bridge_of(&report).encodings);
        let given = device_batches(&report);
        assert!(given.iter().all(|&batches| batches > 0), "{given:?}");
    }
}

/// At the source, at the destination, and at both; over one connection and over three.
#[test]
fn a_device_that_is_lost_at_any_moment_costs_nothing_but_its_help() {
    let seed = setting("PAGEWARP_SEED", 1);
    println!("seed {seed}: set PAGEWARP_SEED for another one");
    let mut random = SplitMix64::new(seed);
    let (mut hosts, mut lost) = (boot(), 0);
    let cases = [([Some(EARLY), None], 0), ([None, Some(LATE)], 0), ([Some(LATE), Some(EARLY)], 2)];
    for (moments, channels) in cases {
        let at = moments.map(|moment| moment.map(|m| m.start + random.below(m.end - m.start)));
        let by = |job: Option<u64>| job.map_or_else(gpu, |job| faulty(&format!("lose-after={job}")));
        let report = hop(&mut hosts, &by(at[0]), &by(at[1]), channels);
        let (whys, given) = (fallbacks(&report), device_batches(&report));
        println!("lost at {at:?} of {given:?}: {whys:?}");
        assert_eq!(ends(&report), ["gpu", "gpu"]);
        for ((at, why), given) in at.into_iter().zip(whys).zip(given) {
            match (at, why) {
                (Some(job), None) => assert!(job >= given, "no word of the loss at job {job} of {given}"),
                (Some(_), Some(why)) => {
                    assert!(why.contains("lost") || why.contains("cannot work"), "{why}");
                    lost += 1;
                }
                (None, why) => assert_eq!(why, None),
            }
        }
    }
    assert!(lost >= 2, "every migration gets as far as the early moments");
}

#[test]
fn a_device_that_stalls_or_has_no_memory_or_decodes_wrongly_damages_nothing() {
    let mut hosts = boot();
    let stalls = faulty("stall-after=20,stall-timeout-ms=300");
    let is_lost = |why: Option<&str>| why.is_some_and(|why| why.contains("lost"));
    // A history that finds no room on the destination's device costs uploads, and nothing else.
    let report = hop(&mut hosts, &stalls, &faulty("no-memory-after=1,no-spill"), 0);
    let [source, destination] = fallbacks(&report);
    assert!(is_lost(source) && destination.is_none(), "{source:?} {destination:?}");
    // A device without memory for the buffers of batches is never used.
    let report = hop(&mut hosts, &faulty("no-memory-after=0"), &stalls, 0);
    let [source, destination] = fallbacks(&report);
    assert!(
        source.is_some_and(|why| why.contains("memory")) && is_lost(destination),
        "{source:?} {destination:?}"
    );
    // The CPU decodes again what does not have the right hash.
    let report = hop(&mut hosts, &gpu(), &faulty("corrupt-one-in=30"), 2);
    let [source, destination] = fallbacks(&report);
    assert!(source.is_none() && destination.is_some_and(|why| why.contains("hash")), "{destination:?}");
}

/// What the source's device has encoded wrongly is noticed at the destination, before any of it gets into QEMU. QEMU would have to send it again, which
/// nobody can ask it to: the VM stays where it is.
#[test]
fn a_device_that_encodes_wrongly_ends_the_migration_and_leaves_the_vm_where_it_is() {
    let mut hosts = boot();
    let mut there = hosts.fresh();
    let (receiving, to) = hosts.receive_by(&cpu(), &there, &BOTH);
    let wrong = faulty("corrupt-one-in=30");
    let sent = hosts.migrate_by(&wrong, &to, &[&BOTH[..], &ALWAYS].concat()).wait();
    let received = receiving.wait();
    println!("{}{}", sent.stderr, received.stderr);
    assert_eq!((sent.code, received.code), (Some(Exit::Peer as i32), Some(Exit::Peer as i32)));
    for Sent { stderr, .. } in [&sent, &received] {
        let error = one_error(stderr);
        assert!(error.contains("damaged") && error.contains("--backend cpu"), "{error}");
    }
    hosts.stayed(&mut there);
    // It was the device and not the link.
    hop(&mut hosts, &cpu(), &gpu(), 0);
}
