//! Messages of the control connection in any order, through the state machines.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| pagewarp_wire::fuzzing::fuzz_session(data));
