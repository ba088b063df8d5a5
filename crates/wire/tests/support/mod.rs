//! Samples and strategies shared by the tests.

#![allow(dead_code, reason = "each test binary uses its own part")]

use pagewarp_wire::{
    Accept, Ack, BatchMeta, Channel, Direction, ErrorCode, FrameReader, FrameWriter, HEADER_LEN, Hello,
    Limits, Message, Offer, Region, Role, Session, WireError, fixed_payload_len, misleads,
};
use proptest::collection::vec;
use proptest::prelude::*;

/// The session that all connections of the tests belong to.
pub(crate) const SESSION: [u8; 16] = *b"0123456789abcdef";

/// An offer of two regions.
pub(crate) fn offer() -> Offer {
    Offer {
        vm_name: "vm-1".into(),
        page_size: 4096,
        regions: vec![
            Region { id: 0, name: "low".into(), pages: 640 },
            Region { id: 4, name: "/dev/high".into(), pages: 1 << 20 },
        ],
        encodings: 0x7f,
        history_slots: 0,
        max_batch_pages: 256,
        connections: 2,
        pipeline: true,
        verify: true,
        downtime_limit_ms: 300,
        machine: b"{\"vcpus\":1}".to_vec(),
    }
}

/// Takes all of [`offer`].
pub(crate) fn accept() -> Accept {
    Accept { encodings: 0x7f, history_slots: 0, max_batch_pages: 256 }
}

/// What [`offer`] and [`accept`] come to.
pub(crate) fn session() -> Session {
    Session::new(&offer(), &accept()).unwrap()
}

/// The same with a history.
pub(crate) fn session_with_history(history_slots: u32) -> Session {
    Session { history_slots, ..session() }
}

/// One message of every kind.
pub(crate) fn samples() -> Vec<Message> {
    vec![
        Message::Hello(Hello::new(Role::Control, SESSION)),
        Message::Hello(Hello::new(Role::Data { index: 3 }, SESSION)),
        Message::HelloAck { version: 1 },
        Message::Offer(offer()),
        Message::Accept(accept()),
        Message::EpochStart { epoch: 1, pages: 70000 },
        Message::Barrier { epoch: 2, batches: 5, pages: 1280 },
        Message::EpochDone { epoch: 2 },
        Message::Ack(Ack { batches: 5, wire_bytes: 100_000, pages: 1280 }),
        Message::DeviceState { total_len: 100, offset: 40, bytes: (0..60).collect() },
        Message::StateEnd { len: 100, xxh3: 0x0123_4567_89ab_cdef },
        Message::Prepare { epoch: 3, state_len: 100, state_hash: 0x0123_4567_89ab_cdef },
        Message::Ready,
        Message::Commit,
        Message::Running { report: b"{\"downtime_ms\":120}".to_vec() },
        Message::Digests { region: 4, first_page: 1000, digests: (1..50).map(|i| u64::MAX / i).collect() },
        Message::DigestsEnd,
        Message::Bye,
        Message::Cancel { reason: "the operator said so".into() },
        Message::Error { code: ErrorCode::Vm, message: "KVM_SET_MSRS: nicht unterstützt".into() },
        Message::Ping { id: 9 },
        Message::Pong { id: 9 },
        Message::Damaged {
            epoch: 3,
            region: 4,
            pages: vec![7, 8, 1 << 19],
            reason: "the hash differs".into(),
        },
    ]
}

/// A batch of every layout: runs and bitmap, tag runs and tag list, with and without payload.
pub(crate) fn sample_batches() -> Vec<BatchMeta> {
    let batch = |pages: Vec<u64>, tag: fn(u64) -> u8| {
        let tags: Vec<u8> = pages.iter().map(|&page| tag(page)).collect();
        let lens: Vec<u16> =
            tags.iter().map(|&tag| fixed_payload_len(tag).unwrap_or(100 + u16::from(tag))).collect();
        let payload_len = lens.iter().copied().map(usize::from).sum();
        let plain_hash = 0xfedc_ba98_7654_3210;
        BatchMeta { epoch: 1, region: 4, pages, tags, lens, slots: Vec::new(), plain_hash, payload_len }
    };
    vec![
        batch((0..256).collect(), |_| 0),
        batch(vec![(1 << 20) - 1], |_| 2),
        batch((0..40).map(|i| 1000 + 2 * i).collect(), |page| (page % 8 / 2) as u8),
        batch((0..40).map(|i| i * 1000).collect(), |page| if page < 20_000 { 4 } else { 6 }),
        batch((0..30).chain(60..64).collect(), |page| 3 + (page % 4) as u8),
    ]
}

