//! An open device: buffers, pipelines, submission, and the ways in which it can fail.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use pagewarp_codec::BackendError;
use wgpu::{
    BindGroup, BindGroupDescriptor, BindGroupEntry, BindingResource, Buffer, BufferBinding, BufferDescriptor,
    BufferUsages, CommandBuffer, CommandEncoderDescriptor, ComputePipeline, ComputePipelineDescriptor,
    Device, ErrorFilter, Features, Limits, PollError, PollType, Queue, ShaderModuleDescriptor, ShaderSource,
};

use crate::adapter::Adapter;
use crate::backend::GpuConfig;
use crate::kernels::Source;
use crate::loss::{Loss, one_line};
use crate::queue::{MapRequest, WorkQueue};
use crate::timing::Timing;

/// Workgroup memory that the kernels need, in bytes.
const WORKGROUP_MEMORY: u32 = 32 << 10;
/// Invocations in the largest workgroup: that of the kernel that adds up the lengths of a batch. The others have 32, and one
/// workgroup per page.
const WORKGROUP_SIZE: u32 = 256;
/// How long one wait for the device lasts at most before its state is looked at again.
const LOOK: Duration = Duration::from_millis(20);

/// An open device and its queue, shared by all encoders and decoders of a backend.
pub(crate) struct Gpu {
    pub(crate) device: Device,
    pub(crate) queue: Queue,
    work: WorkQueue,
    config: GpuConfig,
    name: String,
    /// Why the device is of no use any more, once it is.
    lost: Loss,
    jobs: AtomicU64,
    /// Device memory that histories have taken, in bytes.
    history_bytes: AtomicU64,
    /// If there is a trace.
    timing: Option<Arc<Timing>>,
}

impl Gpu {
    /// Opens the device with all the limits that it has.
    ///
    /// # Errors
    ///
    /// [`BackendError::Unavailable`] with the reason.
    pub(crate) fn open(adapter: &Adapter, config: GpuConfig) -> Result<Arc<Gpu>, BackendError> {
        let name = format!("gpu ({})", adapter.name());
        let unavailable = |reason: String| BackendError::Unavailable { device: name.clone(), reason };
        let limits = adapter.limits();
        check_limits(&limits).map_err(unavailable)?;
        let wanted = Features::TIMESTAMP_QUERY | Features::TIMESTAMP_QUERY_INSIDE_ENCODERS;
        let (device, queue) = pollster::block_on(adapter.inner.request_device(&wgpu::DeviceDescriptor {
            label: Some("pagewarp"),
            required_features: adapter.inner.features() & wanted,
            required_limits: limits,
            ..wgpu::DeviceDescriptor::default()
        }))
        .map_err(|error| unavailable(format!("it cannot be opened: {error}")))?;
        let lost = Loss::default();
        let (by_loss, by_error) = (lost.clone(), lost.clone());
        device.set_device_lost_callback(move |reason, message| {
            let detail = one_line(&format!("{reason:?}: {message}"));
            by_loss.note(&format!("the driver reports its loss ({})", detail.trim_end_matches([':', ' '])));
        });
        // What no error scope catches is not expected: the device is not trusted any further.
        device.on_uncaptured_error(Arc::new(move |error| by_error.note(&error.to_string())));
        let timing = config.trace.clone().map(|trace| Arc::new(Timing::new(&device, &queue, &lost, trace)));
        let work = WorkQueue::start(device.clone(), queue.clone(), lost.clone())
            .map_err(|error| unavailable(format!("no thread for it: {error}")))?;
        Ok(Arc::new(Gpu {
            device,
            queue,
            work,
            config,
            name,
            lost,
            jobs: AtomicU64::new(0),
            history_bytes: AtomicU64::new(0),
            timing,
        }))
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn config(&self) -> &GpuConfig {
        &self.config
    }

    /// For timers; `None` without a trace.
    pub(crate) fn timing(&self) -> Option<&Arc<Timing>> {
        self.timing.as_ref()
    }

    /// The largest buffer that a kernel can use as a whole, in bytes, a multiple of the page size.
    pub(crate) fn max_binding_bytes(&self) -> u64 {
        let limits = self.device.limits();
        let bytes = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size);
        bytes - bytes % pagewarp_codec::PAGE_SIZE as u64
    }

    /// Whether batches of so many pages fit the device.
    ///
    /// # Errors
    ///
    /// [`BackendError::Unavailable`] if not.
    pub(crate) fn check_batch(&self, pages: usize) -> Result<(), BackendError> {
        let by_binding = self.max_binding_bytes() / pagewarp_codec::PAGE_SIZE as u64;
        let most = by_binding.min(u64::from(self.device.limits().max_compute_workgroups_per_dimension));
        if pages as u64 <= most {
            return Ok(());
        }
        let reason = format!("a batch of {pages} pages is too large, it takes {most}; use smaller batches");
        Err(BackendError::Unavailable { device: self.name.clone(), reason })
    }

