//! The page: the unit of everything.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes in a page. Huge-page backing changes nothing here.
pub const PAGE_SIZE: usize = 4096;

/// One page of guest memory, copied out: nobody writes to it any more.
///
/// Aligned to its size so that vector loads never straddle a cache line.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, Immutable, IntoBytes, KnownLayout)]
#[repr(C, align(4096))]
pub struct Page(pub [u8; PAGE_SIZE]);

impl Page {
    /// A page of zeros.
    pub const ZERO: Page = Page([0; PAGE_SIZE]);
}

impl Default for Page {
    fn default() -> Self {
        Page::ZERO
    }
}

impl std::fmt::Debug for Page {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let set = self.0.iter().filter(|&&b| b != 0).count();
        write!(f, "Page({set} non-zero bytes)")
    }
}
