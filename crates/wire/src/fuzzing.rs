//! Entry points for fuzzers and for the property tests that run the same code.
