//! One batch in flight: its buffers, and how far it has come.
//!
//! The first submission uploads the pages, runs the kernels and brings back a small table. Only then is it known how long the payload
//! is; the second submission brings back just that.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use pagewarp_codec::{BackendError, Done, EncodeJob, EncodingSet, PAGE_SIZE, plain_hash};
use wgpu::{
    BindGroup, Buffer, BufferUsages, CommandEncoderDescriptor, ComputePass, ComputePassDescriptor,
    ComputePipeline,
};

use crate::device::Gpu;
use crate::encoder::table;
use crate::exchange::Exchange;
use crate::history::{History, LOAD, STORE};
use crate::kernels::EncodeKernels;
use crate::timing::{Phase, Timer};
use crate::transfer::{Readback, Upload};

/// Bytes of the kernels' `Params`.
const PARAMS_BYTES: u64 = 16;

enum State {
    Idle,
    /// The first submission is on the device.
    Table,
    /// The second submission is on the device; so many bytes of payload come.
    Payload(usize),
    /// So many bytes of payload are in the readback buffer.
    Done(usize),
    Failed(BackendError),
}

/// A kernel with its buffers.
struct Step {
    kernel: Arc<ComputePipeline>,
    group: BindGroup,
}

impl Step {
    fn record(&self, commands: &mut ComputePass<'_>, groups: u32) {
        commands.set_pipeline(&self.kernel);
        commands.set_bind_group(0, &self.group, &[]);
        commands.dispatch_workgroups(groups, 1, 1);
    }
}

/// The buffers of one batch, and the batch.
pub(super) struct Lane {
    gpu: Arc<Gpu>,
    allowed: EncodingSet,
    pages: Upload,
    params: Upload,
    exchange: Option<Exchange>,
    classify: Step,
    lz4: Step,
    sparse: Step,
    offsets: Step,
    pack: Step,
    table: Buffer,
    bases: Buffer,
    scratch: Buffer,
    payload: Buffer,
    table_back: Readback,
    payload_back: Readback,
    encode_timer: Timer,
    readback_timer: Timer,
    state: State,
    job: EncodeJob,
    /// The number of the job on this device.
    number: u64,
    submitted: Instant,
}

impl Lane {
    /// All buffers for batches of up to `max_pages` pages.
    ///
    /// # Errors
    ///
    /// [`BackendError::Unavailable`] if there is no memory for them.
    pub(super) fn new(
        gpu: &Arc<Gpu>,
        kernels: &EncodeKernels,
        allowed: EncodingSet,
        max_pages: usize,
        history: Option<&Mutex<History>>,
    ) -> Result<Lane, BackendError> {
        // What holds pages is overwritten at the end.
        let storage = BufferUsages::STORAGE | BufferUsages::COPY_DST;
        let max_pages = max_pages.max(1);
        let bytes = (max_pages * PAGE_SIZE) as u64;
        let table_bytes = table::bytes(max_pages);
        let pages = Upload::new(gpu, "pages", bytes, storage)?;
        let params = Upload::new(gpu, "params", PARAMS_BYTES, BufferUsages::UNIFORM)?;
        // Without a history no page has a base.
        let bases_bytes = if history.is_some() { bytes } else { PAGE_SIZE as u64 };
        let bases = gpu.buffer("bases", bases_bytes, storage)?;
        let no_base = gpu.buffer("no base", max_pages.div_ceil(32) as u64 * 4, storage)?;
        let results = gpu.buffer("results", max_pages as u64 * 16, storage)?;
        let scratch = gpu.buffer("scratch", bytes, storage)?;
        let payload = gpu.buffer("payload", bytes, storage | BufferUsages::COPY_SRC)?;
        let table = gpu.buffer("table", table_bytes, storage | BufferUsages::COPY_SRC)?;
        let exchange = match history {
            None => None,
            Some(history) => {
                let history = history.lock().unwrap_or_else(PoisonError::into_inner);
                let passes = &[LOAD | STORE];
                let kernel = &kernels.exchange;
                Some(Exchange::new(gpu, kernel, &history, max_pages, passes, pages.device(), &bases)?)
            }
        };
        let has_base = match &exchange {
            Some(exchange) => exchange.has_base_binding(),
            None => no_base.as_entire_buffer_binding(),
        };
        let part = |binding: u32| {
            let part = match binding {
                0 => params.device().as_entire_buffer_binding(),
                1 => pages.device().as_entire_buffer_binding(),
                2 => bases.as_entire_buffer_binding(),
                3 => results.as_entire_buffer_binding(),
                4 => scratch.as_entire_buffer_binding(),
                5 => has_base.clone(),
                6 => payload.as_entire_buffer_binding(),
                _ => table.as_entire_buffer_binding(),
            };
            (binding, part)
        };
        let step = |kernel: &Arc<ComputePipeline>, bindings: &[u32]| {
            let parts: Vec<_> = bindings.iter().map(|&binding| part(binding)).collect();
            Step { kernel: kernel.clone(), group: gpu.bind_parts(kernel, &parts) }
        };
        Ok(Lane {
            allowed,
            classify: step(&kernels.classify, &[0, 1, 2, 3, 5]),
            lz4: step(&kernels.lz4, &[0, 1, 2, 3, 4]),
            sparse: step(&kernels.sparse, &[0, 1, 2, 3, 4]),
            offsets: step(&kernels.offsets, &[0, 3, 6, 7]),
            pack: step(&kernels.pack, &[0, 1, 3, 4, 6]),
            table_back: Readback::new(gpu, "table back", table_bytes)?,
            payload_back: Readback::new(gpu, "payload back", bytes)?,
            encode_timer: Timer::new(gpu, &[Phase::Upload, Phase::Kernel])?,
            readback_timer: Timer::new(gpu, &[Phase::Readback])?,
            state: State::Idle,
            job: EncodeJob::default(),
            number: 0,
            submitted: Instant::now(),
            gpu: gpu.clone(),
            pages,
            params,
            exchange,
            table,
            bases,
            scratch,
            payload,
        })
    }

