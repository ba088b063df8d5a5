//! Buffers through which bytes go to the device and come back. They are made once and used again and again; nothing here waits.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use pagewarp_codec::{BackendError, PAGE_SIZE, Page};
use wgpu::{Buffer, BufferUsages, BufferViewMut, CommandEncoder, MapMode};

use crate::device::Gpu;

/// The device owns the buffer, or is to get it.
const UNMAPPED: u8 = 0;
/// The CPU may use the buffer.
const MAPPED: u8 = 1;
/// The device refused.
const FAILED: u8 = 2;

/// A buffer that is mapped from time to time.
struct Mappable {
    gpu: Arc<Gpu>,
    label: &'static str,
    buffer: Buffer,
    state: Arc<AtomicU8>,
}

impl Mappable {
    fn new(
        gpu: &Arc<Gpu>,
        label: &'static str,
        bytes: u64,
        usage: BufferUsages,
    ) -> Result<Self, BackendError> {
        let buffer = gpu.buffer(label, bytes, usage)?;
        Ok(Mappable { gpu: gpu.clone(), label, buffer, state: Arc::new(AtomicU8::new(UNMAPPED)) })
    }

    /// Asks for the first `bytes`. The answer comes with a later [`Gpu::poll`], once submitted work that uses the buffer is done.
    fn map(&self, mode: MapMode, bytes: u64) {
        let state = self.state.clone();
        self.buffer.map_async(mode, ..bytes, move |result| {
            state.store(if result.is_ok() { MAPPED } else { FAILED }, Ordering::Release);
        });
    }

    fn unmap(&self) {
        self.buffer.unmap();
        self.state.store(UNMAPPED, Ordering::Release);
    }

    fn is_mapped(&self) -> Result<bool, BackendError> {
        match self.state.load(Ordering::Acquire) {
            UNMAPPED => Ok(false),
            MAPPED => Ok(true),
            _ => Err(self.refused("it cannot be mapped")),
        }
    }

    /// Mapping only fails on a device that is of no use any more.
    fn refused(&self, reason: impl std::fmt::Display) -> BackendError {
        self.gpu.give_up(format!("the buffer `{}`: {reason}", self.label))
    }
}

/// The way to the device: a mapped staging buffer and the device buffer that it is copied to.
///
/// Each round is [`write`](Self::write), [`record`](Self::record), [`Gpu::submit`], [`submitted`](Self::submitted).
pub(crate) struct Upload {
    staging: Mappable,
    device: Buffer,
}

impl Upload {
    /// Both buffers, of `bytes` bytes (a multiple of 4). The device buffer has the `usage` and can be copied to.
    ///
    /// The staging buffer is mapped by the next [`Gpu::poll`].
    ///
    /// # Errors
    ///
    /// [`BackendError::Unavailable`] if there is no memory for them.
    pub(crate) fn new(
        gpu: &Arc<Gpu>,
        label: &'static str,
        bytes: u64,
        usage: BufferUsages,
    ) -> Result<Upload, BackendError> {
        let staging = Mappable::new(gpu, label, bytes, BufferUsages::MAP_WRITE | BufferUsages::COPY_SRC)?;
        let device = gpu.buffer(label, bytes, usage | BufferUsages::COPY_DST)?;
        staging.map(MapMode::Write, bytes);
        Ok(Upload { staging, device })
    }

    /// The buffer on the device.
    pub(crate) fn device(&self) -> &Buffer {
        &self.device
    }

    /// Whether the staging buffer can be written to.
    ///
    /// # Errors
    ///
    /// [`BackendError::Lost`] if the device refused to map it.
    pub(crate) fn is_mapped(&self) -> Result<bool, BackendError> {
        self.staging.is_mapped()
    }

    /// Lets `fill` write to the staging buffer.
    ///
    /// # Errors
    ///
    /// [`BackendError::Lost`] if it is not mapped: see [`is_mapped`](Self::is_mapped).
    pub(crate) fn write(&self, fill: impl FnOnce(&mut BufferViewMut)) -> Result<(), BackendError> {
        match self.staging.buffer.get_mapped_range_mut(..) {
            Ok(mut view) => {
                fill(&mut view);
                Ok(())
            }
            Err(error) => Err(self.staging.refused(error)),
        }
    }

