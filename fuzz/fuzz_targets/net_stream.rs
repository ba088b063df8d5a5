//! Both ends of a lasting connection, and its frames.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| pagewarp_net::fuzzing::fuzz_stream(data));
