//! The buffers of one batch, and its way through the device.

use std::sync::Arc;

use pagewarp_codec::{BackendError, DecodeJob, PAGE_SIZE, Page, SlotUse};
use wgpu::{
    BindGroup, Buffer, BufferBinding, BufferUsages, CommandEncoder, CommandEncoderDescriptor,
    ComputePassDescriptor,
};

use crate::decoder::plan::{Entry, Plan, kept_slots};
use crate::device::Gpu;
use crate::exchange::Exchange;
use crate::history::{History, LOAD, STORE};
use crate::kernels::DecodeKernels;
use crate::timing::{Phase, Timer};
use crate::transfer::{Readback, Upload};

/// Bytes of a row of the table.
const ENTRY: u64 = size_of::<Entry>() as u64;
/// Where the rows begin: the parameters are before them, and devices want bindings aligned to so many bytes at most.
const ENTRIES_AT: u64 = 256;
/// Bytes of the parameters.
const PARAMS: u64 = 16;
/// The status of a page that was decoded.
pub(super) const DECODED: u32 = 1;
/// What the lane exchanges with the history: bases before decoding, pages after it.
const PASSES: &[u32] = &[LOAD, STORE];

/// The buffers of one batch, used again and again.
pub(super) struct Lane {
    gpu: Arc<Gpu>,
    kernels: Arc<DecodeKernels>,
    pub(super) plan: Plan,
    exchange: Option<Exchange>,
    /// What the history keeps of the batch.
    slots: Vec<SlotUse>,
    table: Upload,
    payload: Upload,
    bases: Upload,
    pages: Buffer,
    status: Buffer,
    readback: Readback,
    timer: Timer,
    plain: BindGroup,
    lz4: BindGroup,
}