/// A reader that stands behind the opening of a connection.
pub(crate) fn open_reader(channel: Channel, direction: Direction) -> (FrameReader, FrameWriter) {
    let (mut reader, opening) = match direction {
        Direction::ToDestination => {
            let role = if channel == Channel::Control { Role::Control } else { Role::Data { index: 0 } };
            (FrameReader::accepting(Limits::default()), Message::Hello(Hello::new(role, SESSION)))
        }
        Direction::ToSource => {
            (FrameReader::opening(channel, Limits::default()), Message::HelloAck { version: 1 })
        }
    };
    let mut writer = FrameWriter::new();
    let mut frame = Vec::new();
    writer.control(&opening, &mut frame).unwrap();
    assert_eq!(read(&mut reader, &frame).unwrap(), opening);
    (reader, writer)
}

/// Reads one frame that is no batch, as a receiver would.
pub(crate) fn read(reader: &mut FrameReader, frame: &[u8]) -> Result<Message, WireError> {
    let (header, body) = frame.split_first_chunk::<HEADER_LEN>().expect("a whole header");
    let header = reader.header(header)?;
    reader.message(&header, &body[..header.body_len()])
}

/// Header and meta of a batch, right behind the opening of a data connection, and the reader that expects it.
pub(crate) fn batch_frame(meta: &BatchMeta) -> (FrameReader, Vec<u8>) {
    let (reader, mut writer) = open_reader(Channel::Data, Direction::ToDestination);
    let mut frame = Vec::new();
    writer.batch_prefix(&meta.view(), meta.payload_len, &mut frame).unwrap();
    (reader, frame)
}

/// Reads header and meta of a batch.
pub(crate) fn read_batch(
    reader: &mut FrameReader,
    frame: &[u8],
    session: &Session,
    out: &mut BatchMeta,
) -> Result<(), WireError> {
    let (header, meta) = frame.split_first_chunk::<HEADER_LEN>().expect("a whole header");
    let header = reader.header(header)?;
    reader.batch_meta(&header, &meta[..header.meta_len()], session, out)
}

/// Text that survives as it is.
fn text() -> impl Strategy<Value = String> {
    "\\PC{0,200}".prop_filter("fits", |text| text.len() <= 1024 && !text.contains(misleads))
}

fn offers() -> impl Strategy<Value = Offer> {
    let regions = vec((any::<u32>(), 1u64..1 << 20), 1..=64).prop_map(|mut regions| {
        regions.sort_unstable();
        regions.dedup_by_key(|region| region.0);
        let region = |(id, pages)| Region { id, name: format!("ram/{id:x}"), pages };
        regions.into_iter().map(region).collect()
    });
    (
        ("[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", regions, any::<u16>(), any::<u32>(), 1..=4096u32),
        (1..=64u16, any::<bool>(), any::<bool>(), any::<u32>(), vec(any::<u8>(), 0..5000)),
    )
        .prop_map(|(first, second)| {
            let (vm_name, regions, encodings, history_slots, max_batch_pages) = first;
            let (connections, pipeline, verify, downtime_limit_ms, machine) = second;
            Offer {
                vm_name,
                page_size: 4096,
                regions,
                encodings: encodings | 4,
                history_slots,
                max_batch_pages,
                connections,
                pipeline,
                verify,
                downtime_limit_ms,
                machine,
            }
        })
}

