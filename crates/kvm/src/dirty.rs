//! The dirty log: KVM's, and the pages that a migration gave back.
//!
//! With manual protection (Linux 5.2 and newer) KVM keeps a page dirty until it is cleared explicitly, in ranges of 64 pages; and it starts
//! (Linux 5.7 and newer) with all pages dirty and none write-protected, so that starting costs nothing and a page is first protected when it
//! is first cleared. Without it, fetching clears.
//!
//! KVM logs what vCPUs write. Nothing else writes here: see [`Memory`](crate::memory::Memory).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;
use pagewarp_codec::PAGE_SIZE;
use pagewarp_engine::bitmap::PageBitmap;
use pagewarp_engine::vm::{DirtyLog, VmError};

use crate::error::Error;
use crate::ioctl;
use crate::layout;
use crate::vm::Vm;

pub(crate) struct KvmDirtyLog {
    vm: Arc<Vm>,
    given_back: Arc<Mutex<Vec<PageBitmap>>>,
}

impl KvmDirtyLog {
    pub(crate) fn new(vm: Arc<Vm>) -> KvmDirtyLog {
        let given_back = vm.given_back.clone();
        KvmDirtyLog { vm, given_back }
    }

    fn given_back(&self) -> MutexGuard<'_, Vec<PageBitmap>> {
        self.given_back.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pages of `region`. Ids are the indices of the regions.
    fn pages(&self, region: u32) -> Result<u64, VmError> {
        layout::slots(self.vm.memory_bytes())
            .get(region as usize)
            .map(|slot| slot.bytes / PAGE_SIZE as u64)
            .ok_or_else(|| {
                VmError::new("dirty log", format!("there is no region {region}; this is a bug of the caller"))
            })
    }
}

impl DirtyLog for KvmDirtyLog {
    fn start(&mut self) -> Result<(), VmError> {
        ioctl::set_memory(&self.vm.fd, &self.vm.memory, KVM_MEM_LOG_DIRTY_PAGES).map_err(in_log)
    }

    fn fetch(&mut self, region: u32, dirty: &mut PageBitmap) -> Result<(), VmError> {
        let pages = self.pages(region)?;
        let words = self
            .vm
            .fd
            .get_dirty_log(region, pages as usize * PAGE_SIZE)
            .map_err(|e| in_log(Error::kvm("KVM_GET_DIRTY_LOG")(e)))?;
        dirty.union_words(&words);
        let mut given_back = self.given_back();
        dirty.union(&given_back[region as usize]);
        if self.vm.manual_protect == 0 {
            given_back[region as usize].clear();
        }
        Ok(())
    }

    fn clear(&mut self, region: u32, first_page: u64, words: &[u64]) -> Result<(), VmError> {
        if self.vm.manual_protect == 0 || words.is_empty() {
            return Ok(());
        }
        let pages = self.pages(region)?;
        let within = first_page.is_multiple_of(64)
            && first_page < pages
            && words.len() as u64 <= (pages - first_page).div_ceil(64);
        if !within {
            let reason = format!(
                "there are no {} words from page {first_page} on; this is a bug of the caller",
                words.len()
            );
            return Err(VmError::new("dirty log", reason));
        }
        // Ranges end at a multiple of 64 pages or where the slot does.
        let count = (words.len() as u64 * 64).min(pages - first_page);
        ioctl::clear_dirty_log(&self.vm.fd, region, first_page, count as u32, words).map_err(in_log)?;
        let mut given_back = self.given_back();
        let bitmap = &mut given_back[region as usize];
        if !bitmap.is_empty() {
            for page in (0..count).filter(|page| words[(page / 64) as usize] >> (page % 64) & 1 != 0) {
                bitmap.remove(first_page + page);
            }
        }
        Ok(())
    }

    fn give_back(&mut self, region: u32, dirty: &PageBitmap) {
        if let Some(bitmap) = self.given_back().get_mut(region as usize)
            && bitmap.pages() == dirty.pages()
        {
            bitmap.union(dirty);
        }
    }

    fn stop(&mut self) -> Result<(), VmError> {
        ioctl::set_memory(&self.vm.fd, &self.vm.memory, 0).map_err(in_log)
    }
}

fn in_log(error: Error) -> VmError {
    error.in_vm("dirty log")
}
