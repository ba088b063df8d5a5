//! The devices of this host.

use pagewarp_vulkan_memory::Memory;
use wgpu::{Backends, DeviceType, Instance, InstanceDescriptor, InstanceFlags, MemoryBudgetThresholds};

/// Memory that allocations may take, in percent of what the driver offers to this process: the rest is for others.
const MEMORY_PERCENT: u8 = 90;

/// What an adapter is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdapterKind {
    /// A GPU with memory of its own.
    Discrete,
    /// A GPU that shares the memory of the CPU.
    Integrated,
    /// A GPU passed through or shared by a hypervisor.
    Virtual,
    /// Software on the CPU, such as lavapipe: for tests, never chosen automatically.
    Software,
    /// The driver does not say.
    Other,
}

impl AdapterKind {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            AdapterKind::Discrete => "discrete",
            AdapterKind::Integrated => "integrated",
            AdapterKind::Virtual => "virtual",
            AdapterKind::Software => "software",
            AdapterKind::Other => "other",
        }
    }
}

/// A Vulkan device of this host.
#[derive(Clone, Debug)]
pub struct Adapter {
    pub(crate) inner: wgpu::Adapter,
    index: usize,
}

impl Adapter {
    /// Its number: the N of `--backend gpu:N`.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Its name.
    pub fn name(&self) -> String {
        self.inner.get_info().name
    }

    /// The driver's name and version.
    pub fn driver(&self) -> String {
        let info = self.inner.get_info();
        format!("{} {}", info.driver, info.driver_info).trim().to_owned()
    }

    /// What it is.
    pub fn kind(&self) -> AdapterKind {
        match self.inner.get_info().device_type {
            DeviceType::DiscreteGpu => AdapterKind::Discrete,
            DeviceType::IntegratedGpu => AdapterKind::Integrated,
            DeviceType::VirtualGpu => AdapterKind::Virtual,
            DeviceType::Cpu => AdapterKind::Software,
            DeviceType::Other => AdapterKind::Other,
        }
    }

    /// What the device can do at most.
    pub fn limits(&self) -> wgpu::Limits {
        self.inner.limits()
    }

    /// Its memory, as it is now; `None` if the driver does not say.
    pub fn memory(&self) -> Option<Memory> {
        pagewarp_vulkan_memory::memory(&self.inner)
    }

    /// Its place on the PCI bus, `domain:bus:device.function`; empty for software.
    pub fn pci_bus_id(&self) -> String {
        self.inner.get_info().device_pci_bus_id
    }
}

/// The Vulkan devices of this host: GPUs before software, otherwise in the order of the Vulkan loader.
///
/// `validation` switches the Vulkan validation layers on; their messages go to the `log` crate.
pub fn adapters(validation: bool) -> Vec<Adapter> {
    let flags = if validation { InstanceFlags::VALIDATION } else { InstanceFlags::empty() };
    let instance = Instance::new(InstanceDescriptor {
        backends: Backends::VULKAN,
        flags,
        memory_budget_thresholds: MemoryBudgetThresholds {
            for_resource_creation: Some(MEMORY_PERCENT),
            for_device_loss: None,
        },
        ..InstanceDescriptor::new_without_display_handle()
    });
    let mut found = pollster::block_on(instance.enumerate_adapters(Backends::VULKAN));
    found.sort_by_key(|adapter| adapter.get_info().device_type == DeviceType::Cpu);
    found.into_iter().enumerate().map(|(index, inner)| Adapter { inner, index }).collect()
}