    /// Whether a job can be started: the staging buffers came back from the device. A lost device takes jobs to fail them.
    pub(super) fn is_free(&self) -> bool {
        self.gpu.check().is_err() || self.are_uploads_back().unwrap_or(true)
    }

    fn are_uploads_back(&self) -> Result<bool, BackendError> {
        Ok(self.pages.is_mapped()?
            && self.params.is_mapped()?
            && self.exchange.as_ref().map_or(Ok(true), Exchange::is_mapped)?)
    }

    /// Starts a job.
    pub(super) fn start(&mut self, job: EncodeJob, history: Option<&Mutex<History>>) {
        self.job = job;
        self.submitted = Instant::now();
        self.state = match self.launch(history) {
            Ok(state) => state,
            Err(error) => State::Failed(error),
        };
        // While the device works.
        self.job.encoded.plain_hash = plain_hash(&self.job.pages);
    }

    /// The encodings that the batch in this lane may use.
    fn allowed_now(&self) -> EncodingSet {
        self.job.allowed.map_or(self.allowed, |allowed| allowed.intersection(self.allowed))
    }

    /// Uploads the batch and runs the kernels.
    fn launch(&mut self, history: Option<&Mutex<History>>) -> Result<State, BackendError> {
        self.gpu.check()?;
        let count = self.job.pages.len();
        if count == 0 {
            self.number = self.gpu.next_job();
            self.job.encoded.clear();
            return Ok(State::Done(0));
        }
        self.pages.write_pages(0, &self.job.pages)?;
        let params = [count as u32, u32::from(self.allowed_now().bits()), 0, 0];
        self.params.write(|view| view.copy_from_slice(bytemuck::bytes_of(&params)))?;
        // Held until the batch is submitted: the plan counts on the batches before, and those after count on it.
        let mut history = history.map(|history| history.lock().unwrap_or_else(PoisonError::into_inner));
        if let (Some(exchange), Some(history)) = (&mut self.exchange, &mut history) {
            exchange.prepare(history, &self.job.slots)?;
        }
        let mut commands = self.gpu.device.create_command_encoder(&CommandEncoderDescriptor::default());
        self.encode_timer.begin(&mut commands, 0);
        self.pages.record(&mut commands, (count * PAGE_SIZE) as u64);
        self.params.record(&mut commands, PARAMS_BYTES);
        if let Some(exchange) = &self.exchange {
            exchange.record_upload(&mut commands);
        }
        self.encode_timer.end(&mut commands, 0);
        self.encode_timer.begin(&mut commands, 1);
        {
            let mut pass = commands.begin_compute_pass(&ComputePassDescriptor::default());
            if let Some(exchange) = &self.exchange {
                exchange.record_moves(&mut pass, 0);
            }
            let groups = count as u32;
            self.classify.record(&mut pass, groups);
            // Before `sparse`, which then writes no form that LZ4 would replace.
            self.lz4.record(&mut pass, groups);
            self.sparse.record(&mut pass, groups);
            self.offsets.record(&mut pass, 1);
            self.pack.record(&mut pass, groups);
        }
        self.encode_timer.end(&mut commands, 1);
        let table_bytes = table::bytes(count);
        self.table_back.record(&mut commands, &self.table, 0, table_bytes);
        self.encode_timer.record(&mut commands);
        self.number = self.gpu.next_job();
        let mut maps =
            vec![self.pages.request(), self.params.request(), self.table_back.request(table_bytes)];
        maps.extend(self.exchange.as_ref().map(Exchange::request));
        maps.extend(self.encode_timer.request());
        self.gpu.submit(commands.finish(), maps);
        drop(history);
        Ok(State::Table)
    }

