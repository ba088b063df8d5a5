//! Entry points for fuzzing and property tests: what a bridge parses of what a VM holds.

use std::io::Write;
use std::net::Shutdown;
use std::num::NonZeroU8;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use pagewarp_codec::{EncodedBatch, EncodingSet};

use crate::protocol::control::Message;
use crate::protocol::frame::{FrameReader, FrameWriter, HEADER_LEN, Kind};
use crate::protocol::hello::{Credit, Hello, Probed, Terms, decode_ack, encode_ack};
use crate::protocol::meta::{self, LiteralForm, PageTable};
use crate::protocol::text::printable;
use crate::protocol::{MAX_LITERALS, MAX_MESSAGE, MAX_PAGES, MAX_REASON, reason_of};
use crate::qmp::Vm;
use crate::qmp::check::{self, Seen, Wish};
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
/// If what was accepted is not written back as it was read, or a segment is larger than a segment may be.
pub fn fuzz_peer(data: &[u8]) {
    let [kind, data @ ..] = data else { return };
    match kind % 6 {
        0 => read_frames(data),
        1 => {
            if let Ok(hello) = Hello::decode(data) {
                assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
            }
        }
        2 => {
            if let Ok(terms) = decode_ack(data) {
                assert_eq!(encode_ack(terms), data);
            }
        }
        3 => {
            if let Ok(credit) = Credit::decode(data) {
                assert_eq!(credit.encode(), data);
            }
            if let Ok(probed) = Probed::decode(data) {
                assert_eq!(probed.encode(), data);
            }
        }
        4 => follow_return_path(data),
        _ => read_segment(data),
    }
}

/// Frames with headers as they are, and one with a header that fits: its check is hardly ever guessed.
fn read_frames(data: &[u8]) {
    let mut reader = FrameReader::default();
    let mut rest = data;
    while let Some((header, meta)) = rest.split_first_chunk::<HEADER_LEN>()
        && let Ok(read) = reader.header(header)
    {
        assert!(read.kind.allows(read.meta_len, read.payload_len));
        let Some((meta, after)) = meta.split_at_checked(read.meta_len) else { break };
        if read.verify(header, meta).is_err() {
            break;
        }
        rest = after.get(read.payload_len..).unwrap_or_default();
    }
    let meta = &data[..data.len().min(MAX_MESSAGE)];
    let header = FrameWriter::default().header(Kind::Error, meta, 0);
    let read = FrameReader::default().header(&header).expect("its own header");
    assert_eq!((read.kind, read.meta_len, read.payload_len), (Kind::Error, meta.len(), 0));
    read.verify(&header, meta).expect("its own check");
    can_be_printed(&reason_of(meta));
}

/// What a peer says must not make a terminal do anything.
fn can_be_printed(text: &str) {
    assert!(!text.contains(pagewarp_wire::misleads), "{text:?}");
    assert_eq!(printable(text), text, "what can be printed stays as it is");
}

/// However the bytes are cut, the same is understood.
fn follow_return_path(data: &[u8]) {
    let (mut whole, mut cut) = (ReturnPath::default(), ReturnPath::default());
    whole.read(data);
    data.chunks(1).for_each(|byte| cut.read(byte));
    assert_eq!((whole.shut(), whole.is_lost()), (cut.shut(), cut.is_lost()));
}

fn read_segment(data: &[u8]) {
    let terms =
        Terms { encodings: EncodingSet::ALL, zstd: true, verify: true, direct: false, history_slots: 1000 };
    let (mut segment, mut table) = (Segment::default(), PageTable::default());
    let mut encoded = EncodedBatch::default();
    let Ok(len) = meta::decode(data, &terms, 1, 5, &mut segment, &mut table, &mut encoded) else { return };
    let mut stream = Vec::new();
    segment.rebuild(|piece| stream.extend_from_slice(piece));
    assert_eq!(stream.len(), segment.stream_len());
    assert!(stream.len() <= MAX_LITERALS + MAX_PAGES * pagewarp_codec::PAGE_SIZE);

    let (mut again, mut again_table, mut again_encoded) = Default::default();
    let mut written = Vec::new();
    meta::encode(&segment, &table, &encoded, LiteralForm::Lz4, &mut written);
    let again_len = meta::decode(&written, &terms, 1, 5, &mut again, &mut again_table, &mut again_encoded);
    assert_eq!(again_len, Ok(len));
    assert_eq!((again_table, again_encoded), (table, encoded));
    let mut again_stream = Vec::new();
    again.rebuild(|piece| again_stream.extend_from_slice(piece));
    assert!(again_stream == stream, "a segment came back as another");
}

