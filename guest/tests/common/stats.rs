//! What memory images look like to a migration.

use std::fmt;

pub const PAGE: usize = 4096;

/// Statistics of one image.
#[derive(Debug)]
pub struct ImageStats {
    pub pages: usize,
    pub zero_pages: usize,
    /// Bytes of the non-zero pages after LZ4, each page by itself; a page that grows counts as 4096.
    pub lz4_bytes: usize,
}

impl ImageStats {
    pub fn of(image: &[u8]) -> Self {
        let mut stats = ImageStats { pages: image.len() / PAGE, zero_pages: 0, lz4_bytes: 0 };
        let mut out = vec![0; lz4_flex::block::get_maximum_output_size(PAGE)];
        for page in image.chunks_exact(PAGE) {
            if page.iter().all(|&b| b == 0) {
                stats.zero_pages += 1;
            } else {
                let n = lz4_flex::block::compress_into(page, &mut out).expect("the buffer is large enough");
                stats.lz4_bytes += n.min(PAGE);
            }
        }
        stats
    }

    pub fn zero_percent(&self) -> f64 {
        100.0 * self.zero_pages as f64 / self.pages as f64
    }

    /// Size of the non-zero pages over their LZ4 size.
    pub fn lz4_ratio(&self) -> f64 {
        ((self.pages - self.zero_pages) * PAGE) as f64 / self.lz4_bytes as f64
    }
}

impl fmt::Display for ImageStats {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "pages={} zero={:.1}% lz4_ratio={:.2}", self.pages, self.zero_percent(), self.lz4_ratio())
    }
}

/// What changed between two images of the same memory.
#[derive(Debug, Default)]
pub struct ChangeStats {
    pub changed_pages: usize,
    /// Of those, pages that differ in at most 32 bytes.
    pub few_bytes: usize,
    pub changed_bytes: usize,
}

impl ChangeStats {
    pub fn between(before: &[u8], after: &[u8]) -> Self {
        let mut stats = ChangeStats::default();
        for (a, b) in before.chunks_exact(PAGE).zip(after.chunks_exact(PAGE)) {
            let differing = a.iter().zip(b).filter(|(x, y)| x != y).count();
            if differing > 0 {
                stats.changed_pages += 1;
                stats.changed_bytes += differing;
                stats.few_bytes += usize::from(differing <= 32);
            }
        }
        stats
    }

    pub fn few_bytes_percent(&self) -> f64 {
        100.0 * self.few_bytes as f64 / self.changed_pages.max(1) as f64
    }
}

impl fmt::Display for ChangeStats {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let mean = self.changed_bytes as f64 / self.changed_pages.max(1) as f64;
        write!(
            f,
            "changed_pages={} up_to_32_bytes={:.1}% mean_bytes={mean:.0}",
            self.changed_pages,
            self.few_bytes_percent()
        )
    }
}
