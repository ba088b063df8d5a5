//! LZ4 blocks of one page.

use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};

use crate::error::PageError;
use crate::page::{PAGE_SIZE, Page};

/// Makes LZ4 blocks; holds what one block after another can reuse.
pub(crate) struct Lz4Encoder {
    table: CompressTable,
    block: Box<[u8]>,
}

impl Lz4Encoder {
    pub(crate) fn new() -> Lz4Encoder {
        let block = vec![0; get_maximum_output_size(PAGE_SIZE)].into_boxed_slice();
        Lz4Encoder { table: CompressTable::small(), block }
    }

    /// Appends the LZ4 block of the page if it is shorter than `limit` bytes; says whether it was.
    pub(crate) fn encode(&mut self, page: &Page, limit: usize, out: &mut Vec<u8>) -> bool {
        match compress_into_with_table(&page.0, &mut self.block, &mut self.table) {
            Ok(len) if len < limit => {
                out.extend_from_slice(&self.block[..len]);
                true
            }
            _ => false,
        }
    }
}

/// Decodes a block that must be one page. After an error `out` holds anything.
pub(crate) fn decode(block: &[u8], out: &mut Page) -> Result<(), PageError> {
    match decompress_into(block, &mut out.0) {
        Ok(PAGE_SIZE) => Ok(()),
        Ok(seen) => Err(PageError::Lz4Length { seen }),
        Err(error) => Err(PageError::Lz4 { reason: error.to_string() }),
    }
}
