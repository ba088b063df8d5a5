//! When the device did what, for traces: by its own clock where it has one, else from submission to the moment the result is seen.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pagewarp_codec::{BackendError, Trace};
use wgpu::{
    Buffer, BufferUsages, CommandEncoder, Device, Features, QuerySet, QuerySetDescriptor, QueryType, Queue,
};

use crate::device::Gpu;
use crate::loss::Loss;
use crate::queue::MapRequest;
use crate::transfer::Readback;

/// Bytes of one timestamp.
const STAMP: u64 = 8;
/// Attempts at reading both clocks at once; the quickest counts.
const ATTEMPTS: usize = 5;

/// A queue of the device in the trace, such as `gpu kernels`.
struct Track {
    name: Arc<str>,
    /// The end of its last span: spans of one track do not overlap.
    last: Mutex<Option<Instant>>,
}

impl Track {
    fn new(name: &str) -> Track {
        Track { name: Arc::from(name), last: Mutex::new(None) }
    }

    fn span(&self, trace: &Trace, name: &'static str, batch: u64, start: Instant, end: Instant) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let start = last.map_or(start, |last| start.max(last));
        let end = end.max(start);
        *last = Some(end);
        trace.span(&self.name, name, batch, start, end);
    }
}

/// A piece of work on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Copies from staging buffers.
    Upload,
    /// Kernels.
    Kernel,
    /// Copies to readback buffers.
    Readback,
}

impl Phase {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Phase::Upload => "upload",
            Phase::Kernel => "kernel",
            Phase::Readback => "readback",
        }
    }
}

/// What all timers of a device share.
pub(crate) struct Timing {
    trace: Trace,
    upload: Track,
    kernels: Track,
    readback: Track,
    /// `None` if the device cannot tell the time.
    clock: Option<Clock>,
}

impl Timing {
    /// Compares the clocks, if the device has one. A device that is lost meanwhile has none.
    pub(crate) fn new(device: &Device, queue: &Queue, lost: &Loss, trace: Trace) -> Timing {
        let needed = Features::TIMESTAMP_QUERY | Features::TIMESTAMP_QUERY_INSIDE_ENCODERS;
        let calibrate = || lost.catch(|| Clock::calibrate(device, queue)).flatten();
        Timing {
            trace,
            upload: Track::new("gpu upload"),
            kernels: Track::new("gpu kernels"),
            readback: Track::new("gpu readback"),
            clock: device.features().contains(needed).then(calibrate).flatten(),
        }
    }

    /// Whether the device tells the time.
    pub(crate) fn has_clock(&self) -> bool {
        self.clock.is_some()
    }

    fn span(&self, phase: Phase, batch: u64, start: Instant, end: Instant) {
        let track = match phase {
            Phase::Upload => &self.upload,
            Phase::Kernel => &self.kernels,
            Phase::Readback => &self.readback,
        };
        track.span(&self.trace, phase.name(), batch, start, end);
    }
}

/// The device's clock against ours.
#[derive(Clone, Copy, Debug)]
struct Clock {
    ticks: u64,
    instant: Instant,
    /// Nanoseconds of a tick.
    period: f64,
}

impl Clock {
    fn calibrate(device: &Device, queue: &Queue) -> Option<Clock> {
        let (set, resolved) = query_set(device, 1);
        let back = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("clock"),
            size: STAMP,
            usage: BufferUsages::MAP_READ | BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        let mut best: Option<(Duration, Clock)> = None;
        for _ in 0..ATTEMPTS {
            let mut commands = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            commands.write_timestamp(&set, 0);
            commands.resolve_query_set(&set, 0..1, &resolved, 0);
            commands.copy_buffer_to_buffer(&resolved, 0, &back, 0, STAMP);
            let start = Instant::now();
            queue.submit([commands.finish()]);
            back.map_async(wgpu::MapMode::Read, .., |_| ());
            let timeout = Some(Duration::from_secs(1));
            device.poll(wgpu::PollType::Wait { submission_index: None, timeout }).ok()?;
            let took = start.elapsed();
            let ticks = stamps(&back.get_mapped_range(..).ok()?).next()?;
            back.unmap();
            if best.is_none_or(|(quickest, _)| took < quickest) {
                let period = f64::from(queue.get_timestamp_period());
                best = Some((took, Clock { ticks, instant: start + took / 2, period }));
            }
        }
        best.map(|(_, clock)| clock)
    }

    fn instant(&self, ticks: u64) -> Instant {
        let nanoseconds = |ticks: u64| Duration::from_nanos((ticks as f64 * self.period) as u64);
        match ticks.checked_sub(self.ticks) {
            Some(after) => self.instant.checked_add(nanoseconds(after)),
            None => self.instant.checked_sub(nanoseconds(self.ticks - ticks)),
        }
        .unwrap_or(self.instant)
    }
}

/// Notes when the phases of one submission began and ended. Does nothing if there is no trace.
pub(crate) struct Timer(Option<Inner>);

struct Inner {
    timing: Arc<Timing>,
    phases: &'static [Phase],
    stamps: Option<Stamps>,
    submitted: Instant,
}

struct Stamps {
    set: QuerySet,
    resolved: Buffer,
    back: Readback,
}

impl Timer {
    /// For submissions that consist of these phases, the last of which makes the result.
    ///
    /// # Errors
    ///
    /// [`BackendError::Unavailable`] if there is no memory.
    pub(crate) fn new(gpu: &Arc<Gpu>, phases: &'static [Phase]) -> Result<Timer, BackendError> {
        let Some(timing) = gpu.timing() else { return Ok(Timer(None)) };
        let count = 2 * phases.len() as u32;
        let stamps = match timing.clock {
            None => None,
            Some(_) => {
                let (set, resolved) = query_set(&gpu.device, count);
                let back = Readback::new(gpu, "timestamps", u64::from(count) * STAMP)?;
                Some(Stamps { set, resolved, back })
            }
        };
        Ok(Timer(Some(Inner { timing: timing.clone(), phases, stamps, submitted: Instant::now() })))
    }

