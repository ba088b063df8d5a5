//! What every backend has to do, done by those of this crate: `docs/backends.md`.

use std::sync::Arc;
use std::time::Duration;

use crate::common::simd_levels;
use pagewarp_codec::{Backend, CpuBackend, FakeBackend, FakeConfig, SpillBackend};
use pagewarp_testkit::conformance::{Subject, all, cross, malformed};

/// Batches per set of encodings.
const BATCHES: usize = 200;

fn everything(subject: Subject<'_>, seed: u64) {
    all(subject, seed);
    cross(subject, BATCHES, seed);
}

#[test]
fn the_cpu_at_every_level() {
    for simd in simd_levels() {
        let backend = CpuBackend::with_simd(simd).expect("available");
        everything(Subject::new(&backend), 1);
        malformed(Subject::new(&backend), 5_000, 2);
    }
}

#[test]
fn a_fake_device() {
    let max_delay = Duration::from_micros(50);
    for config in [
        FakeConfig::default(),
        FakeConfig { depth: 1, max_polls: 5, decode_history: true, ..FakeConfig::default() },
        FakeConfig { depth: 4, max_polls: 2, max_delay, decode_history: true, ..FakeConfig::default() },
    ] {
        everything(Subject::new(&FakeBackend::new(config)), 3);
    }
}

#[test]
fn a_slow_device_that_spills() {
    for (depth, decode_history) in [(1, true), (3, true), (2, false)] {
        let device = FakeConfig { depth, max_polls: 6, decode_history, ..FakeConfig::default() };
        let backend = SpillBackend::new(Arc::new(FakeBackend::new(device)), CpuBackend::new());
        everything(Subject::spilling(&backend), 4);
        assert!(backend.spilled_batches() > 1000, "{} spilled", backend.spilled_batches());
    }
}
