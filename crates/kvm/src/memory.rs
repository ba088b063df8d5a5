//! Guest memory: a memfd for each region, mapped and shared with KVM.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use pagewarp_codec::{PAGE_SIZE, Page};
use pagewarp_engine::available;
use pagewarp_engine::vm::{GuestMemory, RegionInfo, VmError};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use rustix::io::{preadv, pwritev};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, VolatileMemory};

use crate::config::HostConfig;
use crate::error::Error;
use crate::layout::{self, Slot};

/// The most pages that are read or written at once: the kernel's limit on vectors.
const MAX_VECTORS: usize = 1024;

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
    /// One bit for each page that is known to take up memory of the host; all are, where huge pages were reserved.
    ///
    /// Reading a page that nobody ever touched allocates it if it is read through a mapping of shared memory, and does not if it is read
    /// from the file. Half of a big VM may be such pages, so only pages known here are copied from the mapping, which is several times
    /// faster. A bit may lag behind the truth, which costs time and no more.
    allocated: Box<[AtomicU64]>,
}

impl Mapping {
    /// Where it is in this process.
    pub(crate) fn address(&self) -> *mut u8 {
        self.region.get_mmap().as_ptr()
    }

    fn is_allocated(&self, page: usize) -> bool {
        self.allocated[page / 64].load(Ordering::Relaxed) >> (page % 64) & 1 != 0
    }

    fn set_allocated(&self, page: usize, value: bool) {
        let bit = 1 << (page % 64);
        match value {
            true => self.allocated[page / 64].fetch_or(bit, Ordering::Relaxed),
            false => self.allocated[page / 64].fetch_and(!bit, Ordering::Relaxed),
        };
    }

    /// Reads at most [`MAX_VECTORS`] pages, which exist.
    fn read(&self, first: usize, run: &mut [Page]) -> io::Result<()> {
        if !(first..first + run.len()).all(|page| self.is_allocated(page)) {
            self.find_allocated(first, run.len())?;
        }
        let mut page = first;
        let mut rest = run;
        while !rest.is_empty() {
            let allocated = self.is_allocated(page);
            let same =
                (1..rest.len()).find(|&i| self.is_allocated(page + i) != allocated).unwrap_or(rest.len());
            let (part, after) = rest.split_at_mut(same);
            match allocated {
                true => self.copy_out(page, part)?,
                false => self.read_file(page, part)?,
            }
            page += same;
            rest = after;
        }
        Ok(())
    }

