// LZ4 blocks of pages. Workgroup p encodes page p, and touches nothing unless results[p].lz4 asks for it.
//
// The block is a standard LZ4 block: the last 5 bytes are literals, the last match starts at least 12 bytes before the end.
// It depends on the page (and base) only: every step is deterministic.
//
// Phases, with a barrier between any two of them:
//
//   load     The page, or the XOR of page and base, goes to workgroup memory.
//   match    32 blocks of 128 positions, 4 positions a thread. A hash table over four bytes holds, for each hash, the first
//            position of the latest block. Candidates of a position: the one before it (runs), the table's entry (same block), the
//            entry as it was before this block. The longest wins; lengths are compared up to CAP bytes.
//   choose   Each thread owns a segment of 128 positions. From right to left it finds the cheapest way, in eighths of a byte, from each
//            position to the end of the segment: a literal or the match. Matches that lose are forgotten. Where neighbours
//            continue each other, lengths beyond CAP follow without comparing. Each position remembers the last
//            position of the way in this segment.
//   extend   All threads follow the way from segment to segment, up to where it enters their own. Matches on it that have been
//            compared up to CAP only get their exact length.
//   measure  The way again, for it has changed: sizes of the sequences of each thread, and prefix sums over them.
//   write    Threads write the sequences whose matches start in their segment, and the literals in their segment, each to its
//            final place. Then the block goes to scratch memory as whole words.
//
// Workgroup memory, 29,472 bytes. A word of padding after every 32, 64 or 128 words keeps threads on different banks when each
// works in a segment of its own.
//
//   page      4,240   the bytes that are encoded
//   records  16,512   for each position: offset (12 bits), length (12), CAPPED (1), last position of the way (7)
//   table     8,320   first the hash table, then costs (two a word), then the block
//   scans       400   one word a thread and scan; the mode

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> pages: array<u32>;
@group(0) @binding(2) var<storage, read> bases: array<u32>;
@group(0) @binding(3) var<storage, read_write> results: array<PageResult>;
// The payload of page p starts at word p * PAGE_WORDS.
@group(0) @binding(4) var<storage, read_write> scratch: array<u32>;

// LZ4: the shortest match, where matches start at last, and where they end at last.
const MIN_MATCH: u32 = 4u;
const LAST_START: u32 = PAGE_BYTES - 12u;
const LAST_END: u32 = PAGE_BYTES - 5u;
// A length that does not fit its half of the token.
const LONG: u32 = 15u;

// Positions that enter the table together.
const BLOCK: u32 = 128u;
const PER_THREAD: u32 = BLOCK / THREADS;
const HASH_BITS: u32 = 11u;
// Candidates are compared over so many bytes.
const CAP: u32 = 16u;

// Positions of a thread's segment.
const SEGMENT: u32 = PAGE_BYTES / THREADS;

// Costs, in eighths of a byte.
const LITERAL_COST: u32 = 8u;
const MATCH_COST: u32 = 24u;
// What a byte behind the segment is expected to cost: a match that covers it is worth so much.
const AHEAD: u32 = 5u;
// The cost at the end of a segment; large enough that no match makes it negative.
const END_COST: u32 = AHEAD * PAGE_BYTES;

const LEN_SHIFT: u32 = 12u;
const FIELD: u32 = 0xfffu;
// The match is perhaps longer.
const CAPPED: u32 = 1u << 24u;
const LAST_SHIFT: u32 = 25u;
const MATCH_MASK: u32 = (1u << LAST_SHIFT) - 1u;

// Comparing may read up to CAP bytes from LAST_START on, and a word more.
var<workgroup> page: array<u32, 1060>;
var<workgroup> records: array<u32, 4128>;
var<workgroup> table: array<atomic<u32>, 2080>;
var<workgroup> first_starts: array<u32, THREADS>;
var<workgroup> last_ends: array<u32, THREADS>;
var<workgroup> sizes: array<u32, THREADS>;
var<workgroup> mode: u32;

// Bytes of the block on their way to one word of `table`.
var<private> out_word: u32;
var<private> out_bits: u32;

// --- load ---

fn page_slot(word: u32) -> u32 {
    return word + word / THREADS;
}

