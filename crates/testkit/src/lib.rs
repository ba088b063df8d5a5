//! What pagewarp's tests need beside the product: guests without KVM and in QEMU, links of a known speed, transports that fail on purpose and
//! pages that look like real memory.
#![deny(unsafe_code)]

mod bucket;
pub mod conformance;
pub mod faulty;
pub mod image;
pub mod mapping;
pub mod memory;
pub mod memory_vm;
pub mod netns;
pub mod pipe;
pub mod probe;
pub mod qemu;
pub mod rng;
pub mod shaper;
pub mod synthetic;
mod workload;
mod write_log;
mod writers;
