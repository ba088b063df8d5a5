// Decodes the pages that are no LZ4 blocks: zero, same, raw, sparse, sparse-xor. One workgroup of 32 threads per page.
//
// No bytes whatever make it read or write outside its buffers: what does not decode gets the status BAD. Threads take
// neighbouring words, so that a page is read and written in whole lines of 128 bytes.

// Lines in a page.
const LINES = 64u;
// The shortest sparse payload: a line mask, a byte mask and a byte.
const SPARSE_MIN = 17u;

// The byte mask of each line; 0 for lines that the line mask does not have.
var<workgroup> masks: array<vec2<u32>, LINES>;

@compute @workgroup_size(32)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let page = group.x;
    let room = min(min(arrayLength(&entries), arrayLength(&status)), arrayLength(&pages) / PAGE_WORDS);
    if page >= min(params.pages, room) {
        return;
    }
    let entry = entries[page];
    if entry.tag == LZ4 || entry.tag == LZ4_XOR {
        return;
    }
    if !is_well_formed(entry) {
        if thread == 0u {
            atomicMax(&status[page], BAD);
        }
        return;
    }
    var good = true;
    switch entry.tag {
        case ZERO: {
            fill(page, thread);
        }
        case SAME: {
            copy_base(page, thread, entry.base);
        }
        case RAW: {
            copy_payload(page, thread, entry.offset);
        }
        default: {
            good = expand_sparse(page, thread, entry);
        }
    }
    if !good {
        atomicMax(&status[page], BAD);
    } else if thread == 0u {
        atomicMax(&status[page], DECODED);
    }
}

// Whether tag, length, place and base go together and are inside the buffers.
fn is_well_formed(entry: Entry) -> bool {
    let bytes = min(arrayLength(&payload), 0x3fffffffu) * 4u;
    if entry.len > bytes || entry.offset > bytes - entry.len {
        return false;
    }
    let has_base = entry.base < arrayLength(&bases) / PAGE_WORDS;
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

fn fill(page: u32, thread: u32) {
    for (var i = thread; i < PAGE_WORDS; i += THREADS) {
        pages[page * PAGE_WORDS + i] = 0u;
    }
}

fn copy_base(page: u32, thread: u32, base: u32) {
    for (var i = thread; i < PAGE_WORDS; i += THREADS) {
        pages[page * PAGE_WORDS + i] = bases[base * PAGE_WORDS + i];
    }
}

fn copy_payload(page: u32, thread: u32, offset: u32) {
    for (var i = thread; i < PAGE_WORDS; i += THREADS) {
        pages[page * PAGE_WORDS + i] = payload_bytes(offset + 4u * i);
    }
}

// Writes the page of a sparse payload. Returns false in some thread if the payload is malformed; then the page is anything.
//
// Whatever the masks say, at most 8 + 512 + 4096 bytes are looked at, each of them inside the buffer.
fn expand_sparse(page: u32, thread: u32, entry: Entry) -> bool {
    let lines = vec2(payload_bytes(entry.offset), payload_bytes(entry.offset + 4u));
    let low_lines = countOneBits(lines.x);
    let below = (1u << thread) - 1u;
    // Each thread reads the masks of two lines: those of its bit in both halves of the line mask.
    let low_rank = countOneBits(lines.x & below);
    let high_rank = low_lines + countOneBits(lines.y & below);
    let low = byte_mask(entry.offset, low_rank, (lines.x >> thread) & 1u);
    let high = byte_mask(entry.offset, high_rank, (lines.y >> thread) & 1u);
    masks[thread] = low;
    masks[thread + THREADS] = high;
    var good = any(lines != vec2(0u));
    good = good && (any(low != vec2(0u)) || ((lines.x >> thread) & 1u) == 0u);
    good = good && (any(high != vec2(0u)) || ((lines.y >> thread) & 1u) == 0u);
    workgroupBarrier();

    // In each step the threads take the 32 words of two lines, 16 threads each.
    let is_second = thread >= 16u;
    let is_high = (thread & 8u) != 0u;
    let shift = 4u * (thread & 7u);
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
        let i = step * THREADS + thread;
        if is_delta {
            word ^= bases[entry.base * PAGE_WORDS + i];
        }
        pages[page * PAGE_WORDS + i] = word;
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
