//! Frame headers and the messages of the control connection.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| pagewarp_wire::fuzzing::fuzz_frame(data));
