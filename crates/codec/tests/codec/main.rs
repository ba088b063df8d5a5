//! Tests of the codec through its public interface.

mod backends;
mod bench;
mod common;
mod container;
mod pages;
mod validate;
mod vectors;
