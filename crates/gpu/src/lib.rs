//! The GPU backend: page encodings computed by WGSL kernels on any Vulkan device.
//!
//! Pages are uploaded once; versions for later deltas stay in device memory; only encoded bytes and a small table come back.
//! Several batches are in flight, each with buffers of its own. `docs/gpu-performance.md` describes what moves where and what it costs.
#![forbid(unsafe_code)]

mod adapter;
mod backend;
mod bench;
mod calibrate;
mod choose;
#[cfg(test)]
mod conformance_tests;
#[cfg(test)]
mod cost_tests;
mod decoder;
mod device;
mod drive;
mod encoder;
mod exchange;
#[cfg(test)]
mod fault_tests;
mod faults;
mod history;
mod kernels;
mod loss;
#[cfg(test)]
mod lz4_tests;
mod queue;
#[cfg(test)]
mod test_support;
mod timing;
mod transfer;

pub use adapter::{Adapter, AdapterKind, adapters};
pub use backend::{GpuBackend, GpuConfig};
pub use bench::{BenchReport, PassReport, bench};
pub use calibrate::{Rates, calibrate};
pub use choose::{Speed, prefer_gpu};
pub use faults::Faults;
pub use pagewarp_vulkan_memory::{Memory, switch_off_device_select};
