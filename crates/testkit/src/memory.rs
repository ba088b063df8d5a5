//! Guest memory in a plain vector, and comparison of any two guest memories.

use std::sync::{Mutex, MutexGuard, PoisonError};

use pagewarp_codec::{PAGE_SIZE, Page};
use pagewarp_engine::vm::{GuestMemory, RegionInfo, VmError};

use crate::rng::mix;

/// Pages compared or hashed at a time.
const CHUNK_PAGES: u64 = 64;

/// Memory that nobody but its callers writes: no mapping, no kernel.
#[derive(Debug)]
pub struct PageStore {
    regions: Vec<(RegionInfo, Mutex<Vec<Page>>)>,
}

impl PageStore {
    /// Zeroed memory of these regions.
    pub fn new(regions: &[RegionInfo]) -> PageStore {
        let zeroed = |info: &RegionInfo| (info.clone(), Mutex::new(vec![Page::ZERO; info.pages as usize]));
        PageStore { regions: regions.iter().map(zeroed).collect() }
    }

    /// The pages of one region, locked.
    fn pages(&self, region: u32) -> Result<MutexGuard<'_, Vec<Page>>, VmError> {
        let found = self.regions.iter().find(|(info, _)| info.id == region);
        let (_, pages) =
            found.ok_or_else(|| VmError::new("guest memory", format!("there is no region {region}")))?;
        Ok(pages.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Checks that `count` pages from `first_page` on lie inside a region of `pages` pages, and says where they start.
pub(crate) fn check_range(region: u32, pages: u64, first_page: u64, count: usize) -> Result<usize, VmError> {
    let end = first_page.checked_add(count as u64).filter(|&end| end <= pages);
    end.map(|_| first_page as usize).ok_or_else(|| {
        let reason =
            format!("{count} pages from page {first_page} on do not lie in region {region} of {pages} pages");
        VmError::new("guest memory", reason)
    })
}

impl GuestMemory for PageStore {
    fn regions(&self) -> Vec<RegionInfo> {
        self.regions.iter().map(|(info, _)| info.clone()).collect()
    }

    fn read(&self, region: u32, first_page: u64, out: &mut [Page]) -> Result<(), VmError> {
        let pages = self.pages(region)?;
        let first = check_range(region, pages.len() as u64, first_page, out.len())?;
        out.copy_from_slice(&pages[first..first + out.len()]);
        Ok(())
    }

    fn write(&self, region: u32, first_page: u64, new: &[Page]) -> Result<(), VmError> {
        let mut pages = self.pages(region)?;
        let first = check_range(region, pages.len() as u64, first_page, new.len())?;
        pages[first..first + new.len()].copy_from_slice(new);
        Ok(())
    }
}

/// A place where two memories differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Difference {
    /// They do not have the same regions.
    Regions {
        /// Of the first memory.
        left: Vec<RegionInfo>,
        /// Of the second one.
        right: Vec<RegionInfo>,
    },
    /// The first byte that differs.
    Byte {
        /// Where: region.
        region: u32,
        /// Where: page of the region.
        page: u64,
        /// Where: byte of the page.
        offset: usize,
        /// In the first memory.
        left: u8,
        /// In the second one.
        right: u8,
    },
}

/// Compares two memories byte by byte. Both VMs have to be paused.
pub fn first_difference(
    left: &dyn GuestMemory,
    right: &dyn GuestMemory,
) -> Result<Option<Difference>, VmError> {
    if left.regions() != right.regions() {
        return Ok(Some(Difference::Regions { left: left.regions(), right: right.regions() }));
    }
    let mut theirs = vec![Page::ZERO; CHUNK_PAGES as usize];
    let mut found = None;
    for_each_chunk(left, |region, first_page, ours| {
        let theirs = &mut theirs[..ours.len()];
        right.read(region, first_page, theirs)?;
        if found.is_none() && ours != theirs {
            found = ours.iter().zip(theirs.iter()).zip(first_page..).find_map(|((a, b), page)| {
                let offset = (0..PAGE_SIZE).find(|&i| a.0[i] != b.0[i])?;
                Some(Difference::Byte { region, page, offset, left: a.0[offset], right: b.0[offset] })
            });
        }
        Ok(())
    })?;
    Ok(found)
}

/// A 64-bit digest of all bytes and their places. The VM has to be paused.
///
/// For comparing two memories of this process that cannot be looked at at the same time; not the digest of the wire protocol.
pub fn memory_digest(memory: &dyn GuestMemory) -> Result<u64, VmError> {
    let mut digest = 0;
    for_each_chunk(memory, |region, first_page, pages| {
        digest = mix(digest ^ u64::from(region)) ^ mix(first_page) ^ pagewarp_codec::plain_hash(pages);
        Ok(())
    })?;
    Ok(digest)
}

fn for_each_chunk(
    memory: &dyn GuestMemory,
    mut visit: impl FnMut(u32, u64, &[Page]) -> Result<(), VmError>,
) -> Result<(), VmError> {
    let mut chunk = vec![Page::ZERO; CHUNK_PAGES as usize];
    for region in memory.regions() {
        for first_page in (0..region.pages).step_by(CHUNK_PAGES as usize) {
            let count = (region.pages - first_page).min(CHUNK_PAGES) as usize;
            memory.read(region.id, first_page, &mut chunk[..count])?;
            visit(region.id, first_page, &chunk[..count])?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{PageKind, mixed_image, page};
    use crate::rng::SplitMix64;

    fn store() -> PageStore {
        let region = |id, pages| RegionInfo { id, name: format!("r{id}"), pages };
        PageStore::new(&[region(0, 100), region(7, 3)])
    }

    #[test]
    fn reads_back_what_was_written() {
        let store = store();
        let image = mixed_image(50, 1);
        store.write(0, 50, &image).unwrap();
        let mut back = vec![Page::ZERO; 51];
        store.read(0, 49, &mut back).unwrap();
        assert_eq!(back[0], Page::ZERO);
        assert_eq!(&back[1..], &image[..]);
    }

    #[test]
    fn refuses_what_lies_outside() {
        let store = store();
        let pages = [Page::ZERO; 2];
        assert!(store.write(1, 0, &pages).unwrap_err().to_string().contains("no region 1"));
        assert!(store.write(7, 2, &pages).is_err());
        assert!(store.write(7, u64::MAX, &pages).is_err());
        assert!(store.write(7, 3, &[]).is_ok());
        assert!(store.read(0, 99, &mut pages.clone()).is_err());
    }

    #[test]
    fn finds_the_first_difference() {
        let (a, b) = (store(), store());
        for memory in [&a, &b] {
            memory.write(0, 0, &mixed_image(100, 4)).unwrap();
        }
        assert_eq!(first_difference(&a, &b).unwrap(), None);
        assert_eq!(memory_digest(&a).unwrap(), memory_digest(&b).unwrap());

        let mut page = Page::ZERO;
        page.0[17] = 9;
        b.write(7, 1, &[page]).unwrap();
        let expected = Difference::Byte { region: 7, page: 1, offset: 17, left: 0, right: 9 };
        assert_eq!(first_difference(&a, &b).unwrap(), Some(expected));
        assert_ne!(memory_digest(&a).unwrap(), memory_digest(&b).unwrap());

        let smaller = PageStore::new(&[RegionInfo { id: 0, name: "r0".into(), pages: 100 }]);
        assert!(matches!(first_difference(&a, &smaller).unwrap(), Some(Difference::Regions { .. })));
    }

    #[test]
    fn the_digest_sees_pages_that_change_places() {
        let (a, b) = (store(), store());
        let page = page(PageKind::Text, &mut SplitMix64::new(8));
        a.write(0, 3, &[page]).unwrap();
        b.write(0, 4, &[page]).unwrap();
        assert_ne!(memory_digest(&a).unwrap(), memory_digest(&b).unwrap());
    }
}
