// What the decoder's kernels share. It is put before the source of each of them.
//
// Layout of both
//   binding 0  params
//   binding 1  entries: one per page
//   binding 2  payload: the payload of the batch, as bytes in little-endian words; an entry's begins at any byte
//   binding 3  bases: base b at word 1024 b
//   binding 4  pages: page p at word 1024 p
//   binding 5  status: one word per page, 0 before
//
// One workgroup of 32 threads works on one page, and touches nothing if its tag is for the other kernel. The peer's bytes were checked on the
// CPU before they got here; the kernels stay within their buffers for any bytes all the same.

const THREADS: u32 = 32u;
const PAGE_BYTES: u32 = 4096u;
const PAGE_WORDS: u32 = 1024u;

// Tags of docs/page-encodings.md, section 2.
const ZERO: u32 = 0u;
const SAME: u32 = 1u;
const RAW: u32 = 2u;
const SPARSE: u32 = 3u;
const SPARSE_XOR: u32 = 4u;
const LZ4: u32 = 5u;
const LZ4_XOR: u32 = 6u;

// What becomes of a page.
const DECODED: u32 = 1u;
const BAD: u32 = 2u;

struct Params {
    // Pages in the batch.
    pages: u32,
    unused_0: u32,
    unused_1: u32,
    unused_2: u32,
}

struct Entry {
    tag: u32,
    // Bytes of payload, and where they begin in the payload of the batch.
    len: u32,
    offset: u32,
    // The base, in pages from the beginning of the bases; beyond any for a page that needs none.
    base: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> entries: array<Entry>;
@group(0) @binding(2) var<storage, read> payload: array<u32>;
@group(0) @binding(3) var<storage, read> bases: array<u32>;
@group(0) @binding(4) var<storage, read_write> pages: array<u32>;
// Atomic because a thread that finds a page bad must not be overruled by another.
@group(0) @binding(5) var<storage, read_write> status: array<atomic<u32>>;