/// Reads `data` as a message of the control connection.
///
/// # Panics
///
/// If a message that was accepted holds what a terminal would obey, has a reason that is too long, or is read as another after it was written.
pub fn fuzz_control(data: &[u8]) {
    let Ok(message) = Message::decode(data) else { return };
    match &message {
        Message::Cancel { reason } | Message::Failed { reason } => {
            can_be_printed(reason);
            assert!(reason.chars().count() <= MAX_REASON);
        }
        Message::Prepare(prepare) => {
            let texts = [prepare.name.as_ref(), Some(&prepare.uuid), Some(&prepare.qemu_version)];
            texts.into_iter().flatten().for_each(|text| can_be_printed(text));
        }
        Message::Report(report) => can_be_printed(&report.qemu_version),
        Message::Prepared | Message::Commit { .. } | Message::Running(_) => {}
    }
    let written = message.encode();
    let again = Message::decode(&written).expect("what was written can be read");
    // Numbers with a point may lose the last bit.
    if !matches!(message, Message::Report(_)) {
        assert_eq!(again, message);
    }
}

/// What QEMU greets with.
const GREETING: &str =
    r#"{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 8}}, "capabilities": []}}"#;

/// Lets a QEMU say the lines of `data` to a client that asks it everything a migration asks. The first byte says whether it greets properly; a line that begins with `<` is
/// the answer to the command after those answered before.
///
/// # Panics
///
/// If the client does; or if it keeps more than it may, or decides anything from an answer that does not say it.
pub fn fuzz_qmp(data: &[u8]) {
    let [mode, data @ ..] = data else { return };
    let mut said = String::new();
    let mut id = 0;
    if mode & 1 == 0 {
        said.push_str(GREETING);
        said.push_str("\n{\"return\": {}, \"id\": 0}\n");
        id = 1;
    }
    let mut bytes = said.into_bytes();
    // As much as a socket holds without a reader.
    for line in data[..data.len().min(16 << 10)].split_inclusive(|&byte| byte == b'\n') {
        match line {
            [b'<', answer @ ..] => {
                let answer = answer.trim_ascii_end();
                bytes.extend([b"{\"return\": ", answer, format!(", \"id\": {id}}}\n").as_bytes()].concat());
                id += 1;
            }
            line => bytes.extend(line),
        }
    }
    let Ok((here, mut there)) = UnixStream::pair() else { return };
    if there.set_nonblocking(true).is_err() || there.write_all(&bytes).is_err() {
        return;
    }
    // Nothing is waited for: everything is there, and then the end.
    there.shutdown(Shutdown::Write).expect("the other end is open");
    let patience = Duration::from_secs(60);
    let Ok(mut vm) = Vm::over(here, Path::new("/fuzz"), patience) else { return };
    ask_everything(&mut vm, mode & 2 == 0);
    while let Ok(Some(event)) = vm.next_event(patience) {
        let _ = (event.migration_status(), event.at);
    }
}

fn ask_everything(vm: &mut Vm, at_source: bool) {
    while let Ok(seen) = Seen::ask(vm) {
        for multifd in [None, NonZeroU8::new(4)] {
            let wish = Wish { multifd, downtime_ms: 300, run: true, pause_before_switchover: at_source };
            let plan = if at_source { check::source(&seen, &wish) } else { check::destination(&seen, &wish) };
            let Ok(plan) = plan else { continue };
            assert!(!seen.migration.is_under_way());
            assert!(plan.capabilities.keys().all(|name| seen.capabilities.contains_key(*name)));
            if plan.apply(vm).is_err() {
                return;
            }
        }
        let _ = (vm.name(), vm.uuid(), vm.memory_bytes(), vm.vcpu_threads());
        let _ = (vm.migrate("unix:/fuzz"), vm.migrate_incoming("unix:/fuzz"), vm.quit());
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

        #[test]
        fn whatever_the_control_connection_brings_is_read_or_rejected(
            message in "[a-z]{4,8}|cancel|failed|prepare|prepared|commit|running|report",
            key in "reason|uuid|name|run|multifd|resumed_at_us|qemu_version|[a-z]{1,3}",
            value in "\"\\PC{0,20}\"|[0-9]{1,20}|true|null|\\{\\}|\"\\\\u00[01][0-9a-f]\"",
        ) {
            super::fuzz_control(value.as_bytes());
            super::fuzz_control(format!("{{\"message\": \"{message}\", \"{key}\": {value}}}").as_bytes());
        }

        #[test]
        fn whatever_a_qemu_says_is_read_or_rejected(
            mode in 0..4u8,
            lines in proptest::collection::vec(
                "<\\{\"(status|running|capability|event|error|id)\": (\"[a-z]{0,8}\"|[0-9]{1,25}|true|null)\\}|\\PC{0,40}|<\\[\\]|<\\{\\}",
                0..20,
            ),
        ) {
            super::fuzz_qmp(&[&[mode], lines.join("\n").as_bytes()].concat());
        }
    }
}
