// Pages of LZ4 blocks. Workgroup p decodes page p, and touches nothing if its tag is not an LZ4 one.
//
// All lanes read the tokens of the block together, and know the same at every step; then they copy together, first the literals
// of a sequence, then its match. A word of the page is written by one lane only, the one with the number word % 32: words at the edges
// of two copies need no order among lanes. There is one barrier a sequence, before its match: by then all that a match can refer
// to has been written. A match that overlaps itself repeats its first `offset` bytes, all of them written before.
//
// The payload may be anything. It is read within the bounds of the entry, which must lie within the buffer; the page is
// written within its bounds; every round of a loop consumes a byte of the payload or writes a byte of the page.
//
// Workgroup memory: 4,096 bytes, the page.

struct Params {
    pages: u32,
    pad0: u32,
    pad1: u32,
    pad2: u32,
}

struct Entry {
    tag: u32,
    // Length of the payload and where it starts, in bytes.
    len: u32,
    offset: u32,
    // Index of the base in `bases`, in pages; NO_BASE is beyond any.
    base: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> entries: array<Entry>;
@group(0) @binding(2) var<storage, read> payload: array<u32>;
@group(0) @binding(3) var<storage, read> bases: array<u32>;
// Page p starts at word p * PAGE_WORDS.
@group(0) @binding(4) var<storage, read_write> pages: array<u32>;
@group(0) @binding(5) var<storage, read_write> status: array<u32>;

const LANES: u32 = 32u;
const PAGE_BYTES: u32 = 4096u;
const PAGE_WORDS: u32 = 1024u;

const TAG_LZ4: u32 = 5u;
const TAG_LZ4_XOR: u32 = 6u;
const DECODED: u32 = 1u;
const BAD: u32 = 2u;

const MIN_MATCH: u32 = 4u;
// A half of the token that is continued by more bytes.
const LONG: u32 = 15u;

// Atomic because lanes read words of which another one writes bytes that they do not use.
var<workgroup> page: array<atomic<u32>, PAGE_WORDS>;

fn payload_byte(at: u32) -> u32 {
    return (payload[at / 4u] >> (at % 4u * 8u)) & 0xffu;
}

// The low bytes of two words, shifted down by so many bytes (less than 4).
fn shifted(low: u32, high: u32, bytes: u32) -> u32 {
    // A shift by 32 would be a shift by 0.
    return (low >> (bytes * 8u)) | ((high << 1u) << (31u - bytes * 8u));
}

fn payload_read4(at: u32) -> u32 {
    return shifted(payload[at / 4u], payload[at / 4u + 1u], at % 4u);
}

fn page_byte(at: u32) -> u32 {
    return (atomicLoad(&page[at / 4u]) >> (at % 4u * 8u)) & 0xffu;
}

fn page_read4(at: u32) -> u32 {
    return shifted(atomicLoad(&page[at / 4u]), atomicLoad(&page[min(at / 4u + 1u, PAGE_WORDS - 1u)]), at % 4u);
}

// A length, and where the payload goes on behind it.
struct Length {
    value: u32,
    next: u32,
    // The payload ends within it.
    cut: bool,
}

// The length that starts with a half of a token and may be continued from `at` on.
fn read_length(half: u32, at: u32, end: u32) -> Length {
    var length = Length(half, at, false);
    var more = select(0u, 255u, half == LONG);
    while more == 255u {
        if length.next >= end {
            length.cut = true;
            break;
        }
        more = payload_byte(length.next);
        length.value += more;
        length.next++;
    }
    return length;
}

// The first word from the one of byte `at` on that is this lane's.
fn own_word(lane: u32, at: u32) -> u32 {
    return at / 4u + ((lane - at / 4u) % LANES);
}

// Puts the bytes begin..end of the page, as far as they are in this word; `bits` holds the whole word.
fn put_word(word: u32, bits: u32, begin: u32, end: u32) {
    let skip = max(begin, word * 4u) - word * 4u;
    let stop = min(end - word * 4u, 4u);
    let mask = (0xffffffffu << (skip * 8u)) & (0xffffffffu >> (32u - stop * 8u));
    atomicStore(&page[word], (atomicLoad(&page[word]) & ~mask) | (bits & mask));
}

// Copies `count` literals from `source` in the payload to `at` in the page.
fn copy_literals(lane: u32, source: u32, at: u32, count: u32) {
    for (var word = own_word(lane, at); word * 4u < at + count; word += LANES) {
        // The first bytes of the first word may belong to something else.
        let lead = at - min(at, word * 4u);
        let bits = payload_read4(source + word * 4u + lead - at) << (lead * 8u);
        put_word(word, bits, at, at + count);
    }
}

// Copies `count` bytes that lie `offset` bytes back.
fn copy_match(lane: u32, at: u32, offset: u32, count: u32) {
    let source = at - offset;
    for (var word = own_word(lane, at); word * 4u < at + count; word += LANES) {
        let lead = at - min(at, word * 4u);
        let done = word * 4u + lead - at;
        var bits = 0u;
        if done + 4u <= offset {
            bits = page_read4(source + done) << (lead * 8u);
        } else {
            for (var k = 0u; k < 4u - lead; k++) {
                bits |= page_byte(source + (done + k) % offset) << ((lead + k) * 8u);
            }
        }
        put_word(word, bits, at, at + count);
    }
}

// Decodes the payload bytes begin..end to `page`; whether they are one page. Called by all lanes with the same values.
fn decode(lane: u32, begin: u32, end: u32) -> bool {
    var at = begin;
    var out = 0u;
    var good = false;
    while at < end {
        let token = payload_byte(at);
        let literals = read_length(token >> 4u, at + 1u, end);
        if literals.cut || literals.value > end - literals.next || literals.value > PAGE_BYTES - out {
            break;
        }
        copy_literals(lane, literals.next, out, literals.value);
        at = literals.next + literals.value;
        out += literals.value;
        if at == end {
            good = out == PAGE_BYTES;
            break;
        }
        if end - at < 2u {
            break;
        }
        let offset = payload_byte(at) | (payload_byte(at + 1u) << 8u);
        let matched = read_length(token & 15u, at + 2u, end);
        let count = matched.value + MIN_MATCH;
        if matched.cut || offset == 0u || offset > out || count > PAGE_BYTES - out {
            break;
        }
        workgroupBarrier();
        copy_match(lane, out, offset, count);
        at = matched.next;
        out += count;
    }
    return good;
}

// Whether the payload lies in its buffer and has a length that the encoding allows, and the base, if one is needed, in its.
fn in_bounds(entry: Entry) -> bool {
    let bytes = arrayLength(&payload) * 4u;
    return entry.len != 0u && entry.len < PAGE_BYTES
        && entry.offset <= bytes && entry.len <= bytes - entry.offset
        && (entry.tag == TAG_LZ4 || entry.base < arrayLength(&bases) / PAGE_WORDS);
}

@compute @workgroup_size(32)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let p = group.x;
    if p >= params.pages {
        return;
    }
    let entry = entries[p];
    if entry.tag != TAG_LZ4 && entry.tag != TAG_LZ4_XOR {
        return;
    }
    var good = in_bounds(entry);
    if good {
        good = decode(lane, entry.offset, entry.offset + entry.len);
    }
    // The last sequence has no match, so that no barrier came after its literals.
    workgroupBarrier();
    if good {
        for (var word = lane; word < PAGE_WORDS; word += LANES) {
            var bits = atomicLoad(&page[word]);
            if entry.tag == TAG_LZ4_XOR {
                bits ^= bases[entry.base * PAGE_WORDS + word];
            }
            pages[p * PAGE_WORDS + word] = bits;
        }
    }
    if lane == 0u {
        status[p] = select(BAD, DECODED, good);
    }
}
