//! Certificates of a peer, and the destination's first word.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| pagewarp_net::fuzzing::fuzz_tls(data));
