//! Damaged, cut, oversized and misplaced frames: always an error, before anything is allocated for them.

mod support;

use pagewarp_wire::{
    BatchMeta, Channel, Direction, FrameReader, FrameWriter, HEADER_LEN, Header, Hello, Kind, Limits,
    Message, Region, Role, WireError,
};
use support::{batch_frame, offer, open_reader, read, read_batch, sample_batches, samples, session};
use xxhash_rust::xxh3::xxh3_64;

/// A frame, and a reader that expects just that.
fn sample_frame(message: &Message) -> (impl Fn() -> FrameReader, Vec<u8>) {
    let (channel, direction) = [
        (Channel::Control, Direction::ToDestination),
        (Channel::Control, Direction::ToSource),
        (Channel::Data, Direction::ToDestination),
    ]
    .into_iter()
    .find(|&(channel, direction)| message.kind().travels(channel, direction))
    .unwrap();
    let opens = matches!(message.kind(), Kind::Hello | Kind::HelloAck);
    let reader = move || match direction {
        Direction::ToDestination if opens => FrameReader::accepting(Limits::default()),
        Direction::ToSource if opens => FrameReader::opening(channel, Limits::default()),
        _ => open_reader(channel, direction).0,
    };
    let mut writer = if opens { FrameWriter::new() } else { open_reader(channel, direction).1 };
    let mut frame = Vec::new();
    writer.control(message, &mut frame).unwrap();
    (reader, frame)
}

/// A header with these fields and checksums that fit.
fn header(kind: u8, flags: u16, seq: u64, body_len: u32, meta_len: u32, meta: &[u8]) -> [u8; HEADER_LEN] {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(b"PGWP");
    bytes.extend_from_slice(&[1, kind]);
    bytes.extend_from_slice(&flags.to_le_bytes());
    bytes.extend_from_slice(&seq.to_le_bytes());
    bytes.extend_from_slice(&body_len.to_le_bytes());
    bytes.extend_from_slice(&meta_len.to_le_bytes());
    bytes.extend_from_slice(&xxh3_64(meta).to_le_bytes());
    let check = xxh3_64(&bytes);
    bytes.extend_from_slice(&check.to_le_bytes());
    bytes.try_into().unwrap()
}

fn parse(header: &[u8; HEADER_LEN]) -> Result<Header, WireError> {
    Header::parse(header, &Limits::default())
}

/// What the reader says about a body with a header that fits it.
fn read_body(kind: Kind, body: &[u8]) -> Result<Message, WireError> {
    let direction = if kind.travels(Channel::Control, Direction::ToSource) {
        Direction::ToSource
    } else {
        Direction::ToDestination
    };
    let opens = matches!(kind, Kind::Hello | Kind::HelloAck);
    let mut reader = match direction {
        Direction::ToDestination if opens => FrameReader::accepting(Limits::default()),
        Direction::ToSource if opens => FrameReader::opening(Channel::Control, Limits::default()),
        _ => open_reader(Channel::Control, direction).0,
    };
    let mut frame =
        header(kind.byte(), 0, u64::from(!opens), body.len() as u32, body.len() as u32, body).to_vec();
    frame.extend_from_slice(body);
    read(&mut reader, &frame)
}

#[test]
fn header_layout_is_as_documented() {
    let (_, frame) = sample_frame(&Message::Ping { id: 5 });
    assert_eq!(frame[..HEADER_LEN], header(21, 0, 1, 8, 8, &5u64.to_le_bytes()));
    assert_eq!(HEADER_LEN, 40);
}

#[test]
fn every_flipped_bit_of_a_control_frame_is_seen() {
    for message in samples() {
        let (reader, frame) = sample_frame(&message);
        assert_eq!(read(&mut reader(), &frame).as_ref(), Ok(&message));
        for bit in 0..frame.len() * 8 {
            let mut damaged = frame.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let result = read(&mut reader(), &damaged);
            assert!(result.is_err(), "bit {bit} of {message:?} flipped: {result:?}");
        }
    }
}

#[test]
fn every_flipped_bit_of_a_batch_head_is_seen() {
    for meta in sample_batches() {
        let (_, frame) = batch_frame(&meta);
        for bit in 0..frame.len() * 8 {
            let (mut reader, mut damaged) = batch_frame(&meta);
            damaged[bit / 8] ^= 1 << (bit % 8);
            let result = read_batch(&mut reader, &damaged, &session(), &mut BatchMeta::default());
            assert!(result.is_err(), "bit {bit} of {meta:?} flipped: {result:?}");
        }
    }
}

