//! The kernels: their sources, and compiled once per device, when first needed.

use std::sync::Arc;

use pagewarp_codec::BackendError;
use wgpu::ComputePipeline;

use crate::device::Gpu;

/// The source of a kernel, with what it shares with others before it. Its entry point is `main`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Source<'a> {
    pub(crate) label: &'a str,
    pub(crate) text: &'a str,
}

/// A kernel of the encoder.
macro_rules! encoder {
    ($label:literal, $file:literal) => {
        Source {
            label: $label,
            text: concat!(include_str!("kernels/encode_common.wgsl"), include_str!($file)),
        }
    };
}

/// A kernel of the decoder.
macro_rules! decoder {
    ($label:literal, $file:literal) => {
        Source {
            label: $label,
            text: concat!(include_str!("kernels/decode_common.wgsl"), include_str!($file)),
        }
    };
}

pub(crate) const EXCHANGE: Source<'_> =
    Source { label: "exchange", text: include_str!("kernels/exchange.wgsl") };
pub(crate) const CLASSIFY: Source<'_> = encoder!("classify", "kernels/classify.wgsl");
pub(crate) const ENCODE_LZ4: Source<'_> = encoder!("encode_lz4", "kernels/encode_lz4.wgsl");
pub(crate) const ENCODE_SPARSE: Source<'_> = encoder!("encode_sparse", "kernels/encode_sparse.wgsl");
pub(crate) const OFFSETS: Source<'_> = encoder!("offsets", "kernels/offsets.wgsl");
pub(crate) const PACK: Source<'_> = encoder!("pack", "kernels/pack.wgsl");
pub(crate) const DECODE_PLAIN: Source<'_> = decoder!("decode_plain", "kernels/decode_plain.wgsl");
pub(crate) const DECODE_LZ4: Source<'_> = decoder!("decode_lz4", "kernels/decode_lz4.wgsl");

/// What encoders run.
pub(crate) struct EncodeKernels {
    pub(crate) exchange: Arc<ComputePipeline>,
    pub(crate) classify: Arc<ComputePipeline>,
    pub(crate) lz4: Arc<ComputePipeline>,
    pub(crate) sparse: Arc<ComputePipeline>,
    pub(crate) offsets: Arc<ComputePipeline>,
    pub(crate) pack: Arc<ComputePipeline>,
}

impl EncodeKernels {
    /// # Errors
    ///
    /// [`BackendError::Unavailable`] if the driver does not take one.
    pub(crate) fn new(gpu: &Gpu) -> Result<EncodeKernels, BackendError> {
        let compile = |source| gpu.pipeline(source).map(Arc::new);
        Ok(EncodeKernels {
            exchange: compile(EXCHANGE)?,
            classify: compile(CLASSIFY)?,
            lz4: compile(ENCODE_LZ4)?,
            sparse: compile(ENCODE_SPARSE)?,
            offsets: compile(OFFSETS)?,
            pack: compile(PACK)?,
        })
    }
}

/// What decoders run. Each of `plain` and `lz4` takes the pages of its tags and leaves the others alone.
pub(crate) struct DecodeKernels {
    pub(crate) exchange: Arc<ComputePipeline>,
    pub(crate) plain: Arc<ComputePipeline>,
    pub(crate) lz4: Arc<ComputePipeline>,
}

impl DecodeKernels {
    /// # Errors
    ///
    /// [`BackendError::Unavailable`] if the driver does not take one.
    pub(crate) fn new(gpu: &Gpu) -> Result<DecodeKernels, BackendError> {
        let compile = |source| gpu.pipeline(source).map(Arc::new);
        Ok(DecodeKernels {
            exchange: compile(EXCHANGE)?,
            plain: compile(DECODE_PLAIN)?,
            lz4: compile(DECODE_LZ4)?,
        })
    }
}