impl Lane {
    /// Buffers for batches of `max_pages` pages, of which `max_bases` need a base; with a history all may.
    ///
    /// # Errors
    ///
    /// [`BackendError::Unavailable`] if there is no memory for them.
    pub(super) fn new(
        gpu: &Arc<Gpu>,
        kernels: &Arc<DecodeKernels>,
        max_pages: usize,
        max_bases: usize,
        history: Option<&History>,
    ) -> Result<Lane, BackendError> {
        // Bindings may not be empty.
        let max_pages = max_pages.max(1) as u64;
        let max_bases = if history.is_some() { max_pages } else { max_bases.max(1) as u64 };
        let page = PAGE_SIZE as u64;
        let table = Upload::new(
            gpu,
            "decoder table",
            ENTRIES_AT + ENTRY * max_pages,
            BufferUsages::UNIFORM | BufferUsages::STORAGE,
        )?;
        let payload = Upload::new(gpu, "decoder payload", page * max_pages, BufferUsages::STORAGE)?;
        let bases = Upload::new(gpu, "decoder bases", page * max_bases, BufferUsages::STORAGE)?;
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
        let pages = gpu.buffer("decoded pages", page * max_pages, usage)?;
        let status = gpu.buffer("decoder status", 4 * max_pages, usage)?;
        let readback = Readback::new(gpu, "decoder readback", (page + 4) * max_pages)?;
        let exchange = history.map(|history| {
            Exchange::new(gpu, &kernels.exchange, history, max_pages as usize, PASSES, &pages, bases.device())
        });
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
            exchange: exchange.transpose()?,
            slots: Vec::new(),
            table,
            payload,
            bases,
            pages,
            status,
            readback,
            timer: Timer::new(gpu, &[Phase::Upload, Phase::Kernel, Phase::Readback])?,
            plain,
            lz4,
        })
    }

    /// Whether the CPU has all the staging buffers, so that [`start`](Self::start) can be called.
    pub(super) fn is_free(&self) -> Result<bool, BackendError> {
        Ok(self.table.is_mapped()?
            && self.payload.is_mapped()?
            && self.bases.is_mapped()?
            && self.exchange.as_ref().map_or(Ok(true), Exchange::is_mapped)?)
    }

    /// Writes the payload of the next batch to its staging buffer: the most of what there is to copy, and no business of the history.
    ///
    /// # Errors
    ///
    /// [`BackendError::Lost`] if the device is.
    pub(super) fn write_payload(&self, payload: &[u8]) -> Result<(), BackendError> {
        if payload.is_empty() {
            return Ok(());
        }
        self.payload.write(|view| view.slice(..payload.len()).copy_from_slice(payload))
    }

    /// Plans a batch that was validated. The history must stay locked until [`start`](Self::start) has returned.
    ///
    /// # Errors
    ///
    /// [`BackendError::Lost`] if the device is.
    pub(super) fn prepare(
        &mut self,
        job: &DecodeJob,
        history: Option<&mut History>,
    ) -> Result<(), BackendError> {
        let (Some(exchange), Some(history)) = (&mut self.exchange, history) else {
            self.plan.make(&job.encoded, None);
            return Ok(());
        };
        kept_slots(job, history.slots(), &mut self.slots);
        exchange.prepare(history, &self.slots)?;
        self.plan.make(&job.encoded, Some(&|page| exchange.has_base(page)));
        Ok(())
    }

    /// Sends the batch of the plan, with `payload` bytes [of payload](Self::write_payload), through the device. With `answers` false its pages never come back: a fault.
    ///
    /// # Errors
    ///
    /// [`BackendError::Lost`] if the device is.
    pub(super) fn start(
        &mut self,
        payload: usize,
        bases: &[Page],
        answers: bool,
    ) -> Result<(), BackendError> {
        let bytes = self.fill(payload, bases)?;
        let mut commands =
            self.gpu.device.create_command_encoder(&CommandEncoderDescriptor { label: Some("decode") });
        self.record(&mut commands, bytes);
        let mut maps = vec![self.table.request()];
        for (upload, bytes) in [(&self.payload, bytes.payload), (&self.bases, bytes.bases)] {
            maps.extend((bytes > 0).then(|| upload.request()));
        }
        maps.extend(self.exchange.as_ref().map(Exchange::request));
        if answers {
            maps.push(self.readback.request(self.pages_bytes() + self.status_bytes()));
            maps.extend(self.timer.request());
        }
        self.gpu.submit(commands.finish(), maps);
        Ok(())
    }

    /// Writes the rest to the staging buffers. Returns how much of them to upload.
    fn fill(&self, payload: usize, bases: &[Page]) -> Result<Filled, BackendError> {
        let Plan { entries, uploads, .. } = &self.plan;
        let at = ENTRIES_AT as usize;
        let rows: &[u8] = bytemuck::cast_slice(entries);
        self.table.write(|view| {
            let params = [entries.len() as u32, 0, 0, 0];
            view.slice(..PARAMS as usize).copy_from_slice(bytemuck::bytes_of(&params));
            view.slice(at..at + rows.len()).copy_from_slice(rows);
        })?;
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
            payload: payload as u64,
            bases: (uploads.len() * PAGE_SIZE) as u64,
        })
    }

    fn record(&self, commands: &mut CommandEncoder, bytes: Filled) {
        self.timer.begin(commands, 0);
        self.table.record(commands, bytes.table);
        if bytes.payload > 0 {
            self.payload.record(commands, bytes.payload);
        }
        if bytes.bases > 0 {
            let copies = self.plan.copies.iter().map(|copied| (copied.from, copied.to, copied.bytes));
            self.bases.record_parts(commands, copies);
        }
        if let Some(exchange) = &self.exchange {
            exchange.record_upload(commands);
        }
        self.timer.end(commands, 0);
        self.timer.begin(commands, 1);
        commands.clear_buffer(&self.status, 0, Some(self.status_bytes()));
        let (has_plain, has_lz4) = self.plan.kinds();
        let mut pass = commands.begin_compute_pass(&ComputePassDescriptor::default());
        if let Some(exchange) = &self.exchange {
            exchange.record_moves(&mut pass, 0);
        }
        for (is_needed, pipeline, bindings) in
            [(has_plain, &self.kernels.plain, &self.plain), (has_lz4, &self.kernels.lz4, &self.lz4)]
        {
            if is_needed {
                pass.set_pipeline(pipeline);
                pass.set_bind_group(0, bindings, &[]);
                pass.dispatch_workgroups(self.plan.entries.len() as u32, 1, 1);
            }
        }
        if let Some(exchange) = &self.exchange {
            exchange.record_moves(&mut pass, 1);
        }
        drop(pass);
        self.timer.end(commands, 1);
        self.timer.begin(commands, 2);
        self.readback.record(commands, &self.pages, 0, self.pages_bytes());
        self.readback.record(commands, &self.status, self.pages_bytes(), self.status_bytes());
        self.timer.end(commands, 2);
        self.timer.record(commands);
    }

    /// Bytes of all pages of the batch.
    fn pages_bytes(&self) -> u64 {
        (self.plan.entries.len() * PAGE_SIZE) as u64
    }

    /// Bytes of the status of all pages.
    fn status_bytes(&self) -> u64 {
        4 * self.plan.entries.len() as u64
    }

    /// Whether the pages are there, and the lane is free for another batch once they are taken.
    ///
    /// # Errors
    ///
    /// [`BackendError::Lost`] if the device refuses to give them.
    pub(super) fn is_ready(&self) -> Result<bool, BackendError> {
        Ok(self.readback.is_ready()? && self.timer.is_ready()? && self.is_free()?)
    }

    /// Takes the pages of the batch with this number. Returns the first that was not decoded, if there is one: then `pages` holds
    /// anything.
    ///
    /// # Errors
    ///
    /// [`BackendError::Lost`] if they are not there: see [`is_ready`](Self::is_ready).
    pub(super) fn take(&mut self, batch: u64, pages: &mut Vec<Page>) -> Result<Option<usize>, BackendError> {
        self.timer.observed(batch)?;
        let count = self.plan.entries.len();
        pages.resize(count, Page::ZERO);
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

impl Drop for Lane {
    /// Nothing of the guest stays behind, but for what comes back from a device while a migration is broken off.
    fn drop(&mut self) {
        let device = [self.payload.wipe(), self.bases.wipe(), &self.pages];
        self.gpu.wipe(device.into_iter().chain(self.readback.idle()));
    }
}
