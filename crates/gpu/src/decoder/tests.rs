//! The kernels without the validation before them: whatever they are told, they stay within bounds, and decode what the CPU
//! decodes.

use std::ops::Range;

use pagewarp_codec::{Encoding, EncodingSet, PAGE_SIZE, Page, PageEncoder, Simd, decode_page};
use pagewarp_testkit::image::{Mutation, PageKind, mutate, page};
use pagewarp_testkit::rng::SplitMix64;

use super::*;
use crate::backend::GpuConfig;
use crate::decoder::lane::DECODED;
use crate::decoder::plan::{Copied, Entry, NO_BASE};
use crate::test_support::{assert_no_complaints, software_adapter};

/// Pages of a batch. All their payload and all bases are uploaded each time, so that what is in the buffers is known.
const PAGES: usize = 64;
const PAYLOAD: usize = PAGES * PAGE_SIZE;
/// The status of a page that does not decode.
const BAD: u32 = 2;

fn lane() -> Lane {
    let gpu = Gpu::open(&software_adapter(), GpuConfig::default()).expect("the software device opens");
    let kernels = Arc::new(DecodeKernels::new(&gpu).expect("the kernels compile"));
    Lane::new(&gpu, &kernels, PAGES, PAGES, None).expect("there is memory")
}

/// Runs the kernels over a table, whatever is in it.
fn run(lane: &mut Lane, entries: &[Entry], payload: &[u8], bases: &[Page]) -> Vec<(u32, Page)> {
    assert_eq!((payload.len(), bases.len()), (PAYLOAD, PAGES));
    lane.plan.entries = entries.to_vec();
    lane.plan.uploads = (0..PAGES).collect();
    lane.plan.copies = vec![Copied { from: 0, to: 0, bytes: PAYLOAD as u64 }];
    lane.write_payload(payload).expect("the device works");
    lane.start(payload.len(), bases, true).expect("the device works");
    let gpu = lane.gpu();
    gpu.wait_for(|| lane.is_ready()).expect("the device finishes");
    lane.take_raw()
}

/// What must come of a row of the table: a page, or nothing.
fn expected([tag, len, offset, base]: Entry, payload: &[u8], bases: &[Page]) -> Option<Page> {
    let encoding = Encoding::from_tag(u8::try_from(tag).ok()?)?;
    let end = offset.checked_add(len)? as usize;
    let payload = payload.get(offset as usize..end)?;
    let mut page = Page::ZERO;
    decode_page(Simd::detect(), encoding, payload, bases.get(base as usize), &mut page).ok()?;
    Some(page)
}

/// Counts pages that decoded and that did not.
#[derive(Debug, Default)]
struct Seen {
    good: usize,
    bad: usize,
}

fn check(lane: &mut Lane, entries: &[Entry], payload: &[u8], bases: &[Page], seen: &mut Seen) {
    for (index, (status, page)) in run(lane, entries, payload, bases).into_iter().enumerate() {
        let entry = entries[index];
        match expected(entry, payload, bases) {
            Some(expected) => {
                assert_eq!(status, DECODED, "row {entry:?} decodes");
                assert!(page == expected, "row {entry:?} decodes to another page");
                seen.good += 1;
            }
            None => {
                assert_eq!(status, BAD, "row {entry:?} does not decode");
                seen.bad += 1;
            }
        }
    }
}

/// A valid table of pages of all kinds and encodings, its payload and its bases.
fn valid(rng: &mut SplitMix64) -> (Vec<Entry>, Vec<u8>, Vec<Page>) {
    let (mut entries, mut payload, mut bases) = (Vec::new(), Vec::new(), Vec::new());
    for index in 0..PAGES {
        let base = page(PageKind::ALL[rng.index(PageKind::ALL.len())], rng);
        let mut page = base;
        let change = [
            Mutation::Nothing,
            Mutation::Counter,
            Mutation::Bytes(1 + rng.index(200)),
            Mutation::Share(rng.unit()),
            Mutation::Run(rng.index(PAGE_SIZE)),
            Mutation::Replace(PageKind::ALL[rng.index(PageKind::ALL.len())]),
        ][rng.index(6)];
        mutate(&mut page, change, rng);
        let only = EncodingSet::of(&[Encoding::ALL[rng.index(Encoding::ALL.len())]]);
        let start = payload.len();
        let encoding = PageEncoder::new(Simd::detect(), only).expect("detected").encode(
            &page,
            Some(&base),
            &mut payload,
        );
        let place = if encoding.needs_base() { index as u32 } else { NO_BASE };
        entries.push([u32::from(encoding.tag()), (payload.len() - start) as u32, start as u32, place]);
        bases.push(base);
    }
    payload.resize(PAYLOAD, 0xee);
    (entries, payload, bases)
}

