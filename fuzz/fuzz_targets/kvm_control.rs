//! Requests and events of the control socket.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| pagewarp_kvm::fuzzing::fuzz_control(data));
