//! The state of vCPUs and devices.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| pagewarp_kvm::fuzzing::fuzz_state(data));
