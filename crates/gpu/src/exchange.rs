//! Moves pages between a lane's buffers and the history: uploads what the history has planned and runs the kernel for it.

use std::sync::Arc;

use pagewarp_codec::{BackendError, SlotUse};
use wgpu::{
    BindGroup, Buffer, BufferBinding, BufferSize, BufferUsages, BufferViewMut, CommandEncoder, ComputePass,
    ComputePipeline,
};

use crate::device::Gpu;
use crate::history::{History, Plan};
use crate::queue::MapRequest;
use crate::transfer::Upload;

/// Alignment that every device accepts for a part of a buffer that is bound.
const ALIGN: u64 = 256;

/// What one lane exchanges with the history.
pub(crate) struct Exchange {
    gpu: Arc<Gpu>,
    kernel: Arc<ComputePipeline>,
    /// In this order: one bit per page that has a base; a `Run` of the kernel for each chunk and pass; the moves.
    upload: Upload,
    layout: Layout,
    plan: Plan,
    /// The flags that count in each pass.
    passes: &'static [u32],
    /// By chunk and pass, made when first needed.
    groups: Vec<Option<BindGroup>>,
    pages: Buffer,
    bases: Buffer,
}

/// Where the parts of the upload are, in bytes.
#[derive(Clone, Copy)]
struct Layout {
    flags_bytes: u64,
    runs_at: u64,
    run_stride: u64,
    moves_at: u64,
    end: u64,
}

impl Layout {
    fn new(max_pages: usize, runs: usize, run_stride: u64) -> Layout {
        let flags_bytes = max_pages.div_ceil(32) as u64 * 4;
        let runs_at = flags_bytes.next_multiple_of(ALIGN);
        let moves_at = (runs_at + runs as u64 * run_stride).next_multiple_of(ALIGN);
        Layout { flags_bytes, runs_at, run_stride, moves_at, end: moves_at + max_pages as u64 * 8 }
    }
}

impl Exchange {
    /// For batches of up to `max_pages` pages. Pages are stored from `pages` and loaded to `bases`, both page-indexed; in pass k only
    /// the flags `passes[k]` count.
    ///
    /// # Errors
    ///
    /// [`BackendError::Unavailable`] if there is no memory.
    pub(crate) fn new(
        gpu: &Arc<Gpu>,
        kernel: &Arc<ComputePipeline>,
        history: &History,
        max_pages: usize,
        passes: &'static [u32],
        pages: &Buffer,
        bases: &Buffer,
    ) -> Result<Exchange, BackendError> {
        let run_stride = u64::from(gpu.device.limits().min_uniform_buffer_offset_alignment).max(16);
        let runs = history.chunk_count() * passes.len();
        let layout = Layout::new(max_pages, runs, run_stride);
        let upload = Upload::new(gpu, "exchange", layout.end, BufferUsages::STORAGE | BufferUsages::UNIFORM)?;
        Ok(Exchange {
            gpu: gpu.clone(),
            kernel: kernel.clone(),
            upload,
            layout,
            plan: Plan::default(),
            passes,
            groups: (0..runs).map(|_| None).collect(),
            pages: pages.clone(),
            bases: bases.clone(),
        })
    }

    /// For kernels: one bit per page of the batch, set if the history has its base.
    pub(crate) fn has_base_binding(&self) -> BufferBinding<'_> {
        part(self.upload.device(), 0, self.layout.flags_bytes)
    }

    /// Whether the history had the base of this page of the batch last prepared.
    pub(crate) fn has_base(&self, page: usize) -> bool {
        self.plan.has_base(page)
    }

    /// Whether a batch can be prepared.
    ///
    /// # Errors
    ///
    /// [`BackendError::Lost`] if the device refused.
    pub(crate) fn is_mapped(&self) -> Result<bool, BackendError> {
        self.upload.is_mapped()
    }

    /// Plans a batch. The history must stay locked until the batch is submitted.
    ///
    /// # Errors
    ///
    /// [`BackendError::Lost`] if the upload is not mapped.
    ///
    /// # Panics
    ///
    /// If a slot is out of range.
    pub(crate) fn prepare(&mut self, history: &mut History, slots: &[SlotUse]) -> Result<(), BackendError> {
        history.plan(slots, &mut self.plan);
        let Exchange { upload, layout, plan, passes, .. } = self;
        upload.write(|view| {
            put(view, 0, bytemuck::cast_slice(plan.has_base_words()));
            for run in plan.runs() {
                for (pass, &mask) in passes.iter().enumerate() {
                    let index = (run.chunk * passes.len() + pass) as u64;
                    let words = [run.first, run.count, mask, 0];
                    put(view, layout.runs_at + index * layout.run_stride, bytemuck::bytes_of(&words));
                }
            }
            for (index, entry) in plan.moves().enumerate() {
                put(view, layout.moves_at + index as u64 * 8, bytemuck::bytes_of(&entry));
            }
        })?;
        for run in self.plan.runs() {
            for pass in 0..self.passes.len() {
                let index = run.chunk * self.passes.len() + pass;
                if let (None, Some(chunk)) = (&self.groups[index], history.chunk(run.chunk)) {
                    let run_at = self.layout.runs_at + index as u64 * self.layout.run_stride;
                    let head = self.upload.device();
                    let moves_bytes = self.layout.end - self.layout.moves_at;
                    let group = self.gpu.bind_parts(
                        &self.kernel,
                        &[
                            (0, part(head, run_at, 16)),
                            (1, self.pages.as_entire_buffer_binding()),
                            (2, self.bases.as_entire_buffer_binding()),
                            (3, part(head, self.layout.moves_at, moves_bytes)),
                            (4, chunk.as_entire_buffer_binding()),
                        ],
                    );
                    self.groups[index] = Some(group);
                }
            }
        }
        Ok(())
    }

    /// Records the upload of what was prepared.
    pub(crate) fn record_upload(&self, commands: &mut CommandEncoder) {
        self.upload.record(commands, self.layout.moves_at + self.plan.moves().len() as u64 * 8);
    }

    /// Records the moves of pass number `pass`.
    pub(crate) fn record_moves(&self, commands: &mut ComputePass<'_>, pass: usize) {
        for run in self.plan.runs() {
            if let Some(group) = &self.groups[run.chunk * self.passes.len() + pass] {
                commands.set_pipeline(&self.kernel);
                commands.set_bind_group(0, group, &[]);
                commands.dispatch_workgroups(run.count, 1, 1);
            }
        }
    }

    /// Asks for the upload's buffer back; to be submitted with the batch.
    pub(crate) fn request(&self) -> MapRequest {
        self.upload.request()
    }
}

fn part(buffer: &Buffer, offset: u64, size: u64) -> BufferBinding<'_> {
    BufferBinding { buffer, offset, size: BufferSize::new(size) }
}

fn put(view: &mut BufferViewMut, at: u64, bytes: &[u8]) {
    let at = at as usize;
    view.slice(at..at + bytes.len()).copy_from_slice(bytes);
}
