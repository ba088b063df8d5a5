//! The buffers of one batch, and its way through the device.

use std::sync::Arc;

use pagewarp_codec::{BackendError, PAGE_SIZE, Page};
use wgpu::{
    BindGroup, Buffer, BufferBinding, BufferUsages, CommandEncoder, CommandEncoderDescriptor,
    ComputePassDescriptor, ComputePipeline, SubmissionIndex,
};

use crate::decoder::plan::{Entry, Plan};
use crate::device::Gpu;
use crate::transfer::{Readback, Upload};

/// Bytes of a row of the table.
const ENTRY: u64 = size_of::<Entry>() as u64;
/// Where the rows begin: the parameters are before them, and devices want bindings aligned to so many bytes at most.
const ENTRIES_AT: u64 = 256;
/// Bytes of the parameters.
const PARAMS: u64 = 16;
/// The status of a page that was decoded.
pub(super) const DECODED: u32 = 1;

/// The two kernels. Each takes the pages of its tags and leaves the others alone.
pub(super) struct Kernels {
    plain: ComputePipeline,
    lz4: ComputePipeline,
}

impl Kernels {
    /// Compiles the kernels.
    ///
    /// # Errors
    ///
    /// [`BackendError::Unavailable`] if the driver does not take them.
    pub(super) fn new(gpu: &Gpu) -> Result<Kernels, BackendError> {
        Ok(Kernels {
            plain: gpu.pipeline("decode_plain", include_str!("../kernels/decode_plain.wgsl"))?,
            lz4: gpu.pipeline("lz4_decode", include_str!("../kernels/lz4_decode.wgsl"))?,
        })
    }
}

/// The buffers of one batch, used again and again.
pub(super) struct Lane {
    gpu: Arc<Gpu>,
    kernels: Arc<Kernels>,
    pub(super) plan: Plan,
    table: Upload,
    payload: Upload,
    bases: Upload,
    pages: Buffer,
    status: Buffer,
    readback: Readback,
    plain: BindGroup,
    lz4: BindGroup,
    submission: Option<SubmissionIndex>,
}

impl Lane {
    /// Buffers for batches of `max_pages` pages, of which `max_bases` need a base.
    ///
    /// # Errors
    ///
    /// [`BackendError::Unavailable`] if there is no memory for them.
    pub(super) fn new(
        gpu: &Arc<Gpu>,
        kernels: &Arc<Kernels>,
        max_pages: usize,
        max_bases: usize,
    ) -> Result<Lane, BackendError> {
        // Bindings may not be empty.
        let (max_pages, max_bases) = (max_pages.max(1) as u64, max_bases.max(1) as u64);
        let page = PAGE_SIZE as u64;
        let table = Upload::new(
            gpu,
            "decoder table",
            ENTRIES_AT + ENTRY * max_pages,
            BufferUsages::UNIFORM | BufferUsages::STORAGE,
        )?;
        let payload = Upload::new(gpu, "decoder payload", page * max_pages, BufferUsages::STORAGE)?;
        let bases = Upload::new(gpu, "decoder bases", page * max_bases, BufferUsages::STORAGE)?;
        let pages =
            gpu.buffer("decoded pages", page * max_pages, BufferUsages::STORAGE | BufferUsages::COPY_SRC)?;
        let status = gpu.buffer(
            "decoder status",
            4 * max_pages,
            BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST,
        )?;
        let readback = Readback::new(gpu, "decoder readback", (page + 4) * max_pages)?;
        let part = |offset, size: u64| BufferBinding {
            buffer: table.device(),
            offset,
            size: std::num::NonZeroU64::new(size),
        };
        let bindings = [
            (0, part(0, PARAMS)),
            (1, part(ENTRIES_AT, ENTRY * max_pages)),
            (2, payload.device().as_entire_buffer_binding()),
            (3, bases.device().as_entire_buffer_binding()),
            (4, pages.as_entire_buffer_binding()),
            (5, status.as_entire_buffer_binding()),
        ];
        let plain = gpu.bind_parts(&kernels.plain, &bindings);
        let lz4 = gpu.bind_parts(&kernels.lz4, &bindings);
        Ok(Lane {
            gpu: gpu.clone(),
            kernels: kernels.clone(),
            plan: Plan::default(),
            table,
            payload,
            bases,
            pages,
            status,
            readback,
            plain,
            lz4,
            submission: None,
        })
    }

    /// Whether the CPU has all the staging buffers, so that [`start`](Self::start) can be called.
    pub(super) fn is_free(&self) -> Result<bool, BackendError> {
        Ok(self.table.is_mapped()? && self.payload.is_mapped()? && self.bases.is_mapped()?)
    }

    /// Sends the batch of the plan through the device. With `answers` false its pages never come back: a fault.
    ///
    /// # Errors
    ///
    /// [`BackendError::Lost`] if the device is.
    pub(super) fn start(
        &mut self,
        payload: &[u8],
        bases: &[Page],
        answers: bool,
    ) -> Result<(), BackendError> {
        let bytes = self.fill(payload, bases)?;
        let mut commands =
            self.gpu.device.create_command_encoder(&CommandEncoderDescriptor { label: Some("decode") });
        self.record(&mut commands, bytes);
        self.submission = Some(self.gpu.submit(commands.finish()));
        self.table.submitted();
        for (upload, bytes) in [(&self.payload, bytes.payload), (&self.bases, bytes.bases)] {
            if bytes > 0 {
                upload.submitted();
            }
        }
        if answers {
            self.readback.submitted(self.pages_bytes() + self.status_bytes());
        }
        Ok(())
    }

