//! `--backend auto`: measures what this host has, once per process, and takes what is faster for the migration at hand.

use std::sync::OnceLock;
use std::time::Duration;

use anyhow::Result;
use pagewarp_codec::{Backend, CpuBackend};
use pagewarp_gpu::{Adapter, Rates, Speed, calibrate, prefer_gpu};

use super::gpu;
use crate::exit::{Exit, failure, one_line};

/// How long each backend is measured. Together with what it takes to set up, a third of a second.
const MEASURE: Duration = Duration::from_millis(100);

/// What a backend is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Encode, on the source.
    Encode,
    /// Decode, on the destination.
    Decode,
}

/// What decides between CPU and GPU, besides their speed.
#[derive(Clone, Copy, Debug)]
pub struct Task {
    /// What is to be done.
    pub role: Role,
    /// Threads that the CPU may use for it.
    pub threads: usize,
    /// Bytes a second that the migration may send; `None`: no limit is known.
    pub link_bytes_per_s: Option<u64>,
}

/// Measures a backend: what one thread does with it.
pub fn measure(backend: &dyn Backend) -> Result<Rates> {
    calibrate(backend, MEASURE).map_err(|error| failure(Exit::Environment, error.to_string()))
}

/// Whether a GPU with these rates is better at the task than the CPU with those of one of its threads.
pub fn gpu_is_better(gpu: Rates, cpu: Rates, task: Task) -> bool {
    let rate = |rates: Rates| match task.role {
        Role::Encode => rates.encode_gb_per_s,
        Role::Decode => rates.decode_gb_per_s,
    };
    // More threads than processors are no faster.
    let cores = std::thread::available_parallelism().map_or(1, Into::into);
    let threads = task.threads.clamp(1, cores) as f64;
    let speed = |gb_per_s, rates: Rates| Speed { gb_per_s, ratio: rates.ratio };
    prefer_gpu(speed(rate(gpu), gpu), speed(rate(cpu) * threads, cpu), task.link_bytes_per_s)
}

/// The GPU to take for the task; `None`: the CPU is better, or there is no GPU that works.
pub(super) fn better_gpu(task: Task) -> Option<Adapter> {
    static MEASURED: OnceLock<Option<(Adapter, Rates, Rates)>> = OnceLock::new();
    let (adapter, gpu, cpu) = MEASURED.get_or_init(measure_both).as_ref()?;
    let better = gpu_is_better(*gpu, *cpu, task);
    tracing::info!("backend auto: {} {gpu:?}, one CPU {cpu:?}, {task:?}: gpu {better}", adapter.name());
    better.then(|| adapter.clone())
}

fn measure_both() -> Option<(Adapter, Rates, Rates)> {
    let adapter = gpu::first_hardware(gpu::adapters())?;
    let gpu = gpu::open_plain(&adapter).and_then(|backend| measure(&backend));
    match gpu.and_then(|gpu| Ok((gpu, measure(&CpuBackend::new())?))) {
        Ok((gpu, cpu)) => Some((adapter, gpu, cpu)),
        Err(error) => {
            tracing::warn!("{} is not used: {}", adapter.name(), one_line(&error));
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_counts_with_all_its_threads_in_the_role_that_is_asked_for() {
        let gpu = Rates { encode_gb_per_s: 1.5, decode_gb_per_s: 9.0, ratio: 2.0 };
        let cpu = Rates { encode_gb_per_s: 1.0, decode_gb_per_s: 10.0, ratio: 2.0 };
        let task = |role, threads| Task { role, threads, link_bytes_per_s: None };
        assert!(gpu_is_better(gpu, cpu, task(Role::Encode, 1)));
        assert!(!gpu_is_better(gpu, cpu, task(Role::Decode, 1)));
        let two = std::thread::available_parallelism().map_or(1, Into::into) >= 2;
        assert_eq!(gpu_is_better(gpu, cpu, task(Role::Encode, 2)), !two);
    }
}
