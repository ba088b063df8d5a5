// Writes the sparse form of those pages that have become `sparse` or `sparse-xor`: docs/page-encodings.md, section 3. One workgroup per page.
//
// Layout
//   binding 0  params
//   binding 1  pages: page p at quad 256 p
//   binding 2  bases: page p's base at quad 256 p; looked at for `sparse-xor` only
//   binding 3  results
//   binding 4  scratch: the payload of page p from word 1024 p on
//
// Thread t writes lines 2 t and 2 t + 1: their masks and their bytes go to places that follow from counts over the threads before.

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> pages: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> bases: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> results: array<PageResult>;
@group(0) @binding(4) var<storage, read_write> scratch: array<u32>;

// The page, or its XOR: word w of thread t's 32 words at 33 t + w, so that threads that read the same w use different banks.
var<workgroup> plain: array<u32, 1056>;
// The payload.
var<workgroup> out: array<atomic<u32>, 1024>;
// Per thread: bytes that are not zero (at most 128), and lines with such a byte from bit 16 on.
var<workgroup> counts: array<u32, 32>;

// Puts a byte into the payload.
fn put(at: u32, byte: u32) {
    if at < PAGE_BYTES {
        atomicOr(&out[at / 4u], byte << (8u * (at % 4u)));
    }
}

// Puts a mask into the payload: mask number `index` is the line mask, the ones after it are byte masks.
fn put_mask(index: u32, mask: vec2<u32>) {
    atomicStore(&out[2u * index], mask.x);
    atomicStore(&out[2u * index + 1u], mask.y);
}

// Bit i says whether byte i of the 8 words from `first` on is not zero.
fn half_mask(first: u32) -> u32 {
    var mask = 0u;
    for (var i = 0u; i < 8u; i++) {
        let marks = nonzero_marks(plain[first + i]) >> 7u;
        mask |= ((marks | (marks >> 7u) | (marks >> 14u) | (marks >> 21u)) & 0xfu) << (4u * i);
    }
    return mask;
}

// Puts the bytes of 8 words that `mask` names, and returns the place after them.
fn put_bytes(first: u32, bytes: u32, start: u32) -> u32 {
    var mask = bytes;
    var at = start;
    while mask != 0u {
        let byte = firstTrailingBit(mask);
        mask &= mask - 1u;
        put(at, (plain[first + byte / 4u] >> (8u * (byte % 4u))) & 0xffu);
        at++;
    }
    return at;
}

@compute @workgroup_size(32)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let page = group.x;
    if page >= params.pages {
        return;
    }
    let result = results[page];
    if result.tag != SPARSE && result.tag != SPARSE_XOR {
        return;
    }
    for (var i = thread; i < PAGE_QUADS; i += THREADS) {
        var quad = pages[page * PAGE_QUADS + i];
        if result.tag == SPARSE_XOR {
            quad ^= bases[page * PAGE_QUADS + i];
        }
        let at = 33u * (i / 8u) + 4u * (i % 8u);
        plain[at] = quad.x;
        plain[at + 1u] = quad.y;
        plain[at + 2u] = quad.z;
        plain[at + 3u] = quad.w;
    }
    for (var word = thread; word < PAGE_WORDS; word += THREADS) {
        atomicStore(&out[word], 0u);
    }
    workgroupBarrier();

    let mine = 33u * thread;
    let even = vec2(half_mask(mine), half_mask(mine + 8u));
    let odd = vec2(half_mask(mine + 16u), half_mask(mine + 24u));
    let bits = countOneBits(even) + countOneBits(odd);
    counts[thread] = bits.x + bits.y + (u32(any(even != vec2(0u))) << 16u) + (u32(any(odd != vec2(0u))) << 17u);
    workgroupBarrier();

    var lines_before = 0u;
    var bytes_before = 0u;
    var line_mask = vec2(0u);
    var lines = 0u;
    for (var i = 0u; i < THREADS; i++) {
        let pair = counts[i] >> 16u;
        if i < thread {
            lines_before += countOneBits(pair);
            bytes_before += counts[i] & 0xffffu;
        }
        line_mask[i / 16u] |= pair << (2u * (i % 16u));
        lines += countOneBits(pair);
    }
    if thread == 0u {
        put_mask(0u, line_mask);
    }
    // Masks are whole words, bytes are not: the words before the first byte belong to masks alone.
    var index = 1u + lines_before;
    if any(even != vec2(0u)) {
        put_mask(index, even);
        index++;
    }
    if any(odd != vec2(0u)) {
        put_mask(index, odd);
    }
    var at = 8u + 8u * lines + bytes_before;
    at = put_bytes(mine, even.x, at);
    at = put_bytes(mine + 8u, even.y, at);
    at = put_bytes(mine + 16u, odd.x, at);
    at = put_bytes(mine + 24u, odd.y, at);
    workgroupBarrier();

    let words = min((result.len + 3u) / 4u, PAGE_WORDS);
    for (var word = thread; word < words; word += THREADS) {
        scratch[page * PAGE_WORDS + word] = atomicLoad(&out[word]);
    }
}
