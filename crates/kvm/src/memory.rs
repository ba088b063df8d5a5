//! Guest memory: a memfd for each region, mapped and shared with KVM.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::sync::Arc;

use pagewarp_codec::{PAGE_SIZE, Page};
use pagewarp_engine::vm::{GuestMemory, RegionInfo, VmError};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use rustix::io::preadv;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, VolatileMemory};

use crate::config::HostConfig;
use crate::error::Error;
use crate::layout::{self, Slot};

/// The most pages that one call reads through the memfd; the kernel's limit on vectors.
const READ_PAGES: usize = 1024;

/// The memory of one VM.
///
/// Nothing in the VMM writes to it once the guest runs: the loaders write before, and no device here has DMA. That is why KVM's
/// dirty log alone sees every write.
pub(crate) struct Memory {
    guest: GuestMemoryMmap,
    mappings: Vec<Mapping>,
    huge_pages: bool,
}

/// One region.
pub(crate) struct Mapping {
    pub slot: Slot,
    region: Arc<GuestRegionMmap>,
    file: Arc<File>,
}

impl Mapping {
    /// Where it is in this process.
    pub(crate) fn address(&self) -> *mut u8 {
        self.region.get_mmap().as_ptr()
    }
}

impl Memory {
    /// Zeroed memory for a machine with this much of it.
    pub(crate) fn new(memory_bytes: u64, host: &HostConfig) -> Result<Memory, Error> {
        if !host.overcommit && !host.huge_pages {
            check_available(memory_bytes)?;
        }
        let mappings = layout::slots(memory_bytes)
            .into_iter()
            .map(|slot| map(slot, host))
            .collect::<Result<Vec<_>, Error>>()?;
        let guest = GuestMemoryMmap::from_arc_regions(mappings.iter().map(|m| m.region.clone()).collect())
            .map_err(|e| Error::Host(format!("memory: {e}")))?;
        Ok(Memory { guest, mappings, huge_pages: host.huge_pages })
    }

    /// The guest's view, for loaders.
    pub(crate) fn guest(&self) -> &GuestMemoryMmap {
        &self.guest
    }

    /// The regions, in ascending order of id.
    pub(crate) fn mappings(&self) -> &[Mapping] {
        &self.mappings
    }

    /// Bytes of the host's memory that it takes up now: what was touched.
    pub(crate) fn allocated_bytes(&self) -> io::Result<u64> {
        use std::os::unix::fs::MetadataExt;
        self.mappings.iter().map(|m| Ok(m.file.metadata()?.blocks() * 512)).sum()
    }

    /// The region and the range of bytes that these pages are.
    fn range(&self, region: u32, first_page: u64, pages: usize) -> Result<(&Mapping, u64), VmError> {
        let mapping = self.mappings.iter().find(|m| m.slot.id == region);
        let start = first_page.checked_mul(PAGE_SIZE as u64);
        let end = start.and_then(|s| s.checked_add((pages * PAGE_SIZE) as u64));
        match (mapping, start, end) {
            (Some(mapping), Some(start), Some(end)) if end <= mapping.slot.bytes => Ok((mapping, start)),
            _ => Err(VmError::new(
                "guest memory",
                format!(
                    "there are no {pages} pages from page {first_page} on in region {region}; this is a bug of the caller"
                ),
            )),
        }
    }
}

