//! Messages of the control connection of two bridges.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| pagewarp_qemu::fuzzing::fuzz_control(data));
