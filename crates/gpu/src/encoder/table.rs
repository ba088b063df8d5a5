//! The small table that comes back for a batch. A faulty device may have written anything: nothing in it is trusted.

use pagewarp_codec::{EncodedBatch, Encoding, EncodingSet, PAGE_SIZE};

/// The shortest sparse payload: one line with one byte.
const SPARSE_MIN: usize = 8 + 8 + 1;

/// Bytes of the table of a batch: one word per page and the length of the payload.
pub(super) fn bytes(pages: usize) -> u64 {
    (pages as u64 + 1) * 4
}

/// Fills in encodings and lengths, and returns the length of the payload.
///
/// # Errors
///
/// What is wrong with the table.
pub(super) fn read(
    table: &[u8],
    pages: usize,
    allowed: EncodingSet,
    has_base: impl Fn(usize) -> bool,
    encoded: &mut EncodedBatch,
) -> Result<usize, String> {
    encoded.clear();
    let (words, _) = table.as_chunks::<4>();
    let mut words = words.iter().map(|&word| u32::from_le_bytes(word));
    let mut sum = 0;
    for (page, word) in words.by_ref().take(pages).enumerate() {
        let (tag, len) = (word >> 16, (word & 0xffff) as usize);
        let encoding = u8::try_from(tag).ok().and_then(Encoding::from_tag);
        let encoding = encoding
            .filter(|&encoding| allowed.contains(encoding) && (has_base(page) || !encoding.needs_base()))
            .ok_or_else(|| format!("it gave page {page} the tag {tag}, which is not allowed for it"))?;
        if !fits(encoding, len) {
            return Err(format!("it gave page {page} {len} bytes of `{encoding}`"));
        }
        encoded.encodings.push(encoding);
        encoded.lens.push(len as u16);
        sum += len;
    }
    match words.next() {
        Some(total) if encoded.lens.len() == pages && total as usize == sum => Ok(sum),
        Some(total) => Err(format!("it gave a payload of {total} bytes for pages of {sum} bytes together")),
        None => Err(format!("it gave a table of {} bytes for {pages} pages", table.len())),
    }
}

/// Whether the payload of a page with this encoding can be so long.
fn fits(encoding: Encoding, len: usize) -> bool {
    match (encoding.fixed_len(), encoding) {
        (Some(fixed), _) => len == fixed,
        (None, Encoding::Sparse | Encoding::SparseXor) => (SPARSE_MIN..PAGE_SIZE).contains(&len),
        (None, _) => (1..PAGE_SIZE).contains(&len),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(entries: &[(u32, u32)], total: u32) -> Vec<u8> {
        let words = entries.iter().map(|&(tag, len)| tag << 16 | len).chain([total]);
        words.flat_map(u32::to_le_bytes).collect()
    }

    fn read_all(table: &[u8], pages: usize, allowed: EncodingSet) -> Result<usize, String> {
        read(table, pages, allowed, |page| page == 1, &mut EncodedBatch::default())
    }

    #[test]
    fn a_sane_table_is_taken() {
        let mut encoded = EncodedBatch { lens: vec![3], payload: vec![1], ..EncodedBatch::default() };
        let bytes = table(&[(2, 4096), (1, 0), (3, 17)], 4113);
        assert_eq!(read(&bytes, 3, EncodingSet::ALL, |page| page == 1, &mut encoded), Ok(4113));
        assert_eq!(encoded.encodings, [Encoding::Raw, Encoding::Same, Encoding::Sparse]);
        assert_eq!((encoded.lens, encoded.payload), (vec![4096, 0, 17], vec![]));
        assert_eq!(read_all(&table(&[], 0), 0, EncodingSet::ALL), Ok(0));
    }

    #[test]
    fn nonsense_is_told_from_a_table() {
        let insane: [(&[(u32, u32)], u32); 10] = [
            (&[(7, 0)], 0),
            (&[(0xffff, 0)], 0),
            (&[(0, 1)], 1),
            (&[(2, 4095)], 4095),
            (&[(3, 16)], 16),
            (&[(3, 4096)], 4096),
            (&[(5, 0)], 0),
            (&[(5, 0xffff)], 0xffff),
            (&[(1, 0)], 0),
            (&[(2, 4096)], 4097),
        ];
        for (entries, total) in insane {
            assert!(read_all(&table(entries, total), 1, EncodingSet::ALL).is_err(), "{entries:?}");
        }
        assert!(read_all(&table(&[(0, 0)], 0), 1, EncodingSet::RAW).is_err(), "not allowed");
        assert!(read_all(&table(&[(0, 0)], 0), 2, EncodingSet::ALL).is_err(), "too short");
        assert!(read_all(&[], 0, EncodingSet::ALL).is_err(), "without a length");
    }
}
