// Decodes the pages that are no LZ4 blocks: zero, same, raw, sparse, sparse-xor. One workgroup of 32 lanes per page.
//
// No bytes whatever make it read or write outside its buffers: what does not decode gets the status BAD. Lanes take
// neighbouring words, so that a page is read and written in whole lines of 128 bytes.

struct Params {
    pages: u32,
    pad0: u32,
    pad1: u32,
    pad2: u32,
}

struct Entry {
    // The tag of docs/page-encodings.md.
    tag: u32,
    // Bytes of payload, and where they begin in the payload of the batch.
    len: u32,
    offset: u32,
    // The base, in pages from the beginning of the bases.
    base: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> entries: array<Entry>;
@group(0) @binding(2) var<storage, read> payload: array<u32>;
@group(0) @binding(3) var<storage, read> bases: array<u32>;
@group(0) @binding(4) var<storage, read_write> pages: array<u32>;
// Atomic because a lane that finds a page bad must not be overruled by another.
@group(0) @binding(5) var<storage, read_write> status: array<atomic<u32>>;

const ZERO = 0u;
const SAME = 1u;
const RAW = 2u;
const SPARSE = 3u;
const SPARSE_XOR = 4u;
const LZ4 = 5u;
const LZ4_XOR = 6u;

const DECODED = 1u;
const BAD = 2u;

const PAGE_BYTES = 4096u;
// Words in a page, words that the lanes take in one step, and lines in a page.
const WORDS = 1024u;
const LANES = 32u;
const LINES = 64u;
// The shortest sparse payload: a line mask, a byte mask and a byte.
const SPARSE_MIN = 17u;

// The byte mask of each line; 0 for lines that the line mask does not have.
var<workgroup> masks: array<vec2<u32>, LINES>;

@compute @workgroup_size(32)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let page = group.x;
    let room = min(min(arrayLength(&entries), arrayLength(&status)), arrayLength(&pages) / WORDS);
    if page >= min(params.pages, room) {
        return;
    }
    let entry = entries[page];
    if entry.tag == LZ4 || entry.tag == LZ4_XOR {
        return;
    }
    if !is_well_formed(entry) {
        if lane == 0u {
            atomicMax(&status[page], BAD);
        }
        return;
    }
    var good = true;
    switch entry.tag {
        case ZERO: {
            fill(page, lane);
        }
        case SAME: {
            copy_base(page, lane, entry.base);
        }
        case RAW: {
            copy_payload(page, lane, entry.offset);
        }
        default: {
            good = expand_sparse(page, lane, entry);
        }
    }
    if !good {
        atomicMax(&status[page], BAD);
    } else if lane == 0u {
        atomicMax(&status[page], DECODED);
    }
}

// Whether tag, length, place and base go together and are inside the buffers.
fn is_well_formed(entry: Entry) -> bool {
    let bytes = min(arrayLength(&payload), 0x3fffffffu) * 4u;
    if entry.len > bytes || entry.offset > bytes - entry.len {
        return false;
    }
    let has_base = entry.base < arrayLength(&bases) / WORDS;
    let is_sparse = entry.len >= SPARSE_MIN && entry.len < PAGE_BYTES;
    switch entry.tag {
        case ZERO: {
            return entry.len == 0u;
        }
        case SAME: {
            return entry.len == 0u && has_base;
        }
        case RAW: {
            return entry.len == PAGE_BYTES;
        }
        case SPARSE: {
            return is_sparse;
        }
        case SPARSE_XOR: {
            return is_sparse && has_base;
        }
        default: {
            return false;
        }
    }
}

fn fill(page: u32, lane: u32) {
    for (var i = lane; i < WORDS; i += LANES) {
        pages[page * WORDS + i] = 0u;
    }
}

fn copy_base(page: u32, lane: u32, base: u32) {
    for (var i = lane; i < WORDS; i += LANES) {
        pages[page * WORDS + i] = bases[base * WORDS + i];
    }
}

fn copy_payload(page: u32, lane: u32, offset: u32) {
    for (var i = lane; i < WORDS; i += LANES) {
        pages[page * WORDS + i] = payload_bytes(offset + 4u * i);
    }
}

