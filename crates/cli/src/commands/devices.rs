//! `pagewarp devices`: who could compute encodings on this host, and how fast.

use std::fmt::Write as _;
use std::io::Write as _;

use anyhow::{Context, Result};
use pagewarp_codec::CpuBackend;
use pagewarp_engine::config::default_threads;
use pagewarp_gpu::{Adapter, AdapterKind, Rates};
use serde::Serialize;

use crate::args::DevicesArgs;
use crate::backend::{self, Role, Task};
use crate::demo::host::HostInfo;
use crate::exit::one_line;
use crate::table::Table;
use crate::units::human_bytes;

/// Threads that decode, unless `receive` is told otherwise.
const DECODE_THREADS: usize = 1;

/// The JSON of `pagewarp devices`.
#[derive(Serialize)]
struct Devices {
    /// The Vulkan devices, in the order of their numbers.
    devices: Vec<Device>,
    cpu: Cpu,
    /// What `auto` takes; absent with `--no-measure`.
    auto: Option<Auto>,
}

#[derive(Serialize)]
struct Device {
    backend: String,
    name: String,
    kind: &'static str,
    driver: String,
    /// Absent for software.
    pci_bus_id: Option<String>,
    /// Absent if the driver does not say.
    memory_bytes: Option<u64>,
    /// What this process could take now; absent if the driver does not say.
    memory_available_bytes: Option<u64>,
    max_buffer_bytes: u64,
    max_binding_bytes: u64,
    workgroup_memory_bytes: u32,
    usable: bool,
    /// Why it is not usable, or was not measured.
    problem: Option<String>,
    #[serde(flatten)]
    speed: Speed,
}

#[derive(Serialize)]
struct Cpu {
    backend: &'static str,
    name: String,
    simd: String,
    cpus: usize,
    memory_bytes: u64,
    /// Of one thread.
    #[serde(flatten)]
    speed: Speed,
}

/// Absent if not measured.
#[derive(Default, Serialize)]
struct Speed {
    encode_gb_per_s: Option<f64>,
    decode_gb_per_s: Option<f64>,
}

/// What `auto` takes where no limit of the link is known.
#[derive(Serialize)]
struct Auto {
    send: &'static str,
    receive: &'static str,
}

/// Runs `pagewarp devices`.
pub(super) fn devices(args: &DevicesArgs) -> Result<()> {
    let found = find(!args.no_measure)?;
    let text = if args.json { serde_json::to_string_pretty(&found)? + "\n" } else { text(&found) };
    std::io::stdout().write_all(text.as_bytes()).context("cannot print the devices")
}

fn find(measure: bool) -> Result<Devices> {
    let adapters = backend::adapters();
    let looked: Vec<(Device, Option<Rates>)> =
        adapters.iter().map(|adapter| look_at(adapter, measure)).collect();
    let cpu = measure.then(|| backend::measure(&CpuBackend::new())).transpose()?;
    // As `auto` does: the first one that is not software, and no other.
    let hardware = adapters.iter().position(|adapter| adapter.kind() != AdapterKind::Software);
    let gpu = hardware.and_then(|index| looked[index].1);
    let auto = cpu.map(|cpu| Auto {
        send: choice(gpu, cpu, Role::Encode, default_threads()),
        receive: choice(gpu, cpu, Role::Decode, DECODE_THREADS),
    });
    let host = HostInfo::detect();
    Ok(Devices {
        devices: looked.into_iter().map(|(device, _)| device).collect(),
        cpu: Cpu {
            backend: "cpu",
            name: host.cpu,
            simd: host.simd,
            cpus: host.cpus,
            memory_bytes: host.memory_bytes,
            speed: cpu.into(),
        },
        auto,
    })
}

fn choice(gpu: Option<Rates>, cpu: Rates, role: Role, threads: usize) -> &'static str {
    let task = Task { role, threads, link_bytes_per_s: None };
    if gpu.is_some_and(|gpu| backend::gpu_is_better(gpu, cpu, task)) { "gpu" } else { "cpu" }
}