fn load_page(p: u32, thread: u32, xor_base: bool) {
    for (var word = thread; word < PAGE_WORDS; word += THREADS) {
        var bits = pages[p * PAGE_WORDS + word];
        if xor_base {
            bits ^= bases[p * PAGE_WORDS + word];
        }
        page[page_slot(word)] = bits;
    }
}

fn byte_at(at: u32) -> u32 {
    return (page[page_slot(at / 4u)] >> (at % 4u * 8u)) & 0xffu;
}

// The four bytes from `at` on.
fn read4(at: u32) -> u32 {
    let low = page[page_slot(at / 4u)];
    let high = page[page_slot(at / 4u + 1u)];
    let shift = at % 4u * 8u;
    // A shift by 32 would be a shift by 0.
    return (low >> shift) | ((high << 1u) << (31u - shift));
}

// How many bytes from `a` and from `b` on are the same, `a` < `b`, at most `limit` and up to the last place a match may end.
fn common_bytes(a: u32, b: u32, limit: u32) -> u32 {
    let most = min(limit, LAST_END - b);
    var len = 0u;
    while len < most {
        let different = read4(a + len) ^ read4(b + len);
        if different != 0u {
            len += firstTrailingBit(different) / 8u;
            break;
        }
        len += 4u;
    }
    return min(len, most);
}

// --- match ---

fn clear_table(thread: u32, words: u32) {
    for (var word = thread; word < words; word += THREADS) {
        atomicStore(&table[word], 0u);
    }
}

fn hash(bytes: u32) -> u32 {
    return (bytes * 2654435761u) >> (32u - HASH_BITS);
}

// Entries are positions with the place in the block counted from its end: the largest is the first position of the latest block.
// It is its own inverse. An entry never written is a position, too: like all others it is compared before it is believed.
fn entry_of_position(at: u32) -> u32 {
    return at ^ (BLOCK - 1u);
}

fn record_slot(at: u32) -> u32 {
    return at + at / SEGMENT;
}

// The longest match of `at` among the one before and two candidates, as a record; 0 if there is none.
fn best_match(at: u32, bytes: u32, recent: u32, earlier: u32) -> u32 {
    var best = 0u;
    var best_source = at;
    var candidates = vec3(at - 1u, recent, earlier);
    if at == 0u {
        return 0u;
    }
    for (var k = 0u; k < 3u && best < CAP; k++) {
        let source = candidates[k];
        if source < at && read4(source) == bytes {
            let len = common_bytes(source, at, CAP);
            if len > best {
                best = len;
                best_source = source;
            }
        }
    }
    if best < MIN_MATCH {
        return 0u;
    }
    return (at - best_source) | (best << LEN_SHIFT) | select(0u, CAPPED, best == CAP);
}

fn find_matches(thread: u32) {
    for (var block = 0u; block < PAGE_BYTES; block += BLOCK) {
        let first = block + thread * PER_THREAD;
        var bytes: array<u32, PER_THREAD>;
        var earlier: array<u32, PER_THREAD>;
        for (var k = 0u; k < PER_THREAD; k++) {
            bytes[k] = read4(first + k);
            earlier[k] = entry_of_position(atomicLoad(&table[hash(bytes[k])]));
        }
        workgroupBarrier();
        for (var k = 0u; k < PER_THREAD; k++) {
            if first + k <= LAST_START {
                atomicMax(&table[hash(bytes[k])], entry_of_position(first + k));
            }
        }
        workgroupBarrier();
        for (var k = 0u; k < PER_THREAD; k++) {
            let at = first + k;
            var record = 0u;
            if at <= LAST_START {
                let recent = entry_of_position(atomicLoad(&table[hash(bytes[k])]));
                record = best_match(at, bytes[k], recent, earlier[k]);
            }
            records[record_slot(at)] = record;
        }
    }
}

// --- choose ---

fn offset_of(record: u32) -> u32 {
    return record & FIELD;
}

// 0: a literal.
fn len_of(record: u32) -> u32 {
    return (record >> LEN_SHIFT) & FIELD;
}

// Where the way goes on from `at`.
fn next_of(at: u32, record: u32) -> u32 {
    return at + max(1u, len_of(record));
}

fn cost_slot(at: u32) -> u32 {
    return at / 2u + at / SEGMENT;
}

fn cost_at(at: u32, end: u32) -> u32 {
    if at >= end {
        return END_COST - AHEAD * (at - end);
    }
    return (atomicLoad(&table[cost_slot(at)]) >> (at % 2u * 16u)) & 0xffffu;
}

