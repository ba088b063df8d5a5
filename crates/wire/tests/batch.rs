//! Batches: how little their meta costs, what is refused, and that reading them allocates nothing once warm.

mod support;

use pagewarp_wire::{
    BatchMeta, BatchView, Channel, Direction, FrameWriter, NO_SLOT, Region, Session, WireError,
};
use support::{batch_frame, open_reader, read_batch, sample_batches, session, session_with_history};

fn zero_batch(pages: std::ops::Range<u64>) -> BatchMeta {
    let count = (pages.end - pages.start) as usize;
    BatchMeta {
        region: 4,
        pages: pages.collect(),
        tags: vec![0; count],
        lens: vec![0; count],
        ..BatchMeta::default()
    }
}

/// What the writer says about a batch.
fn write(change: impl FnOnce(&mut BatchMeta)) -> Result<(), WireError> {
    let mut meta = sample_batches().remove(4);
    change(&mut meta);
    let mut out = b"before".to_vec();
    let result = FrameWriter::new().batch_prefix(&meta.view(), meta.payload_len, &mut out);
    assert!(result.is_ok() || out == b"before", "a refused batch leaves nothing behind");
    result
}

/// What the reader says about a valid batch of another session.
fn read(meta: &BatchMeta, session: &Session) -> Result<(), WireError> {
    let (mut reader, frame) = batch_frame(meta);
    read_batch(&mut reader, &frame, session, &mut BatchMeta::default())
}

#[track_caller]
fn malformed(result: Result<(), WireError>, of: &str) {
    match result {
        Err(WireError::Malformed { what, .. }) if what == of => {}
        other => panic!("expected a malformed {of}, got {other:?}"),
    }
}

#[test]
fn zero_pages_cost_next_to_nothing() {
    let mut writer = FrameWriter::new();
    let mut bytes = 0;
    let (total, step) = (1u64 << 20, 256);
    for first in (0..total).step_by(step as usize) {
        let mut out = Vec::new();
        writer.batch_prefix(&zero_batch(first..first + step).view(), 0, &mut out).unwrap();
        bytes += out.len();
    }
    let per_page = bytes as f64 / total as f64;
    assert!(per_page < 0.3, "a 4 GiB VM of zeros costs {bytes} bytes, {per_page} a page");
}

#[test]
fn dense_and_sparse_pages_cost_little() {
    // Every other page: a bitmap. Every hundredth: runs of one. Both with the same tag, 2 bytes of length a page.
    for (stride, most) in [(2u64, 2.9), (100, 4.5)] {
        let pages: Vec<u64> = (0..256).map(|i| i * stride).collect();
        let view = BatchView {
            epoch: 0,
            region: 4,
            pages: &pages,
            tags: &[4; 256],
            lens: &[100; 256],
            slots: &[],
            plain_hash: 0,
        };
        let mut out = Vec::new();
        FrameWriter::new().batch_prefix(&view, 25600, &mut out).unwrap();
        let per_page = out.len() as f64 / 256.0;
        assert!(per_page < most, "stride {stride}: {per_page} bytes a page");
    }
}

#[test]
fn reading_allocates_nothing_once_warm() {
    let session = session_with_history(5000);
    let (mut reader, mut writer) = open_reader(Channel::Data, Direction::ToDestination);
    let mut out = BatchMeta::default();
    let mut warm = None;
    for round in 0..4 {
        for mut meta in sample_batches() {
            meta.slots = (0..meta.pages.len() as u32).collect();
            let mut frame = Vec::new();
            writer.batch_prefix(&meta.view(), meta.payload_len, &mut frame).unwrap();
            read_batch(&mut reader, &frame, &session, &mut out).unwrap();
            assert_eq!(out, meta);
        }
        let buffers = (out.pages.as_ptr(), out.tags.as_ptr(), out.lens.as_ptr(), out.slots.as_ptr());
        assert!(round == 0 || warm == Some(buffers), "the buffers stay where they are");
        warm = Some(buffers);
    }
    assert!(out.pages.capacity() <= 512, "buffers grow to the largest batch, not beyond what doubling gives");
}