    /// Asks the kernel which pages are in memory. Those that are not may be swapped out or never touched.
    fn find_allocated(&self, first: usize, pages: usize) -> io::Result<()> {
        let mut resident = [0u8; MAX_VECTORS];
        assert!(pages <= MAX_VECTORS && (first + pages) * PAGE_SIZE <= self.slot.bytes as usize);
        // SAFETY: the range is within the mapping that `region` owns, by the assertion, and the kernel writes one byte for each of
        // `pages` pages, which `resident` has room for, by the assertion as well.
        let result = unsafe {
            let start = self.address().add(first * PAGE_SIZE);
            libc::mincore(start.cast(), pages * PAGE_SIZE, resident.as_mut_ptr())
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        (0..pages).filter(|&i| resident[i] & 1 != 0).for_each(|i| self.set_allocated(first + i, true));
        Ok(())
    }

    fn copy_out(&self, first: usize, run: &mut [Page]) -> io::Result<()> {
        let whole = self.region.get_mmap();
        for (i, page) in run.iter_mut().enumerate() {
            whole
                .get_slice((first + i) * PAGE_SIZE, PAGE_SIZE)
                .map_err(io::Error::other)?
                .copy_to(&mut page.0);
        }
        Ok(())
    }

    fn read_file(&self, first: usize, run: &mut [Page]) -> io::Result<()> {
        let offset = (first * PAGE_SIZE) as u64;
        let bytes = run.len() * PAGE_SIZE;
        let mut vectors: Vec<_> = run.iter_mut().map(|page| IoSliceMut::new(&mut page.0)).collect();
        let mut left = &mut vectors[..];
        let mut done = 0;
        while done < bytes {
            match preadv(&self.file, left, offset + done as u64) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    IoSliceMut::advance_slices(&mut left, n);
                    done += n;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Writes at most [`MAX_VECTORS`] pages, which exist. Where `give_back` is set, pages that become zero give their memory back to the
    /// host instead of taking some.
    fn write(&self, first: usize, pages: &[Page], give_back: bool) -> io::Result<()> {
        /// How a page is best written.
        #[derive(PartialEq)]
        enum Way {
            Punch,
            Copy,
            File,
        }
        let way = |index: usize| match self.is_allocated(first + index) {
            _ if give_back && is_zero(&pages[index]) => Way::Punch,
            true => Way::Copy,
            // The kernel allocates such a page without clearing it first and without a fault: half the time of a copy.
            false => Way::File,
        };
        let mut at = 0;
        while at < pages.len() {
            let run_way = way(at);
            let run = (at + 1..pages.len()).find(|&i| way(i) != run_way).unwrap_or(pages.len()) - at;
            let (run_first, run_pages) = (first + at, &pages[at..at + run]);
            match run_way {
                Way::Punch => self.punch(run_first, run)?,
                Way::Copy => self.copy_in(run_first, run_pages)?,
                Way::File => self.write_file(run_first, run_pages)?,
            }
            at += run;
        }
        Ok(())
    }

    fn copy_in(&self, first: usize, pages: &[Page]) -> io::Result<()> {
        let whole = self.region.get_mmap();
        for (i, page) in pages.iter().enumerate() {
            whole.get_slice((first + i) * PAGE_SIZE, PAGE_SIZE).map_err(io::Error::other)?.copy_from(&page.0);
        }
        Ok(())
    }

    fn write_file(&self, first: usize, pages: &[Page]) -> io::Result<()> {
        let offset = (first * PAGE_SIZE) as u64;
        let bytes = pages.len() * PAGE_SIZE;
        let mut vectors: Vec<_> = pages.iter().map(|page| IoSlice::new(&page.0)).collect();
        let mut left = &mut vectors[..];
        let mut done = 0;
        while done < bytes {
            match pwritev(&self.file, left, offset + done as u64) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    IoSlice::advance_slices(&mut left, n);
                    done += n;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        (first..first + pages.len()).for_each(|page| self.set_allocated(page, true));
        Ok(())
    }

    /// Makes pages zero and gives their memory back to the host.
    fn punch(&self, first: usize, pages: usize) -> io::Result<()> {
        let (offset, bytes) = ((first * PAGE_SIZE) as u64, (pages * PAGE_SIZE) as u64);
        fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, bytes)?;
        (first..first + pages).for_each(|page| self.set_allocated(page, false));
        Ok(())
    }
}

/// Refuses memory that is not there, rather than let the kernel kill something later.
fn check_available(memory_bytes: u64) -> Result<(), Error> {
    match available::limits().into_iter().find(|&(_, left)| memory_bytes > left) {
        None => Ok(()),
        Some((who, left)) => Err(Error::Host(format!(
            "memory: the VM wants {} MiB and {who} has {} MiB available; give it less, or allow overcommitment (--overcommit)",
            memory_bytes >> 20,
            left >> 20
        ))),
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
    let words = (slot.bytes as usize / PAGE_SIZE).div_ceil(64);
    let known = if host.huge_pages { u64::MAX } else { 0 };
    let allocated = (0..words).map(|_| AtomicU64::new(known)).collect();
    Ok(Mapping { slot, region: Arc::new(region), file, allocated })
}

fn is_zero(page: &Page) -> bool {
    *page == Page::ZERO
}

impl GuestMemory for Memory {
    fn regions(&self) -> Vec<RegionInfo> {
        layout::regions(self.mappings.iter().map(|m| m.slot.bytes).sum())
    }

    fn read(&self, region: u32, first_page: u64, out: &mut [Page]) -> Result<(), VmError> {
        let (mapping, _) = self.range(region, first_page, out.len())?;
        let mut first = first_page as usize;
        for run in out.chunks_mut(MAX_VECTORS) {
            mapping.read(first, run).map_err(|e| VmError::new("reading guest memory", e))?;
            first += run.len();
        }
        Ok(())
    }

    fn write(&self, region: u32, first_page: u64, pages: &[Page]) -> Result<(), VmError> {
        let (mapping, _) = self.range(region, first_page, pages.len())?;
        let mut first = first_page as usize;
        for run in pages.chunks(MAX_VECTORS) {
            mapping
                .write(first, run, !self.huge_pages)
                .map_err(|e| VmError::new("writing guest memory", e))?;
            first += run.len();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_memory_is_in_no_core_dump() {
        for huge_pages in [false, true] {
            let host = HostConfig { overcommit: true, huge_pages, ..HostConfig::default() };
            // Most hosts have no huge pages to give.
            let Ok(memory) = Memory::new(8 << 20, &host) else { continue };
            let address = memory.mappings()[0].address() as usize;
            for address in [address, address + (8 << 20) - 1] {
                let flags = pagewarp_testkit::mapping::mapping_flags(address);
                assert!(flags.iter().any(|flag| flag == "dd"), "{flags:?}");
            }
        }
        assert!(Memory::new(8 << 20, &HostConfig { overcommit: true, ..HostConfig::default() }).is_ok());
    }
}