#[test]
fn damage_of_a_header_is_seen_before_its_length_is_believed() {
    let (reader, frame) = sample_frame(&Message::Ping { id: 5 });
    for bit in 0..HEADER_LEN * 8 {
        let mut damaged: [u8; HEADER_LEN] = frame[..HEADER_LEN].try_into().unwrap();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(reader().header(&damaged).is_err(), "bit {bit}");
    }
}

#[test]
fn foreign_bytes_are_named() {
    assert!(matches!(parse(&[0x16; HEADER_LEN]), Err(WireError::BadMagic { seen: 0x1616_1616, .. })));
    let mut future = header(21, 0, 0, 8, 8, &[0; 8]);
    future[4] = 2;
    assert!(matches!(parse(&future), Err(WireError::UnsupportedVersion { what: "frame format", .. })));
    for kind in [0, 24, 255] {
        assert_eq!(
            parse(&header(kind, 0, 0, 0, 0, &[])),
            Err(WireError::UnknownKind { seen: kind, last: 23 })
        );
    }
    let flags = parse(&header(21, 1, 0, 8, 8, &[0; 8]));
    assert!(matches!(flags, Err(WireError::Malformed { what: "flags of a frame header", .. })));
}

#[test]
fn every_kind_has_a_largest_size() {
    for kind in Kind::ALL {
        let result = parse(&header(kind.byte(), 0, 0, u32::MAX, u32::MAX, &[]));
        assert!(
            matches!(result, Err(WireError::TooLarge { limit, .. }) if limit < 2 << 20),
            "{kind}: {result:?}"
        );
        if kind != Kind::Batch {
            let shortest =
                (0..).find(|&len| parse(&header(kind.byte(), 0, 0, len, len, &[])).is_ok()).unwrap();
            let payload = parse(&header(kind.byte(), 0, 0, shortest + 1, shortest, &[]));
            assert!(matches!(payload, Err(WireError::TooLarge { limit: 0, .. })), "{kind}: {payload:?}");
        }
    }
    let limits = Limits::default().with_batch_pages(16);
    let batch = |payload: u32| Header::parse(&header(6, 0, 0, 60 + payload, 60, &[]), &limits);
    assert_eq!(batch(16 * 4096).unwrap().payload_len(), 16 * 4096);
    assert_eq!(
        batch(16 * 4096 + 1),
        Err(WireError::TooLarge { what: "a frame's payload", seen: 16 * 4096 + 1, limit: 16 * 4096 })
    );
    assert!(
        Header::parse(&header(6, 0, 0, 1000, 1000, &[]), &limits).is_err(),
        "a meta for more than 16 pages"
    );
    let inverted = parse(&header(6, 0, 0, 59, 60, &[]));
    assert!(matches!(inverted, Err(WireError::Malformed { what: "body length", .. })), "{inverted:?}");
}

#[test]
fn cut_and_extended_bodies_are_refused() {
    for message in samples() {
        let (_, frame) = sample_frame(&message);
        let body = &frame[HEADER_LEN..];
        let open_ended =
            matches!(message.kind(), Kind::DeviceState | Kind::Running | Kind::Cancel | Kind::Error);
        for len in 0..body.len() {
            let result = read_body(message.kind(), &body[..len]);
            let whole_digests = message.kind() == Kind::Digests && len >= 20 && (len - 12) % 8 == 0;
            // The pages are counted, the text after them is not.
            let whole_pages =
                matches!(&message, Message::Damaged { pages, .. } if len >= 12 + 8 * pages.len());
            assert!(
                open_ended || whole_digests || whole_pages || result.is_err(),
                "{message:?} cut to {len} bytes: {result:?}"
            );
            // What ends anywhere may be cut, but then it is not the same message.
            assert_ne!(result.as_ref(), Ok(&message));
        }
        let longer = [body, &[0]].concat();
        let result = read_body(message.kind(), &longer);
        assert!(
            result.is_err() || matches!(message.kind(), Kind::Running),
            "{message:?} and a byte: {result:?}"
        );
    }
}

