//! What a synthetic guest writes: every byte of its memory follows from its configuration and the number of writes done.

use pagewarp_codec::Page;
use serde::{Deserialize, Serialize};

use crate::image::{PageKind, mixed_page, page};
use crate::rng::{SplitMix64, mix};

/// Bytes at the start of a page that every write changes.
const HEADER: usize = 32;

/// What a synthetic guest is and does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SyntheticConfig {
    /// The VM's name.
    pub name: String,
    /// Sizes of its regions in pages. Region `i` has id `i`.
    pub region_pages: Vec<u64>,
    /// Everything random follows from it.
    pub seed: u64,
    /// Threads that write, 1 to 64.
    pub writers: u32,
    /// Writes per second of all writers together; 0 is a guest that only sits there.
    pub writes_per_s: u64,
    /// Pages that are ever written, spread evenly over all regions, at least one per writer.
    pub working_set_pages: u64,
    /// Of 1000 writes so many replace a whole page; the others change a counter, a timestamp and a checksum: about 16 bytes.
    pub whole_page_permille: u32,
}

impl Default for SyntheticConfig {
    /// 64 MiB in two regions, two writers, 2000 writes per second over 2000 pages, one in ten a whole page.
    fn default() -> SyntheticConfig {
        SyntheticConfig {
            name: "synthetic".into(),
            region_pages: vec![10_001, 6_383],
            seed: 1,
            writers: 2,
            writes_per_s: 2000,
            working_set_pages: 2000,
            whole_page_permille: 100,
        }
    }
}

impl SyntheticConfig {
    /// Pages of all regions, or why this is no configuration.
    pub(crate) fn check(&self) -> Result<u64, String> {
        if self.name.len() > 64 || self.region_pages.is_empty() || self.region_pages.len() > 64 {
            return Err(format!("a name of {} bytes, {} regions", self.name.len(), self.region_pages.len()));
        }
        let total = self
            .region_pages
            .iter()
            .try_fold(0u64, |sum, &pages| sum.checked_add(pages).filter(|_| pages > 0));
        let total =
            total.filter(|&total| total <= 1 << 40).ok_or("a region without pages, or too many pages")?;
        if !(1..=64).contains(&self.writers) {
            return Err(format!("{} writers, expected 1 to 64", self.writers));
        }
        if self.working_set_pages < u64::from(self.writers) || self.working_set_pages > total {
            let (pages, writers) = (self.working_set_pages, self.writers);
            return Err(format!(
                "a working set of {pages} pages for {writers} writers and {total} pages of memory"
            ));
        }
        Ok(total)
    }

    /// The region and page of page `number`, counted through all regions.
    pub(crate) fn locate(&self, mut number: u64) -> (u32, u64) {
        for (id, &pages) in self.region_pages.iter().enumerate() {
            if number < pages {
                return (id as u32, number);
            }
            number -= pages;
        }
        panic!("the memory ends {number} pages before that page")
    }

    /// What page `number` holds before any write.
    pub(crate) fn initial(&self, number: u64) -> Page {
        mixed_page(number, self.seed)
    }
}

/// The n-th write of a writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PlannedWrite {
    /// Which page of the writer's share of the working set.
    pub(crate) slot: u64,
    /// Whether it replaces the page.
    pub(crate) whole: bool,
}

/// One writer's share of the work. A page of the working set is written by one writer only.
#[derive(Clone, Debug)]
pub(crate) struct Share {
    writer: u32,
    seed: u64,
    /// Its pages, counted through all regions.
    pages: Vec<u64>,
    whole_page_permille: u32,
}

impl Share {
    /// The share of writer `writer` in a configuration that was checked.
    pub(crate) fn new(config: &SyntheticConfig, writer: u32) -> Share {
        let total: u64 = config.region_pages.iter().sum();
        let place = |index: u64| {
            (u128::from(index) * u128::from(total) / u128::from(config.working_set_pages)) as u64
        };
        let pages = (u64::from(writer)..config.working_set_pages)
            .step_by(config.writers as usize)
            .map(place)
            .collect();
        let seed = mix(config.seed ^ mix(u64::from(writer) + 1));
        Share { writer, seed, pages, whole_page_permille: config.whole_page_permille }
    }

    /// Which page a slot is, counted through all regions.
    pub(crate) fn page(&self, slot: u64) -> u64 {
        self.pages[slot as usize]
    }

