//! The reader of the migration stream, on streams of which it is known what they hold.

#![allow(unreachable_pub, reason = "helper modules of a test")]

mod support;

use pagewarp_qemu::stream::{Blocks, ConnectionKind, Limits};
use pagewarp_testkit::rng::SplitMix64;
use proptest::collection::vec;
use proptest::prelude::*;

use support::drive::{self, Output, WIDE};
use support::main_stream::{self, Options};
use support::multifd_stream::{self, Packet, some_packets};
use support::{Model, VERSIONS, Version, Writer};

const NAMES: [&str; 4] = ["pc.ram", "0000:00:02.0/vga.vram", "/rom@etc/acpi/tables", "huge"];

/// Chunks of random lengths, most of them short.
fn chunks(seed: u64) -> impl FnMut() -> usize {
    let mut rng = SplitMix64::new(seed);
    move || {
        let most = [3, 40, 700, 9000, 70_000][rng.index(5)];
        1 + rng.index(most)
    }
}

/// Reads the stream at once, in chunks of 1 and 7 bytes, and with narrow limits: the same is found each time.
fn check(writer: &Writer, what: &dyn std::fmt::Debug) -> Output {
    let blocks = Blocks::default();
    let whole = drive::read_whole(&blocks, &writer.bytes);
    let model = whole.model(&blocks, &NAMES);
    assert!(model.pages == writer.model.pages, "the pages of {what:?}");
    assert!(model.zeros == writer.model.zeros, "the zero records of {what:?}");
    assert_eq!(model.boundaries, writer.model.boundaries, "{what:?}");

    let narrow = Limits { pages: 3, literal_bytes: 2000 };
    for (limits, len) in [(WIDE, 1), (WIDE, 7), (narrow, 1), (narrow, 5000)] {
        let again = drive::read(&blocks, &writer.bytes, &limits, || len, || false);
        assert!(again.ops == whole.ops, "{what:?} in chunks of {len} with {limits:?}");
        assert_eq!(again.model(&blocks, &NAMES), model);
        assert_eq!(again.raw, whole.raw);
    }
    whole
}

fn options() -> impl Strategy<Value = Options> {
    (prop::sample::select(&VERSIONS[..]), any::<u64>(), any::<[bool; 12]>()).prop_map(
        |(version, seed, on)| {
            let [
                return_path,
                multifd,
                postcopy,
                shared,
                huge,
                early_state,
                dirty_bitmap,
                vfio,
                disk,
                deltas,
                footers,
                description,
            ] = on;
            // What excludes each other does so here.
            let ignore_shared = shared && !postcopy;
            let multifd = multifd && !(postcopy && version < Version::V10_2);
            Options {
                version,
                seed,
                return_path,
                multifd,
                ignore_shared,
                postcopy,
                huge,
                early_state: early_state && footers,
                dirty_bitmap,
                vfio,
                disk: disk && seed % 4 == 0,
                deltas: deltas && !multifd,
                page_bits: (seed % 3 == 0).then_some(12),
                footers,
                description,
            }
        },
    )
}