    /// Phase number `phase` begins here.
    pub(crate) fn begin(&self, commands: &mut CommandEncoder, phase: u32) {
        self.stamp(commands, 2 * phase);
    }

    /// Phase number `phase` ends here.
    pub(crate) fn end(&self, commands: &mut CommandEncoder, phase: u32) {
        self.stamp(commands, 2 * phase + 1);
    }

    fn stamp(&self, commands: &mut CommandEncoder, index: u32) {
        if let Some(Inner { stamps: Some(stamps), .. }) = &self.0 {
            commands.write_timestamp(&stamps.set, index);
        }
    }

    /// Records the way back of the timestamps, after the last phase.
    pub(crate) fn record(&self, commands: &mut CommandEncoder) {
        if let Some(Inner { stamps: Some(stamps), phases, .. }) = &self.0 {
            let count = 2 * phases.len() as u32;
            commands.resolve_query_set(&stamps.set, 0..count, &stamps.resolved, 0);
            stamps.back.record(commands, &stamps.resolved, 0, u64::from(count) * STAMP);
        }
    }

    /// Asks for the timestamps; to be submitted with the phases.
    pub(crate) fn request(&mut self) -> Option<MapRequest> {
        let inner = self.0.as_mut()?;
        inner.submitted = Instant::now();
        let count = 2 * inner.phases.len() as u64;
        inner.stamps.as_mut().map(|stamps| stamps.back.request(count * STAMP))
    }

    /// Whether the timestamps are there, if there are any.
    ///
    /// # Errors
    ///
    /// [`BackendError::Lost`] if the device does not give them.
    pub(crate) fn is_ready(&self) -> Result<bool, BackendError> {
        match &self.0 {
            Some(Inner { stamps: Some(stamps), .. }) => stamps.back.is_ready(),
            _ => Ok(true),
        }
    }

    /// To be called when the result of the submission was seen, and the timestamps [are there](Self::is_ready). Adds the spans to the trace.
    ///
    /// # Errors
    ///
    /// [`BackendError::Lost`] if the device does not give its timestamps.
    pub(crate) fn observed(&mut self, batch: u64) -> Result<(), BackendError> {
        let Some(inner) = &mut self.0 else { return Ok(()) };
        let Inner { timing, phases, stamps, submitted } = inner;
        match (stamps, timing.clock) {
            (Some(stamps), Some(clock)) => stamps.back.read(|bytes| {
                let at: Vec<Instant> = self::stamps(bytes).map(|ticks| clock.instant(ticks)).collect();
                for (&phase, span) in phases.iter().zip(at.chunks_exact(2)) {
                    timing.span(phase, batch, span[0], span[1]);
                }
            }),
            _ => {
                if let Some(&phase) = phases.last() {
                    timing.span(phase, batch, *submitted, Instant::now());
                }
                Ok(())
            }
        }
    }
}

fn query_set(device: &Device, count: u32) -> (QuerySet, Buffer) {
    let set = device.create_query_set(&QuerySetDescriptor {
        label: Some("timestamps"),
        ty: QueryType::Timestamp,
        count,
    });
    let resolved = device.create_buffer(&wgpu::BufferDescriptor {
        label: Some("timestamps"),
        size: u64::from(count) * STAMP,
        usage: BufferUsages::QUERY_RESOLVE | BufferUsages::COPY_SRC,
        mapped_at_creation: false,
    });
    (set, resolved)
}

fn stamps(bytes: &[u8]) -> impl Iterator<Item = u64> {
    let (stamps, _) = bytes.as_chunks::<{ STAMP as usize }>();
    stamps.iter().map(|&stamp| u64::from_le_bytes(stamp))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::GpuConfig;
    use crate::test_support::software_adapter;

    #[test]
    fn ticks_become_instants_on_both_sides_of_the_calibration() {
        let now = Instant::now();
        let clock = Clock { ticks: 1000, instant: now, period: 2.5 };
        assert_eq!(clock.instant(1000), now);
        assert_eq!(clock.instant(1400), now + Duration::from_micros(1));
        assert_eq!(clock.instant(600), now - Duration::from_micros(1));
    }

    /// As when a driver loses its device.
    #[test]
    fn a_clock_that_panics_is_none() {
        let config = GpuConfig { trace: Some(Trace::new()), ..GpuConfig::default() };
        let gpu = Gpu::open(&software_adapter(), config).unwrap();
        assert!(gpu.timing().unwrap().has_clock());
        let lost = Loss::default();
        gpu.queue.on_submitted_work_done(|| panic!("the driver is gone (on purpose)"));
        assert!(!Timing::new(&gpu.device, &gpu.queue, &lost, Trace::new()).has_clock());
        assert!(lost.reason().unwrap().ends_with("the driver is gone (on purpose)"));
    }

    #[test]
    fn spans_of_a_track_do_not_overlap() {
        let (trace, track) = (Trace::new(), Track::new("gpu kernels"));
        let at = |ms| trace.epoch() + Duration::from_millis(ms);
        track.span(&trace, "kernel", 1, at(1), at(5));
        track.span(&trace, "kernel", 2, at(3), at(8));
        track.span(&trace, "kernel", 3, at(2), at(4));
        let spans: Vec<_> = trace.spans().0.iter().map(|span| (span.batch, span.start, span.end)).collect();
        assert_eq!(spans, [(1, at(1), at(5)), (2, at(5), at(8)), (3, at(8), at(8))]);
    }
}
