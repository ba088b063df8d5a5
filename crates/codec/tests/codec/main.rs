//! Tests of the codec through its public interface.

mod backends;
mod bench;
mod common;
mod conformance;
mod container;
mod lz4_blocks;
mod pages;
mod spill;
mod spill_model;
mod validate;
mod vectors;