/// Records of kinds that take turns need an operation each, and a segment has a limit to them.
#[test]
fn records_of_alternating_kinds_fill_segments_that_the_destination_accepts() {
    const CONTINUE: u64 = 0x20;
    let mut writer = Writer::new(1);
    writer.raw(b"QEVM\0\0\0\x03\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
    writer.u64(1 << 30 | 0x04);
    writer.counted("pc.ram");
    writer.u64(1 << 30);
    writer.u64(0x10);
    writer.raw(b"\x7e\0\0\0\x02\x02\0\0\0\x02");
    writer.u64(0x02);
    writer.counted("pc.ram");
    writer.u8(0);
    for page in 1..10_000u64 {
        writer.u64(page << 12 | CONTINUE | 0x02);
        writer.u8(0);
        // A delta without anything in it, or now and then a page.
        if page % 4 == 0 {
            writer.u64(page << 12 | CONTINUE | 0x08);
            writer.random(4096);
        } else {
            writer.u64(page << 12 | CONTINUE | 0x40);
            writer.raw(&[1, 0, 2, 0, 0]);
        }
    }
    writer.u64(0x10);
    for limits in [WIDE, Limits { pages: 256, literal_bytes: 128 << 10 }] {
        for len in [usize::MAX / 2, 70_001] {
            let output = drive::read(&Blocks::default(), &writer.bytes, &limits, || len, || len > 100_000);
            assert_eq!((output.raw, output.zeros.len(), output.pages.len()), (None, 9_999, 2_499));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn everything_in_a_main_stream_is_found(options in options()) {
        let (writer, tail) = main_stream::write(&options);
        let output = check(&writer, &options);
        prop_assert_eq!(output.kind, Some(ConnectionKind::Main));
        prop_assert_eq!(output.raw, None);
        prop_assert_eq!(output.return_path, options.return_path || options.postcopy);
        prop_assert_eq!(output.postcopy, options.postcopy);
        let footer = if options.footers { 5 } else { 0 };
        prop_assert_eq!(output.ram_ended_at, Some(tail - footer));
    }

    #[test]
    fn everything_in_a_multifd_stream_is_found(version in prop::sample::select(&VERSIONS[..]), seed: u64) {
        let packets = some_packets(version, seed);
        let writer = multifd_stream::write(version, seed, &packets);
        let output = check(&writer, &packets);
        prop_assert_eq!(output.kind, Some(ConnectionKind::Multifd));
        prop_assert_eq!(output.raw, None);
        let syncs = packets.iter().filter(|packet| matches!(packet, Packet::Sync(_))).count();
        prop_assert_eq!(output.last_epoch, syncs as u32);
        let epochs: Vec<u32> = writer
            .model
            .pages
            .iter()
            .map(|(at, _)| writer.model.boundaries.iter().filter(|&boundary| boundary <= at).count() as u32)
            .collect();
        prop_assert_eq!(output.epochs, epochs);
    }

    #[test]
    fn everything_in_a_preempt_stream_is_found(seed: u64) {
        let output = check(&main_stream::preempt(seed), &seed);
        prop_assert_eq!(output.kind, Some(ConnectionKind::Other));
        prop_assert_eq!(output.raw, None);
    }

    #[test]
    fn a_flush_keeps_the_reader_in_step(options in options(), seed: u64, percent in 1..100u64) {
        let (writer, _) = main_stream::write(&options);
        in_step(&writer, seed, percent);
        let multifd = multifd_stream::write(options.version, seed, &some_packets(options.version, seed));
        in_step(&multifd, seed, percent);
        in_step(&main_stream::preempt(seed), seed, percent);
    }

    #[test]
    fn changed_streams_come_out_as_they_went_in(
        options in options(),
        kind in 0..3,
        changes in vec((any::<prop::sample::Index>(), any::<u8>(), 0..4u8), 1..6),
        seed: u64,
        limits in (0..5usize, 0..3000usize),
    ) {
        let writer = match kind {
            0 => main_stream::write(&Options { disk: false, ..options }).0,
            1 => multifd_stream::write(options.version, seed, &some_packets(options.version, seed)),
            _ => main_stream::preempt(seed),
        };
        let mut stream = writer.bytes;
        for (at, byte, how) in changes {
            let at = at.index(stream.len());
            match how {
                0 => stream[at] = byte,
                1 => stream[at] ^= 1 << (byte % 8),
                2 => stream.truncate(at.max(1)),
                _ => drop(stream.splice(at..at, [byte])),
            }
        }
        let limits = Limits { pages: limits.0, literal_bytes: limits.1 };
        let mut rng = SplitMix64::new(seed);
        let mut lengths = chunks(seed);
        drive::read(&Blocks::default(), &stream, &limits, || lengths().max(20), || rng.below(3) == 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_bytes_come_out_as_they_went_in(data in vec(any::<u8>(), 0..600)) {
        pagewarp_qemu::fuzzing::fuzz_stream(&data);
    }

    #[test]
    fn any_bytes_after_a_good_start_come_out_as_they_went_in(
        start in 0..8u8,
        how in any::<[u8; 2]>(),
        data in vec(prop_oneof![Just(0), 0..0x80u8, any::<u8>()], 0..600),
    ) {
        pagewarp_qemu::fuzzing::fuzz_stream(&[&[start], &how[..], &data].concat());
    }
}

/// With flushes at random, every boundary is still found, and every page that no flush cut.
fn in_step(writer: &Writer, seed: u64, percent: u64) {
    let blocks = Blocks::default();
    let (mut rng, mut flushed) = (SplitMix64::new(seed), 0);
    let output = drive::read(&blocks, &writer.bytes, &WIDE, chunks(seed), || {
        let flush = rng.below(100) < percent;
        flushed += usize::from(flush);
        flush
    });
    assert_eq!(output.raw, None);
    let Model { pages, zeros, .. } = output.model(&blocks, &NAMES);
    assert!(pages.iter().all(|page| writer.model.pages.contains(page)), "no page that is none");
    assert!(zeros.iter().all(|zero| writer.model.zeros.binary_search(zero).is_ok()));
    // A flush can cut one packet of up to 128 words, one page or one record.
    assert!(pages.len() + zeros.len() + flushed >= writer.model.pages.len() + writer.model.zeros.len());
    let mut boundaries = output.boundaries;
    boundaries.dedup();
    assert!(boundaries.iter().all(|boundary| writer.model.boundaries.binary_search(boundary).is_ok()));

    // With a flush after every byte nothing is found, but the reader knows where it is.
    let whole = drive::read_whole(&blocks, &writer.bytes);
    let bytes = drive::read(&blocks, &writer.bytes, &WIDE, || 1, || true);
    assert_eq!(bytes.raw, None);
    assert_eq!((bytes.pages.len(), bytes.last_epoch), (0, whole.last_epoch));
    assert_eq!((bytes.ram_ended_at, bytes.postcopy), (whole.ram_ended_at, whole.postcopy));
}

fn plain() -> Options {
    Options::plain(Version::V7_2, 11)
}

fn raw_of(writer: &Writer) -> (String, usize) {
    let output = drive::read_whole(&Blocks::default(), &writer.bytes);
    (output.raw.unwrap_or_default(), output.pages.len())
}

#[test]
fn pages_of_another_size_travel_as_they_are() {
    let (writer, _) = main_stream::write(&Options { page_bits: Some(16), ..plain() });
    assert_eq!(raw_of(&writer), ("pages of 2^16 bytes at byte 26".into(), 0));
    let writer =
        multifd_stream::write(Version::V9_2, 3, &[Packet::Pages(2), Packet::LargePages, Packet::Pages(2)]);
    let (reason, pages) = raw_of(&writer);
    assert!(reason.starts_with("multifd packets for 8 pages at byte "), "{reason}");
    assert_eq!(pages, 2);
}

#[test]
fn compressed_and_unknown_packets_travel_as_they_are() {
    for (packet, expected) in [
        (Packet::Compressed, "multifd pages that QEMU compressed at byte 9600"),
        (Packet::Unknown, "a multifd packet with flags 0x80 at byte 9600"),
    ] {
        let writer = multifd_stream::write(Version::V10_0, 3, &[Packet::Pages(2), packet, Packet::Pages(2)]);
        assert_eq!(raw_of(&writer), (expected.into(), 2));
    }
}

#[test]
fn an_unknown_section_travels_as_it_is() {
    let (mut writer, tail) = main_stream::write(&plain());
    writer.bytes.truncate(tail as usize);
    let pages = writer.model.pages.len();
    writer.raw(b"\x01\0\0\0\x09\x08foo/vfix\0\0\0\0\0\0\0\x01 and so on");
    let (reason, found) = raw_of(&writer);
    assert_eq!(reason, format!("an unknown section 'foo/vfix' of version 1 at byte {tail}"));
    assert_eq!(found, pages);
}

#[test]
fn encrypted_connections_travel_as_they_are() {
    let mut writer = Writer::new(5);
    writer.raw(&[0x16, 3, 1]);
    let blocks = Blocks::default();
    assert_eq!(drive::read_whole(&blocks, &writer.bytes).kind, Some(ConnectionKind::Unknown));
    writer.raw(&[2]);
    writer.random(5000);
    let output = drive::read_whole(&blocks, &writer.bytes);
    assert_eq!(output.kind, Some(ConnectionKind::Other));
    assert_eq!(output.raw.as_deref(), Some("a connection that is neither main nor multifd at byte 0"));
}

#[test]
fn an_early_state_without_an_end_is_given_up() {
    let mut writer = Writer::new(6);
    writer.raw(b"QEVM\0\0\0\x03");
    writer.raw(b"\x04\0\0\0\x2a\x05early\0\0\0\0\0\0\0\x01");
    (0..(1 << 18) + 100).for_each(|_| writer.raw(b"\x7e\0\0\0\x2a"));
    let (reason, _) = raw_of(&writer);
    assert!(reason.starts_with("the state of a device, section 42, without an end at byte "), "{reason}");
}
