//! Entry points for fuzzing and property tests: what a bridge parses of what a VM holds.

use pagewarp_codec::{EncodedBatch, EncodingSet};

use crate::protocol::control::Message;
use crate::protocol::frame::{FrameReader, HEADER_LEN};
use crate::protocol::hello::{Credit, Hello, Terms, decode_ack};
use crate::protocol::meta::{self, PageTable};
use crate::protocol::{MAX_LITERALS, MAX_PAGES};
use crate::return_path::ReturnPath;
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

/// Reads `data` as whatever the other bridge may send; its first byte says as what.
///
/// # Panics
///
/// If a segment that was accepted is larger than a segment may be.
pub fn fuzz_peer(data: &[u8]) {
    let [kind, data @ ..] = data else { return };
    match kind % 6 {
        0 => {
            if let Some((header, meta)) = data.split_first_chunk::<HEADER_LEN>()
                && let Ok(read) = FrameReader::default().header(header)
            {
                let _ = read.verify(header, meta);
            }
        }
        1 => drop(Hello::decode(data)),
        2 => drop(decode_ack(data)),
        3 => drop(Credit::decode(data)),
        4 => {
            let _ = Message::decode(data);
            let mut path = ReturnPath::default();
            path.read(data);
        }
        _ => {
            let terms = Terms { encodings: EncodingSet::ALL, zstd: true, verify: true, history_slots: 1000 };
            let (mut segment, mut table) = (Segment::default(), PageTable::default());
            let mut encoded = EncodedBatch::default();
            if meta::decode(data, &terms, 1, 5, &mut segment, &mut table, &mut encoded).is_ok() {
                let mut rebuilt = 0;
                segment.rebuild(|piece| rebuilt += piece.len());
                assert_eq!(rebuilt, segment.stream_len());
                assert!(rebuilt <= MAX_LITERALS + MAX_PAGES * pagewarp_codec::PAGE_SIZE);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn whatever_a_peer_sends_is_read_or_rejected(data in proptest::collection::vec(any::<u8>(), 0..400)) {
            super::fuzz_peer(&data);
        }
    }
}
