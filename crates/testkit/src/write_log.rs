//! A dirty log of ordinary memory, without a hypervisor: userfaultfd in asynchronous write-protect mode and the `PAGEMAP_SCAN` ioctl.
//!
//! The kernel notes a write to a protected page by taking the protection off, without telling anybody; a scan finds the pages that are
//! not protected any more. Needs Linux 6.7 (include/uapi/linux/userfaultfd.h and fs.h are the source of the numbers here).
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::raw::c_void;

use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, opcode};
use rustix::mm::UserfaultfdFlags;

/// `UFFD_USER_MODE_ONLY`: lets a process without privileges open one. Write faults are resolved by the kernel, so nothing is lost by it.
const USER_MODE_ONLY: u32 = 1;
const UFFD_API: u64 = 0xaa;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const REGISTER_MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;
const SCAN_WP_MATCHING: u64 = 1 << 0;
const SCAN_CHECK_WPASYNC: u64 = 1 << 1;
const PAGE_IS_WRITTEN: u64 = 1 << 1;

/// Ranges that one scan returns at most.
const SCAN_RANGES: usize = 512;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct WriteProtect {
    start: u64,
    len: u64,
    mode: u64,
}

#[repr(C)]
struct Unregister {
    start: u64,
    len: u64,
}

#[repr(C)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

#[repr(C)]
struct PagemapScan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// An ioctl whose argument is a struct that the kernel reads and writes, and whose return value counts.
struct Exchange<'a, T> {
    opcode: Opcode,
    argument: &'a mut T,
}

// SAFETY: `as_ptr` gives a pointer to a whole, exclusively borrowed `T`, and the constructor sites below pair each opcode, which encodes the
// size of `T`, with the `repr(C)` struct that the kernel defines for it. `output_from_ptr` does not use the pointer.
unsafe impl<T> Ioctl for Exchange<'_, T> {
    type Output = usize;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::from_mut(self.argument).cast()
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> rustix::io::Result<usize> {
        // The kernel returns a negative number only with an error, which the caller has dealt with.
        Ok(out.try_into().unwrap_or(0))
    }
}

/// Watches address ranges of this process for writes.
///
/// The ranges stay valid or not as they like: protecting and scanning addresses that nobody maps is an error of the kernel, and neither
/// changes any byte of memory.
#[derive(Debug)]
pub(crate) struct WriteLog {
    uffd: OwnedFd,
    pagemap: File,
    watched: Vec<Range<u64>>,
}

impl WriteLog {
    /// A log that watches nothing yet.
    pub(crate) fn open() -> io::Result<WriteLog> {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::from_bits_retain(USER_MODE_ONLY);
        // SAFETY: the descriptor is used for asynchronous write protection only, in which the kernel resolves every fault by itself: no
        // thread is ever held, and no memory changes.
        let uffd = unsafe { rustix::mm::userfaultfd(flags) }?;
        let mut api = Api { api: UFFD_API, features: FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC, ioctls: 0 };
        let opcode = opcode::read_write::<Api>(0xaa, 0x3f);
        // SAFETY: UFFDIO_API takes a `struct uffdio_api`, which `Api` is, and changes the descriptor only.
        unsafe { rustix::ioctl::ioctl(&uffd, Exchange { opcode, argument: &mut api }) }?;
        Ok(WriteLog { uffd, pagemap: File::open("/proc/self/pagemap")?, watched: Vec::new() })
    }

    /// Watches a range of whole pages from now on: none of them counts as written.
    pub(crate) fn watch(&mut self, range: Range<u64>) -> io::Result<()> {
        let (start, len) = (range.start, range.end - range.start);
        let mut register = Register { start, len, mode: REGISTER_MODE_WP, ioctls: 0 };
        let opcode = opcode::read_write::<Register>(0xaa, 0x00);
        // SAFETY: UFFDIO_REGISTER takes a `struct uffdio_register`, which `Register` is. It changes how faults are resolved, no memory.
        unsafe { rustix::ioctl::ioctl(&self.uffd, Exchange { opcode, argument: &mut register }) }?;
        self.watched.push(range);
        let mut protect = WriteProtect { start, len, mode: WRITEPROTECT_MODE_WP };
        let opcode = opcode::read_write::<WriteProtect>(0xaa, 0x06);
        // SAFETY: UFFDIO_WRITEPROTECT takes a `struct uffdio_writeprotect`, which `WriteProtect` is. Writes to the range still succeed,
        // because the kernel takes the protection off by itself (FEATURE_WP_ASYNC was granted, or `open` had failed).
        unsafe { rustix::ioctl::ioctl(&self.uffd, Exchange { opcode, argument: &mut protect }) }?;
        Ok(())
    }

    /// Watches nothing any more.
    pub(crate) fn unwatch_all(&mut self) -> io::Result<()> {
        while let Some(range) = self.watched.pop() {
            let mut unregister = Unregister { start: range.start, len: range.end - range.start };
            let opcode = opcode::read::<Unregister>(0xaa, 0x01);
            // SAFETY: UFFDIO_UNREGISTER takes a `struct uffdio_range`, which `Unregister` is, and undoes UFFDIO_REGISTER.
            unsafe { rustix::ioctl::ioctl(&self.uffd, Exchange { opcode, argument: &mut unregister }) }?;
        }
        Ok(())
    }

    /// Calls `found` with each range of written pages within `range`.
    pub(crate) fn written(&self, range: Range<u64>, found: impl FnMut(Range<u64>)) -> io::Result<()> {
        self.scan(range, SCAN_CHECK_WPASYNC, found)
    }

    /// Makes all pages of `range` unwritten. A write at any later time counts again.
    pub(crate) fn clear(&self, range: Range<u64>) -> io::Result<()> {
        self.scan(range, SCAN_CHECK_WPASYNC | SCAN_WP_MATCHING, |_| {})
    }

    fn scan(&self, range: Range<u64>, flags: u64, mut found: impl FnMut(Range<u64>)) -> io::Result<()> {
        const EMPTY: PageRegion = PageRegion { start: 0, end: 0, categories: 0 };
        let mut regions = [EMPTY; SCAN_RANGES];
        let mut start = range.start;
        while start < range.end {
            let mut scan = PagemapScan {
                size: size_of::<PagemapScan>() as u64,
                flags,
                start,
                end: range.end,
                walk_end: 0,
                vec: regions.as_mut_ptr() as u64,
                vec_len: SCAN_RANGES as u64,
                max_pages: 0,
                category_inverted: 0,
                category_mask: PAGE_IS_WRITTEN,
                category_anyof_mask: 0,
                return_mask: PAGE_IS_WRITTEN,
            };
            let opcode = opcode::read_write::<PagemapScan>(b'f', 16);
            // SAFETY: PAGEMAP_SCAN takes a `struct pm_scan_arg`, which `PagemapScan` is. `vec` points to `vec_len` regions that live in this
            // function and that nothing else refers to during the call; the kernel writes no more than those.
            let count =
                unsafe { rustix::ioctl::ioctl(&self.pagemap, Exchange { opcode, argument: &mut scan }) }?;
            regions.iter().take(count).for_each(|region| found(region.start..region.end));
            if scan.walk_end <= start {
                return Err(io::Error::other(format!("PAGEMAP_SCAN made no progress at {start:#x}")));
            }
            start = scan.walk_end;
        }
        Ok(())
    }
}
