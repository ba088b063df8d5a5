//! Loading a kernel and setting the first vCPU up to enter it.

mod acpi;
mod linux;
mod pvh;
mod registers;

use std::fs::File;
use std::io::Cursor;
use std::path::Path;

use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::config::{KernelSource, MachineConfig};
use crate::devices::{I8042_COMMAND, I8042_RESET};
use crate::error::Error;
use crate::layout;
pub(crate) use registers::{Entry, set_registers};

const ELF_MAGIC: &[u8] = b"\x7fELF";
const BZIMAGE_MAGIC: &[u8] = b"HdrS";
const BZIMAGE_MAGIC_AT: usize = 0x202;

/// A kernel image is no larger than this.
const MAX_KERNEL_BYTES: u64 = 1 << 30;

/// What a BIOS has at its reset vector: here, real-mode code that pulls the reset line. Linux comes here to reboot a hardware-reduced
/// machine without EFI (`reboot=` not given). `mov al, 0xfe; out 0x64, al; hlt; jmp` back to the `hlt`.
const RESET_CODE: [u8; 7] = [0xb0, I8042_RESET, 0xe6, I8042_COMMAND as u8, 0xf4, 0xeb, 0xfd];

/// Where the initrd lies: guest physical address and bytes.
#[derive(Clone, Copy, Debug)]
struct Initrd {
    start: u64,
    bytes: u64,
}

/// Loads what `config` asks for, and says how the first vCPU enters it. `tsc_khz` is how fast the guest's TSC counts, if KVM tells.
pub(crate) fn load(
    config: &MachineConfig,
    tsc_khz: Option<u32>,
    guest: &GuestMemoryMmap,
) -> Result<Entry, Error> {
    let image = read_kernel(&config.kernel)?;
    let mut cmdline = config.cmdline.clone();
    if let Some(tsc_khz) = tsc_khz.filter(|_| config.tsc_khz_in_cmdline) {
        cmdline.push_str(&format!(" tsc_khz={tsc_khz}"));
    }
    let mut text = cmdline.into_bytes();
    text.push(0);
    write(guest, &text, layout::CMDLINE)?;
    write(guest, &acpi::build(config.vcpus), layout::ACPI_TABLES)?;
    write(guest, &RESET_CODE, layout::RESET_VECTOR)?;

    let kernel = load_kernel(&image, guest)?;
    let kernel_end = match &kernel.setup_header {
        Some(header) => linux::end(header, kernel.kernel_end),
        None => kernel.kernel_end,
    };
    let initrd = config.initrd.as_deref().map(|p| load_initrd(p, config, kernel_end, guest)).transpose()?;
    match (kernel.setup_header, kernel.pvh_boot_cap) {
        (Some(header), _) => linux::prepare(header, kernel.kernel_load.0, text.len(), initrd, config.memory_bytes, guest),
        (None, PvhBootCapability::PvhEntryPresent(entry)) => pvh::prepare(entry.0, initrd, config.memory_bytes, guest),
        (None, _) => Err(Error::Kernel(
            "the ELF image has no PVH entry note (name \"Xen\", type 18); a Linux kernel needs CONFIG_PVH, or use its bzImage".into(),
        )),
    }
}

fn read_kernel(source: &KernelSource) -> Result<std::borrow::Cow<'_, [u8]>, Error> {
    match source {
        KernelSource::Bytes(bytes) => Ok((&bytes[..]).into()),
        KernelSource::Path(path) => {
            let failed = |source| Error::File { what: "kernel", path: path.clone(), source };
            let bytes = std::fs::metadata(path).map_err(failed)?.len();
            if bytes > MAX_KERNEL_BYTES {
                return Err(Error::Kernel(format!("{} has {bytes} bytes; is it a kernel?", path.display())));
            }
            Ok(std::fs::read(path).map_err(failed)?.into())
        }
    }
}

fn load_kernel(image: &[u8], guest: &GuestMemoryMmap) -> Result<KernelLoaderResult, Error> {
    let himem = Some(GuestAddress(layout::HIMEM));
    let mut reader = Cursor::new(image);
    let failed =
        |e: &dyn std::fmt::Display| Error::Kernel(format!("{e}; is the VM's memory large enough for it?"));
    if image.starts_with(ELF_MAGIC) {
        Elf::load(guest, None, &mut reader, himem).map_err(|e| failed(&e))
    } else if image.get(BZIMAGE_MAGIC_AT..).is_some_and(|rest| rest.starts_with(BZIMAGE_MAGIC)) {
        BzImage::load(guest, None, &mut reader, himem).map_err(|e| failed(&e))
    } else {
        Err(Error::Kernel("neither an ELF image nor a bzImage".into()))
    }
}

/// Puts the initrd as high as every kernel can reach it, out of the way of the kernel's own unpacking.
fn load_initrd(
    path: &Path,
    config: &MachineConfig,
    kernel_end: u64,
    guest: &GuestMemoryMmap,
) -> Result<Initrd, Error> {
    let failed = |source| Error::File { what: "initrd", path: path.to_owned(), source };
    let mut file = File::open(path).map_err(failed)?;
    let bytes = file.metadata().map_err(failed)?.len();
    let end = config.memory_bytes.min(layout::INITRD_END_MAX);
    let start = end.saturating_sub(bytes) & !0xfff;
    if start < kernel_end {
        return Err(Error::Config(format!(
            "initrd {}: {} MiB do not fit beside the kernel into {} MiB of memory; give the VM more",
            path.display(),
            bytes >> 20,
            config.memory_bytes >> 20
        )));
    }
    guest
        .read_exact_volatile_from(GuestAddress(start), &mut file, bytes as usize)
        .map_err(|e| failed(std::io::Error::other(e.to_string())))?;
    Ok(Initrd { start, bytes })
}

/// Writes to guest memory at a place that `layout` has chosen.
fn write(guest: &GuestMemoryMmap, bytes: &[u8], address: u64) -> Result<(), Error> {
    guest
        .write_slice(bytes, GuestAddress(address))
        .map_err(|e| Error::Kernel(format!("cannot write {} bytes at {address:#x}: {e}", bytes.len())))
}

/// Whether the whole range is RAM.
fn is_ram(guest: &GuestMemoryMmap, address: u64, bytes: u64) -> bool {
    guest.check_range(GuestAddress(address), bytes as usize)
}