#[test]
fn the_kernels_decode_what_the_cpu_decodes() {
    let (mut lane, mut rng, mut seen) = (lane(), SplitMix64::new(1), Seen::default());
    for _ in 0..20 {
        let (entries, payload, bases) = valid(&mut rng);
        check(&mut lane, &entries, &payload, &bases, &mut seen);
    }
    assert_eq!((seen.good, seen.bad), (20 * PAGES, 0));
    assert_no_complaints();
}

/// A number of any size, often one at an edge.
fn any_number(rng: &mut SplitMix64) -> u32 {
    let edges = [0, 1, 16, 17, 4095, 4096, 4097, PAYLOAD as u32, PAYLOAD as u32 - 1, 1 << 31, u32::MAX];
    match rng.below(4) {
        0 => edges[rng.index(edges.len())],
        1 => edges[rng.index(edges.len())].wrapping_sub(rng.below(4) as u32),
        2 => rng.below(PAYLOAD as u64) as u32,
        _ => rng.next_u64() as u32,
    }
}

fn scribble(bytes: &mut [u8], range: Range<usize>, rng: &mut SplitMix64) {
    if range.is_empty() {
        return;
    }
    for _ in 0..1 + rng.index(3) {
        let at = range.start + rng.index(range.len());
        match rng.below(4) {
            0 => bytes[at] = rng.byte(),
            1 => bytes[at] ^= 1 << rng.below(8),
            2 => bytes[at] = [0, 0xff][rng.index(2)],
            _ => rng.fill(&mut bytes[at..range.end]),
        }
    }
}

#[test]
fn corrupted_tables_and_payloads_are_rejected_or_decode_as_on_the_cpu() {
    let (mut lane, mut rng, mut seen) = (lane(), SplitMix64::new(2), Seen::default());
    for round in 0..160 {
        let (mut entries, mut payload, bases) = valid(&mut rng);
        for entry in &mut entries {
            let range = entry[2] as usize..(entry[2] + entry[1]) as usize;
            match rng.below(8) {
                0..4 => scribble(&mut payload, range, &mut rng),
                4 => entry[0] = rng.below(8) as u32,
                5 => entry[rng.index(4)] = any_number(&mut rng),
                6 => entry[1] = rng.below(4097) as u32,
                _ => *entry = std::array::from_fn(|_| any_number(&mut rng)),
            }
        }
        if round % 8 == 0 {
            rng.fill(&mut payload);
        }
        check(&mut lane, &entries, &payload, &bases, &mut seen);
    }
    assert!(seen.good > 500 && seen.bad > 5_000, "{seen:?}");
    assert_no_complaints();
}

#[test]
fn sparse_payloads_are_judged_as_the_cpu_does_at_every_length_and_place() {
    let (mut lane, mut rng, mut seen) = (lane(), SplitMix64::new(3), Seen::default());
    for _ in 0..40 {
        let (mut payload, mut entries) = (Vec::new(), Vec::new());
        while entries.len() < PAGES {
            let mut page = Page::ZERO;
            mutate(&mut page, Mutation::Bytes(1 + rng.index(120)), &mut rng);
            // Any place: the first byte is at every distance from a word.
            payload.resize(payload.len() + rng.index(7), 0xff);
            let start = payload.len();
            let sparse = EncodingSet::of(&[Encoding::Sparse]);
            let mut encoder = PageEncoder::new(Simd::detect(), sparse).expect("detected");
            assert_eq!(encoder.encode(&page, None, &mut payload), Encoding::Sparse);
            let (mut len, end) = ((payload.len() - start) as u32, payload.len());
            let masks = start..(start + 8 + 64 * 8).min(end);
            match rng.below(4) {
                0 => {}
                1 => len = len.wrapping_add_signed(rng.below(5) as i32 - 2),
                2 => scribble(&mut payload, masks, &mut rng),
                _ => {
                    let at = end - 1 - rng.index(8).min(end - start - 1);
                    payload[at] = 0;
                }
            }
            entries.push([3 + rng.below(2) as u32, len, start as u32, rng.below(PAGES as u64 + 1) as u32]);
        }
        payload.resize(PAYLOAD, 0);
        let bases: Vec<_> = (0..PAGES).map(|_| page(PageKind::Random, &mut rng)).collect();
        check(&mut lane, &entries, &payload, &bases, &mut seen);
    }
    assert!(seen.good > 500 && seen.bad > 500, "{seen:?}");
    assert_no_complaints();
}