    /// Goes on if the device has finished something.
    pub(super) fn step(&mut self) {
        match self.next_state() {
            Ok(None) => {}
            Ok(Some(state)) => self.state = state,
            Err(error) => self.fail(error),
        }
    }

    fn next_state(&mut self) -> Result<Option<State>, BackendError> {
        self.gpu.check()?;
        // Everything that a submission gives back is waited for: one buffer may be mapped a moment before another.
        let is_back = match &self.state {
            State::Table => {
                self.table_back.is_ready()? && self.encode_timer.is_ready()? && self.are_uploads_back()?
            }
            State::Payload(_) => self.payload_back.is_ready()? && self.readback_timer.is_ready()?,
            State::Idle | State::Done(_) | State::Failed(_) => return Ok(None),
        };
        if self.gpu.stalls(self.number) || !is_back {
            // Those who only ask whether a job is ready never wait for it, and have to hear of a stall too.
            return if self.gpu.is_stalled(self.submitted) { Err(self.gpu.stalled()) } else { Ok(None) };
        }
        if let State::Payload(total) = self.state {
            self.readback_timer.observed(self.job.number)?;
            return Ok(Some(State::Done(total)));
        }
        self.encode_timer.observed(self.job.number)?;
        self.fetch().map(Some)
    }

    /// Reads the table and asks for as many bytes of payload as it says.
    fn fetch(&mut self) -> Result<State, BackendError> {
        let allowed = self.allowed_now();
        let Lane { table_back, exchange, job, .. } = self;
        let has_base = |page| exchange.as_ref().is_some_and(|exchange| exchange.has_base(page));
        let hash = job.encoded.plain_hash;
        let total = table_back
            .read(|table| table::read(table, job.pages.len(), allowed, has_base, &mut job.encoded))?
            .map_err(|reason| self.gpu.give_up(reason))?;
        job.encoded.plain_hash = hash;
        if total == 0 {
            return Ok(State::Done(0));
        }
        let bytes = (total as u64).next_multiple_of(4);
        let mut commands = self.gpu.device.create_command_encoder(&CommandEncoderDescriptor::default());
        self.readback_timer.begin(&mut commands, 0);
        self.payload_back.record(&mut commands, &self.payload, 0, bytes);
        self.readback_timer.end(&mut commands, 0);
        self.readback_timer.record(&mut commands);
        let mut maps = vec![self.payload_back.request(bytes)];
        maps.extend(self.readback_timer.request());
        self.gpu.submit(commands.finish(), maps);
        self.submitted = Instant::now();
        Ok(State::Payload(total))
    }

    /// Whether the job can be taken without waiting.
    pub(super) fn is_done(&self) -> bool {
        matches!(self.state, State::Idle | State::Done(_) | State::Failed(_))
    }

    /// The job comes back with this error.
    pub(super) fn fail(&mut self, error: BackendError) {
        self.state = State::Failed(error);
    }

    /// Takes the job, which must be done.
    pub(super) fn finish(&mut self) -> Done<EncodeJob> {
        let mut result = match std::mem::replace(&mut self.state, State::Idle) {
            State::Done(total) => self.gpu.check().and_then(|()| self.take_payload(total)),
            State::Failed(error) => Err(error),
            State::Idle | State::Table | State::Payload(_) => Err(self.gpu.lost("the job was not finished")),
        };
        let mut job = std::mem::take(&mut self.job);
        if result.is_ok() && self.gpu.corrupts(self.number) {
            corrupt(&mut job);
        }
        if let Err(error) = &mut result {
            job.encoded.clear();
            tracing::debug!(batch = job.number, "a batch was not encoded: {error}");
        }
        Done { job, result }
    }

    fn take_payload(&mut self, total: usize) -> Result<(), BackendError> {
        if total == 0 {
            return Ok(());
        }
        let Lane { payload_back, job, .. } = self;
        payload_back.read(|bytes| job.encoded.payload.extend_from_slice(&bytes[..total]))
    }
}

impl Drop for Lane {
    /// Nothing of the guest stays behind, but for what comes back from a device while a migration is broken off.
    fn drop(&mut self) {
        let device = [self.pages.wipe(), &self.bases, &self.scratch, &self.payload];
        self.gpu.wipe(device.into_iter().chain(self.payload_back.idle()));
    }
}

/// Flips a bit, as memory of a device does at times.
fn corrupt(job: &mut EncodeJob) {
    let middle = job.encoded.payload.len() / 2;
    match job.encoded.payload.get_mut(middle) {
        Some(byte) => *byte ^= 0x10,
        None => job.encoded.plain_hash ^= 0x10,
    }
}
