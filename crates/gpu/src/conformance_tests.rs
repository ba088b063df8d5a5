//! What every backend has to do, done by the software device: `docs/backends.md`.

use std::sync::Arc;
use std::time::Duration;

use pagewarp_codec::{Backend, CpuBackend, SpillBackend};
use pagewarp_testkit::conformance::{Subject, all, cross, malformed};

use crate::backend::{GpuBackend, GpuConfig};
use crate::test_support::{assert_no_complaints, software_adapter};

fn backend(depth: usize) -> GpuBackend {
    // A busy machine is not a stalled device.
    let config = GpuConfig { depth, stall_timeout: Duration::from_secs(120), ..GpuConfig::default() };
    GpuBackend::open(&software_adapter(), config).expect("the software device opens")
}

#[test]
fn the_device_does_what_every_backend_has_to_do() {
    all(Subject::new(&backend(3)), 1);
    assert_no_complaints();
}

#[test]
fn a_thousand_random_batches_with_every_set_of_encodings_cross_between_device_and_cpu() {
    cross(Subject::new(&backend(3)), 1_000, 2);
    assert_no_complaints();
}

#[test]
fn ten_thousand_corrupted_batches_are_judged_as_the_cpu_does() {
    malformed(Subject::new(&backend(3)), 10_000, 3);
    assert_no_complaints();
}

#[test]
fn a_device_with_the_help_of_the_cpu() {
    let backend = SpillBackend::new(Arc::new(backend(1)), CpuBackend::new());
    all(Subject::spilling(&backend), 4);
    cross(Subject::spilling(&backend), 100, 5);
    assert!(backend.spilled_batches() > 0, "with one batch in flight the device is busy at times");
    assert_no_complaints();
}
