//! The backend itself: opens a device and makes encoders and decoders for it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pagewarp_codec::{
    Backend, BackendError, Decoder, DecoderConfig, Encoder, EncoderConfig, EncodingSet, Trace,
};

use crate::adapter::Adapter;
use crate::decoder::GpuDecoder;
use crate::device::Gpu;
use crate::encoder::GpuEncoder;
use crate::faults::Faults;
use crate::history::History;
use crate::kernels::{DecodeKernels, EncodeKernels};

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
    encode_kernels: Compiled<EncodeKernels>,
    decode_kernels: Compiled<DecodeKernels>,
}

impl GpuBackend {
    /// Opens the device.
    ///
    /// # Errors
    ///
    /// [`BackendError::Unavailable`] with the reason.
    pub fn open(adapter: &Adapter, config: GpuConfig) -> Result<GpuBackend, BackendError> {
        Gpu::open(adapter, config).map(GpuBackend::on)
    }

    /// The backend of a device that is open.
    pub(crate) fn on(gpu: Arc<Gpu>) -> GpuBackend {
        GpuBackend { gpu, encode_kernels: Compiled::default(), decode_kernels: Compiled::default() }
    }

    /// A history for so many slots; `None` where it would never be read.
    fn history(&self, allowed: EncodingSet, slots: u32) -> Option<Arc<Mutex<History>>> {
        (allowed.needs_base() && slots > 0).then(|| Arc::new(Mutex::new(History::new(&self.gpu, slots))))
    }
}

impl std::fmt::Debug for GpuBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("GpuBackend").field(&self.gpu.name()).finish()
    }
}

/// Kernels that are compiled when they are first needed.
struct Compiled<K>(Mutex<Option<Arc<K>>>);

impl<K> Default for Compiled<K> {
    fn default() -> Self {
        Compiled(Mutex::new(None))
    }
}

impl<K> Compiled<K> {
    fn get(&self, compile: impl FnOnce() -> Result<K, BackendError>) -> Result<Arc<K>, BackendError> {
        let mut kernels = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernels) = &*kernels {
            return Ok(kernels.clone());
        }
        Ok(kernels.insert(Arc::new(compile()?)).clone())
    }
}

impl Backend for GpuBackend {
    fn name(&self) -> String {
        self.gpu.name().to_owned()
    }

    fn history_slots(&self, wanted: u32) -> u32 {
        History::offer(wanted, self.gpu.config().memory_bytes)
    }

    fn decode_history_slots(&self, wanted: u32) -> u32 {
        History::offer(wanted, self.gpu.config().memory_bytes)
    }

    fn encoders(&self, config: EncoderConfig, workers: usize) -> Result<Vec<Box<dyn Encoder>>, BackendError> {
        self.gpu.check()?;
        self.gpu.check_batch(config.max_batch_pages)?;
        let kernels = self.encode_kernels.get(|| EncodeKernels::new(&self.gpu))?;
        let history = self.history(config.allowed, config.history_slots);
        let encoder = |_| {
            let encoder = GpuEncoder::new(&self.gpu, &kernels, config, history.as_ref())?;
            Ok(Box::new(encoder) as Box<dyn Encoder>)
        };
        (0..workers.max(1)).map(encoder).collect()
    }

    fn decoders(&self, config: DecoderConfig, workers: usize) -> Result<Vec<Box<dyn Decoder>>, BackendError> {
        self.gpu.check()?;
        self.gpu.check_batch(config.max_batch_pages)?;
        let kernels = self.decode_kernels.get(|| DecodeKernels::new(&self.gpu))?;
        let history = self.history(config.allowed, config.history_slots);
        let decoder = |_| {
            let decoder = GpuDecoder::new(&self.gpu, &kernels, config, history.as_ref())?;
            Ok(Box::new(decoder) as Box<dyn Decoder>)
        };
        (0..workers.max(1)).map(decoder).collect()
    }
}