    /// The error for a device that was lost.
    pub(crate) fn lost(&self, reason: impl Into<String>) -> BackendError {
        BackendError::Lost { device: self.name.clone(), reason: reason.into() }
    }

    /// Declares the device lost; only the first reason is kept.
    pub(crate) fn give_up(&self, reason: impl Into<String>) -> BackendError {
        self.lost.note(&reason.into());
        self.check().err().unwrap_or_else(|| self.lost("for no known reason"))
    }

    /// Whether the device is still there.
    pub(crate) fn check(&self) -> Result<(), BackendError> {
        self.lost.reason().map_or(Ok(()), |reason| Err(self.lost(reason)))
    }

    /// Counts a job, makes the faults happen that are due, and returns the number of the job.
    pub(crate) fn next_job(&self) -> u64 {
        let job = self.jobs.fetch_add(1, Relaxed);
        if self.config.faults.lose_after.is_some_and(|limit| job >= limit) {
            self.device.destroy();
        }
        job
    }

    /// Whether this job never finishes.
    pub(crate) fn stalls(&self, job: u64) -> bool {
        self.config.faults.stall_after.is_some_and(|limit| job >= limit)
    }

    /// Whether this job comes back with a bit flipped.
    pub(crate) fn corrupts(&self, job: u64) -> bool {
        self.config.faults.corrupt_one_in.is_some_and(|n| (job + 1).is_multiple_of(n.get()))
    }

    /// Takes a part of the memory that histories may use; `false` if not so much is left.
    pub(crate) fn take_history_bytes(&self, bytes: u64) -> bool {
        let limit = self.config.memory_bytes.unwrap_or(u64::MAX);
        let take = |taken: u64| taken.checked_add(bytes).filter(|&taken| taken <= limit);
        self.history_bytes.fetch_update(Relaxed, Relaxed, take).is_ok()
    }

    /// Gives back what [`take_history_bytes`](Self::take_history_bytes) took.
    pub(crate) fn give_back_history_bytes(&self, bytes: u64) {
        self.history_bytes.fetch_sub(bytes, Relaxed);
    }

    /// A buffer, zeroed.
    ///
    /// # Errors
    ///
    /// [`BackendError::Unavailable`] if there is no memory for it.
    pub(crate) fn buffer(&self, label: &str, size: u64, usage: BufferUsages) -> Result<Buffer, BackendError> {
        self.allocate(label, size, usage, false)
    }

    /// A buffer that the CPU can use at once.
    ///
    /// # Errors
    ///
    /// [`BackendError::Unavailable`] if there is no memory for it.
    pub(crate) fn mapped_buffer(
        &self,
        label: &str,
        size: u64,
        usage: BufferUsages,
    ) -> Result<Buffer, BackendError> {
        self.allocate(label, size, usage, true)
    }

    fn allocate(
        &self,
        label: &str,
        size: u64,
        usage: BufferUsages,
        mapped_at_creation: bool,
    ) -> Result<Buffer, BackendError> {
        let unavailable = |reason: String| BackendError::Unavailable { device: self.name.clone(), reason };
        if self.config.faults.no_memory_after.is_some_and(|limit| self.jobs.load(Relaxed) >= limit) {
            return Err(unavailable(format!("no memory for the {size} bytes of `{label}` (injected)")));
        }
        let validation = self.device.push_error_scope(ErrorFilter::Validation);
        let memory = self.device.push_error_scope(ErrorFilter::OutOfMemory);
        let buffer = self.device.create_buffer(&BufferDescriptor {
            label: Some(label),
            size,
            usage,
            mapped_at_creation,
        });
        let error = pollster::block_on(memory.pop()).or(pollster::block_on(validation.pop()));
        self.check()?;
        match error {
            None => Ok(buffer),
            Some(error) => Err(unavailable(format!(
                "no memory for the {size} bytes of `{label}`: {}",
                one_line(&error.to_string())
            ))),
        }
    }