    /// The n-th write. Half of all writes go to an eighth of the pages.
    pub(crate) fn plan(&self, n: u64) -> PlannedWrite {
        let mut rng = SplitMix64::new(self.seed ^ mix(n));
        let slots = self.pages.len() as u64;
        let slots = if rng.below(2) == 0 { slots.div_ceil(8) } else { slots };
        PlannedWrite { slot: rng.below(slots), whole: rng.below(1000) < u64::from(self.whole_page_permille) }
    }

    /// What every write puts at the start of its page: who, the number of the write, a timestamp, a checksum.
    pub(crate) fn header(&self, n: u64) -> [u8; HEADER] {
        let words = [
            0x7061_6765_0000_0000 | u64::from(self.writer),
            n,
            1_700_000_000_000 + n,
            mix(self.seed ^ mix(n)),
        ];
        let mut header = [0; HEADER];
        for (bytes, word) in header.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        header
    }

    /// The page that the n-th write leaves if it replaces the whole page.
    pub(crate) fn whole(&self, n: u64) -> Page {
        let mut rng = SplitMix64::new(self.seed ^ mix(!n));
        let kind = [PageKind::Heap, PageKind::Text, PageKind::Floats, PageKind::Sparse][rng.index(4)];
        let mut page = page(kind, &mut rng);
        page.0[..HEADER].copy_from_slice(&self.header(n));
        page
    }

    /// The pages after the first `writes` writes: (page number, content), written ones only.
    pub(crate) fn expected<'a>(
        &'a self,
        config: &'a SyntheticConfig,
        writes: u64,
    ) -> impl Iterator<Item = (u64, Page)> + 'a {
        let mut last = vec![None; self.pages.len()];
        for n in 0..writes {
            let write = self.plan(n);
            let entry: &mut Option<(u64, Option<u64>)> = &mut last[write.slot as usize];
            let whole = if write.whole { Some(n) } else { entry.and_then(|(_, whole)| whole) };
            *entry = Some((n, whole));
        }
        self.pages.iter().zip(last).filter_map(|(&number, last)| {
            let (n, whole) = last?;
            let mut page = whole.map_or_else(|| config.initial(number), |whole| self.whole(whole));
            page.0[..HEADER].copy_from_slice(&self.header(n));
            Some((number, page))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn writers_share_the_working_set_without_overlap() {
        let config = SyntheticConfig { writers: 3, working_set_pages: 1000, ..SyntheticConfig::default() };
        let total = config.check().unwrap();
        let shares: Vec<Share> = (0..3).map(|writer| Share::new(&config, writer)).collect();
        let pages: HashSet<u64> = shares.iter().flat_map(|share| share.pages.clone()).collect();
        assert_eq!(pages.len(), 1000);
        assert!(pages.iter().all(|&page| page < total));
        let regions: HashSet<u32> = pages.iter().map(|&page| config.locate(page).0).collect();
        assert_eq!(regions.len(), 2);
        assert_eq!(config.locate(10_000), (0, 10_000));
        assert_eq!(config.locate(10_001), (1, 0));
    }

    #[test]
    fn expectations_follow_the_plan() {
        let config = SyntheticConfig::default();
        let share = Share::new(&config, 1);
        assert_eq!(share.expected(&config, 0).count(), 0);
        let write = share.plan(0);
        let (number, page) = share.expected(&config, 1).next().unwrap();
        assert_eq!(number, share.page(write.slot));
        assert_eq!(page.0[..HEADER], share.header(0));
        let written: Vec<_> = share.expected(&config, 5000).collect();
        assert!(written.len() > 500, "{} pages written", written.len());
        assert_ne!(share.header(7), Share::new(&config, 0).header(7));
    }

    #[test]
    fn nonsense_is_refused() {
        let good = SyntheticConfig::default();
        let bad = [
            SyntheticConfig { region_pages: vec![], ..good.clone() },
            SyntheticConfig { region_pages: vec![5, 0], ..good.clone() },
            SyntheticConfig { region_pages: vec![u64::MAX, 2], ..good.clone() },
            SyntheticConfig { writers: 0, ..good.clone() },
            SyntheticConfig { working_set_pages: 1, ..good.clone() },
            SyntheticConfig { working_set_pages: 1 << 30, ..good.clone() },
            SyntheticConfig { name: "x".repeat(65), ..good },
        ];
        for config in bad {
            assert!(config.check().is_err(), "{config:?}");
        }
    }
}
