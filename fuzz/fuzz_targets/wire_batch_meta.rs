//! The meta of a batch.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| pagewarp_wire::fuzzing::fuzz_batch_meta(data));