    /// The pipeline of one kernel: entry point `main`, bindings of group 0 derived from the source.
    ///
    /// Workgroup memory is not zeroed: kernels write before they read.
    ///
    /// # Errors
    ///
    /// [`BackendError::Unavailable`] if the driver does not take it.
    pub(crate) fn pipeline(&self, kernel: Source<'_>) -> Result<ComputePipeline, BackendError> {
        let scope = self.device.push_error_scope(ErrorFilter::Validation);
        let module = self.device.create_shader_module(ShaderModuleDescriptor {
            label: Some(kernel.label),
            source: ShaderSource::Wgsl(kernel.text.into()),
        });
        let pipeline = self.device.create_compute_pipeline(&ComputePipelineDescriptor {
            label: Some(kernel.label),
            layout: None,
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                zero_initialize_workgroup_memory: false,
                ..wgpu::PipelineCompilationOptions::default()
            },
            cache: None,
        });
        match pollster::block_on(scope.pop()) {
            None => Ok(pipeline),
            Some(error) => Err(BackendError::Unavailable {
                device: self.name.clone(),
                reason: format!("it does not take the kernel `{}`: {error}", kernel.label),
            }),
        }
    }

    /// Binds buffers or parts of them to bindings of group 0, each with its number.
    pub(crate) fn bind_parts(
        &self,
        pipeline: &ComputePipeline,
        bindings: &[(u32, BufferBinding<'_>)],
    ) -> BindGroup {
        let entries: Vec<_> = bindings
            .iter()
            .map(|(binding, part)| BindGroupEntry {
                binding: *binding,
                resource: BindingResource::Buffer(part.clone()),
            })
            .collect();
        self.device.create_bind_group(&BindGroupDescriptor {
            label: None,
            layout: &pipeline.get_bind_group_layout(0),
            entries: &entries,
        })
    }

    /// Gives work to the device and returns at once. The buffers in `maps` are mapped when it is done. What fails shows up in
    /// [`check`](Self::check).
    pub(crate) fn submit(&self, commands: CommandBuffer, maps: Vec<MapRequest>) {
        if !self.work.submit(commands, maps) {
            self.give_up("the thread that works with the device has ended");
        }
    }

    /// Overwrites buffers with zeros, after all that was submitted before. They can be copied to, and the CPU does not have them. Nobody waits for it, and a
    /// device that is lost cannot be asked.
    pub(crate) fn wipe<'a>(&self, buffers: impl IntoIterator<Item = &'a Buffer>) {
        if self.check().is_err() {
            return;
        }
        let commands = self.lost.catch(|| {
            let mut commands = self.device.create_command_encoder(&CommandEncoderDescriptor::default());
            buffers.into_iter().for_each(|buffer| commands.clear_buffer(buffer, 0, None));
            commands.finish()
        });
        if let Some(commands) = commands {
            self.submit(commands, Vec::new());
        }
    }

    /// Whether the device has finished nothing for longer than the stall timeout, for somebody who waits since `start`. As long as it finishes
    /// what is ahead of a job, it gets there.
    pub(crate) fn is_stalled(&self, start: Instant) -> bool {
        self.work.progress.quiet_since(start) >= self.config.stall_timeout
    }

    /// Waits until `ready`, which looks at what the device has left behind and may submit more. Returns the time spent.
    ///
    /// # Errors
    ///
    /// [`BackendError::Lost`] if the device is lost, or finishes nothing for the stall timeout; the error of `ready`.
    pub(crate) fn wait_for(
        &self,
        mut ready: impl FnMut() -> Result<bool, BackendError>,
    ) -> Result<Duration, BackendError> {
        let start = Instant::now();
        loop {
            // Before looking, so that what is finished meanwhile is not waited for.
            let seen = self.work.progress.count();
            self.check()?;
            if ready()? {
                return Ok(start.elapsed());
            }
            if self.is_stalled(start) {
                return Err(self.stalled());
            }
            self.work.progress.wait(seen, LOOK);
        }
    }

    /// Runs work on the device, in this thread, and waits for its end: for measurements.
    ///
    /// # Errors
    ///
    /// As [`wait_for`](Self::wait_for).
    pub(crate) fn run(&self, commands: CommandBuffer) -> Result<(), BackendError> {
        let submission = self.lost.catch(|| self.queue.submit([commands]));
        let start = Instant::now();
        loop {
            self.check()?;
            let wait = PollType::Wait { submission_index: submission.clone(), timeout: Some(LOOK) };
            match self.lost.catch(|| self.device.poll(wait)) {
                // A panic was noted.
                None | Some(Ok(_)) => return self.check(),
                Some(Err(PollError::Timeout)) if !self.is_stalled(start) => {}
                Some(Err(PollError::Timeout)) => return Err(self.stalled()),
                Some(Err(error)) => return Err(self.give_up(error.to_string())),
            }
        }
    }

    /// Declares the device lost because it finishes nothing.
    pub(crate) fn stalled(&self) -> BackendError {
        let seconds = self.config.stall_timeout.as_secs_f64();
        self.give_up(format!("no answer for {seconds} s: the queue is stalled"))
    }
}

fn check_limits(limits: &Limits) -> Result<(), String> {
    let needs = [
        ("bytes of workgroup memory", limits.max_compute_workgroup_storage_size, WORKGROUP_MEMORY),
        ("invocations in a workgroup", limits.max_compute_invocations_per_workgroup, WORKGROUP_SIZE),
    ];
    for (what, seen, expected) in needs {
        if seen < expected {
            return Err(format!("it has {seen} {what}, and {expected} are needed; use another backend"));
        }
    }
    Ok(())
}
