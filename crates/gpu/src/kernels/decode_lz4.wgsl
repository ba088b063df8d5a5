// Pages of LZ4 blocks. Workgroup p decodes page p, and touches nothing if its tag is not an LZ4 one.
//
// All threads read the tokens of the block together, and know the same at every step; then they copy together, first the literals
// of a sequence, then its match. A word of the page is written by one thread only, the one with the number word % 32: words at the edges
// of two copies need no order among threads. There is one barrier a sequence, before its match: by then all that a match can refer
// to has been written. A match that overlaps itself repeats its first `offset` bytes, all of them written before.
//
// The payload may be anything. It is read within the bounds of the entry, which must lie within the buffer; the page is
// written within its bounds; every round of a loop consumes a byte of the payload or writes a byte of the page.
//
// Workgroup memory: 4,096 bytes, the page.

const MIN_MATCH: u32 = 4u;
// A half of the token that is continued by more bytes.
const LONG: u32 = 15u;

// Atomic because threads read words of which another one writes bytes that they do not use.
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

// The first word from the one of byte `at` on that is this thread's.
fn own_word(thread: u32, at: u32) -> u32 {
    return at / 4u + ((thread - at / 4u) % THREADS);
}

// Puts the bytes begin..end of the page, as far as they are in this word; `bits` holds the whole word.
fn put_word(word: u32, bits: u32, begin: u32, end: u32) {
    let skip = max(begin, word * 4u) - word * 4u;
    let stop = min(end - word * 4u, 4u);
    let mask = (0xffffffffu << (skip * 8u)) & (0xffffffffu >> (32u - stop * 8u));
    atomicStore(&page[word], (atomicLoad(&page[word]) & ~mask) | (bits & mask));
}

// Copies `count` literals from `source` in the payload to `at` in the page.
fn copy_literals(thread: u32, source: u32, at: u32, count: u32) {
    for (var word = own_word(thread, at); word * 4u < at + count; word += THREADS) {
        // The first bytes of the first word may belong to something else.
        let lead = at - min(at, word * 4u);
        let bits = payload_read4(source + word * 4u + lead - at) << (lead * 8u);
        put_word(word, bits, at, at + count);
    }
}

// Copies `count` bytes that lie `offset` bytes back.
fn copy_match(thread: u32, at: u32, offset: u32, count: u32) {
    let source = at - offset;
    for (var word = own_word(thread, at); word * 4u < at + count; word += THREADS) {
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

// Decodes the payload bytes begin..end to `page`; whether they are one page. Called by all threads with the same values.
fn decode(thread: u32, begin: u32, end: u32) -> bool {
    var at = begin;
    var out = 0u;
    var good = false;
    while at < end {
        let token = payload_byte(at);
        let literals = read_length(token >> 4u, at + 1u, end);
        if literals.cut || literals.value > end - literals.next || literals.value > PAGE_BYTES - out {
            break;
        }
        copy_literals(thread, literals.next, out, literals.value);
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
        copy_match(thread, out, offset, count);
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
        && (entry.tag == LZ4 || entry.base < arrayLength(&bases) / PAGE_WORDS);
}

@compute @workgroup_size(32)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let p = group.x;
    if p >= params.pages {
        return;
    }
    let entry = entries[p];
    if entry.tag != LZ4 && entry.tag != LZ4_XOR {
        return;
    }
    var good = in_bounds(entry);
    if good {
        good = decode(thread, entry.offset, entry.offset + entry.len);
    }
    // The last sequence has no match, so that no barrier came after its literals.
    workgroupBarrier();
    if good {
        for (var word = thread; word < PAGE_WORDS; word += THREADS) {
            var bits = atomicLoad(&page[word]);
            if entry.tag == LZ4_XOR {
                bits ^= bases[entry.base * PAGE_WORDS + word];
            }
            pages[p * PAGE_WORDS + word] = bits;
        }
    }
    if thread == 0u {
        atomicStore(&status[p], select(BAD, DECODED, good));
    }
}
