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

fn spilling(device: &FakeBackend) -> SpillBackend {
    SpillBackend::new(Arc::new(device.clone()), CpuBackend::new())
}

#[test]
fn a_slow_device_that_spills() {
    for (depth, decode_history) in [(1, true), (3, true), (2, false)] {
        let config = FakeConfig { depth, max_polls: 6, decode_history, ..FakeConfig::default() };
        let device = FakeBackend::new(config);
        let backend = spilling(&device);
        assert_eq!(backend.decode_history_slots(7), if decode_history { 7 } else { 0 });
        everything(Subject::spilling(&backend), 4);
        let spilled = backend.spilled_batches();
        assert!(spilled > 1_000, "{spilled} spilled");
        assert!(spilled < device.submitted(), "{spilled} spilled: the device has to do its part");
        // Here only decoders work.
        malformed(Subject::spilling(&backend), 2_000, 5);
        let spilled_by_decoders = backend.spilled_batches() - spilled;
        assert!(spilled_by_decoders > 50, "{spilled_by_decoders} spilled");
    }
}

#[test]
fn a_device_that_keeps_up_spills_nothing() {
    let config = FakeConfig { depth: 2, decode_history: true, ..FakeConfig::default() };
    let backend = spilling(&FakeBackend::new(config));
    // Which is why it uses every base.
    everything(Subject::new(&backend), 6);
    assert_eq!(backend.spilled_batches(), 0);
}
