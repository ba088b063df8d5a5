//! The KVM calls that kvm-ioctls marks unsafe or does not have, behind safe functions.

use std::io;
use std::os::raw::c_void;

use kvm_bindings::{
    KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_userspace_memory_region, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iowr_nr;

use crate::error::Error;
use crate::memory::Memory;

ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// Makes every region of `memory` a memory slot of `vm`, or changes the slots' flags.
///
/// The caller keeps `memory` mapped for as long as `vm` exists.
pub(crate) fn set_memory(vm: &VmFd, memory: &Memory, flags: u32) -> Result<(), Error> {
    for region in memory.mappings() {
        let slot = kvm_userspace_memory_region {
            slot: region.slot.id,
            flags,
            guest_phys_addr: region.slot.start,
            memory_size: region.slot.bytes,
            userspace_addr: region.address() as u64,
        };
        // SAFETY: the guest may write to this range, so nobody may hold references into it, and it must stay mapped while a vCPU can run.
        // `Memory` owns the mapping and only ever copies in and out of it as volatile slices. vCPUs run on the threads of `Vm` alone,
        // which holds `Memory` and joins them before it lets go of it (`Vm::drop`).
        unsafe { vm.set_user_memory_region(slot) }.map_err(Error::kvm("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}

/// Clears the pages of `slot` whose bits are set in `bitmap` and watches them again.
///
/// `first_page` is a multiple of 64, and so is `pages` unless the range ends where the slot does. `bitmap` has a bit for each page.
pub(crate) fn clear_dirty_log(
    vm: &VmFd,
    slot: u32,
    first_page: u64,
    pages: u32,
    bitmap: &[u64],
) -> Result<(), Error> {
    assert!(bitmap.len() as u64 * 64 >= u64::from(pages), "the bitmap is shorter than the range");
    let log = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: bitmap.as_ptr() as *mut c_void },
    };
    // SAFETY: the kernel reads `pages` bits from `dirty_bitmap`, and the assertion above made sure that they are there; it writes nothing.
    let result = unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &log) };
    if result != 0 {
        return Err(Error::Kvm { call: "KVM_CLEAR_DIRTY_LOG", source: io::Error::last_os_error() });
    }
    Ok(())
}

/// Sets the extended processor state.
pub(crate) fn set_xsave(vcpu: &VcpuFd, xsave: &kvm_xsave) -> Result<(), kvm_ioctls::Error> {
    // SAFETY: the kernel reads as many bytes as the guest may have state, which is more than this structure's 4096 only after the
    // process has asked for dynamically enabled features (`arch_prctl`, AMX), which this program never does.
    unsafe { vcpu.set_xsave(xsave) }
}