// Bytes that continue a length.
fn extension_bytes(len: u32) -> u32 {
    return select(0u, 1u + (len - LONG) / 255u, len >= LONG);
}

// The last position in the segment of the way that goes on from `at` to `next`, relative to the segment.
fn last_of(at: u32, next: u32, end: u32) -> u32 {
    if next >= end {
        return at % SEGMENT;
    }
    return records[record_slot(next)] >> LAST_SHIFT;
}

fn choose_matches(thread: u32) {
    let begin = thread * SEGMENT;
    let end = begin + SEGMENT;
    var right = 0u;
    var right_cost = END_COST;
    var odd_cost = 0u;
    for (var at = end; at > begin;) {
        at--;
        var record = records[record_slot(at)];
        if (record & CAPPED) != 0u && offset_of(record) == offset_of(right) && len_of(right) >= CAP {
            record = right + (1u << LEN_SHIFT);
        }
        right = record;
        var cost = right_cost + LITERAL_COST;
        if len_of(record) != 0u {
            let next = next_of(at, record);
            let extension = extension_bytes(len_of(record) - MIN_MATCH) * LITERAL_COST;
            let match_cost = MATCH_COST + extension + cost_at(next, end);
            if match_cost <= cost {
                cost = match_cost;
            } else {
                record = 0u;
            }
        }
        let last = last_of(at, next_of(at, record), end);
        records[record_slot(at)] = record | (last << LAST_SHIFT);
        right_cost = cost;
        if at % 2u == 1u {
            odd_cost = cost;
        } else {
            atomicStore(&table[cost_slot(at)], cost | (odd_cost << 16u));
        }
    }
}

// --- extend ---

// Where the way enters this thread's segment; behind the segment if a match covers it as a whole.
fn find_entry(thread: u32) -> u32 {
    var at = 0u;
    for (var segment = 0u; segment < thread; segment++) {
        let begin = segment * SEGMENT;
        if at < begin + SEGMENT {
            let last = begin + (records[record_slot(at)] >> LAST_SHIFT);
            at = next_of(last, records[record_slot(last)]);
        }
    }
    return at;
}

fn extend_matches(thread: u32, entry: u32) {
    let begin = thread * SEGMENT;
    let end = begin + SEGMENT;
    var changed = false;
    for (var at = entry; at < end;) {
        let record = records[record_slot(at)];
        var len = len_of(record);
        if len != 0u && (record & CAPPED) != 0u {
            len += common_bytes(at + len - offset_of(record), at + len, PAGE_BYTES);
            records[record_slot(at)] = offset_of(record) | (len << LEN_SHIFT);
            changed = true;
        }
        at += max(1u, len);
    }
    if changed {
        for (var at = end; at > begin;) {
            at--;
            let record = records[record_slot(at)] & MATCH_MASK;
            let last = last_of(at, next_of(at, record), end);
            records[record_slot(at)] = record | (last << LAST_SHIFT);
        }
    }
}

// --- measure ---

fn literals_size(count: u32) -> u32 {
    return 1u + extension_bytes(count) + count;
}

// Sizes of the thread's sequences, without token and literals of the first: where those begin is not known yet.
fn measure_segment(thread: u32, entry: u32) -> u32 {
    let end = (thread + 1u) * SEGMENT;
    var first_start = PAGE_BYTES;
    var last_end = 0u;
    var size = 0u;
    for (var at = entry; at < end;) {
        let len = len_of(records[record_slot(at)]);
        if len == 0u {
            at++;
            continue;
        }
        size += 2u + extension_bytes(len - MIN_MATCH);
        if last_end == 0u {
            first_start = at;
        } else {
            size += literals_size(at - last_end);
        }
        at += len;
        last_end = at;
    }
    first_starts[thread] = first_start;
    last_ends[thread] = last_end;
    return size;
}

// What a thread has to know of the others.
struct Place {
    // Where the literals before its first match begin.
    anchor: u32,
    // Where the first match behind its segment starts; PAGE_BYTES if there is none.
    next_start: u32,
}

fn find_place(thread: u32) -> Place {
    var place = Place(0u, PAGE_BYTES);
    for (var other = 0u; other < THREADS; other++) {
        if other < thread {
            place.anchor = max(place.anchor, last_ends[other]);
        } else if other > thread {
            place.next_start = min(place.next_start, first_starts[other]);
        }
    }
    return place;
}

