//! The reader of the migration stream, on what the installed QEMU sends.

#![allow(unreachable_pub, reason = "helper modules of a test")]

mod support;

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use pagewarp_guest::{GuestConfig, WriteRate};
use pagewarp_qemu::segment::Place;
use pagewarp_qemu::stream::{Blocks, ConnectionKind};
use pagewarp_testkit::rng::SplitMix64;

use support::drive::{self, Output, WIDE};
use support::source::{Memory, Source};

const MEMORY_MIB: u64 = 96;
const PAGES: u64 = MEMORY_MIB << 8;

/// One machine at a time: together they would slow each other down.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

fn boot(memory: Memory) -> Source {
    let config = GuestConfig {
        write_rate: WriteRate::PagesPerS(3000),
        fill_percent: Some(40),
        ..GuestConfig::default()
    };
    Source::boot(MEMORY_MIB, memory, &config)
}

/// Reads a recording, at once and as it might have come.
fn read(blocks: &Blocks, stream: &[u8]) -> Output {
    let whole = drive::read_whole(blocks, stream);
    assert_eq!(whole.raw, None);
    let mut rng = SplitMix64::new(3);
    let again = drive::read(blocks, stream, &WIDE, || 1 + rng.index(200_000), || false);
    assert!(again.ops == whole.ops && again.pages == whole.pages);
    assert_eq!((&again.raw, &again.boundaries), (&whole.raw, &whole.boundaries));

    // Flushes may cut pages, but no more than one each.
    let (mut rng, mut flushes) = (SplitMix64::new(4), 0);
    let flushed = drive::read(
        blocks,
        stream,
        &WIDE,
        || 150_000,
        || {
            let flush = rng.below(4) == 0;
            flushes += usize::from(flush);
            flush
        },
    );
    assert_eq!(flushed.raw, None);
    assert!(flushed.pages.len() + flushes >= whole.pages.len());
    whole
}

/// Collects the last contents of each page.
fn collect(contents: &mut HashMap<Place, (u32, Vec<u8>)>, output: &Output) {
    for ((at, place), &epoch) in output.pages.iter().zip(&output.epochs) {
        let place = place.expect("every page has a place");
        let page = &output.bytes[*at as usize..][..4096];
        match contents.get(&place) {
            Some((newer, _)) if *newer > epoch => {}
            _ => drop(contents.insert(place, (epoch, page.to_vec()))),
        }
    }
}

/// The pages that were found are those of the guest.
fn compare(block: u32, contents: &HashMap<Place, (u32, Vec<u8>)>, memory: &[u8]) {
    let mut compared = 0;
    for (number, page) in memory.chunks(4096).enumerate() {
        // What the processor sees from 640 KiB to 1 MiB is not this memory.
        if (0xa0..0x100).contains(&number) || page.iter().all(|&b| b == 0) {
            continue;
        }
        let found = contents.get(&Place { block, page: number as u64 });
        assert!(found.is_some_and(|(_, found)| found == page), "page {number:#x}");
        compared += 1;
    }
    assert!(compared as u64 > PAGES / 4, "{compared} pages with contents");
}

fn check_main(blocks: &Blocks, stream: &[u8]) -> Output {
    let output = read(blocks, stream);
    assert_eq!(output.kind, Some(ConnectionKind::Main));
    let end = output.ram_ended_at.expect("the end of ram");
    let tail = stream.len() as u64 - end;
    println!(
        "{} bytes: {} pages, {} zero records, {} boundaries, a tail of {tail}",
        stream.len(),
        output.pages.len(),
        output.zeros.len(),
        output.boundaries.len(),
    );
    assert!(tail < 400_000, "the rest is states of devices");
    output
}

/// What is neither page nor zero record before the tail is next to nothing.
fn check_all_found(output: &Output) {
    assert!(output.pages.len() as u64 > PAGES / 4);
    assert!((output.pages.len() + output.zeros.len()) as u64 >= PAGES * 9 / 10);
    let found = 4104 * output.pages.len() as u64 + 9 * output.zeros.len() as u64;
    let end = output.ram_ended_at.expect("the end of ram");
    assert!(end - found < 20_000, "{} bytes beside pages", end - found);
}

#[test]
fn a_plain_migration() {
    let _alone = alone();
    for capabilities in [&[][..], &["return-path"], &["postcopy-ram"]] {
        let mut source = boot(Memory::Private);
        let streams = source.record(capabilities);
        let blocks = Blocks::default();
        let output = check_main(&blocks, &streams[0]);
        check_all_found(&output);
        assert_eq!(output.return_path, !capabilities.is_empty());
        assert!(!output.postcopy);
        let mut contents = HashMap::new();
        collect(&mut contents, &output);
        compare(blocks.number(b"pc.ram").expect("few blocks"), &contents, &source.memory());
    }
}

#[test]
fn a_migration_over_several_connections() {
    let _alone = alone();
    let mut source = boot(Memory::Private);
    let streams = source.record(&["multifd"]);
    let blocks = Blocks::default();
    let main = check_main(&blocks, &streams[0]);
    assert!(main.zeros.len() as u64 > PAGES / 4, "zero pages are on the main connection");
    let mut contents = HashMap::new();
    for stream in &streams[1..] {
        let output = read(&blocks, stream);
        assert_eq!(output.kind, Some(ConnectionKind::Multifd));
        assert!(output.last_epoch > 1);
        println!("{} bytes: {} pages, {} epochs", stream.len(), output.pages.len(), output.last_epoch);
        collect(&mut contents, &output);
    }
    compare(blocks.number(b"pc.ram").expect("few blocks"), &contents, &source.memory());
}

#[test]
fn a_migration_that_leaves_shared_memory_alone() {
    let _alone = alone();
    for ignore in [true, false] {
        let mut source = boot(Memory::Shared);
        let capabilities: &[&str] = if ignore { &["x-ignore-shared"] } else { &[] };
        let streams = source.record(capabilities);
        let blocks = Blocks::default();
        let output = check_main(&blocks, &streams[0]);
        if ignore {
            assert!((output.pages.len() as u64) < 1000);
        } else {
            check_all_found(&output);
            let mut contents = HashMap::new();
            collect(&mut contents, &output);
            compare(blocks.number(b"mem").expect("few blocks"), &contents, &source.memory());
        }
    }
}