fn map(slot: Slot, host: &HostConfig) -> Result<Mapping, Error> {
    let too_little = |e: &dyn std::fmt::Display| {
        let mib = slot.bytes >> 20;
        let advice = if host.huge_pages {
            "reserve more huge pages (sysctl vm.nr_hugepages) or run without them"
        } else {
            "give the VM less memory"
        };
        Error::Host(format!("memory: the host cannot map {mib} MiB for {}: {e}; {advice}", slot.name))
    };
    let mut flags = MemfdFlags::CLOEXEC;
    if host.huge_pages {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    }
    let file = File::from(memfd_create(slot.name, flags).map_err(|e| too_little(&e))?);
    ftruncate(&file, slot.bytes).map_err(|e| too_little(&e))?;
    let file = Arc::new(file);
    // Huge pages are reserved while mapping, so that a lack of them shows now and not as a fault in the guest.
    let reserve = if host.huge_pages { MapFlags::empty() } else { MapFlags::NORESERVE };
    let region = MmapRegionBuilder::new(slot.bytes as usize)
        .with_mmap_prot((ProtFlags::READ | ProtFlags::WRITE).bits() as i32)
        .with_mmap_flags((MapFlags::SHARED | reserve).bits() as i32)
        .with_file_offset(FileOffset::from_arc(file.clone(), 0))
        .with_hugetlbfs(host.huge_pages)
        .build()
        .map_err(|e| too_little(&e))?;
    // SAFETY: the range is exactly the mapping that `region` owns, and DONTDUMP changes nothing but core dumps, where guest memory has
    // no place.
    unsafe { madvise(region.as_ptr().cast(), region.size(), Advice::LinuxDontDump) }
        .map_err(|e| Error::Host(format!("memory: madvise: {e}")))?;
    let region = GuestRegionMmap::new(region, GuestAddress(slot.start))
        .ok_or_else(|| Error::Host("memory: a region wraps around the address space".into()))?;
    Ok(Mapping { slot, region: Arc::new(region), file })
}

/// Refuses memory that the host does not have, rather than let the kernel kill something later.
fn check_available(memory_bytes: u64) -> Result<(), Error> {
    let Some(available) = available_bytes() else { return Ok(()) };
    if memory_bytes > available {
        return Err(Error::Host(format!(
            "memory: the VM wants {} MiB and the host has {} MiB available; give it less, or allow overcommitment",
            memory_bytes >> 20,
            available >> 20
        )));
    }
    Ok(())
}

fn is_zero(page: &Page) -> bool {
    *page == Page::ZERO
}

fn available_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

impl GuestMemory for Memory {
    fn regions(&self) -> Vec<RegionInfo> {
        layout::regions(self.mappings.iter().map(|m| m.slot.bytes).sum())
    }

    // Through the memfd, not the mapping: reading a page that nobody ever touched allocates it in a mapping of shared memory, and
    // does not in a read. Half of a big VM may be such pages.
    fn read(&self, region: u32, first_page: u64, out: &mut [Page]) -> Result<(), VmError> {
        let (mapping, mut offset) = self.range(region, first_page, out.len())?;
        for run in out.chunks_mut(READ_PAGES) {
            let bytes = run.len() * PAGE_SIZE;
            let mut vectors: Vec<_> = run.iter_mut().map(|page| IoSliceMut::new(&mut page.0)).collect();
            let mut left = &mut vectors[..];
            let mut done = 0;
            while done < bytes {
                let n = match preadv(&mapping.file, left, offset + done as u64) {
                    Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
                    Ok(n) => Ok(n),
                    Err(rustix::io::Errno::INTR) => Ok(0),
                    Err(e) => Err(io::Error::from(e)),
                }
                .map_err(|e| VmError::new("reading guest memory", e))?;
                IoSliceMut::advance_slices(&mut left, n);
                done += n;
            }
            offset += bytes as u64;
        }
        Ok(())
    }

    fn write(&self, region: u32, first_page: u64, pages: &[Page]) -> Result<(), VmError> {
        let (mapping, offset) = self.range(region, first_page, pages.len())?;
        let whole = mapping.region.get_mmap();
        let target = whole
            .get_slice(offset as usize, pages.len() * PAGE_SIZE)
            .map_err(|e| VmError::new("writing guest memory", e))?;
        let mut index = 0;
        // Runs of zero pages give their memory back instead of taking some.
        for run in pages.chunk_by(|a, b| !self.huge_pages && is_zero(a) == is_zero(b)) {
            let start = index * PAGE_SIZE;
            index += run.len();
            if !self.huge_pages && is_zero(&run[0]) {
                let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                fallocate(&mapping.file, punch, offset + start as u64, (run.len() * PAGE_SIZE) as u64)
                    .map_err(|e| VmError::new("zeroing guest memory", e))?;
                continue;
            }
            for (i, page) in run.iter().enumerate() {
                let slice = target
                    .subslice(start + i * PAGE_SIZE, PAGE_SIZE)
                    .map_err(|e| VmError::new("writing guest memory", e))?;
                slice.copy_from(&page.0);
            }
        }
        Ok(())
    }
}
