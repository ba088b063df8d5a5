//! A bitmap of pages of one region.

/// One bit per page of a region, packed into little-endian 64-bit words: bit `i` of word `w` is page `64 * w + i`.
///
/// This is the layout of KVM's dirty bitmaps. Bits beyond the last page are always clear.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageBitmap {
    pages: u64,
    words: Vec<u64>,
}

impl PageBitmap {
    /// A bitmap of `pages` pages, all clear.
    pub fn new(pages: u64) -> PageBitmap {
        PageBitmap { pages, words: vec![0; pages.div_ceil(64) as usize] }
    }

    /// A bitmap of `pages` pages, all set.
    pub fn full(pages: u64) -> PageBitmap {
        let mut bitmap = PageBitmap { pages, words: vec![u64::MAX; pages.div_ceil(64) as usize] };
        bitmap.trim();
        bitmap
    }

    /// Number of pages, set or clear.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Number of set pages.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// Whether no page is set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&w| w == 0)
    }

    /// Whether `page` is set. Panics if the region has no such page.
    pub fn contains(&self, page: u64) -> bool {
        assert!(page < self.pages);
        self.words[(page / 64) as usize] >> (page % 64) & 1 != 0
    }

    /// Sets `page` and says whether it was clear. Panics if the region has no such page.
    pub fn insert(&mut self, page: u64) -> bool {
        assert!(page < self.pages);
        let word = &mut self.words[(page / 64) as usize];
        let before = *word;
        *word |= 1 << (page % 64);
        *word != before
    }

    /// Clears `page`. Panics if the region has no such page.
    pub fn remove(&mut self, page: u64) {
        assert!(page < self.pages);
        self.words[(page / 64) as usize] &= !(1 << (page % 64));
    }

    /// Clears every page.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Sets every page that `other`, a bitmap of the same size, has set.
    pub fn union(&mut self, other: &PageBitmap) {
        assert_eq!(self.pages, other.pages);
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
        }
    }

    /// ORs words as KVM returns them into the bitmap; bits beyond the last page are dropped.
    pub fn union_words(&mut self, words: &[u64]) {
        for (mine, theirs) in self.words.iter_mut().zip(words) {
            *mine |= theirs;
        }
        self.trim();
    }

    /// The words, for callers that work on 64 pages at a time.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// The set pages in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.words.iter().enumerate().flat_map(|(index, &word)| {
            std::iter::successors((word != 0).then_some(word), |w| Some(w & (w - 1)).filter(|&w| w != 0))
                .map(move |w| index as u64 * 64 + u64::from(w.trailing_zeros()))
        })
    }

    fn trim(&mut self) {
        let used = self.pages % 64;
        if used != 0
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << used) - 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_has_no_bit_beyond_the_last_page() {
        let bitmap = PageBitmap::full(70);
        assert_eq!(bitmap.count(), 70);
        assert_eq!(bitmap.words()[1], 0b11_1111);
        assert_eq!(bitmap.iter().collect::<Vec<_>>(), (0..70).collect::<Vec<_>>());
    }

    #[test]
    fn words_from_the_kernel_are_trimmed() {
        let mut bitmap = PageBitmap::new(65);
        bitmap.union_words(&[0, u64::MAX]);
        assert_eq!(bitmap.iter().collect::<Vec<_>>(), vec![64]);
    }

    #[test]
    fn insert_says_whether_the_page_was_clear() {
        let mut bitmap = PageBitmap::new(3);
        assert!(bitmap.insert(2));
        assert!(!bitmap.insert(2));
        bitmap.remove(2);
        assert!(bitmap.is_empty());
    }
}
