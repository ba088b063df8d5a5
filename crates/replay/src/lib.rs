//! Nothing: see `tests/replay.rs`.

#![forbid(unsafe_code)]
