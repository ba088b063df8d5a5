//! Buffers through which bytes go to the device and come back. They are made once and used again and again; nothing here waits.

use std::sync::Arc;

use pagewarp_codec::{BackendError, PAGE_SIZE, Page};
use wgpu::{Buffer, BufferUsages, BufferViewMut, CommandEncoder, MapMode};

use crate::device::Gpu;
use crate::queue::{MapRequest, Mapping, SharedMapping};

/// A buffer that is mapped from time to time.
struct Mappable {
    gpu: Arc<Gpu>,
    label: &'static str,
    buffer: Buffer,
    mapping: SharedMapping,
}

impl Mappable {
    fn new(gpu: &Arc<Gpu>, label: &'static str, buffer: Buffer, mapping: Mapping) -> Self {
        Mappable { gpu: gpu.clone(), label, buffer, mapping: SharedMapping::new(mapping) }
    }

    /// Asks for the first `bytes`, once submitted work that uses the buffer is done.
    fn request(&self, mode: MapMode, bytes: u64) -> MapRequest {
        MapRequest { buffer: self.buffer.clone(), mapping: self.mapping.clone(), mode, bytes }
    }

    fn unmap(&self) {
        self.buffer.unmap();
        self.mapping.set(Mapping::Unmapped);
    }

    fn is_mapped(&self) -> Result<bool, BackendError> {
        match self.mapping.get() {
            Mapping::Unmapped => Ok(false),
            Mapping::Mapped => Ok(true),
            Mapping::Failed => Err(self.refused("it cannot be mapped")),
        }
    }

    /// Mapping only fails on a device that is of no use any more.
    fn refused(&self, reason: impl std::fmt::Display) -> BackendError {
        self.gpu.give_up(format!("the buffer `{}`: {reason}", self.label))
    }
}

/// The way to the device: a mapped staging buffer and the device buffer that it is copied to.
///
/// Each round is [`write`](Self::write), [`record`](Self::record), [`Gpu::submit`] with the [`request`](Self::request).
pub(crate) struct Upload {
    staging: Mappable,
    device: Buffer,
}

impl Upload {
    /// Both buffers, of `bytes` bytes (a multiple of 4). The device buffer has the `usage` and can be copied to.
    ///
    /// The staging buffer is mapped from the beginning.
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
        let staging = gpu.mapped_buffer(label, bytes, BufferUsages::MAP_WRITE | BufferUsages::COPY_SRC)?;
        let device = gpu.buffer(label, bytes, usage | BufferUsages::COPY_DST)?;
        Ok(Upload { staging: Mappable::new(gpu, label, staging, Mapping::Mapped), device })
    }

    /// The buffer on the device.
    pub(crate) fn device(&self) -> &Buffer {
        &self.device
    }

    /// Overwrites the staging buffer with zeros, for the last time, unless the device has it. Returns the buffer on the device, for [`Gpu::wipe`].
    pub(crate) fn wipe(&self) -> &Buffer {
        if self.staging.mapping.get() == Mapping::Mapped {
            let bytes = self.staging.buffer.size() as usize;
            // A device that is lost has lost the buffer as well.
            let _ = self.write(|view| {
                for at in (0..bytes).step_by(PAGE_SIZE) {
                    let piece = PAGE_SIZE.min(bytes - at);
                    view.slice(at..at + piece).copy_from_slice(&Page::ZERO.0[..piece]);
                }
            });
            self.staging.unmap();
        }
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

    /// Asks for the staging buffer back; to be submitted with the recorded copy.
    pub(crate) fn request(&self) -> MapRequest {
        self.staging.request(MapMode::Write, self.staging.buffer.size())
    }
}

/// The way back: a buffer that the device copies to and the CPU reads.
///
/// Each round is [`record`](Self::record), [`Gpu::submit`] with the [`request`](Self::request), [`is_ready`](Self::is_ready) until it is
/// true, [`read`](Self::read).
pub(crate) struct Readback {
    buffer: Mappable,
    /// What is on its way; 0: nothing is, and the device has the buffer.
    bytes: u64,
}

impl Readback {
    /// A buffer of `bytes` bytes (a multiple of 4).
    ///
    /// # Errors
    ///
    /// [`BackendError::Unavailable`] if there is no memory for it.
    pub(crate) fn new(gpu: &Arc<Gpu>, label: &'static str, bytes: u64) -> Result<Readback, BackendError> {
        let buffer = gpu.buffer(label, bytes, BufferUsages::MAP_READ | BufferUsages::COPY_DST)?;
        Ok(Readback { buffer: Mappable::new(gpu, label, buffer, Mapping::Unmapped), bytes: 0 })
    }

    /// Records the copy of the first `bytes` bytes of `source` to byte `at` of this buffer. Both are multiples of 4.
    pub(crate) fn record(&self, commands: &mut CommandEncoder, source: &Buffer, at: u64, bytes: u64) {
        commands.copy_buffer_to_buffer(source, 0, &self.buffer.buffer, at, bytes);
    }

    /// Asks for the first `bytes` bytes (more than 0, a multiple of 4); to be submitted with the recorded copies.
    pub(crate) fn request(&mut self, bytes: u64) -> MapRequest {
        self.bytes = bytes;
        self.buffer.request(MapMode::Read, bytes)
    }

    /// Whether the bytes are there.
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
        self.bytes = 0;
        Ok(taken)
    }

    /// The buffer, for [`Gpu::wipe`]; none while something is on its way.
    pub(crate) fn idle(&self) -> Option<&Buffer> {
        (self.bytes == 0).then_some(&self.buffer.buffer)
    }
}
