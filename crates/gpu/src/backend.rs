//! The backend itself: opens a device and makes encoders and decoders for it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pagewarp_codec::{Backend, BackendError, Decoder, DecoderConfig, Encoder, EncoderConfig, Trace};

use crate::adapter::Adapter;
use crate::decoder;
use crate::device::Gpu;
use crate::encoder::GpuEncoder;
use crate::faults::Faults;
use crate::history::History;
use crate::kernels::EncodeKernels;

/// How to use a device.
#[derive(Clone, Debug)]
pub struct GpuConfig {
    /// Batches that each encoder and decoder keeps in flight, each with its own buffers.
    pub depth: usize,
    /// A device that finishes nothing for so long is lost.
    pub stall_timeout: Duration,
    /// Device memory that histories may take, in bytes; `None` if nobody knows: then an allocation that fails is the limit.
    pub memory_bytes: Option<u64>,
    /// Where to record uploads, kernels and readbacks.
    pub trace: Option<Trace>,
    /// What goes wrong, for tests.
    pub faults: Faults,
}

impl Default for GpuConfig {
    /// Three batches in flight, 10 s, no limit of memory, no trace, no faults.
    fn default() -> Self {
        GpuConfig {
            depth: 3,
            stall_timeout: Duration::from_secs(10),
            memory_bytes: None,
            trace: None,
            faults: Faults::default(),
        }
    }
}

/// Encodes and decodes on a GPU.
pub struct GpuBackend {
    gpu: Arc<Gpu>,
    /// Compiled for the first encoders.
    encode_kernels: Mutex<Option<Arc<EncodeKernels>>>,
}

impl GpuBackend {
    /// Opens the device.
    ///
    /// # Errors
    ///
    /// [`BackendError::Unavailable`] with the reason.
    pub fn open(adapter: &Adapter, config: GpuConfig) -> Result<GpuBackend, BackendError> {
        Ok(GpuBackend { gpu: Gpu::open(adapter, config)?, encode_kernels: Mutex::new(None) })
    }

    fn encode_kernels(&self) -> Result<Arc<EncodeKernels>, BackendError> {
        let mut kernels = self.encode_kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernels) = &*kernels {
            return Ok(kernels.clone());
        }
        Ok(kernels.insert(Arc::new(EncodeKernels::new(&self.gpu)?)).clone())
    }
}

impl Backend for GpuBackend {
    fn name(&self) -> String {
        format!("gpu ({})", self.gpu.name())
    }

    fn history_slots(&self, wanted: u32) -> u32 {
        History::offer(wanted, self.gpu.config().memory_bytes)
    }

    fn encoders(&self, config: EncoderConfig, workers: usize) -> Result<Vec<Box<dyn Encoder>>, BackendError> {
        self.gpu.check()?;
        self.gpu.check_batch(config.max_batch_pages)?;
        let kernels = self.encode_kernels()?;
        // Without an encoding that needs a base the history would never be read.
        let keeps_history = config.allowed.needs_base() && config.history_slots > 0;
        let history =
            keeps_history.then(|| Arc::new(Mutex::new(History::new(&self.gpu, config.history_slots))));
        let encoder = |_| GpuEncoder::new(&self.gpu, &kernels, config, history.as_ref());
        let encoders = (0..workers.max(1)).map(encoder);
        encoders.map(|encoder| encoder.map(|encoder| Box::new(encoder) as Box<dyn Encoder>)).collect()
    }

    fn decoders(&self, config: DecoderConfig, workers: usize) -> Result<Vec<Box<dyn Decoder>>, BackendError> {
        crate::decoder::decoders(&self.gpu, config, workers)
    }
}
