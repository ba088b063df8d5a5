//! Tests of the codec through its public interface.

mod backends;
mod bench;
mod common;
mod conformance;
mod container;
mod pages;
mod spill;
mod spill_model;
mod validate;
mod vectors;
