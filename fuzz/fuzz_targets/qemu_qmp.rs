//! What QEMU says in its monitor.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| pagewarp_qemu::fuzzing::fuzz_qmp(data));
