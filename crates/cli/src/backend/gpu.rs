//! The GPUs of this host: which one is meant, and opening it.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use pagewarp_codec::{CpuBackend, SharedBackend, SpillBackend, Trace};
use pagewarp_gpu::{Adapter, AdapterKind, GpuBackend, GpuConfig};

use super::faults::Injected;
use crate::exit::{Exit, failure};

/// Part of the memory of a device that the history may take.
const HISTORY_PART: (u64, u64) = (3, 4);

/// The devices of this host.
pub fn adapters() -> Vec<Adapter> {
    pagewarp_gpu::adapters(false)
}

/// Whether there may be a GPU on this host, as far as the files tell through which its driver is reached: without loading a driver.
pub fn may_have_gpu() -> bool {
    let render = std::fs::read_dir("/dev/dri").into_iter().flatten().flatten();
    render.map(|entry| entry.file_name()).any(|name| name.as_encoded_bytes().starts_with(b"renderD"))
        || ["/dev/nvidiactl", "/dev/dxg"].iter().any(|file| Path::new(file).exists())
}

/// The first device that is not software.
pub fn first_hardware(adapters: Vec<Adapter>) -> Option<Adapter> {
    adapters.into_iter().find(|adapter| adapter.kind() != AdapterKind::Software)
}

/// The device of this number, else the first GPU, else, with a warning, the first in software.
pub fn pick(number: Option<usize>) -> Result<Adapter> {
    let adapters = adapters();
    if adapters.is_empty() {
        return Err(failure(
            Exit::Environment,
            "no Vulkan device: the Vulkan loader (libvulkan.so.1) or a driver for it is missing; install libvulkan1 and the \
             driver of your GPU, or mesa-vulkan-drivers for a device in software, or use --backend cpu",
        ));
    }
    let index = match number {
        Some(number) => number,
        None => adapters.iter().position(|adapter| adapter.kind() != AdapterKind::Software).unwrap_or(0),
    };
    let names: Vec<String> = adapters.iter().map(describe).collect();
    let adapter = adapters.into_iter().nth(index).ok_or_else(|| {
        failure(Exit::Environment, format!("there is no gpu:{index} on this host, only {}", names.join(", ")))
    })?;
    if number.is_none() && adapter.kind() == AdapterKind::Software {
        tracing::warn!(
            "there is no GPU: {} computes on the CPU, more slowly than --backend cpu does",
            describe(&adapter)
        );
    }
    Ok(adapter)
}

fn describe(adapter: &Adapter) -> String {
    format!("gpu:{} `{}` ({})", adapter.index(), adapter.name(), adapter.kind().name())
}

/// Opens a device for a migration. What it has no time for, `cpu` does.
pub(super) fn open(adapter: &Adapter, cpu: CpuBackend, trace: Option<Trace>) -> Result<SharedBackend> {
    let injected = Injected::from_env()?;
    let defaults = GpuConfig::default();
    let config = GpuConfig {
        memory_bytes: history_budget_bytes(adapter),
        stall_timeout: injected.stall_timeout.unwrap_or(defaults.stall_timeout),
        trace,
        faults: injected.faults,
        ..defaults
    };
    let device: SharedBackend = Arc::new(open_with(adapter, config)?);
    Ok(if injected.no_spill { device } else { Arc::new(SpillBackend::new(device, cpu)) })
}

/// Opens a device as it is, to measure it.
pub fn open_plain(adapter: &Adapter) -> Result<GpuBackend> {
    open_with(adapter, GpuConfig::default())
}

fn open_with(adapter: &Adapter, config: GpuConfig) -> Result<GpuBackend> {
    GpuBackend::open(adapter, config).map_err(|error| failure(Exit::Environment, error.to_string()))
}

/// Memory of a device that the history may take, if it is known how much there is.
fn history_budget_bytes(adapter: &Adapter) -> Option<u64> {
    let memory = adapter.memory()?;
    Some(memory.available_bytes.unwrap_or(memory.total_bytes) / HISTORY_PART.1 * HISTORY_PART.0)
}