#[test]
fn a_body_of_another_length_than_announced_is_refused() {
    let (reader, frame) = sample_frame(&Message::Ping { id: 5 });
    let mut reader = reader();
    let header = reader.header(frame[..HEADER_LEN].try_into().unwrap()).unwrap();
    let result = reader.message(&header, &frame[HEADER_LEN..HEADER_LEN + 7]);
    assert_eq!(
        result,
        Err(WireError::Truncated { what: "the body of a control frame", seen: 7, expected: 8 })
    );
}

#[test]
fn lost_repeated_and_swapped_frames_are_seen() {
    let (_, mut writer) = open_reader(Channel::Control, Direction::ToDestination);
    let frames: Vec<Vec<u8>> = (0..3)
        .map(|id| {
            let mut frame = Vec::new();
            writer.control(&Message::Ping { id }, &mut frame).unwrap();
            frame
        })
        .collect();
    for (order, seen) in [([0, 2], 3), ([0, 0], 1), ([0, 1], 0)] {
        let (mut reader, _) = open_reader(Channel::Control, Direction::ToDestination);
        read(&mut reader, &frames[order[0]]).unwrap();
        let result = read(&mut reader, &frames[order[1]]);
        match seen {
            0 => assert!(result.is_ok()),
            seen => assert_eq!(result, Err(WireError::Sequence { seen, expected: 2 })),
        }
    }
}

#[test]
fn frames_stay_on_their_connection() {
    for channel in [Channel::Control, Channel::Data] {
        for direction in [Direction::ToDestination, Direction::ToSource] {
            for message in samples() {
                let (mut reader, mut writer) = open_reader(channel, direction);
                let mut frame = Vec::new();
                writer.control(&message, &mut frame).unwrap();
                let result = read(&mut reader, &frame);
                let opens = matches!(message.kind(), Kind::Hello | Kind::HelloAck);
                let fits = message.kind().travels(channel, direction) && !opens;
                assert_eq!(
                    result.is_ok(),
                    fits,
                    "{message:?} {direction} on a {channel} connection: {result:?}"
                );
            }
        }
    }
}

#[test]
fn a_connection_opens_with_hello() {
    for message in samples() {
        let mut frame = Vec::new();
        FrameWriter::new().control(&message, &mut frame).unwrap();
        let result = read(&mut FrameReader::accepting(Limits::default()), &frame);
        assert_eq!(result.is_ok(), message.kind() == Kind::Hello, "{result:?}");
        let result = read(&mut FrameReader::opening(Channel::Control, Limits::default()), &frame);
        assert_eq!(result.is_ok(), matches!(message.kind(), Kind::HelloAck | Kind::Error), "{result:?}");
    }
}