fn look_at(adapter: &Adapter, measure: bool) -> (Device, Option<Rates>) {
    let memory = adapter.memory();
    let limits = adapter.limits();
    let (usable, rates) = match backend::open_plain(adapter) {
        Ok(opened) => {
            let rates = measure.then(|| backend::measure(&opened)).transpose();
            // A device that cannot do a measurement cannot do a migration either.
            (rates.as_ref().map(|_| ()).map_err(one_line), rates.ok().flatten())
        }
        Err(error) => (Err(one_line(&error)), None),
    };
    let device = Device {
        backend: format!("gpu:{}", adapter.index()),
        name: adapter.name(),
        kind: adapter.kind().name(),
        driver: adapter.driver(),
        pci_bus_id: Some(adapter.pci_bus_id()).filter(|id| !id.is_empty()),
        memory_bytes: memory.map(|memory| memory.total_bytes),
        memory_available_bytes: memory.and_then(|memory| memory.available_bytes),
        max_buffer_bytes: limits.max_buffer_size,
        max_binding_bytes: limits.max_storage_buffer_binding_size,
        workgroup_memory_bytes: limits.max_compute_workgroup_storage_size,
        usable: usable.is_ok(),
        problem: usable.err(),
        speed: rates.into(),
    };
    (device, rates)
}

impl From<Option<Rates>> for Speed {
    fn from(rates: Option<Rates>) -> Speed {
        rates.map_or_else(Speed::default, |rates| Speed {
            encode_gb_per_s: Some(rates.encode_gb_per_s),
            decode_gb_per_s: Some(rates.decode_gb_per_s),
        })
    }
}

fn text(found: &Devices) -> String {
    let bytes = |bytes: Option<u64>| bytes.map_or_else(|| "-".to_owned(), human_bytes);
    let rate = |rate: Option<f64>| rate.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.2} GB/s"));
    let mut table = Table::new([
        "backend",
        "kind",
        "memory",
        "available",
        "largest buffer",
        "binding",
        "workgroup",
        "PCI",
        "encode",
        "decode",
        "usable",
    ]);
    for device in &found.devices {
        table.row([
            device.backend.clone(),
            device.kind.to_owned(),
            bytes(device.memory_bytes),
            bytes(device.memory_available_bytes),
            human_bytes(device.max_buffer_bytes),
            human_bytes(device.max_binding_bytes),
            human_bytes(device.workgroup_memory_bytes.into()),
            device.pci_bus_id.clone().unwrap_or_else(|| "-".to_owned()),
            rate(device.speed.encode_gb_per_s),
            rate(device.speed.decode_gb_per_s),
            if device.usable { "yes" } else { "NO" }.to_owned(),
        ]);
    }
    let cpu = &found.cpu;
    let dash = || "-".to_owned();
    table.row([
        cpu.backend.to_owned(),
        cpu.simd.clone(),
        human_bytes(cpu.memory_bytes),
        dash(),
        dash(),
        dash(),
        dash(),
        dash(),
        rate(cpu.speed.encode_gb_per_s),
        rate(cpu.speed.decode_gb_per_s),
        "yes".to_owned(),
    ]);
    let mut text = format!("{table}\n");
    for device in &found.devices {
        let _ = writeln!(text, "{}: {}, driver {}", device.backend, device.name, device.driver);
        if let Some(problem) = &device.problem {
            let _ = writeln!(text, "  not usable: {problem}");
        }
    }
    let _ = writeln!(text, "cpu: {}, {} processors; the speed is that of one", cpu.name, cpu.cpus);
    if found.devices.is_empty() {
        let _ = writeln!(text, "no Vulkan devices: see \"GPUs\" in the user guide");
    }
    if let Some(auto) = &found.auto {
        let _ = writeln!(text, "`auto` takes {} to send and {} to receive", auto.send, auto.receive);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_of_no_use_comes_with_the_reason() {
        let found = Devices {
            devices: vec![Device {
                backend: "gpu:0".into(),
                name: "Tiny".into(),
                kind: "discrete",
                driver: "tiny 1".into(),
                pci_bus_id: Some("0000:01:00.0".into()),
                memory_bytes: Some(1 << 30),
                memory_available_bytes: None,
                max_buffer_bytes: 1 << 28,
                max_binding_bytes: 1 << 27,
                workgroup_memory_bytes: 16 << 10,
                usable: false,
                problem: Some("too little of everything".into()),
                speed: Speed::default(),
            }],
            cpu: Cpu {
                backend: "cpu",
                name: "CPU".into(),
                simd: "avx2".into(),
                cpus: 8,
                memory_bytes: 1 << 33,
                speed: Speed { encode_gb_per_s: Some(1.5), decode_gb_per_s: Some(3.25) },
            },
            auto: Some(Auto { send: "cpu", receive: "cpu" }),
        };
        let text = text(&found);
        for part in [
            "0000:01:00.0",
            "NO\n",
            "gpu:0: Tiny, driver tiny 1\n  not usable: too little of everything\n",
            "3.25 GB/s",
            "`auto` takes cpu to send",
        ] {
            assert!(text.contains(part), "missing `{part}` in:\n{text}");
        }
    }
}
