//! What a destination says to a source.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| pagewarp_engine::fuzzing::fuzz_destination_says(data));
