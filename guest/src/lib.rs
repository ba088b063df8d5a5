//! The built-in bare-metal test guest of pagewarp, as an ELF image.
#![forbid(unsafe_code)]

/// The guest's ELF image: a 64-bit kernel with a PVH entry point, for any hypervisor that boots such (QEMU, Cloud Hypervisor,
/// Firecracker, pagewarp's own VMM).
pub const ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.elf"));
