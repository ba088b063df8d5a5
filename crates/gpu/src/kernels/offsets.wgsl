// Finds where each page's bytes begin in the payload, and writes the table that goes back to the CPU. One workgroup for the batch.
//
// Layout
//   binding 0  params
//   binding 3  results: read is len, written is offset
//   binding 6  payload: words that hold bytes of more than one page, or the end, become 0 for `pack`
//   binding 7  table: tag << 16 | len of each page, then the length of the payload
//
// A prefix sum, and not a cursor that pages advance: the same batch gives the same payload every time.

const GROUP: u32 = 256u;

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(3) var<storage, read_write> results: array<PageResult>;
@group(0) @binding(6) var<storage, read_write> payload: array<u32>;
@group(0) @binding(7) var<storage, read_write> table: array<u32>;

// Sums of the lengths of each thread's pages; two rows, of which each round reads one and writes the other.
var<workgroup> sums: array<u32, 512>;

@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) thread: u32) {
    let each = (params.pages + GROUP - 1u) / GROUP;
    let first = min(thread * each, params.pages);
    let end = min(first + each, params.pages);
    var sum = 0u;
    for (var page = first; page < end; page++) {
        sum += min(results[page].len, PAGE_BYTES);
    }
    sums[thread] = sum;
    var row = 0u;
    for (var reach = 1u; reach < GROUP; reach *= 2u) {
        workgroupBarrier();
        var reached = sums[row + thread];
        if thread >= reach {
            reached += sums[row + thread - reach];
        }
        row = GROUP - row;
        sums[row + thread] = reached;
    }
    workgroupBarrier();
    var offset = sums[row + thread] - sum;
    for (var page = first; page < end; page++) {
        let len = min(results[page].len, PAGE_BYTES);
        results[page].offset = offset;
        table[page] = (results[page].tag << 16u) | len;
        if offset % 4u != 0u {
            payload[offset / 4u] = 0u;
        }
        offset += len;
        if offset % 4u != 0u {
            payload[offset / 4u] = 0u;
        }
    }
    if thread == GROUP - 1u {
        table[params.pages] = sums[row + thread];
    }
}
