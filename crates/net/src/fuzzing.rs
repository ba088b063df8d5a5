//! Entry points for fuzzers and for the property tests that run the same code.

pub use crate::lasting::fuzzing::fuzz_stream;
pub use crate::tls::fuzzing::fuzz_tls;