    /// Writes these pages from byte `at` on.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    pub(crate) fn write_pages(&self, at: usize, pages: &[Page]) -> Result<(), BackendError> {
        self.write(|view| {
            for (index, page) in pages.iter().enumerate() {
                view.slice(at + index * PAGE_SIZE..at + (index + 1) * PAGE_SIZE).copy_from_slice(&page.0);
            }
        })
    }

    /// Gives the staging buffer to the device and records the copy of its first `bytes` bytes (rounded up to a multiple of 4).
    pub(crate) fn record(&self, commands: &mut CommandEncoder, bytes: u64) {
        self.staging.unmap();
        let bytes = bytes.next_multiple_of(4);
        if bytes > 0 {
            commands.copy_buffer_to_buffer(&self.staging.buffer, 0, &self.device, 0, bytes);
        }
    }

    /// Gives the staging buffer to the device and records the copies of parts of it: from, to, number of bytes (multiples of 4).
    pub(crate) fn record_parts(
        &self,
        commands: &mut CommandEncoder,
        parts: impl IntoIterator<Item = (u64, u64, u64)>,
    ) {
        self.staging.unmap();
        for (from, to, bytes) in parts {
            commands.copy_buffer_to_buffer(&self.staging.buffer, from, &self.device, to, bytes);
        }
    }

    /// Asks for the staging buffer back; to be called right after the recorded copy was submitted.
    pub(crate) fn submitted(&self) {
        self.staging.map(MapMode::Write, self.staging.buffer.size());
    }
}

/// The way back: a buffer that the device copies to and the CPU reads.
///
/// Each round is [`record`](Self::record), [`Gpu::submit`], [`submitted`](Self::submitted), [`is_ready`](Self::is_ready) until it
/// is true, [`read`](Self::read).
pub(crate) struct Readback {
    buffer: Mappable,
    /// What is on its way.
    bytes: u64,
}

impl Readback {
    /// A buffer of `bytes` bytes (a multiple of 4).
    ///
    /// # Errors
    ///
    /// [`BackendError::Unavailable`] if there is no memory for it.
    pub(crate) fn new(gpu: &Arc<Gpu>, label: &'static str, bytes: u64) -> Result<Readback, BackendError> {
        let buffer = Mappable::new(gpu, label, bytes, BufferUsages::MAP_READ | BufferUsages::COPY_DST)?;
        Ok(Readback { buffer, bytes: 0 })
    }

    /// Records the copy of the first `bytes` bytes of `source` to byte `at` of this buffer. Both are multiples of 4.
    pub(crate) fn record(&self, commands: &mut CommandEncoder, source: &Buffer, at: u64, bytes: u64) {
        commands.copy_buffer_to_buffer(source, 0, &self.buffer.buffer, at, bytes);
    }

    /// Asks for the first `bytes` bytes (more than 0, a multiple of 4); to be called right after the recorded copies were
    /// submitted.
    pub(crate) fn submitted(&mut self, bytes: u64) {
        self.bytes = bytes;
        self.buffer.map(MapMode::Read, bytes);
    }

    /// Whether the bytes are there. Changes by [`Gpu::poll`] only.
    ///
    /// # Errors
    ///
    /// [`BackendError::Lost`] if the device refused to map the buffer.
    pub(crate) fn is_ready(&self) -> Result<bool, BackendError> {
        self.buffer.is_mapped()
    }

    /// Lets `take` look at the bytes, then gives the buffer back to the device.
    ///
    /// # Errors
    ///
    /// [`BackendError::Lost`] if they are not there: see [`is_ready`](Self::is_ready).
    pub(crate) fn read<R>(&mut self, take: impl FnOnce(&[u8]) -> R) -> Result<R, BackendError> {
        let taken = match self.buffer.buffer.get_mapped_range(..self.bytes) {
            Ok(view) => take(&view),
            Err(error) => return Err(self.buffer.refused(error)),
        };
        self.buffer.unmap();
        Ok(taken)
    }
}
