//! A batch of encoded pages.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| pagewarp_codec::fuzzing::fuzz_decode_batch(data));