#[test]
fn values_that_make_no_sense_are_refused_at_both_ends() {
    let region = |id, name: &str, pages| Region { id, name: name.into(), pages };
    let offers = [
        pagewarp_wire::Offer { vm_name: String::new(), ..offer() },
        pagewarp_wire::Offer { vm_name: "a/b".into(), ..offer() },
        pagewarp_wire::Offer { vm_name: "..".into(), ..offer() },
        pagewarp_wire::Offer { vm_name: "-rf".into(), ..offer() },
        pagewarp_wire::Offer { vm_name: "x".repeat(65), ..offer() },
        pagewarp_wire::Offer { page_size: 16384, ..offer() },
        pagewarp_wire::Offer { regions: vec![], ..offer() },
        pagewarp_wire::Offer {
            regions: (0..65).map(|i| region(i, &format!("r{i}"), 1)).collect(),
            ..offer()
        },
        pagewarp_wire::Offer { regions: vec![region(0, "a", 0)], ..offer() },
        pagewarp_wire::Offer { regions: vec![region(0, "a b", 1)], ..offer() },
        pagewarp_wire::Offer { regions: vec![region(0, "a", 1), region(1, "a", 1)], ..offer() },
        pagewarp_wire::Offer { regions: vec![region(1, "a", 1), region(0, "b", 1)], ..offer() },
        pagewarp_wire::Offer { regions: vec![region(1, "a", 1), region(1, "b", 1)], ..offer() },
        pagewarp_wire::Offer { encodings: 0b1011, ..offer() },
        pagewarp_wire::Offer { max_batch_pages: 0, ..offer() },
        pagewarp_wire::Offer { max_batch_pages: 4097, ..offer() },
        pagewarp_wire::Offer { connections: 0, ..offer() },
        pagewarp_wire::Offer { connections: 65, ..offer() },
        pagewarp_wire::Offer { machine: vec![0; (1 << 20) + 1], ..offer() },
    ];
    let others = [
        Message::Hello(Hello { min_version: 0, ..Hello::new(Role::Control, [0; 16]) }),
        Message::Hello(Hello { min_version: 2, max_version: 1, ..Hello::new(Role::Control, [0; 16]) }),
        Message::Hello(Hello::new(Role::Data { index: 64 }, [0; 16])),
        Message::Accept(pagewarp_wire::Accept { encodings: 1, history_slots: 0, max_batch_pages: 1 }),
        Message::DeviceState { total_len: 10, offset: 0, bytes: vec![] },
        Message::DeviceState { total_len: 10, offset: 8, bytes: vec![0; 3] },
        Message::DeviceState { total_len: 10, offset: u64::MAX, bytes: vec![0; 3] },
        Message::DeviceState { total_len: (64 << 20) + 1, offset: 0, bytes: vec![0; 3] },
        Message::DeviceState { total_len: 64 << 20, offset: 0, bytes: vec![0; (1 << 20) + 1] },
        Message::StateEnd { len: (64 << 20) + 1, xxh3: 0 },
        Message::Running { report: vec![b' '; (1 << 20) + 1] },
        Message::Digests { region: 0, first_page: 0, digests: vec![] },
        Message::Digests { region: 0, first_page: 0, digests: vec![0; 65537] },
    ];
    for message in offers.into_iter().map(Message::Offer).chain(others) {
        let mut out = b"before".to_vec();
        let mut writer = FrameWriter::new();
        assert!(writer.control(&message, &mut out).is_err(), "written: {:?}", message.kind());
        assert_eq!(out, b"before", "a refused message leaves nothing behind");
        writer.control(&Message::Ping { id: 1 }, &mut out).unwrap();
        assert_eq!(parse(out[6..46].try_into().unwrap()).unwrap().seq(), 0, "and takes no number");
    }

    // The writer cannot be made to write these: change bodies by hand.
    let body = |message: &Message| sample_frame(message).1[HEADER_LEN..].to_vec();
    let changed = |message: &Message, at: usize, byte: u8| {
        let mut body = body(message);
        body[at] = byte;
        read_body(message.kind(), &body)
    };
    let (hello, offer) = (samples().remove(0), Message::Offer(offer()));
    assert_eq!(changed(&hello, 0, 1), Ok(hello.clone()), "unchanged");
    for (message, at, byte) in [
        (&hello, 0, 0),                              // min_version 0
        (&hello, 4, 2),                              // role
        (&hello, 5, 1),                              // reserved
        (&hello, 6, 1),                              // index of a control connection
        (&offer, 0, 1),                              // page size
        (&offer, 4, 0b11),                           // encodings without raw
        (&offer, 6, 0),                              // connections
        (&offer, 20, 2),                             // pipeline
        (&offer, 21, 2),                             // verify
        (&offer, 22, 65),                            // length of the name
        (&offer, 23, 65),                            // regions
        (&offer, 23, 3),                             // more regions than there are
        (&offer, 28, b'/'),                          // the name
        (&offer, 28, 0xff),                          // the name
        (&Message::Accept(support::accept()), 2, 1), // reserved
        (&Message::Cancel { reason: "why".into() }, 1, 0x1b),
        (&Message::Cancel { reason: "why".into() }, 1, 0xff),
    ] {
        let result = changed(message, at, byte);
        assert!(result.is_err(), "byte {at} of {:?} set to {byte}: {result:?}", message.kind());
    }
}

#[test]
fn guest_memory_is_bounded_by_the_receiver() {
    let (_, frame) = sample_frame(&Message::Offer(offer()));
    let limits = Limits { max_guest_pages: 1000, ..Limits::default() };
    let (mut reader, _) = open_reader(Channel::Control, Direction::ToDestination);
    reader.set_limits(limits);
    let result = read(&mut reader, &frame);
    let total = 640 + (1 << 20);
    assert_eq!(result, Err(WireError::TooLarge { what: "guest memory in pages", seen: total, limit: 1000 }));
}
