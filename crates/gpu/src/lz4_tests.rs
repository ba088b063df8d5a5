//! The two LZ4 kernels, each alone on the software device, against `lz4_flex`, the C library and the CPU encoder.

use std::sync::Arc;
use std::time::Duration;

use pagewarp_codec::{Encoding, EncodingSet, PAGE_SIZE, Page, PageEncoder, Simd};
use pagewarp_testkit::conformance::check_end_of_block;
use pagewarp_testkit::image::{PageKind, mixed_image, page};
use pagewarp_testkit::rng::SplitMix64;
use wgpu::{Buffer, CommandEncoder, ComputePassDescriptor, ComputePipeline};

use crate::backend::GpuConfig;
use crate::device::Gpu;
use crate::kernels;
use crate::test_support::{assert_no_complaints, page_words, run, software_adapter, storage, uniform};

const PAGE_WORDS: usize = PAGE_SIZE / 4;
const NO_BASE: u32 = u32::MAX;
/// What `results` and `status` hold where the kernel writes nothing.
const UNTOUCHED: u32 = 0xabcd;

const DECODED: u32 = 1;
const BAD: u32 = 2;

/// The kernels, ready to run.
struct Kernels {
    gpu: Arc<Gpu>,
    encode: ComputePipeline,
    decode: ComputePipeline,
}

/// One page to encode.
#[derive(Clone, Copy)]
struct Input {
    page: Page,
    base: Page,
    /// The field `lz4` of its result: 0 nothing, 1 the page, 2 the XOR.
    lz4: u32,
    limit: u32,
}

impl Input {
    fn plain(page: Page) -> Input {
        Input { page, base: Page::ZERO, lz4: 1, limit: PAGE_SIZE as u32 }
    }
}

/// One page to decode.
#[derive(Clone)]
struct Block {
    tag: Encoding,
    bytes: Vec<u8>,
    base: u32,
}

impl Block {
    fn plain(bytes: Vec<u8>) -> Block {
        Block { tag: Encoding::Lz4, bytes, base: NO_BASE }
    }
}

/// What became of a page: its status, and its bytes.
type Decoded = (u32, Page);

