//! What is written is read back, for every message and every batch.

mod support;

use pagewarp_wire::{
    BatchMeta, Channel, Direction, FrameReader, FrameWriter, HEADER_LEN, Kind, Limits, Message,
};
use proptest::prelude::*;
use support::{batch_frame, batches, messages, open_reader, read, read_batch, session, session_with_history};

/// Writes a message where frames of its kind travel, and reads it.
fn roundtrip(message: &Message) {
    let places = [
        (Channel::Control, Direction::ToDestination),
        (Channel::Control, Direction::ToSource),
        (Channel::Data, Direction::ToDestination),
    ];
    let opens = matches!(message.kind(), Kind::Hello | Kind::HelloAck);
    let (channel, direction) =
        places.into_iter().find(|&(channel, direction)| message.kind().travels(channel, direction)).unwrap();
    let (mut reader, mut writer) = match direction {
        Direction::ToDestination if opens => (FrameReader::accepting(Limits::default()), FrameWriter::new()),
        Direction::ToSource if opens => {
            (FrameReader::opening(channel, Limits::default()), FrameWriter::new())
        }
        _ => open_reader(channel, direction),
    };
    let mut frame = b"before".to_vec();
    writer.control(message, &mut frame).unwrap();
    assert!(frame.starts_with(b"before"), "the writer appends");
    assert_eq!(&read(&mut reader, &frame[6..]).unwrap(), message);
}

#[test]
fn every_kind_comes_back() {
    let samples = support::samples();
    for kind in Kind::ALL.into_iter().filter(|&kind| kind != Kind::Batch) {
        assert!(samples.iter().any(|message| message.kind() == kind), "no sample of {kind}");
    }
    samples.iter().for_each(roundtrip);
}

#[test]
fn largest_messages_fit() {
    use pagewarp_wire::*;
    let name = |i: u32| format!("{i:064}");
    roundtrip(&Message::Offer(Offer {
        vm_name: "x".repeat(MAX_NAME_LEN),
        regions: (0..MAX_REGIONS as u32).map(|id| Region { id, name: name(id), pages: 1 }).collect(),
        machine: vec![1; MAX_MACHINE_LEN],
        ..support::offer()
    }));
    roundtrip(&Message::DeviceState {
        total_len: MAX_STATE_LEN,
        offset: MAX_STATE_LEN - MAX_STATE_CHUNK as u64,
        bytes: vec![7; MAX_STATE_CHUNK],
    });
    roundtrip(&Message::Running { report: vec![7; MAX_REPORT_LEN] });
    roundtrip(&Message::Digests { region: 1, first_page: u64::MAX, digests: vec![u64::MAX; MAX_DIGESTS] });
    let pages = (u64::MAX - u64::from(MAX_BATCH_PAGES) + 1..=u64::MAX).collect();
    roundtrip(&Message::Damaged {
        epoch: u32::MAX,
        region: u32::MAX,
        pages,
        reason: "x".repeat(MAX_TEXT_LEN),
    });
    roundtrip(&Message::Cancel { reason: "x".repeat(MAX_TEXT_LEN) });
    roundtrip(&Message::Error { code: ErrorCode::Other(u16::MAX), message: "x".repeat(MAX_TEXT_LEN) });
}

#[test]
fn smallest_messages_fit() {
    use pagewarp_wire::*;
    let regions = vec![Region { id: 0, name: "r".into(), pages: 1 }];
    roundtrip(&Message::Offer(Offer {
        vm_name: "v".into(),
        regions,
        machine: Vec::new(),
        ..support::offer()
    }));
    roundtrip(&Message::DeviceState { total_len: 1, offset: 0, bytes: vec![7] });
    roundtrip(&Message::Running { report: Vec::new() });
    roundtrip(&Message::Digests { region: 1, first_page: 0, digests: vec![7] });
    roundtrip(&Message::Damaged { epoch: 0, region: 0, pages: vec![0], reason: String::new() });
    roundtrip(&Message::Cancel { reason: String::new() });
    roundtrip(&Message::Error { code: ErrorCode::Vm, message: String::new() });
}

#[test]
fn damaged_pages_are_some_and_ascend() {
    use pagewarp_wire::*;
    let (_, mut writer) = open_reader(Channel::Control, Direction::ToSource);
    for pages in [vec![], vec![2, 1], vec![3, 3], (0..=u64::from(MAX_BATCH_PAGES)).collect()] {
        let message = Message::Damaged { epoch: 0, region: 0, pages, reason: String::new() };
        assert!(writer.control(&message, &mut Vec::new()).is_err(), "{message:?}");
    }
}

#[test]
fn texts_are_made_fit() {
    let (mut reader, mut writer) = open_reader(Channel::Control, Direction::ToDestination);
    let mut frame = Vec::new();
    let reason = format!("red \x1b[31m alert\u{202e}{}", "ü".repeat(1000));
    writer.control(&Message::Cancel { reason }, &mut frame).unwrap();
    let Message::Cancel { reason } = read(&mut reader, &frame).unwrap() else { panic!("a Cancel") };
    assert!(reason.starts_with("red  [31m alert üü"), "{reason}");
    assert!((1023..=1024).contains(&reason.len()) && reason.ends_with('ü'));
}

#[test]
fn error_codes_are_numbers() {
    for number in 0..=u16::MAX {
        assert_eq!(pagewarp_wire::ErrorCode::from_number(number).number(), number);
    }
}

proptest! {
    #[test]
    fn messages_come_back(message in messages()) {
        roundtrip(&message);
    }

    #[test]
    fn batches_come_back(meta in batches(false)) {
        let (mut reader, frame) = batch_frame(&meta);
        let mut out = BatchMeta::default();
        read_batch(&mut reader, &frame, &session(), &mut out).unwrap();
        prop_assert_eq!(out, meta);
    }

    #[test]
    fn batches_with_slots_come_back(meta in batches(true)) {
        let (mut reader, frame) = batch_frame(&meta);
        let mut out = BatchMeta::default();
        read_batch(&mut reader, &frame, &session_with_history(5000), &mut out).unwrap();
        prop_assert_eq!(out, meta);
    }

    #[test]
    fn batches_of_any_pages_keep_within_the_announced_size(
        mut pages in prop::collection::vec(any::<u64>(), 1..300),
        slots in any::<bool>(),
    ) {
        pages.sort_unstable();
        pages.dedup();
        let tags: Vec<u8> = (0..pages.len()).map(|i| 3 + (i % 2) as u8).collect();
        let slots = if slots { vec![pagewarp_wire::NO_SLOT; pages.len()] } else { Vec::new() };
        let batch = pagewarp_wire::BatchView {
            epoch: u32::MAX, region: u32::MAX, pages: &pages, tags: &tags, lens: &vec![4095; pages.len()],
            slots: &slots, plain_hash: 1,
        };
        let mut frame = Vec::new();
        FrameWriter::new().batch_prefix(&batch, 4095 * pages.len(), &mut frame).unwrap();
        prop_assert!(frame.len() - HEADER_LEN <= pagewarp_wire::batch_meta_max(pages.len() as u32));
    }
}
