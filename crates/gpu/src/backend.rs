//! The backend itself: opens a device and makes encoders and decoders for it.

use std::sync::Arc;
use std::time::Duration;

use pagewarp_codec::{Backend, BackendError, Decoder, DecoderConfig, Encoder, EncoderConfig, Trace};

use crate::adapter::Adapter;
use crate::device::Gpu;
use crate::faults::Faults;

/// How to use a device.
#[derive(Clone, Debug)]
pub struct GpuConfig {
    /// Batches that each encoder and decoder keeps in flight, each with its own buffers.
    pub depth: usize,
    /// A device that finishes nothing for so long is lost.
    pub stall_timeout: Duration,
    /// Where to record uploads, kernels and readbacks.
    pub trace: Option<Trace>,
    /// What goes wrong, for tests.
    pub faults: Faults,
}

impl Default for GpuConfig {
    /// Three batches in flight, 10 s, no trace, no faults.
    fn default() -> Self {
        GpuConfig { depth: 3, stall_timeout: Duration::from_secs(10), trace: None, faults: Faults::default() }
    }
}

/// Encodes and decodes on a GPU.
pub struct GpuBackend {
    gpu: Arc<Gpu>,
}

impl GpuBackend {
    /// Opens the device.
    ///
    /// # Errors
    ///
    /// [`BackendError::Unavailable`] with the reason.
    pub fn open(adapter: &Adapter, config: GpuConfig) -> Result<GpuBackend, BackendError> {
        Ok(GpuBackend { gpu: Gpu::open(adapter, config)? })
    }
}

impl Backend for GpuBackend {
    fn name(&self) -> String {
        format!("gpu ({})", self.gpu.name())
    }

    fn encoders(
        &self,
        _config: EncoderConfig,
        _workers: usize,
    ) -> Result<Vec<Box<dyn Encoder>>, BackendError> {
        Err(self.gpu.lost("not written yet"))
    }

    fn decoders(
        &self,
        _config: DecoderConfig,
        _workers: usize,
    ) -> Result<Vec<Box<dyn Decoder>>, BackendError> {
        Err(self.gpu.lost("not written yet"))
    }
}