/// Any valid message.
pub(crate) fn messages() -> impl Strategy<Value = Message> {
    let hello = (1..100u16, 0..100u16, prop::option::of(0..64u16), any::<[u8; 16]>()).prop_map(
        |(min_version, more, index, session)| {
            let role = index.map_or(Role::Control, |index| Role::Data { index });
            Message::Hello(Hello { min_version, max_version: min_version + more, role, session })
        },
    );
    let accept =
        (any::<u16>(), any::<u32>(), 1..=4096u32).prop_map(|(encodings, history_slots, max_batch_pages)| {
            Message::Accept(Accept { encodings: encodings | 4, history_slots, max_batch_pages })
        });
    let piece = (vec(any::<u8>(), 1..3000), 0..1000u64, 0..1000u64).prop_map(|(bytes, offset, more)| {
        Message::DeviceState { total_len: offset + bytes.len() as u64 + more, offset, bytes }
    });
    let state_len = 0..=pagewarp_wire::MAX_STATE_LEN;
    prop_oneof![
        hello,
        any::<u16>().prop_map(|version| Message::HelloAck { version }),
        offers().prop_map(Message::Offer),
        accept,
        any::<(u32, u64)>().prop_map(|(epoch, pages)| Message::EpochStart { epoch, pages }),
        any::<(u32, u64, u64)>().prop_map(|(epoch, batches, pages)| Message::Barrier {
            epoch,
            batches,
            pages
        }),
        any::<u32>().prop_map(|epoch| Message::EpochDone { epoch }),
        any::<(u64, u64, u64)>().prop_map(|(batches, wire_bytes, pages)| Message::Ack(Ack {
            batches,
            wire_bytes,
            pages
        })),
        piece,
        (state_len.clone(), any::<u64>()).prop_map(|(len, xxh3)| Message::StateEnd { len, xxh3 }),
        (any::<u32>(), state_len, any::<u64>()).prop_map(|(epoch, state_len, state_hash)| Message::Prepare {
            epoch,
            state_len,
            state_hash
        }),
        Just(Message::Ready),
        Just(Message::Commit),
        vec(any::<u8>(), 0..3000).prop_map(|report| Message::Running { report }),
        (any::<u32>(), any::<u64>(), vec(any::<u64>(), 1..500))
            .prop_map(|(region, first_page, digests)| Message::Digests { region, first_page, digests }),
        Just(Message::DigestsEnd),
        Just(Message::Bye),
        text().prop_map(|reason| Message::Cancel { reason }),
        (any::<u16>(), text())
            .prop_map(|(code, message)| Message::Error { code: ErrorCode::from_number(code), message }),
        any::<u64>().prop_map(|id| Message::Ping { id }),
        any::<u64>().prop_map(|id| Message::Pong { id }),
        (any::<u32>(), any::<u32>(), prop::collection::btree_set(any::<u64>(), 1..300), text()).prop_map(
            |(epoch, region, pages, reason)| Message::Damaged {
                epoch,
                region,
                pages: pages.into_iter().collect(),
                reason
            }
        ),
    ]
}

/// Any valid batch of [`session_with_history`]`(5000)` or, without slots, of [`session`].
pub(crate) fn batches(with_slots: bool) -> impl Strategy<Value = BatchMeta> {
    // Steps between pages decide the layout: mostly one, mostly a few, or far.
    let step = prop_oneof![Just(1..2u64), Just(1..4), Just(1..4000)];
    let page = step.prop_flat_map(|steps| vec((steps, 0..7u8, 1..4096u16), 1..=256));
    (any::<u32>(), 0..1000u64, page, any::<u64>(), 0..1000u32, any::<bool>()).prop_map(
        move |(epoch, first, entries, plain_hash, first_slot, same_tag)| {
            let mut meta = BatchMeta { epoch, region: 4, plain_hash, ..BatchMeta::default() };
            let mut page = first;
            for (i, (step, tag, len)) in (0u32..).zip(entries) {
                let tag = if same_tag { meta.tags.first().copied().unwrap_or(tag) } else { tag };
                meta.pages.push(page);
                meta.tags.push(tag);
                meta.lens.push(fixed_payload_len(tag).unwrap_or(len));
                if with_slots {
                    let slot = (first_slot + i * 7) % 5000;
                    meta.slots.push(if i % 5 == 4 { pagewarp_wire::NO_SLOT } else { slot });
                }
                page += step;
            }
            meta.payload_len = meta.lens.iter().copied().map(usize::from).sum();
            meta
        },
    )
}
