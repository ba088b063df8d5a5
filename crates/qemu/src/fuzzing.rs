//! Entry points for fuzzing and property tests: what a bridge parses of what a VM holds.

use crate::segment::Segment;
use crate::stream::{Blocks, Limits, Stop, StreamReader};

/// Where a connection can have come to before the bytes of the fuzzer follow.
const STARTS: [&[u8]; 7] = [
    b"",
    b"QEVM\0\0\0\x03",
    // In the configuration.
    b"QEVM\0\0\0\x03\x07\0\0\0\x02pc",
    // In the list of RAM blocks, where postcopy was advised.
    b"QEVM\0\0\0\x03\x08\0\x03\0\x10\0\0\0\0\0\x20\x10\0\0\0\0\0\0\0\x10\0\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04",
    // Among records, after a zero page.
    b"QEVM\0\0\0\x03\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\x10\x02\x01m\0",
    // In the state of a device before the pages.
    b"QEVM\0\0\0\x03\x04\0\0\0\x05\x01d\0\0\0\0\0\0\0\x01",
    // A multifd packet.
    b"\x11\x22\x33\x44\0\0\0\x01",
];

/// Reads `data` as the stream of a connection; its first bytes say what comes before, how it is cut, and how much a segment may hold.
///
/// # Panics
///
/// If what comes out is not what went in, or does not come to an end.
pub fn fuzz_stream(data: &[u8]) {
    let [start, cut, hold, data @ ..] = data else { return };
    let start = usize::from(*start) % (STARTS.len() + 1);
    // The rest of the packet that opens a multifd connection.
    let stream = match STARTS.get(start) {
        Some(start) => [start, data].concat(),
        None => [STARTS[6], &[0; 56], data].concat(),
    };
    let chunk = match cut % 4 {
        0 => stream.len(),
        1 => 1,
        _ => 1 + usize::from(cut / 4),
    };
    let limits = Limits { pages: usize::from(hold % 4), literal_bytes: usize::from(hold / 4) * 30 };

    let mut reader = StreamReader::new(Blocks::default());
    let mut segment = Segment::default();
    let mut rebuilt = Vec::new();
    let (mut taken, mut come) = (0, 0);
    while taken < stream.len() {
        let flush = come == stream.len() || (cut % 4 == 3 && taken % 5 == 0);
        come = (come + chunk).min(stream.len());
        loop {
            let (n, stop) = reader.read(&stream[taken..come], &limits, &mut segment);
            taken += n;
            let full = stop == Stop::Full && segment.is_empty();
            assert!(!full, "an empty segment is not full");
            if stop == Stop::Hungry && flush && taken < come {
                taken += reader.flush(&stream[taken..come], &limits, &mut segment);
            } else if stop == Stop::Hungry {
                break;
            }
            segment.rebuild(|piece| rebuilt.extend_from_slice(piece));
            segment.clear();
        }
        segment.rebuild(|piece| rebuilt.extend_from_slice(piece));
        segment.clear();
    }
    assert!(rebuilt == stream, "what was read is what went in");
}
