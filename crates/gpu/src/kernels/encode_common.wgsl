// What the encoder's kernels share. It is put before the source of each of them.
//
// Buffers hold little-endian words. A page is 4096 bytes = 1024 words = 256 quads (a vec4<u32>, 16 bytes) = 64 lines of 64 bytes.
// One workgroup of 32 threads works on one page. Nothing depends on how these threads are grouped in hardware.

const THREADS: u32 = 32u;
const PAGE_WORDS: u32 = 1024u;
const PAGE_QUADS: u32 = 256u;
const PAGE_BYTES: u32 = 4096u;

// Tags of docs/page-encodings.md, section 2.
const ZERO: u32 = 0u;
const SAME: u32 = 1u;
const RAW: u32 = 2u;
const SPARSE: u32 = 3u;
const SPARSE_XOR: u32 = 4u;
const LZ4: u32 = 5u;
const LZ4_XOR: u32 = 6u;

struct Params {
    // Pages in the batch.
    pages: u32,
    // Bit t is set if tag t may be used.
    allowed: u32,
    unused_0: u32,
    unused_1: u32,
}

struct PageResult {
    tag: u32,
    // Bytes of payload.
    len: u32,
    // Whether to try LZ4: 0 no, 1 of the page, 2 of the page XOR its base.
    lz4: u32,
    // Where the page's bytes begin in the payload of the batch.
    offset: u32,
}

// Bits 7, 15, 23, 31 say which bytes of the word are not zero.
fn nonzero_marks(word: u32) -> u32 {
    return (((word & 0x7f7f7f7fu) + 0x7f7f7f7fu) | word) & 0x80808080u;
}
