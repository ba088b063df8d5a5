//! Entry points for fuzzers and for the property tests that run the same code.
//!
//! Random bytes hardly ever get past a checksum, so these build valid frames around what the fuzzer gives.

use crate::batch::{self, BatchMeta};
use crate::header::{HEADER_LEN, header_bytes};
use crate::{
    Channel, FrameReader, FrameWriter, Hello, Kind, Limits, Message, NO_SLOT, Region, Role, Session,
    fixed_payload_len,
};

/// Bytes as they might come from a peer: either a raw stream, or one body of a chosen kind with a header that fits.
///
/// # Panics
/// If a message that was accepted is not written back as the same bytes.
pub fn fuzz_frame(data: &[u8]) {
    let Some((&mode, rest)) = data.split_first() else { return };
    if mode & 1 == 0 {
        return read_stream(rest);
    }
    let Some((&kind, body)) = rest.split_first() else { return };
    let Some(kind) = Kind::from_byte(kind % (Kind::ALL.len() as u8 + 1)).filter(|&kind| kind != Kind::Batch)
    else {
        return;
    };
    let first = matches!(kind, Kind::Hello | Kind::HelloAck);
    let channel = if mode & 2 == 0 { Channel::Control } else { Channel::Data };
    let to_source = if first { kind == Kind::HelloAck } else { mode & 4 != 0 };
    let mut reader = if to_source {
        FrameReader::opening(channel, Limits::default())
    } else {
        FrameReader::accepting(Limits::default())
    };
    if !first {
        let role = if channel == Channel::Control { Role::Control } else { Role::Data { index: 0 } };
        let opening = if to_source {
            Message::HelloAck { version: 1 }
        } else {
            Message::Hello(Hello::new(role, [7; 16]))
        };
        let mut frame = Vec::new();
        FrameWriter::new().control(&opening, &mut frame).expect("an opening is always valid");
        assert_eq!(read_frame(&mut reader, &frame), Some(opening));
    }
    let mut frame = header_bytes(kind, u64::from(!first), body, 0).to_vec();
    frame.extend_from_slice(body);
    if let Some(message) = read_frame(&mut reader, &frame) {
        let mut again = Vec::new();
        message.encode(&mut again).expect("what was accepted is valid");
        assert_eq!(again, body, "{message:?} has two forms");
    }
}

/// The meta of a batch.
///
/// # Panics
/// If what was accepted breaks a promise of [`BatchMeta`], or is not read back from what is written for it.
pub fn fuzz_batch_meta(data: &[u8]) {
    let Some((&mode, meta)) = data.split_first() else { return };
    let region = |id, pages| Region { id, name: format!("region{id}"), pages };
    let session = Session {
        regions: vec![region(0, 100), region(3, 1 << 28)],
        encodings: 0x7f,
        history_slots: if mode & 1 == 0 { 0 } else { 1000 },
        max_batch_pages: 300,
        connections: 1,
        verify: false,
    };
    let (mut out, mut scratch) = (BatchMeta::default(), Vec::new());
    if batch::decode(meta, &session, &mut scratch, &mut out).is_err() {
        return;
    }
    let pages = session.region(out.region).expect("the region is one of the session's").pages;
    let count = out.pages.len();
    assert!((1..=300).contains(&count) && out.tags.len() == count && out.lens.len() == count);
    assert!(out.pages.is_sorted_by(|a, b| a < b) && out.pages.iter().all(|&page| page < pages));
    for (&tag, &len) in out.tags.iter().zip(&out.lens) {
        assert!(tag < 7 && fixed_payload_len(tag).map_or((1..4096).contains(&len), |fixed| fixed == len));
    }
    assert_eq!(out.lens.iter().copied().map(usize::from).sum::<usize>(), out.payload_len);
    assert_eq!(out.slots.len(), if session.history_slots > 0 { count } else { 0 });
    assert!(out.slots.iter().all(|&slot| slot < 1000 || slot == NO_SLOT));

    let mut again = Vec::new();
    batch::encode(&out.view(), &mut again).expect("what was accepted is valid");
    assert!(again.len() <= batch::batch_meta_max(count as u32));
    let mut reread = BatchMeta::default();
    batch::decode(&again, &session, &mut scratch, &mut reread).expect("what was written is valid");
    assert_eq!(reread, out);
}

/// Reads frames until something is wrong or nothing is left.
fn read_stream(mut stream: &[u8]) {
    let limits = Limits::default();
    let mut reader = FrameReader::accepting(limits);
    while let Some((header, rest)) = stream.split_first_chunk::<HEADER_LEN>() {
        let Ok(header) = reader.header(header) else { return };
        let Some((body, rest)) = rest.split_at_checked(header.body_len()) else { return };
        if header.kind() == Kind::Batch || reader.message(&header, body).is_err() {
            return;
        }
        stream = rest;
    }
}

/// Reads a frame that is there as a whole.
fn read_frame(reader: &mut FrameReader, frame: &[u8]) -> Option<Message> {
    let (header, body) = frame.split_first_chunk::<HEADER_LEN>()?;
    let header = reader.header(header).ok()?;
    assert_eq!(header.body_len(), body.len());
    reader.message(&header, body).ok()
}
