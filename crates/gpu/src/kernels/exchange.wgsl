// Moves pages between a batch and one chunk of the history. One workgroup per move.
//
// Layout
//   binding 0  run: which moves concern this chunk
//   binding 1  pages: page p at quad 256 p
//   binding 2  bases: page p's base at quad 256 p
//   binding 3  moves: x = page | flags, y = slot, counted from the beginning of the chunk
//   binding 4  chunk: slot s at quad 256 s
//
// A move may load the slot into `bases`, store the page into the slot, or both: load first. No slot has two moves in a batch.

const LOAD: u32 = 0x80000000u;
const STORE: u32 = 0x40000000u;
const PAGE: u32 = 0x3fffffffu;
const THREADS: u32 = 32u;
const PAGE_QUADS: u32 = 256u;

struct Run {
    // The moves first .. first + count concern this chunk.
    first: u32,
    count: u32,
    // Flags that count in this pass.
    mask: u32,
    unused_0: u32,
}

@group(0) @binding(0) var<uniform> run: Run;
@group(0) @binding(1) var<storage, read> pages: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read_write> bases: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> moves: array<vec2<u32>>;
@group(0) @binding(4) var<storage, read_write> chunk: array<vec4<u32>>;

@compute @workgroup_size(32)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    if group.x >= run.count || run.first + group.x >= arrayLength(&moves) {
        return;
    }
    let entry = moves[run.first + group.x];
    let flags = entry.x & run.mask;
    let page = (entry.x & PAGE) * PAGE_QUADS;
    let slot = entry.y * PAGE_QUADS;
    if page >= arrayLength(&pages) || page >= arrayLength(&bases) || slot >= arrayLength(&chunk) {
        return;
    }
    for (var quad = thread; quad < PAGE_QUADS; quad += THREADS) {
        if (flags & LOAD) == 0u {
            if (flags & STORE) != 0u {
                chunk[slot + quad] = pages[page + quad];
            }
            continue;
        }
        let old = chunk[slot + quad];
        bases[page + quad] = old;
        // Most of a page that is sent again has not changed: that spares the store.
        if (flags & STORE) != 0u {
            let latest = pages[page + quad];
            if any(old != latest) {
                chunk[slot + quad] = latest;
            }
        }
    }
}
