//! Digests of all guest memory, by which both ends compare it while the VM is paused. The VM waits for them: all processors work.

use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use pagewarp_codec::Page;
use xxhash_rust::xxh3::xxh3_64;

use crate::error::MigrationError;
use crate::flow::{self, Flow, Stopped, lock};
use crate::metrics::StageMeter;
use crate::vm::{GuestMemory, RegionInfo};

/// Pages that a thread copies and hashes at once: they stay in its cache in between.
const CHUNK: usize = 64;
/// More threads than this wait for the memory, not for a processor.
const MAX_THREADS: usize = 16;
/// Pages of a sample that the speed is measured with, and samples.
const SAMPLE: u64 = 4096;
const SAMPLES: u64 = 3;
/// Pages that differ which are named; of the others only their number is.
const NAMED: usize = 4;

/// xxh3-64 of the page.
fn page_digest(page: &Page) -> u64 {
    xxh3_64(&page.0)
}

/// Digests pages of guest memory, which is copied: it is never looked at where it is.
#[derive(Clone, Copy)]
pub(crate) struct Digester<'a> {
    memory: &'a dyn GuestMemory,
    flow: &'a Flow,
    /// Counts the CPU time.
    meter: &'a StageMeter,
    threads: usize,
}

impl<'a> Digester<'a> {
    /// With as many threads as help.
    pub(crate) fn new(memory: &'a dyn GuestMemory, flow: &'a Flow, meter: &'a StageMeter) -> Digester<'a> {
        let threads = thread::available_parallelism().map_or(1, |cores| cores.get().min(MAX_THREADS));
        Digester { memory, flow, meter, threads }
    }

    /// Digests the pages of a region from `first_page` on, one for each element of `out`.
    pub(crate) fn pages(&self, region: u32, first_page: u64, out: &mut [u64]) -> Result<(), Stopped> {
        let threads = self.threads.min(out.len().div_ceil(CHUNK));
        let chunks = out.chunks_mut(CHUNK).enumerate();
        let chunks = Mutex::new(chunks.map(|(index, out)| (first_page + (index * CHUNK) as u64, out)));
        let work = || -> Result<(), Stopped> {
            let mut pages = vec![Page::ZERO; CHUNK];
            loop {
                // Let go before the work begins.
                let next = lock(&chunks).next();
                let Some((first, out)) = next else { return Ok(()) };
                self.flow.check()?;
                let pages = &mut pages[..out.len()];
                let read = self.memory.read(region, first, pages);
                read.map_err(|error| self.flow.stop_threads(error.into()))?;
                out.iter_mut().zip(&*pages).for_each(|(digest, page)| *digest = page_digest(page));
            }
        };
        thread::scope(|scope| {
            (0..threads).try_for_each(|_| flow::spawn(scope, self.flow, || self.meter.cpu_only(work)))
        })?;
        // A thread that stopped, or panicked, has left something out.
        self.flow.check()
    }

    /// The digests of all pages of each region.
    pub(crate) fn all(&self, regions: &[RegionInfo]) -> Result<Vec<Vec<u64>>, Stopped> {
        regions
            .iter()
            .map(|region| {
                let mut digests = vec![0; region.pages as usize];
                self.pages(region.id, 0, &mut digests)?;
                Ok(digests)
            })
            .collect()
    }

    /// How long all pages of these regions will take, by some that are digested now.
    pub(crate) fn estimate(&self, regions: &[RegionInfo]) -> Result<Duration, Stopped> {
        let Some(largest) = regions.iter().max_by_key(|region| region.pages) else {
            return Ok(Duration::ZERO);
        };
        let sample = largest.pages.min(SAMPLE);
        let mut digests = vec![0; sample as usize];
        let mut times = (0..SAMPLES)
            .map(|index| {
                let began = Instant::now();
                let first = (largest.pages - sample) / (SAMPLES - 1) * index;
                self.pages(largest.id, first, &mut digests)?;
                Ok(began.elapsed())
            })
            .collect::<Result<Vec<_>, Stopped>>()?;
        // Neither the one that was held up nor the one of pages that nobody has ever touched.
        times.sort_unstable();
        let pages: u64 = regions.iter().map(|region| region.pages).sum();
        Ok(times[times.len() / 2].mul_f64(pages as f64 / sample.max(1) as f64))
    }
}

/// Compares the digests of both ends, region by region.
pub(crate) fn compare(
    regions: &[RegionInfo],
    ours: &[Vec<u64>],
    theirs: &[Vec<u64>],
) -> Result<(), MigrationError> {
    let (mut differ, mut pages, mut named) = (0u64, 0u64, Vec::new());
    for (index, region) in regions.iter().enumerate() {
        let (ours, theirs) = (ours.get(index), theirs.get(index));
        let all = region.pages as usize;
        let whole = |digests: Option<&Vec<u64>>| digests.is_some_and(|digests| digests.len() == all);
        let (Some(ours), Some(theirs), true) = (ours, theirs, whole(ours) && whole(theirs)) else {
            return Err(MigrationError::Internal(format!("not all of `{}` was digested", region.name)));
        };
        pages += region.pages;
        let other = ours.iter().zip(theirs).enumerate().filter(|(_, (ours, theirs))| ours != theirs);
        for (page, _) in other {
            differ += 1;
            if named.len() < NAMED {
                named.push(format!("page {page} of `{}`", region.name));
            }
        }
    }
    if differ == 0 {
        return Ok(());
    }
    let more = if differ > named.len() as u64 { " and more" } else { "" };
    Err(MigrationError::Differs(format!("{differ} of {pages} pages: {}{more}", named.join(", "))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::MigrationControl;
    use crate::vm::VmError;

    /// Each page holds its number; one of them cannot be read.
    struct Numbered {
        unreadable: u64,
    }

    impl GuestMemory for Numbered {
        fn regions(&self) -> Vec<RegionInfo> {
            regions()
        }

        fn read(&self, region: u32, first_page: u64, out: &mut [Page]) -> Result<(), VmError> {
            for (page, out) in (first_page..).zip(out) {
                if page == self.unreadable {
                    return Err(VmError::new("read", "no"));
                }
                *out = numbered(region, page);
            }
            Ok(())
        }

        fn write(&self, _: u32, _: u64, _: &[Page]) -> Result<(), VmError> {
            Err(VmError::new("write", "nobody writes"))
        }
    }

    fn numbered(region: u32, page: u64) -> Page {
        let mut content = Page::ZERO;
        content.0[..8].copy_from_slice(&page.to_le_bytes());
        content.0[4092..].copy_from_slice(&region.to_le_bytes());
        content
    }

    fn regions() -> Vec<RegionInfo> {
        let region = |id, pages| RegionInfo { id, name: format!("ram{id}"), pages };
        vec![region(0, 1), region(3, 64), region(7, 1000)]
    }

    #[test]
    fn every_page_has_its_digest() {
        let (flow, meter) = (Flow::new(MigrationControl::new()), StageMeter::new(0));
        let memory = Numbered { unreadable: u64::MAX };
        let digester = Digester::new(&memory, &flow, &meter);
        let digests = digester.all(&regions()).unwrap();
        for (region, digests) in regions().iter().zip(&digests) {
            let expected: Vec<u64> =
                (0..region.pages).map(|page| page_digest(&numbered(region.id, page))).collect();
            assert_eq!(*digests, expected);
        }
        let mut some = [0; 3];
        digester.pages(7, 500, &mut some).unwrap();
        assert_eq!(some, digests[2][500..503]);
        assert!(digester.estimate(&regions()).unwrap() > Duration::ZERO);
        assert_eq!(digester.estimate(&[]), Ok(Duration::ZERO));
    }

    #[test]
    fn a_page_that_cannot_be_read_or_a_cancel_leaves_no_digests() {
        let meter = StageMeter::new(0);
        let flow = Flow::new(MigrationControl::new());
        let memory = Numbered { unreadable: 700 };
        assert_eq!(Digester::new(&memory, &flow, &meter).all(&regions()), Err(Stopped));
        assert!(matches!(flow.take_reason(), MigrationError::Vm(_)));
        let control = MigrationControl::new();
        control.cancel();
        let flow = Flow::new(control);
        assert_eq!(Digester::new(&memory, &flow, &meter).all(&regions()), Err(Stopped));
        assert!(matches!(flow.take_reason(), MigrationError::Cancelled));
    }

    #[test]
    fn what_differs_is_named() {
        let ours: Vec<Vec<u64>> = regions().iter().map(|region| (0..region.pages).collect()).collect();
        compare(&regions(), &ours, &ours).unwrap();
        let mut theirs = ours.clone();
        theirs[0][0] = 9;
        theirs[2][999] = 9;
        let text = compare(&regions(), &ours, &theirs).unwrap_err().to_string();
        assert!(text.contains("2 of 1065 pages: page 0 of `ram0`, page 999 of `ram7`."), "{text}");
        theirs[2].fill(0);
        let text = compare(&regions(), &ours, &theirs).unwrap_err().to_string();
        let expected = "1000 of 1065 pages: page 0 of `ram0`, page 1 of `ram7`, page 2 of `ram7`, page 3 of `ram7` and more";
        assert!(text.contains(expected), "{text}");
        theirs[1].pop();
        assert!(matches!(compare(&regions(), &ours, &theirs), Err(MigrationError::Internal(_))));
    }
}
