//! The digest that both hosts compute of a page to compare it after the hand-over.

use pagewarp_codec::Page;
use xxhash_rust::xxh3::xxh3_64;

/// xxh3-64 of the page.
pub(crate) fn page_digest(page: &Page) -> u64 {
    xxh3_64(&page.0)
}
