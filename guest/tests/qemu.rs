//! The guest in QEMU: it boots, works, checks itself, and its memory looks like the real thing.
//!
//! `cargo test -p pagewarp-guest --test qemu -- --nocapture` prints the statistics that docs/guest.md quotes.

#![allow(unreachable_pub, reason = "helper modules of a test")]

#[path = "common/qemu.rs"]
mod qemu;
#[path = "common/stats.rs"]
mod stats;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use pagewarp_guest::{Event, GuestConfig, Ready, Report, Workload};
use qemu::Machine;
use stats::{ChangeStats, ImageStats};

/// One machine at a time: together they would need much memory, and slow each other down.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

fn ready(event: &Event) -> Option<Ready> {
    if let Event::Ready(ready) = event { Some(ready.clone()) } else { None }
}

fn report(event: &Event) -> Option<Report> {
    if let Event::Report(report) = event { Some(*report) } else { None }
}

/// Boots, takes two images 2 s apart, and returns their statistics.
fn observe(workload: Workload, memory_mib: u64) -> (ImageStats, ChangeStats) {
    const APART: Duration = Duration::from_secs(2);
    let config = GuestConfig { workload, report_ms: 200, verify_mib_s: Some(2048), ..GuestConfig::default() };
    let mut machine = Machine::boot(memory_mib, &config);
    let filled = machine.wait_for("ready", ready);
    let first = machine.wait_for("a first report", report);
    let mut control = machine.control();
    let (before, resumed) = machine.dump(&mut control, memory_mib);
    thread::sleep(APART.saturating_sub(resumed.elapsed()));
    let apart = resumed.elapsed().as_secs_f64();
    let (after, _) = machine.dump(&mut control, memory_mib);
    let seen = machine.wait_for("a report after the last image", report);
    let last = machine.wait_for("two more sweeps", |e| report(e).filter(|r| r.sweeps >= seen.sweeps + 2));
    assert_eq!(last.errors, 0);
    assert!(last.pages_written > first.pages_written);
    let (image, changes) = (ImageStats::of(&before), ChangeStats::between(&before, &after));
    println!("{workload}: fill_ms={} {image}; after {apart:.1} s: {changes}", filled.fill_ms);
    (image, changes)
}

#[test]
fn kv_memory_looks_like_a_store() {
    let _alone = alone();
    let (image, changes) = observe(Workload::Kv, 512);
    assert!((25.0..=40.0).contains(&image.zero_percent()), "{image}");
    assert!((1.6..=2.0).contains(&image.lz4_ratio()), "{image}");
    // How much is written in 2 s depends on the host, and with it how many changes gather in a page.
    assert!(changes.changed_pages > 100, "{changes}");
    assert!((50.0..=85.0).contains(&changes.few_bytes_percent()), "{changes}");
}

#[test]
fn graph_memory_changes_in_whole_pages() {
    let _alone = alone();
    let (image, changes) = observe(Workload::Graph, 256);
    assert!((1.0..=2.0).contains(&image.lz4_ratio()), "{image}");
    assert!(changes.changed_pages > 100 && changes.few_bytes_percent() < 10.0, "{changes}");
}

#[test]
fn idle_leaves_memory_untouched() {
    let _alone = alone();
    let (image, changes) = observe(Workload::Idle, 128);
    assert!(image.zero_percent() > 99.0, "{image}");
    assert!(changes.changed_pages < 100, "{changes}");
}

#[test]
fn uniform_memory_is_random() {
    let _alone = alone();
    let (image, changes) = observe(Workload::Uniform, 128);
    assert!(image.zero_percent() < 5.0 && image.lz4_ratio() < 1.01, "{image}");
    assert!(changes.few_bytes_percent() > 50.0, "{changes}");
}

#[test]
fn a_stopped_guest_sees_the_pause() {
    let _alone = alone();
    let config = GuestConfig {
        workload: Workload::Uniform,
        memory_mib: Some(8),
        report_ms: 100,
        ..GuestConfig::default()
    };
    let mut machine = Machine::boot(64, &config);
    machine.wait_for("a first report", report);
    let mut control = machine.control();
    control.run("stop", "");
    thread::sleep(Duration::from_millis(400));
    control.run("cont", "");
    // QEMU's own clock handling may not let a stopped guest's TSC go on to the last millisecond.
    let pause = machine.wait_for("the pause", |e| {
        if let Event::Pause(p) = e { Some(p.us).filter(|&us| us >= 390_000) } else { None }
    });
    let next = machine.wait_for("a report with it", report);
    assert!(next.max_pause_us >= pause);
    machine.wait_for("a report after it", |e| {
        report(e).filter(|r| r.max_pause_us >= pause && r.last_pause_us < pause)
    });
}

#[test]
fn memory_beyond_4_gib_is_used() {
    let _alone = alone();
    // Idle, and so hardly any of it exists on the host.
    let config = GuestConfig {
        workload: Workload::Idle,
        exit_after_ms: Some(300),
        report_ms: 100,
        ..GuestConfig::default()
    };
    let mut machine = Machine::boot(5120, &config);
    let filled = machine.wait_for("ready", ready);
    assert!((5100..=5120).contains(&filled.mem_mib), "{filled:?}");
    let errors = machine
        .wait_for("the exit", |e| if let Event::Exit { errors, .. } = e { Some(*errors) } else { None });
    assert_eq!(errors, 0);
    assert_eq!(machine.next_event(), None, "the machine must be off");
}

#[test]
fn bad_parameters_are_explained() {
    let _alone = alone();
    let mut machine = Machine::boot_cmdline(64, "quiet workload=redis");
    let warning = machine.next_event();
    assert!(matches!(&warning, Some(Event::Warning(text)) if text.contains("quiet")), "{warning:?}");
    let fault = machine.next_event();
    assert!(matches!(fault, Some(Event::Fault(_))), "{fault:?}");
    assert!(
        machine.log.iter().any(|l| l.contains("workload=redis") && l.contains("idle, kv, graph or uniform")),
        "{:?}",
        machine.log
    );
    assert!(machine.log.iter().any(|l| l.starts_with("rate=")), "{:?}", machine.log);
    assert_eq!(machine.next_event(), None, "the machine must be off");
}

#[test]
fn too_little_memory_is_explained() {
    let _alone = alone();
    let mut machine = Machine::boot(3, &GuestConfig::default());
    let fault = machine.next_event();
    assert!(
        matches!(&fault, Some(Event::Fault(text)) if text.contains("memory")),
        "{fault:?}; {:?}",
        machine.log
    );
}