    /// Writes to the staging buffers. Returns how much of them to upload.
    fn fill(&self, payload: &[u8], bases: &[Page]) -> Result<Filled, BackendError> {
        let Plan { entries, uploads, .. } = &self.plan;
        let at = ENTRIES_AT as usize;
        let rows: &[u8] = bytemuck::cast_slice(entries);
        self.table.write(|view| {
            let params = [entries.len() as u32, 0, 0, 0];
            view.slice(..PARAMS as usize).copy_from_slice(bytemuck::bytes_of(&params));
            view.slice(at..at + rows.len()).copy_from_slice(rows);
        })?;
        if !payload.is_empty() {
            self.payload.write(|view| view.slice(..payload.len()).copy_from_slice(payload))?;
        }
        if !uploads.is_empty() {
            self.bases.write(|view| {
                for (place, &base) in uploads.iter().enumerate() {
                    let at = place * PAGE_SIZE;
                    view.slice(at..at + PAGE_SIZE).copy_from_slice(&bases[base].0);
                }
            })?;
        }
        Ok(Filled {
            table: (at + rows.len()) as u64,
            payload: payload.len() as u64,
            bases: (uploads.len() * PAGE_SIZE) as u64,
        })
    }

    fn record(&self, commands: &mut CommandEncoder, bytes: Filled) {
        self.table.record(commands, bytes.table);
        if bytes.payload > 0 {
            self.payload.record(commands, bytes.payload);
        }
        if bytes.bases > 0 {
            let copies = self.plan.copies.iter().map(|copied| (copied.from, copied.to, copied.bytes));
            self.bases.record_parts(commands, copies);
        }
        commands.clear_buffer(&self.status, 0, Some(self.status_bytes()));
        let (has_plain, has_lz4) = self.plan.kinds();
        let mut pass = commands.begin_compute_pass(&ComputePassDescriptor::default());
        for (is_needed, pipeline, bindings) in
            [(has_plain, &self.kernels.plain, &self.plain), (has_lz4, &self.kernels.lz4, &self.lz4)]
        {
            if is_needed {
                pass.set_pipeline(pipeline);
                pass.set_bind_group(0, bindings, &[]);
                pass.dispatch_workgroups(self.plan.entries.len() as u32, 1, 1);
            }
        }
        drop(pass);
        self.readback.record(commands, &self.pages, 0, self.pages_bytes());
        self.readback.record(commands, &self.status, self.pages_bytes(), self.status_bytes());
    }

    /// Bytes of all pages of the batch.
    fn pages_bytes(&self) -> u64 {
        (self.plan.entries.len() * PAGE_SIZE) as u64
    }

    /// Bytes of the status of all pages.
    fn status_bytes(&self) -> u64 {
        4 * self.plan.entries.len() as u64
    }

    /// `None` if the pages are there; otherwise what has to be done first. Changes by [`Gpu::poll`] only.
    ///
    /// # Errors
    ///
    /// [`BackendError::Lost`] if the device refuses to give them.
    pub(super) fn pending(&self) -> Result<Option<SubmissionIndex>, BackendError> {
        let is_ready = self.readback.is_ready()? && self.is_free()?;
        Ok(self.submission.clone().filter(|_| !is_ready))
    }

    /// Takes the pages. Returns the first that was not decoded, if there is one: then `pages` holds anything.
    ///
    /// # Errors
    ///
    /// [`BackendError::Lost`] if they are not there: see [`pending`](Self::pending).
    pub(super) fn take(&mut self, pages: &mut Vec<Page>) -> Result<Option<usize>, BackendError> {
        let count = self.plan.entries.len();
        pages.resize(count, Page::ZERO);
        self.submission = None;
        self.readback.read(|bytes| {
            let (plain, status) = bytes.split_at(count * PAGE_SIZE);
            for (page, plain) in pages.iter_mut().zip(plain.as_chunks().0) {
                page.0 = *plain;
            }
            let decoded = DECODED.to_le_bytes();
            status.as_chunks::<4>().0.iter().position(|status| *status != decoded)
        })
    }

    /// The device.
    #[cfg(test)]
    pub(super) fn gpu(&self) -> Arc<Gpu> {
        self.gpu.clone()
    }

    /// Takes the pages and their status as they are.
    #[cfg(test)]
    pub(super) fn take_raw(&mut self) -> Vec<(u32, Page)> {
        let count = self.plan.entries.len();
        let taken = self.readback.read(|bytes| {
            let (plain, status) = bytes.split_at(count * PAGE_SIZE);
            let status = status.as_chunks().0.iter().map(|status| u32::from_le_bytes(*status));
            status.zip(plain.as_chunks().0.iter().map(|plain| Page(*plain))).collect()
        });
        taken.expect("the pages are there")
    }
}

/// Bytes to upload.
#[derive(Clone, Copy)]
struct Filled {
    table: u64,
    payload: u64,
    bases: u64,
}
