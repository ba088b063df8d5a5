//! Encoding a page and decoding it again, at every SIMD level.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| pagewarp_codec::fuzzing::fuzz_encode_page(data));
