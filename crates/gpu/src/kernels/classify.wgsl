// Chooses the encoding of each page, LZ4 aside, and says whether LZ4 is worth an attempt: docs/page-encodings.md, section 8.
// One workgroup per page.
//
// Layout
//   binding 0  params
//   binding 1  pages: page p at quad 256 p
//   binding 2  bases: page p's base at quad 256 p, if it has one
//   binding 3  results: written are tag, len and lz4
//   binding 5  has_base: bit p % 32 of word p / 32 says whether page p has a base

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> pages: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> bases: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read_write> results: array<PageResult>;
@group(0) @binding(5) var<storage, read> has_base: array<u32>;

// A sparse form of at most this many bytes is taken without trying LZ4.
const SPARSE_IS_ENOUGH: u32 = 512u;
const NEVER: u32 = 0xffffffffu;

// What each thread found in its 8 quads, of which number i is in line 8 i + thread / 4. From the lowest byte on: bit i is set if
// quad i of the page has a byte that is not zero; how many bytes are not zero (at most 128); both for the XOR.
var<workgroup> found: array<u32, 32>;

fn allowed(tag: u32) -> bool {
    return ((params.allowed >> tag) & 1u) != 0u;
}

fn marks(quad: vec4<u32>) -> u32 {
    // Each word's marks have 4 bits, at 7, 15, 23 and 31: shifted apart they can be counted together.
    return nonzero_marks(quad.x) | (nonzero_marks(quad.y) >> 1u) | (nonzero_marks(quad.z) >> 2u)
        | (nonzero_marks(quad.w) >> 3u);
}

// The length of a sparse form, NEVER if it does not exist or may not be used.
fn sparse_len(tag: u32, lines: u32, bytes: u32) -> u32 {
    return select(NEVER, 8u + 8u * lines + bytes, allowed(tag) && lines != 0u);
}

fn choose(lines: u32, bytes: u32, based: bool, xor_lines: u32, xor_bytes: u32) -> PageResult {
    if lines == 0u && allowed(ZERO) {
        return PageResult(ZERO, 0u, 0u, 0u);
    }
    let sparse = sparse_len(SPARSE, lines, bytes);
    var sparse_xor = NEVER;
    if based {
        if xor_lines == 0u && allowed(SAME) {
            return PageResult(SAME, 0u, 0u, 0u);
        }
        sparse_xor = sparse_len(SPARSE_XOR, xor_lines, xor_bytes);
        if sparse_xor <= SPARSE_IS_ENOUGH {
            return PageResult(SPARSE_XOR, sparse_xor, 0u, 0u);
        }
    }
    var best = PageResult(RAW, PAGE_BYTES, 0u, 0u);
    if sparse < best.len {
        best.tag = SPARSE;
        best.len = sparse;
    }
    if sparse_xor < best.len {
        best.tag = SPARSE_XOR;
        best.len = sparse_xor;
    }
    if best.len > SPARSE_IS_ENOUGH {
        let both = allowed(LZ4) && allowed(LZ4_XOR);
        let xor = based && select(allowed(LZ4_XOR), 2u * xor_bytes <= bytes, both);
        if xor {
            best.lz4 = 2u;
        } else if allowed(LZ4) {
            best.lz4 = 1u;
        }
    }
    return best;
}

@compute @workgroup_size(32)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let page = group.x;
    if page >= params.pages {
        return;
    }
    let based = ((has_base[page / 32u] >> (page % 32u)) & 1u) != 0u;
    var mine = 0u;
    for (var i = 0u; i < 8u; i++) {
        let at = page * PAGE_QUADS + i * THREADS + thread;
        let quad = pages[at];
        let bytes = countOneBits(marks(quad));
        mine += (bytes << 8u) | (u32(bytes != 0u) << i);
        if based {
            let xor_bytes = countOneBits(marks(quad ^ bases[at]));
            mine += (xor_bytes << 24u) | (u32(xor_bytes != 0u) << (16u + i));
        }
    }
    found[thread] = mine;
    workgroupBarrier();
    if thread != 0u {
        return;
    }
    var lines = 0u;
    var bytes = 0u;
    var xor_lines = 0u;
    var xor_bytes = 0u;
    for (var four = 0u; four < 32u; four += 4u) {
        var any = 0u;
        for (var i = 0u; i < 4u; i++) {
            let theirs = found[four + i];
            any |= theirs;
            bytes += (theirs >> 8u) & 0xffu;
            xor_bytes += theirs >> 24u;
        }
        lines += countOneBits(any & 0xffu);
        xor_lines += countOneBits((any >> 16u) & 0xffu);
    }
    results[page] = choose(lines, bytes, based, xor_lines, xor_bytes);
}