#[test]
fn writer_refuses_what_is_wrong() {
    assert_eq!(write(|_| {}), Ok(()));
    malformed(write(|meta| *meta = zero_batch(3..3)), "a Batch");
    malformed(write(|meta| meta.pages.swap(1, 2)), "the pages of a Batch");
    malformed(write(|meta| meta.pages[1] = meta.pages[0]), "the pages of a Batch");
    malformed(write(|meta| meta.tags.truncate(5)), "a Batch");
    malformed(write(|meta| meta.slots.push(1)), "a Batch");
    malformed(write(|meta| meta.payload_len += 1), "the payload of a Batch");
    malformed(write(|meta| meta.tags[0] = 2), "payload length of a page");
    malformed(
        write(|meta| {
            meta.payload_len += 4096 - usize::from(meta.lens[0]);
            meta.lens[0] = 4096;
        }),
        "payload length of a page",
    );
    let too_many = write(|meta| *meta = zero_batch(0..4097));
    assert_eq!(too_many, Err(WireError::TooLarge { what: "a Batch in pages", seen: 4097, limit: 4096 }));
}

#[test]
fn reader_refuses_what_was_not_agreed() {
    let meta = sample_batches().remove(4);
    assert_eq!(read(&meta, &session()), Ok(()));
    malformed(read(&BatchMeta { region: 5, ..meta.clone() }, &session()), "region of a Batch");
    malformed(read(&meta, &Session { encodings: 0b11_0111, ..session() }), "tag of a page");
    malformed(read(&meta, &session_with_history(8)), "a Batch");
    let small = Session { regions: vec![Region { id: 4, name: "high".into(), pages: 63 }], ..session() };
    malformed(read(&meta, &small), "a page of a Batch");
    assert!(matches!(
        read(&meta, &Session { max_batch_pages: 33, ..session() }),
        Err(WireError::TooLarge { what: "a Batch in pages", seen: 34, limit: 33 })
    ));

    let slots = |first: u32| BatchMeta { slots: (first..first + 34).collect(), ..meta.clone() };
    assert_eq!(read(&slots(0), &session_with_history(34)), Ok(()));
    malformed(read(&slots(0), &session()), "a Batch");
    malformed(read(&slots(1), &session_with_history(34)), "slot of a page");
    let mut twice = slots(0);
    twice.slots[3] = 20;
    malformed(read(&twice, &session_with_history(34)), "slots of a Batch");
    let unused = BatchMeta { slots: vec![NO_SLOT; 34], ..meta };
    assert_eq!(read(&unused, &session_with_history(34)), Ok(()), "any number of pages may be without a slot");
}

#[test]
fn epochs_of_a_data_connection_are_kept_apart() {
    use pagewarp_wire::{DataReceiver, DataSender, Message};
    let (mut sender, mut receiver) = (DataSender::new(), DataReceiver::new());
    let batch = |epoch| BatchMeta { epoch, ..zero_batch(0..10) };

    sender.batch(0, 10).unwrap();
    receiver.batch(&batch(0)).unwrap();
    malformed(sender.batch(1, 10), "epoch on a data connection");
    malformed(receiver.batch(&batch(1)), "epoch on a data connection");
    malformed(
        receiver.clone().barrier(&Message::Barrier { epoch: 0, batches: 2, pages: 10 }).map(drop),
        "counts of a Barrier",
    );
    malformed(
        receiver.clone().barrier(&Message::Barrier { epoch: 0, batches: 1, pages: 9 }).map(drop),
        "counts of a Barrier",
    );
    malformed(
        receiver.clone().barrier(&Message::Barrier { epoch: 1, batches: 1, pages: 10 }).map(drop),
        "epoch on a data connection",
    );
    assert!(matches!(receiver.clone().barrier(&Message::Ready), Err(WireError::Unexpected { .. })));

    assert_eq!(receiver.barrier(&sender.barrier().unwrap()), Ok(0));
    malformed(receiver.batch(&batch(0)), "epoch on a data connection");
    assert_eq!(receiver.barrier(&sender.barrier().unwrap()), Ok(1), "an epoch may be empty");
    assert_eq!(receiver.epoch(), 2);
    receiver.batch(&batch(2)).unwrap();
}
