//! Why bytes from the peer are rejected.

use thiserror::Error;

use crate::encoding::{Encoding, EncodingSet};
use crate::page::PAGE_SIZE;

/// Why an encoded batch is rejected.
///
/// What the bytes were can be trusted no more: every reason means that the peer, the device or the memory on the way is
/// at fault, or that the two sides disagree about the base.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// More pages than agreed.
    #[error("the batch has {seen} pages, at most {max} were agreed")]
    TooManyPages {
        /// Pages in the batch.
        seen: usize,
        /// The agreed limit.
        max: usize,
    },
    /// The two tables of the batch disagree.
    #[error(
        "the batch has {encodings} encodings but {lens} payload lengths; there must be one of each per page"
    )]
    Tables {
        /// Entries in the table of encodings.
        encodings: usize,
        /// Entries in the table of payload lengths.
        lens: usize,
    },
    /// The payload is not as long as the lengths of the pages say.
    #[error("the payload of the batch is {seen} bytes, the lengths of its pages add up to {expected}")]
    PayloadLength {
        /// Bytes of payload.
        seen: usize,
        /// Sum of the payload lengths of the pages.
        expected: usize,
    },
    /// Too many or too few bases came with the batch.
    #[error("the batch came with {seen} bases, its encodings need {expected}")]
    Bases {
        /// Number of bases.
        seen: usize,
        /// Number of pages whose encoding needs one.
        expected: usize,
    },
    /// One page does not decode.
    #[error("page {page} of the batch: {reason}")]
    Page {
        /// Index of the page in its batch, from 0.
        page: usize,
        /// What is wrong with it.
        reason: PageError,
    },
    /// The batch decodes, to other pages than were encoded.
    #[error(
        "the decoded pages hash to {seen:#018x}, the sender said {expected:#018x}: wrong base, or corrupted on the way"
    )]
    HashMismatch {
        /// Hash of what was decoded.
        seen: u64,
        /// Hash that came with the batch.
        expected: u64,
    },
}

/// Why one encoded page is rejected.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PageError {
    /// The encoding was not agreed on.
    #[error("encoding `{encoding}` was not agreed; agreed: {allowed}")]
    NotAllowed {
        /// The encoding of the page.
        encoding: Encoding,
        /// What was agreed.
        allowed: EncodingSet,
    },
    /// The encoding needs a base and there is none.
    #[error("encoding `{encoding}` needs a base, but there is none")]
    NoBase {
        /// The encoding of the page.
        encoding: Encoding,
    },
    /// The payload has a length that the encoding does not allow.
    #[error("`{encoding}` payload of {seen} bytes, expected {expected}")]
    FixedLength {
        /// The encoding of the page.
        encoding: Encoding,
        /// Bytes of payload.
        seen: usize,
        /// Bytes that the encoding has.
        expected: usize,
    },
    /// The payload is so long that the page had to be `raw`, or empty.
    #[error("`{encoding}` payload of {seen} bytes, expected {min} to {max}", max = PAGE_SIZE - 1)]
    LengthRange {
        /// The encoding of the page.
        encoding: Encoding,
        /// Bytes of payload.
        seen: usize,
        /// The shortest payload.
        min: usize,
    },
    /// The sparse payload is not as long as its masks say.
    #[error("sparse payload of {seen} bytes, its masks say {expected}")]
    SparseLength {
        /// Bytes of payload.
        seen: usize,
        /// Bytes that the masks add up to, as far as they could be read.
        expected: usize,
    },
    /// The line mask of a sparse page is 0.
    #[error("sparse page without a line; it has to be `zero` or `same`")]
    SparseEmpty,
    /// The byte mask of a line is 0 although the line mask has the line.
    #[error("sparse page has line {line}, but no byte in it")]
    SparseEmptyLine {
        /// The line, 0 to 63.
        line: usize,
    },
    /// A data byte of a sparse page is 0.
    #[error("sparse data byte {index} is zero")]
    SparseZeroByte {
        /// Index of the byte in the data.
        index: usize,
    },
    /// The LZ4 block is malformed or would decode to more than a page.
    #[error("malformed LZ4 block: {reason}")]
    Lz4 {
        /// What the LZ4 decoder found.
        reason: String,
    },
    /// The LZ4 block decodes to less than a page.
    #[error("LZ4 block of {seen} plain bytes, expected {PAGE_SIZE}")]
    Lz4Length {
        /// Bytes it decodes to.
        seen: usize,
    },
}

impl PageError {
    /// The error of the batch in which this is page `page`.
    pub fn at(self, page: usize) -> DecodeError {
        DecodeError::Page { page, reason: self }
    }
}

/// Why a payload of LZ4 blocks is rejected. Blocks count from 0.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Lz4BlocksError {
    /// The payload ends before a block or in it.
    #[error("the payload has {seen} bytes left for LZ4 block {block} or its length, expected {expected}")]
    Ends {
        /// The block that ought to be there.
        block: usize,
        /// Bytes that are left.
        seen: usize,
        /// Bytes that the length or the block has.
        expected: usize,
    },
    /// The block is so long that it had to be stored as it is.
    #[error("LZ4 block {block} of {seen} bytes, expected less than its {plain} plain bytes")]
    NotShorter {
        /// The block.
        block: usize,
        /// Bytes of the block.
        seen: usize,
        /// Plain bytes that it is to have.
        plain: usize,
    },
    /// The block is malformed or would decode to more plain bytes than it is to have.
    #[error("malformed LZ4 block {block}: {reason}")]
    Malformed {
        /// The block.
        block: usize,
        /// What the LZ4 decoder found.
        reason: String,
    },
    /// The block decodes to too few plain bytes.
    #[error("LZ4 block {block} of {seen} plain bytes, expected {expected}")]
    PlainLength {
        /// The block.
        block: usize,
        /// Bytes it decodes to.
        seen: usize,
        /// Bytes it is to decode to.
        expected: usize,
    },
    /// There is something after the last block.
    #[error("{seen} bytes after the last LZ4 block")]
    Trailing {
        /// The bytes that are left.
        seen: usize,
    },
}
