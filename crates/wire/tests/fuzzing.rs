//! The fuzz targets of this crate under proptest: what runs where there is no fuzzer.

mod support;

use pagewarp_wire::HEADER_LEN;
use pagewarp_wire::fuzzing::{fuzz_batch_meta, fuzz_frame, fuzz_session};
use proptest::collection::vec;
use proptest::prelude::*;

/// Some bytes of `bytes` replaced.
fn mutate(mut bytes: Vec<u8>, changes: &[(prop::sample::Index, u8)]) -> Vec<u8> {
    for (at, byte) in changes {
        if !bytes.is_empty() {
            let at = at.index(bytes.len());
            bytes[at] = *byte;
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 20 } else { 4000 }))]

    #[test]
    fn any_bytes_as_frames(data in vec(any::<u8>(), 0..300)) {
        fuzz_frame(&data);
    }

    #[test]
    fn changed_messages(
        message in support::messages(),
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        mode in 0..8u8,
    ) {
        let mut frame = Vec::new();
        pagewarp_wire::FrameWriter::new().control(&message, &mut frame).unwrap();
        let stream = mutate(frame.clone(), &changes);
        fuzz_frame(&[&[0], &stream[..]].concat());
        let body = mutate(frame.split_off(HEADER_LEN), &changes);
        fuzz_frame(&[&[mode | 1, message.kind().byte()], &body[..]].concat());
    }

    #[test]
    fn any_messages_in_any_order(data in vec(any::<u8>(), 0..300)) {
        fuzz_session(&data);
    }

    #[test]
    fn any_bytes_as_batch_meta(data in vec(any::<u8>(), 0..300)) {
        fuzz_batch_meta(&data);
    }

    #[test]
    fn changed_batch_meta(
        slots in any::<bool>(),
        meta in any::<bool>().prop_flat_map(support::batches),
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
    ) {
        let (_, frame) = support::batch_frame(&pagewarp_wire::BatchMeta { region: 3, ..meta });
        let meta = mutate(frame[HEADER_LEN..].to_vec(), &changes);
        fuzz_batch_meta(&[&[u8::from(slots)], &meta[..]].concat());
    }
}