// --- write ---

fn flush() {
    atomicOr(&table[out_word], out_bits);
    out_bits = 0u;
}

fn put(at: u32, byte: u32) {
    if at / 4u != out_word {
        flush();
        out_word = at / 4u;
    }
    out_bits |= byte << (at % 4u * 8u);
}

// Writes the bytes that continue a length; returns where they end.
fn put_extension(at: u32, len: u32) -> u32 {
    if len < LONG {
        return at;
    }
    var out = at;
    var rest = len - LONG;
    while rest >= 255u {
        put(out, 255u);
        out++;
        rest -= 255u;
    }
    put(out, rest);
    return out + 1u;
}

fn put_bytes(at: u32, begin: u32, end: u32) {
    for (var i = begin; i < end; i++) {
        put(at + i - begin, byte_at(i));
    }
}

// Writes the token, and the length of the literals; returns where the literals begin.
fn put_token(at: u32, literals: u32, match_code: u32) -> u32 {
    put(at, (min(literals, LONG) << 4u) | min(match_code, LONG));
    return put_extension(at + 1u, literals);
}

fn write_sequences(thread: u32, entry: u32, place: Place, start: u32) {
    let begin = thread * SEGMENT;
    let end = begin + SEGMENT;
    var anchor = place.anchor;
    var out = start;
    for (var at = entry; at < end;) {
        let record = records[record_slot(at)];
        let len = len_of(record);
        if len == 0u {
            at++;
            continue;
        }
        out = put_token(out, at - anchor, len - MIN_MATCH);
        // Literals before the segment are written by the threads whose they are.
        let own = max(anchor, begin);
        put_bytes(out + own - anchor, own, at);
        out += at - anchor;
        put(out, offset_of(record) & 0xffu);
        put(out + 1u, offset_of(record) >> 8u);
        out = put_extension(out + 2u, len - MIN_MATCH);
        at += len;
        anchor = at;
    }
    // Literals of a sequence whose match starts in a later segment, or of the last sequence, which has none.
    let literals = place.next_start - anchor;
    if thread == THREADS - 1u {
        out = put_token(out, literals, 0u);
    } else {
        out += 1u + extension_bytes(literals);
    }
    let own = max(anchor, begin);
    if own < end {
        put_bytes(out + own - anchor, own, end);
    }
    flush();
}

@compute @workgroup_size(32)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let p = group.x;
    if p >= params.pages {
        return;
    }
    if thread == 0u {
        mode = results[p].lz4;
    }
    let what = workgroupUniformLoad(&mode);
    if what == 0u {
        return;
    }
    let limit = min(results[p].len, PAGE_BYTES);

    load_page(p, thread, what == 2u);
    clear_table(thread, 1u << HASH_BITS);
    workgroupBarrier();
    find_matches(thread);
    workgroupBarrier();
    choose_matches(thread);
    workgroupBarrier();

    let first_entry = find_entry(thread);
    clear_table(thread, PAGE_WORDS);
    workgroupBarrier();
    extend_matches(thread, first_entry);
    workgroupBarrier();

    let entry = find_entry(thread);
    var size = measure_segment(thread, entry);
    workgroupBarrier();
    let place = find_place(thread);
    if first_starts[thread] != PAGE_BYTES {
        size += literals_size(first_starts[thread] - place.anchor);
    }
    sizes[thread] = size;
    workgroupBarrier();
    var start = 0u;
    var total = 0u;
    var anchor = 0u;
    for (var other = 0u; other < THREADS; other++) {
        start += select(0u, sizes[other], other < thread);
        total += sizes[other];
        anchor = max(anchor, last_ends[other]);
    }
    total += literals_size(PAGE_BYTES - anchor);

    let fits = total < limit;
    if fits {
        write_sequences(thread, entry, place, start);
    }
    workgroupBarrier();
    if fits {
        for (var word = thread; word * 4u < total; word += THREADS) {
            scratch[p * PAGE_WORDS + word] = atomicLoad(&table[word]);
        }
        if thread == 0u {
            results[p].tag = select(LZ4, LZ4_XOR, what == 2u);
            results[p].len = total;
        }
    }
}
