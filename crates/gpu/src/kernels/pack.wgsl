// Copies each page's bytes to their place in the payload. One workgroup per page.
//
// Layout
//   binding 0  params
//   binding 1  pages: page p at word 1024 p; the bytes of `raw` pages
//   binding 3  results
//   binding 4  scratch: the bytes of other pages, page p's from word 1024 p on
//   binding 6  payload: words shared between pages are 0 before
//
// Pages begin at any byte, so that a word of the payload is put together from two words of the page, and the words at both ends may
// have bytes of other pages.

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> pages: array<u32>;
@group(0) @binding(3) var<storage, read> results: array<PageResult>;
@group(0) @binding(4) var<storage, read> scratch: array<u32>;
@group(0) @binding(6) var<storage, read_write> payload: array<atomic<u32>>;

// Word `index` of the page's `len` bytes; what is not in them is 0. An index of -1 wraps and is outside.
fn word_at(page: u32, raw: bool, len: u32, index: u32) -> u32 {
    if index >= (len + 3u) / 4u {
        return 0u;
    }
    let at = page * PAGE_WORDS + index;
    var word = 0u;
    if raw {
        word = pages[at];
    } else {
        word = scratch[at];
    }
    let left = len - 4u * index;
    return select(word & ((1u << (8u * (left % 4u))) - 1u), word, left >= 4u);
}

@compute @workgroup_size(32)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let page = group.x;
    if page >= params.pages {
        return;
    }
    let result = results[page];
    let len = min(result.len, PAGE_BYTES);
    if len == 0u {
        return;
    }
    let raw = result.tag == RAW;
    let shift = 8u * (result.offset % 4u);
    let first = result.offset / 4u;
    let end = (result.offset + len + 3u) / 4u;
    for (var at = first + thread; at < end; at += THREADS) {
        if at >= arrayLength(&payload) {
            return;
        }
        let index = at - first;
        var word = word_at(page, raw, len, index) << shift;
        if shift != 0u {
            word |= word_at(page, raw, len, index - 1u) >> (32u - shift);
        }
        if 4u * at >= result.offset && 4u * at + 4u <= result.offset + len {
            atomicStore(&payload[at], word);
        } else {
            atomicOr(&payload[at], word);
        }
    }
}
