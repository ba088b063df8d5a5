//! Who computes encodings: from the name that was typed to the thing itself.

mod auto;
mod faults;
mod gpu;
mod name;

use std::sync::Arc;

use anyhow::Result;
use pagewarp_codec::{CpuBackend, SharedBackend, Simd, Trace};

use crate::exit::{Exit, failure, one_line};

pub use auto::{Role, Task, gpu_is_better, measure};
pub use gpu::{adapters, first_hardware, may_have_gpu, open_plain, pick};
pub use name::BackendName;

/// The CPU backend at this SIMD level, or at the best one of this host.
pub fn cpu(simd: Option<&str>) -> Result<CpuBackend> {
    let Some(level) = simd else { return Ok(CpuBackend::new()) };
    let level: Simd =
        level.parse().map_err(|e| failure(Exit::Usage, format!("instruction set `{level}`: {e}")))?;
    CpuBackend::with_simd(level).map_err(|e| failure(Exit::Environment, e.to_string()))
}

/// The backend of this name for this task. `simd` is for what the CPU does.
pub fn choose(
    name: BackendName,
    simd: Option<&str>,
    task: Task,
    trace: Option<Trace>,
) -> Result<SharedBackend> {
    let cpu = cpu(simd)?;
    match name {
        BackendName::Cpu => Ok(Arc::new(cpu)),
        BackendName::Gpu(number) => gpu::open(&gpu::pick(number)?, cpu, trace),
        BackendName::Auto => {
            match auto::better_gpu(task).map(|adapter| gpu::open(&adapter, cpu.clone(), trace)) {
                Some(Ok(gpu)) => Ok(gpu),
                Some(Err(error)) => {
                    tracing::warn!("the CPU is used instead of the GPU: {}", one_line(&error));
                    Ok(Arc::new(cpu))
                }
                None => Ok(Arc::new(cpu)),
            }
        }
    }
}

/// The name of the SIMD level that the CPU backend takes on this host.
pub fn simd_name() -> String {
    CpuBackend::new().simd().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::exit_of;

    const TASK: Task = Task { role: Role::Encode, threads: 1, link_bytes_per_s: None };

    #[test]
    fn an_instruction_set_that_does_not_exist_is_a_usage_error() {
        let chosen = |simd| choose(BackendName::Cpu, Some(simd), TASK, None);
        assert_eq!(exit_of(&chosen("mmx").err().unwrap()), Exit::Usage);
        assert!(chosen("scalar").is_ok());
    }

    #[test]
    fn a_device_that_is_not_there_is_told_with_those_that_are() {
        let error = choose(BackendName::Gpu(Some(4096)), None, TASK, None).err().unwrap();
        assert_eq!(exit_of(&error), Exit::Environment);
        let text = error.to_string();
        assert!(
            text.contains("no gpu:4096 on this host, only gpu:0 "),
            "{text}: are mesa-vulkan-drivers and libvulkan1 installed?"
        );
    }

    #[test]
    fn auto_never_takes_a_device_in_software() {
        if first_hardware(adapters()).is_none() {
            let chosen = choose(BackendName::Auto, None, TASK, None).unwrap();
            assert!(chosen.name().starts_with("cpu"), "{}", chosen.name());
        }
    }
}
