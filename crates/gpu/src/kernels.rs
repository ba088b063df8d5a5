//! The kernels: compiled once per device, when first needed.

use std::sync::Arc;

use pagewarp_codec::BackendError;
use wgpu::ComputePipeline;

use crate::device::Gpu;

/// A compiled kernel.
pub(crate) struct Kernel {
    pub(crate) pipeline: ComputePipeline,
}

impl Kernel {
    /// # Errors
    ///
    /// [`BackendError::Unavailable`] if the driver does not take it.
    pub(crate) fn new(gpu: &Gpu, label: &str, source: &str) -> Result<Arc<Kernel>, BackendError> {
        Ok(Arc::new(Kernel { pipeline: gpu.pipeline(label, source)? }))
    }

    /// The kernel that moves pages from and to the history.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub(crate) fn exchange(gpu: &Gpu) -> Result<Arc<Kernel>, BackendError> {
        Kernel::new(gpu, "exchange", include_str!("kernels/exchange.wgsl"))
    }
}

/// What encoders run.
pub(crate) struct EncodeKernels {
    pub(crate) exchange: Arc<Kernel>,
    pub(crate) classify: Arc<Kernel>,
    pub(crate) sparse: Arc<Kernel>,
    pub(crate) offsets: Arc<Kernel>,
    pub(crate) pack: Arc<Kernel>,
}

/// A kernel's source with what it shares with the others.
macro_rules! with_common {
    ($file:literal) => {
        concat!(include_str!("kernels/common.wgsl"), include_str!($file))
    };
}

impl EncodeKernels {
    /// # Errors
    ///
    /// [`BackendError::Unavailable`] if the driver does not take one.
    pub(crate) fn new(gpu: &Gpu) -> Result<EncodeKernels, BackendError> {
        Ok(EncodeKernels {
            exchange: Kernel::exchange(gpu)?,
            classify: Kernel::new(gpu, "classify", with_common!("kernels/classify.wgsl"))?,
            sparse: Kernel::new(gpu, "sparse encode", with_common!("kernels/sparse_encode.wgsl"))?,
            offsets: Kernel::new(gpu, "offsets", with_common!("kernels/offsets.wgsl"))?,
            pack: Kernel::new(gpu, "pack", with_common!("kernels/pack.wgsl"))?,
        })
    }
}
