//! How much memory a Vulkan device has, and how much of it this process may still take; and a layer that is better switched off.
//!
//! wgpu does not tell, so this asks Vulkan through wgpu's own handles. It is a crate of its own because both take `unsafe`, and the
//! backend has none.

mod layers;

use ash::{ext, vk};

pub use layers::switch_off_device_select;

/// Memory of a device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// All of its own memory; for software and integrated GPUs this is a part of the host's.
    pub total_bytes: u64,
    /// What this process could take now, other processes considered; `None` if the driver does not say.
    pub available_bytes: Option<u64>,
}

/// The memory of this device; `None` if it is not one of Vulkan, or has no memory of its own.
pub fn memory(adapter: &wgpu::Adapter) -> Option<Memory> {
    // SAFETY: the handles are only asked for properties; nothing is destroyed or changed, and none outlives this function.
    let adapter = unsafe { adapter.as_hal::<wgpu::hal::api::Vulkan>() }?;
    let shared = adapter.shared_instance();
    let (instance, device) = (shared.raw_instance(), adapter.raw_physical_device());
    // SAFETY: `device` belongs to `instance`, and `adapter` keeps both alive until the end of this function.
    let properties = unsafe { instance.get_physical_device_memory_properties(device) };
    let heaps = properties.memory_heaps.iter().take(properties.memory_heap_count as usize);
    let local: Vec<(usize, u64)> = heaps
        .enumerate()
        .filter(|(_, heap)| heap.flags.contains(vk::MemoryHeapFlags::DEVICE_LOCAL))
        .map(|(index, heap)| (index, heap.size))
        .collect();
    let total_bytes = local.iter().map(|&(_, size)| size).sum();
    if total_bytes == 0 {
        return None;
    }

    let capabilities = adapter.physical_device_capabilities();
    // The function below is part of Vulkan from 1.1 on.
    let version = shared.instance_api_version().min(capabilities.properties().api_version);
    let tells = version >= vk::API_VERSION_1_1 && capabilities.supports_extension(ext::memory_budget::NAME);
    let available_bytes = tells.then(|| {
        let mut budget = vk::PhysicalDeviceMemoryBudgetPropertiesEXT::default();
        let mut properties = vk::PhysicalDeviceMemoryProperties2::default().push_next(&mut budget);
        // SAFETY: as above; besides, instance and device are of a version that has the function, the device has the extension
        // whose structure is in the chain, and both structures live until the call returns.
        unsafe { instance.get_physical_device_memory_properties2(device, &mut properties) };
        local
            .iter()
            .map(|&(index, size)| {
                budget.heap_budget[index].saturating_sub(budget.heap_usage[index]).min(size)
            })
            .sum()
    });
    Some(Memory { total_bytes, available_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_device_has_memory_and_no_more_of_it_available_than_there_is() {
        let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
            backends: wgpu::Backends::VULKAN,
            ..wgpu::InstanceDescriptor::new_without_display_handle()
        });
        let adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::VULKAN));
        assert!(
            !adapters.is_empty(),
            "no Vulkan device, not even in software: install mesa-vulkan-drivers and libvulkan1"
        );
        for adapter in adapters {
            let memory = memory(&adapter).unwrap_or_else(|| panic!("{}", adapter.get_info().name));
            assert!(memory.total_bytes >= 64 << 20, "{memory:?}");
            assert!(
                memory.available_bytes.is_none_or(|available| available <= memory.total_bytes),
                "{memory:?}"
            );
            println!("{}: {memory:?}", adapter.get_info().name);
        }
    }
}
