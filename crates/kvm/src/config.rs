//! What a caller decides about a machine.

use std::path::PathBuf;
use std::sync::Arc;

use crate::error::Error;
use crate::layout;

/// The most vCPUs of a machine: their APIC ids have to fit the 8 bits of ACPI's processor entries.
pub const MAX_VCPUS: u32 = 254;

/// The least guest memory, in bytes.
pub const MIN_MEMORY_BYTES: u64 = 16 << 20;

/// The most guest memory, in bytes.
pub const MAX_MEMORY_BYTES: u64 = 4 << 40;

/// The longest kernel command line, in bytes, without the final zero.
pub const MAX_CMDLINE_BYTES: usize = 2047;

/// Where the kernel comes from.
#[derive(Clone)]
pub enum KernelSource {
    /// A file: an ELF image with a PVH note, or a bzImage.
    Path(PathBuf),
    /// The bytes of such a file.
    Bytes(Arc<[u8]>),
}

impl std::fmt::Debug for KernelSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            KernelSource::Path(path) => write!(f, "Path({})", path.display()),
            KernelSource::Bytes(bytes) => write!(f, "Bytes({})", bytes.len()),
        }
    }
}

/// A machine to boot.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// The VM's name: 1 to 64 of `A-Z a-z 0-9 . _ -`.
    pub name: String,
    /// Guest memory in bytes; a multiple of 2 MiB.
    pub memory_bytes: u64,
    /// Virtual CPUs, from 1.
    pub vcpus: u32,
    /// The kernel.
    pub kernel: KernelSource,
    /// The initial RAM disk, or what else the kernel wants as its first module.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// Append ` tsc_khz=N` to the command line. For guests that have no other way to learn how fast their TSC counts.
    pub tsc_khz_in_cmdline: bool,
    /// How it sits on this host.
    pub host: HostConfig,
}

impl MachineConfig {
    /// A machine with one vCPU, no initrd and an empty command line.
    pub fn new(name: impl Into<String>, memory_bytes: u64, kernel: KernelSource) -> MachineConfig {
        MachineConfig {
            name: name.into(),
            memory_bytes,
            vcpus: 1,
            kernel,
            initrd: None,
            cmdline: String::new(),
            tsc_khz_in_cmdline: false,
            host: HostConfig::default(),
        }
    }

    /// Checks what can be checked without a host.
    pub fn validate(&self) -> Result<(), Error> {
        check_name(&self.name)?;
        check_size(self.memory_bytes, self.vcpus)?;
        if self.cmdline.len() > MAX_CMDLINE_BYTES {
            let seen = self.cmdline.len();
            return Err(Error::Config(format!(
                "command line: {seen} bytes; at most {MAX_CMDLINE_BYTES} fit"
            )));
        }
        if self.cmdline.contains('\0') {
            return Err(Error::Config("command line: contains a zero byte; leave it out".into()));
        }
        Ok(())
    }
}

/// How a machine sits on its host. None of this travels with a migration except `huge_pages`, which is the destination's own choice.
#[derive(Clone, Debug, Default)]
pub struct HostConfig {
    /// Back guest memory with the host's reserved huge pages of 2 MiB.
    pub huge_pages: bool,
    /// Take guest memory that is larger than what the host has available now.
    pub overcommit: bool,
    /// Priority of the vCPU threads, -20 (urgent) to 19.
    pub vcpu_nice: Option<i32>,
}

/// Checks a VM's name: it becomes part of a file name.
pub fn check_name(name: &str) -> Result<(), Error> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if (1..=64).contains(&name.len()) && name.chars().all(allowed) && !name.starts_with('.') {
        return Ok(());
    }
    Err(Error::Config(format!(
        "name {name:?}: expected 1 to 64 of the characters A-Z a-z 0-9 . _ -, the first one not a dot"
    )))
}

/// Checks sizes, whoever they come from.
pub(crate) fn check_size(memory_bytes: u64, vcpus: u32) -> Result<(), Error> {
    if !(1..=MAX_VCPUS).contains(&vcpus) {
        return Err(Error::Config(format!("vcpus: {vcpus}; expected 1 to {MAX_VCPUS}")));
    }
    if !(MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&memory_bytes) {
        return Err(Error::Config(format!(
            "memory: {memory_bytes} bytes; expected {} MiB to {} TiB",
            MIN_MEMORY_BYTES >> 20,
            MAX_MEMORY_BYTES >> 40
        )));
    }
    if !memory_bytes.is_multiple_of(layout::MEMORY_GRANULE) {
        return Err(Error::Config(format!("memory: {memory_bytes} bytes; expected a multiple of 2 MiB")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_the_directory_are_refused() {
        for good in ["a", "vm-1", "A.b_c", &"x".repeat(64)] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "../x", "a/b", "a b", "ä", "a\n", &"x".repeat(65)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        assert!(check_size(64 << 20, 1).is_ok());
        assert!(check_size(64 << 20, 0).is_err());
        assert!(check_size(64 << 20, 255).is_err());
        assert!(check_size(1 << 20, 1).is_err());
        assert!(check_size((64 << 20) + 4096, 1).is_err());
        assert!(check_size(u64::MAX, 1).is_err());
    }
}