// Writes the page of a sparse payload. Returns false in some lane if the payload is malformed; then the page is anything.
//
// Whatever the masks say, at most 8 + 512 + 4096 bytes are looked at, each of them inside the buffer.
fn expand_sparse(page: u32, lane: u32, entry: Entry) -> bool {
    let lines = vec2(payload_bytes(entry.offset), payload_bytes(entry.offset + 4u));
    let low_lines = countOneBits(lines.x);
    let below = (1u << lane) - 1u;
    // Each lane reads the masks of two lines: those of its bit in both halves of the line mask.
    let low_rank = countOneBits(lines.x & below);
    let high_rank = low_lines + countOneBits(lines.y & below);
    let low = byte_mask(entry.offset, low_rank, (lines.x >> lane) & 1u);
    let high = byte_mask(entry.offset, high_rank, (lines.y >> lane) & 1u);
    masks[lane] = low;
    masks[lane + LANES] = high;
    var good = any(lines != vec2(0u));
    good = good && (any(low != vec2(0u)) || ((lines.x >> lane) & 1u) == 0u);
    good = good && (any(high != vec2(0u)) || ((lines.y >> lane) & 1u) == 0u);
    workgroupBarrier();

    // In each step the lanes take the 32 words of two lines, 16 lanes each.
    let is_second = lane >= 16u;
    let is_high = (lane & 8u) != 0u;
    let shift = 4u * (lane & 7u);
    let is_delta = entry.tag == SPARSE_XOR;
    var at = entry.offset + 8u + 8u * (low_lines + countOneBits(lines.y));
    for (var step = 0u; step < LINES / 2u; step++) {
        let first = masks[2u * step];
        let second = masks[2u * step + 1u];
        let first_bytes = bits(first);
        let mask = select(first, second, is_second);
        let half = select(mask.x, mask.y, is_high);
        let nibble = (half >> shift) & 15u;
        var word = 0u;
        if nibble != 0u {
            let before = select(0u, first_bytes, is_second)
                + select(0u, countOneBits(mask.x), is_high)
                + countOneBits(half & ((1u << shift) - 1u));
            word = spread(nibble, payload_bytes(at + before));
            good = good && non_zero_bytes(word) == nibble;
        }
        let i = step * LANES + lane;
        if is_delta {
            word ^= bases[entry.base * WORDS + i];
        }
        pages[page * WORDS + i] = word;
        at += first_bytes + bits(second);
    }
    return good && at - entry.offset == entry.len;
}

// The byte mask number `rank` of a sparse payload if `present` is 1, otherwise 0.
fn byte_mask(offset: u32, rank: u32, present: u32) -> vec2<u32> {
    if present == 0u {
        return vec2(0u);
    }
    let at = offset + 8u + 8u * rank;
    return vec2(payload_bytes(at), payload_bytes(at + 4u));
}

fn bits(mask: vec2<u32>) -> u32 {
    return countOneBits(mask.x) + countOneBits(mask.y);
}

// A word whose bytes named by the four bits of `nibble` are the bytes of `packed`, one after another, and whose others are 0.
fn spread(nibble: u32, packed: u32) -> u32 {
    var rest = packed;
    var word = 0u;
    for (var i = 0u; i < 4u; i++) {
        if ((nibble >> i) & 1u) != 0u {
            word |= (rest & 0xffu) << (8u * i);
            rest >>= 8u;
        }
    }
    return word;
}

// Four bits that say which bytes of a word are not zero.
fn non_zero_bytes(word: u32) -> u32 {
    let high = (((word & 0x7f7f7f7fu) + 0x7f7f7f7fu) | word) & 0x80808080u;
    return ((high >> 7u) | (high >> 14u) | (high >> 21u) | (high >> 28u)) & 15u;
}

// The four bytes at byte `at` of the payload of the batch; 0 for those outside the buffer.
fn payload_bytes(at: u32) -> u32 {
    let index = at / 4u;
    let shift = 8u * (at % 4u);
    let low = payload_word(index) >> shift;
    if shift == 0u {
        return low;
    }
    return low | (payload_word(index + 1u) << (32u - shift));
}

fn payload_word(index: u32) -> u32 {
    if index < arrayLength(&payload) {
        return payload[index];
    }
    return 0u;
}