fn bytes_of(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

impl Kernels {
    fn open() -> Kernels {
        // A busy machine is not a stalled device.
        let config = GpuConfig { stall_timeout: Duration::from_secs(120), ..GpuConfig::default() };
        let gpu = Gpu::open(&software_adapter(), config).expect("the software device opens");
        let encode = gpu.pipeline(kernels::ENCODE_LZ4).expect("encode kernel");
        let decode = gpu.pipeline(kernels::DECODE_LZ4).expect("decode kernel");
        Kernels { gpu, encode, decode }
    }

    fn dispatch(
        &self,
        commands: &mut CommandEncoder,
        kernel: &ComputePipeline,
        buffers: &[&Buffer],
        groups: usize,
    ) {
        let bindings: Vec<_> =
            (0..).zip(buffers.iter().map(|buffer| buffer.as_entire_buffer_binding())).collect();
        let mut pass = commands.begin_compute_pass(&ComputePassDescriptor::default());
        pass.set_pipeline(kernel);
        pass.set_bind_group(0, &self.gpu.bind_parts(kernel, &bindings), &[]);
        pass.dispatch_workgroups(groups as u32, 1, 1);
    }

    /// Encodes the pages: for each a block, or `None` if the result was left alone.
    fn encode(&self, inputs: &[Input]) -> Vec<Option<(Encoding, Vec<u8>)>> {
        let pages: Vec<Page> = inputs.iter().map(|input| input.page).collect();
        let bases: Vec<Page> = inputs.iter().map(|input| input.base).collect();
        let results: Vec<u32> =
            inputs.iter().flat_map(|input| [UNTOUCHED, input.limit, input.lz4, UNTOUCHED]).collect();
        let buffers = [
            &uniform(&self.gpu, [inputs.len() as u32, 0, 0, 0]),
            &storage(&self.gpu, &page_words(&pages)),
            &storage(&self.gpu, &page_words(&bases)),
            &storage(&self.gpu, &results),
            &storage(&self.gpu, &vec![0; inputs.len() * PAGE_WORDS]),
        ];
        let record = |commands: &mut CommandEncoder| {
            self.dispatch(commands, &self.encode, &buffers, inputs.len());
        };
        let [results, scratch] = run(&self.gpu, record, [buffers[3], buffers[4]]);
        let outcome = |(number, input): (usize, &Input)| {
            let [tag, len, lz4, offset] = results[4 * number..][..4] else { unreachable!("four words") };
            assert_eq!(
                (lz4, offset),
                (input.lz4, UNTOUCHED),
                "page {number}: fields that are not the kernel's"
            );
            if tag == UNTOUCHED {
                assert_eq!(len, input.limit, "page {number}: a length without a tag");
                return None;
            }
            let tag = Encoding::from_tag(tag as u8).expect("a tag");
            let bytes = bytes_of(&scratch[number * PAGE_WORDS..][..PAGE_WORDS]);
            Some((tag, bytes[..len as usize].to_vec()))
        };
        let outcomes = inputs.iter().enumerate().map(outcome).collect();
        assert_no_complaints();
        outcomes
    }

    /// The blocks of these pages; `None` for those that are not shorter than a page.
    fn blocks(&self, pages: &[Page]) -> Vec<Option<Vec<u8>>> {
        let inputs: Vec<Input> = pages.iter().copied().map(Input::plain).collect();
        let without_tag = |(tag, block)| {
            assert_eq!(tag, Encoding::Lz4);
            block
        };
        self.encode(&inputs).into_iter().map(|block| block.map(without_tag)).collect()
    }

    /// Decodes blocks that lie one after another without gaps. Pages hold ones before.
    fn decode(&self, blocks: &[Block], bases: &[Page]) -> Vec<Decoded> {
        let mut payload = Vec::new();
        let mut entries = Vec::new();
        for block in blocks {
            entries.extend([block.tag as u32, block.bytes.len() as u32, payload.len() as u32, block.base]);
            payload.extend(&block.bytes);
        }
        self.decode_entries(&entries, payload, bases)
    }

    fn decode_entries(&self, entries: &[u32], mut payload: Vec<u8>, bases: &[Page]) -> Vec<Decoded> {
        payload.resize(payload.len().next_multiple_of(4).max(4), 0);
        let payload: Vec<u32> = payload.chunks_exact(4).map(bytemuck::pod_read_unaligned).collect();
        let count = entries.len() / 4;
        let buffers = [
            &uniform(&self.gpu, [count as u32, 0, 0, 0]),
            &storage(&self.gpu, entries),
            &storage(&self.gpu, &payload),
            &storage(&self.gpu, &page_words(if bases.is_empty() { &[Page::ZERO] } else { bases })),
            &storage(&self.gpu, &vec![u32::MAX; count * PAGE_WORDS]),
            &storage(&self.gpu, &vec![UNTOUCHED; count]),
        ];
        let record = |commands: &mut CommandEncoder| {
            self.dispatch(commands, &self.decode, &buffers, count);
        };
        let [pages, status] = run(&self.gpu, record, [buffers[4], buffers[5]]);
        assert_no_complaints();
        let page = |words: &[u32]| Page(bytes_of(words).try_into().expect("a page"));
        status.into_iter().zip(pages.chunks_exact(PAGE_WORDS).map(page)).collect()
    }
}

/// What `lz4_flex` makes of a block, if it is one page.
fn flex_decodes(block: &[u8]) -> Option<Page> {
    let mut page = Page::ZERO;
    let len = lz4_flex::block::decompress_into(block, &mut page.0).ok()?;
    (len == PAGE_SIZE).then_some(page)
}

/// Both libraries decode the block to this page, and it follows the rules for the end of a block.
fn assert_block_of(page: &Page, block: &[u8], what: &str) {
    assert_eq!(flex_decodes(block).as_ref(), Some(page), "{what}: lz4_flex");
    let c = lz4::block::decompress(block, Some(PAGE_SIZE as i32));
    assert_eq!(c.ok().as_deref(), Some(&page.0[..]), "{what}: C library");
    assert_eq!(check_end_of_block(block), Ok(()), "{what}");
}

fn pages_of(kind: PageKind, count: usize) -> Vec<Page> {
    let mut rng = SplitMix64::new(3);
    (0..count).map(|_| page(kind, &mut rng)).collect()
}

/// A page made of a piece again and again.
fn repeated(piece: &[u8]) -> Page {
    let mut page = Page::ZERO;
    page.0.iter_mut().zip(piece.iter().cycle()).for_each(|(byte, &of)| *byte = of);
    page
}

/// Pages with one feature each that an encoder or decoder may get wrong.
fn edge_pages() -> Vec<(String, Page)> {
    let mut rng = SplitMix64::new(17);
    let mut random = || page(PageKind::Random, &mut rng);
    let mut pages = vec![
        ("all bytes zero".to_owned(), Page::ZERO),
        ("all bytes 0x61".to_owned(), Page([0x61; PAGE_SIZE])),
        ("incompressible".to_owned(), random()),
    ];
    for period in 2..=40 {
        pages.push((format!("period {period}"), repeated(&random().0[..period])));
    }
    for period in [100, 127, 128, 129, 255, 256, 1000, 2047, 2048, 2049, 4080, 4085] {
        pages.push((format!("period {period}"), repeated(&random().0[..period])));
    }
    // A run of so many equal bytes between incompressible ones, and between runs so many incompressible ones.
    for length in
        [3, 4, 5, 6, 14, 15, 16, 17, 18, 19, 20, 127, 128, 129, 269, 270, 271, 272, 273, 274, 525, 2000]
    {
        let mut run = random();
        run.0[1000..1000 + length].fill(7);
        pages.push((format!("run of {length}"), run));
        let mut literals = Page::ZERO;
        literals.0[1000..1000 + length].copy_from_slice(&random().0[..length]);
        pages.push((format!("{length} literals"), literals));
        // A match of that length far back.
        let mut copy = random();
        copy.0.copy_within(100..100 + length, 2050);
        pages.push((format!("match of {length}"), copy));
        // At the start and at the end of the page.
        let mut ends = random();
        ends.0[..length].fill(9);
        ends.0[PAGE_SIZE - length..].fill(9);
        pages.push((format!("runs of {length} at both ends"), ends));
    }
    // Matches across the borders of what one lane parses.
    for start in (120..136).chain(2040..2056).chain(4060..4086) {
        let mut across = random();
        let length = 40.min(PAGE_SIZE - start);
        across.0.copy_within(10..10 + length, start);
        pages.push((format!("match from {start} on"), across));
    }
    pages
}

#[test]
fn both_libraries_decode_the_blocks_of_every_kind_of_page() {
    let kernels = Kernels::open();
    for kind in PageKind::ALL {
        let pages = pages_of(kind, 24);
        for (number, (page, block)) in pages.iter().zip(kernels.blocks(&pages)).enumerate() {
            if let Some(block) = block {
                assert_block_of(page, &block, &format!("{kind:?} {number}"));
            }
        }
    }
}

#[test]
fn both_libraries_decode_the_blocks_of_edge_cases() {
    let kernels = Kernels::open();
    let (names, pages): (Vec<_>, Vec<_>) = edge_pages().into_iter().unzip();
    for ((name, page), block) in names.iter().zip(&pages).zip(kernels.blocks(&pages)) {
        match block {
            Some(block) => assert_block_of(page, &block, name),
            None => {
                let shortest =
                    lz4::block::compress(&page.0, None, false).expect("the C library encodes").len();
                assert!(
                    shortest >= PAGE_SIZE - 16,
                    "{name}: no block, but the C library has {shortest} bytes"
                );
            }
        }
    }
}

#[test]
fn runs_and_periods_need_one_match() {
    let kernels = Kernels::open();
    let pages: Vec<Page> =
        [1, 2, 3, 4, 7, 8, 16].iter().map(|&period| repeated(&b"qwertyuiopasdfgh"[..period])).collect();
    for (page, block) in pages.iter().zip(kernels.blocks(&pages)) {
        let block = block.expect("a block");
        let flex = lz4_flex::block::compress(&page.0);
        assert!(block.len() <= flex.len(), "{} bytes, lz4_flex {}", block.len(), flex.len());
    }
}

/// Bytes of the pages that `lz4_flex` makes smaller, in its blocks and in the kernel's. A page without a block counts as raw.
fn sizes(kernels: &Kernels, pages: &[Page]) -> (usize, usize) {
    let mut sum = (0, 0);
    for (page, block) in pages.iter().zip(kernels.blocks(pages)) {
        let flex = lz4_flex::block::compress(&page.0).len();
        if flex < PAGE_SIZE {
            sum = (sum.0 + flex, sum.1 + block.map_or(PAGE_SIZE, |block| block.len()));
        }
    }
    sum
}

#[test]
fn blocks_are_about_as_short_as_those_of_lz4_flex() {
    let kernels = Kernels::open();
    let mut sets: Vec<(String, Vec<Page>)> =
        PageKind::ALL.iter().map(|&kind| (format!("{kind:?}"), pages_of(kind, 64))).collect();
    sets.push(("mixed image".to_owned(), mixed_image(1024, 7)));
    let mut total = (0, 0);
    for (name, pages) in sets {
        let (flex, ours) = sizes(&kernels, &pages);
        println!("{name:16} lz4_flex {flex:8}  kernel {ours:8}  {:6.3}", ours as f64 / flex.max(1) as f64);
        assert!(ours * 100 <= flex * 108, "{name}: {ours} bytes, lz4_flex {flex}");
        total = (total.0 + flex, total.1 + ours);
    }
    println!(
        "{:16} lz4_flex {:8}  kernel {:8}  {:6.3}",
        "total",
        total.0,
        total.1,
        total.1 as f64 / total.0 as f64
    );
    assert!(total.1 * 100 <= total.0 * 102, "in total {} bytes, lz4_flex {}", total.1, total.0);
}

#[test]
fn the_same_page_gives_the_same_block() {
    let kernels = Kernels::open();
    let image = mixed_image(128, 21);
    let first = kernels.blocks(&image);
    assert_eq!(first, kernels.blocks(&image));
    // Wherever it is in the batch.
    let reversed: Vec<Page> = image.iter().rev().copied().collect();
    let mut again = kernels.blocks(&reversed);
    again.reverse();
    assert_eq!(first, again);
}

#[test]
fn only_a_block_below_the_limit_is_taken() {
    let kernels = Kernels::open();
    let page = pages_of(PageKind::Text, 1)[0];
    let len = kernels.blocks(&[page])[0].as_ref().expect("text has a block").len() as u32;
    let with_limit = |limit| Input { limit, ..Input::plain(page) };
    let blocks = kernels.encode(&[with_limit(len), with_limit(len + 1), with_limit(0), with_limit(u32::MAX)]);
    let taken: Vec<bool> = blocks.iter().map(Option::is_some).collect();
    assert_eq!(taken, [false, true, false, true]);
}

#[test]
fn pages_that_are_not_asked_for_are_left_alone_and_those_with_a_base_are_xored() {
    let kernels = Kernels::open();
    let mut rng = SplitMix64::new(5);
    let mut inputs = Vec::new();
    for number in 0..48 {
        let base = page(PageKind::Heap, &mut rng);
        let mut changed = base;
        pagewarp_testkit::image::mutate(
            &mut changed,
            pagewarp_testkit::image::Mutation::Share(0.1),
            &mut rng,
        );
        inputs.push(Input { page: changed, base, lz4: number % 3, limit: PAGE_SIZE as u32 });
    }
    for (input, block) in inputs.iter().zip(kernels.encode(&inputs)) {
        match (input.lz4, block) {
            (0, block) => assert_eq!(block, None),
            (1, Some((Encoding::Lz4, block))) => assert_block_of(&input.page, &block, "page"),
            (2, Some((Encoding::Lz4Xor, block))) => {
                let mut xor = input.page;
                xor.0.iter_mut().zip(&input.base.0).for_each(|(byte, base)| *byte ^= base);
                assert_block_of(&xor, &block, "XOR");
            }
            (mode, other) => panic!("mode {mode}: {:?}", other.map(|(tag, block)| (tag, block.len()))),
        }
    }
}

/// Blocks of a page from every encoder there is.
fn all_blocks(page: &Page, kernel: Option<Vec<u8>>) -> Vec<(&'static str, Vec<u8>)> {
    use lz4::block::CompressionMode::{FAST, HIGHCOMPRESSION};
    let c = |mode| lz4::block::compress(&page.0, mode, false).expect("the C library encodes");
    let mut cpu = Vec::new();
    let mut encoder =
        PageEncoder::new(Simd::Scalar, EncodingSet::of(&[Encoding::Raw, Encoding::Lz4])).expect("scalar");
    let mut blocks = vec![
        ("lz4_flex", lz4_flex::block::compress(&page.0)),
        ("C", c(None)),
        ("C fast", c(Some(FAST(20)))),
        ("C high compression", c(Some(HIGHCOMPRESSION(12)))),
    ];
    if encoder.encode(page, None, &mut cpu) == Encoding::Lz4 {
        blocks.push(("CPU backend", cpu));
    }
    blocks.extend(kernel.map(|block| ("kernel", block)));
    blocks.retain(|(_, block)| block.len() < PAGE_SIZE);
    blocks
}

#[test]
fn blocks_of_every_encoder_are_decoded() {
    let kernels = Kernels::open();
    let mut pages: Vec<Page> = PageKind::ALL.iter().flat_map(|&kind| pages_of(kind, 12)).collect();
    pages.extend(edge_pages().into_iter().map(|(_, page)| page));
    let mut expected = Vec::new();
    let mut blocks = Vec::new();
    for (page, own) in pages.iter().zip(kernels.blocks(&pages)) {
        for (encoder, block) in all_blocks(page, own) {
            expected.push((encoder, page));
            blocks.push(Block::plain(block));
        }
    }
    for (number, (outcome, (encoder, page))) in
        kernels.decode(&blocks, &[]).into_iter().zip(expected).enumerate()
    {
        assert_eq!(outcome, (DECODED, *page), "block {number}, of {encoder}");
    }
}

#[test]
fn decoding_adds_the_base_and_leaves_other_tags_alone() {
    let kernels = Kernels::open();
    let xors = pages_of(PageKind::Text, 6);
    let bases = pages_of(PageKind::Random, 3);
    let mut blocks: Vec<Block> = xors
        .iter()
        .enumerate()
        .map(|(number, xor)| Block {
            tag: Encoding::Lz4Xor,
            bytes: lz4_flex::block::compress(&xor.0),
            base: number as u32 % 3,
        })
        .collect();
    let first = blocks[0].clone();
    blocks.extend(Encoding::ALL[..5].iter().map(|&tag| Block { tag, ..first.clone() }));
    let outcomes = kernels.decode(&blocks, &bases);
    for (number, (xor, outcome)) in xors.iter().zip(&outcomes).enumerate() {
        let mut page = *xor;
        page.0.iter_mut().zip(&bases[number % 3].0).for_each(|(byte, base)| *byte ^= base);
        assert_eq!(*outcome, (DECODED, page), "page {number}");
    }
    assert!(outcomes[6..].iter().all(|outcome| *outcome == (UNTOUCHED, Page([0xff; PAGE_SIZE]))));
}

#[test]
fn entries_out_of_bounds_are_bad() {
    let kernels = Kernels::open();
    let block = lz4_flex::block::compress(&Page([0x61; PAGE_SIZE]).0);
    let len = block.len() as u32;
    let total = len.next_multiple_of(4);
    let (lz4, xor) = (Encoding::Lz4 as u32, Encoding::Lz4Xor as u32);
    let bad = [
        [lz4, 0, 0, NO_BASE],
        [lz4, PAGE_SIZE as u32, 0, NO_BASE],
        [lz4, u32::MAX, 0, NO_BASE],
        [lz4, u32::MAX, len, NO_BASE],
        [lz4, len, total - len + 1, NO_BASE],
        [lz4, len, u32::MAX, NO_BASE],
        [lz4, len, u32::MAX - len + 1, NO_BASE],
        [lz4, 1, total, NO_BASE],
        [lz4, len - 1, 0, NO_BASE],
        [xor, len, 0, 1],
        [xor, len, 0, NO_BASE],
    ];
    let mut entries = vec![[lz4, len, 0, NO_BASE], [xor, len, 0, 0]];
    entries.extend(bad);
    let outcomes = kernels.decode_entries(entries.as_flattened(), block, &[Page([1; PAGE_SIZE])]);
    assert_eq!(outcomes[0], (DECODED, Page([0x61; PAGE_SIZE])));
    assert_eq!(outcomes[1], (DECODED, Page([0x60; PAGE_SIZE])));
    for (entry, outcome) in bad.iter().zip(&outcomes[2..]) {
        assert_eq!(*outcome, (BAD, Page([0xff; PAGE_SIZE])), "{entry:?}");
    }
}

/// A block with some bytes changed, cut, or made longer.
fn corrupted(block: &[u8], rng: &mut SplitMix64) -> Vec<u8> {
    let mut block = block.to_vec();
    match rng.below(4) {
        0 => block.truncate(1 + rng.index(block.len())),
        1 => {
            let more = 1 + rng.index(8);
            block.extend((0..more).map(|_| rng.byte()));
        }
        _ => {}
    }
    for _ in 0..=rng.below(4) {
        let at = rng.index(block.len());
        // Length bytes and zero offsets are where decoders stumble.
        block[at] = [rng.byte(), 0, 255, block[at] ^ (1 << rng.below(8))][rng.index(4)];
    }
    block.truncate(PAGE_SIZE - 1);
    block
}

fn random_block(rng: &mut SplitMix64) -> Vec<u8> {
    let longest = [64, PAGE_SIZE - 1][rng.index(2)];
    let mut block = vec![0; 1 + rng.index(longest)];
    rng.fill(&mut block);
    if rng.below(3) == 0 {
        // Few different bytes: long lengths, small offsets.
        block.iter_mut().for_each(|byte| *byte = [0x00, 0x01, 0x0f, 0xf0, 0xff][usize::from(*byte) % 5]);
    }
    block
}

#[test]
fn any_bytes_are_decoded_as_lz4_flex_does_or_rejected() {
    let kernels = Kernels::open();
    let mut rng = SplitMix64::new(99);
    let sources: Vec<Vec<u8>> = PageKind::ALL
        .iter()
        .flat_map(|&kind| pages_of(kind, 8))
        .map(|page| lz4_flex::block::compress(&page.0))
        .filter(|block| block.len() < PAGE_SIZE)
        .collect();
    let mut pages = 0;
    for _ in 0..10 {
        let blocks: Vec<Block> = (0..1000)
            .map(|_| match rng.below(4) {
                0 => random_block(&mut rng),
                _ => corrupted(&sources[rng.index(sources.len())], &mut rng),
            })
            .map(Block::plain)
            .collect();
        for (block, (status, page)) in blocks.iter().zip(kernels.decode(&blocks, &[])) {
            match flex_decodes(&block.bytes) {
                Some(expected) => assert!((status, page) == (DECODED, expected), "{:02x?}", block.bytes),
                None => assert!((status, page) == (BAD, Page([0xff; PAGE_SIZE])), "{:02x?}", block.bytes),
            }
            pages += usize::from(status == DECODED);
        }
    }
    assert!((500..9500).contains(&pages), "{pages} of 10000 are pages: this tests one outcome only");
}
