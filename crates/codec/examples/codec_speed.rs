//! Measures the codec on one core, in one run, against memcpy and the C liblz4.
//!
//! `cargo run --release -p pagewarp-codec --example codec_speed [-- --json] [--mib N] [--rounds N]`
//!
//! Figures are 10^9 plain bytes per second of CPU time. The pages are gone through several times, in parts of 1 MiB; the best
//! time of each part counts, which leaves out what other processes of the machine disturb. Together the pages exceed the
//! caches.

use std::hint::black_box;
use std::ops::Range;

use lz4_flex::block::{CompressTable, compress_into_with_table};
use rustix::time::{ClockId, clock_gettime};

use pagewarp_codec::{
    Backend, CpuBackend, DecodeJob, DecoderConfig, EncodeJob, EncoderConfig, Encoding, EncodingSet,
    PAGE_SIZE, Page, PageEncoder, Simd, SlotUse, decode_page, plain_hash,
};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |name: &str, default: usize| {
        let at = args.iter().position(|arg| arg == name);
        at.and_then(|at| args.get(at + 1)).map_or(default, |value| value.parse().expect("a number"))
    };
    let pages = number("--mib", 64) * 256;
    let mut bench = Bench { pages, rounds: number("--rounds", 9), lines: Vec::new(), memcpy: 0.0 };
    bench.memcpy();
    if args.iter().any(|arg| arg == "--lz4") {
        bench.lz4();
        bench.print_table();
        return;
    }
    for simd in Simd::available().into_iter().rev() {
        for (name, changed) in [("clustered", clustered as fn(&Page, u64) -> Page), ("spread", spread)] {
            bench.delta(simd, name, changed);
        }
        bench.zero(simd);
    }
    bench.lz4();
    if args.iter().any(|arg| arg == "--json") {
        bench.print_json();
    } else {
        bench.print_table();
    }
}

/// CPU time of this thread: what a core spends, also while other processes share it.
fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Pages of a part that is timed as one: 1 MiB, also the size of a batch.
const PART: usize = 256;

/// A name, and what is done with a part of the pages.
type Work<'a> = (&'a str, &'a mut dyn FnMut(Range<usize>));

/// Encoded pages: encoding and place in the payload of each.
struct Encoded {
    payload: Vec<u8>,
    pages: Vec<(Encoding, Range<usize>)>,
}

impl Encoded {
    fn with_room_for(pages: usize) -> Encoded {
        Encoded { payload: Vec::with_capacity(pages * PAGE_SIZE), pages: Vec::with_capacity(pages) }
    }

    /// Encodes the pages of one part after another; the first part starts afresh.
    fn encode<'a>(
        &'a mut self,
        mut encoder: PageEncoder,
        pages: &'a [Page],
        bases: Option<&'a [Page]>,
    ) -> impl FnMut(Range<usize>) + 'a {
        move |part| {
            if part.start == 0 {
                self.payload.clear();
                self.pages.clear();
            }
            for index in part {
                let start = self.payload.len();
                let encoding =
                    encoder.encode(&pages[index], bases.map(|bases| &bases[index]), &mut self.payload);
                self.pages.push((encoding, start..self.payload.len()));
            }
        }
    }
}

struct Line {
    what: String,
    simd: &'static str,
    gb_per_s: f64,
    /// Plain bytes over payload bytes, where bytes are encoded.
    ratio: Option<f64>,
}

struct Bench {
    pages: usize,
    rounds: usize,
    lines: Vec<Line>,
    memcpy: f64,
}

impl Bench {
    /// Times `work` on all parts of the pages.
    fn time(&mut self, what: String, simd: &'static str, mut work: impl FnMut(Range<usize>)) -> f64 {
        self.time_in_turn(simd, &mut [(&what, &mut work)]);
        self.lines.last().expect("just added").gb_per_s
    }

    /// Times each work on all parts of the pages, one work after another on each part: what disturbs one disturbs all.
    /// The result is the sum of the best times of each part.
    fn time_in_turn(&mut self, simd: &'static str, works: &mut [Work<'_>]) {
        let parts: Vec<_> = (0..self.pages).step_by(PART).map(|at| at..self.pages.min(at + PART)).collect();
        let mut best = vec![vec![f64::INFINITY; parts.len()]; works.len()];
        for _ in 0..self.rounds {
            for (index, part) in parts.iter().enumerate() {
                for ((_, work), best) in works.iter_mut().zip(&mut best) {
                    let start = cpu_seconds();
                    work(part.clone());
                    best[index] = best[index].min(cpu_seconds() - start);
                }
            }
        }
        for ((what, _), best) in works.iter().zip(&best) {
            let gb_per_s = (self.pages * PAGE_SIZE) as f64 / best.iter().sum::<f64>() / 1e9;
            self.lines.push(Line { what: what.to_string(), simd, gb_per_s, ratio: None });
        }
    }

    fn memcpy(&mut self) {
        let from = heap_pages(self.pages);
        let mut to = vec![Page::ZERO; self.pages];
        let by_page = self.time("memcpy, page by page".into(), "libc", |part| {
            for (to, from) in to[part.clone()].iter_mut().zip(&from[part]) {
                to.0.copy_from_slice(&from.0);
            }
            black_box(&mut to);
        });
        let at_once = self.time("memcpy, 1 MiB at once".into(), "libc", |part| {
            to[part.clone()].copy_from_slice(&from[part]);
            black_box(&mut to);
        });
        self.memcpy = by_page.max(at_once);
        self.time("plain_hash (xxh3-64)".into(), "-", |part| {
            black_box(plain_hash(&from[part]));
        });
    }

    /// Re-sent pages of which 1 % of the bytes changed.
    fn delta(&mut self, simd: Simd, name: &str, change: fn(&Page, u64) -> Page) {
        let bases = heap_pages(self.pages);
        let pages: Vec<Page> = bases.iter().zip(0..).map(|(base, seed)| change(base, seed)).collect();
        let encoder = PageEncoder::new(simd, EncodingSet::ALL).expect("available");
        let what = format!("sparse-xor encode, 1 % changed, {name}");
        let encoded = self.encode(what, simd.name(), encoder, &pages, Some(&bases));
        assert!(encoded.pages.iter().all(|(encoding, _)| *encoding == Encoding::SparseXor));
        let mut decoded = vec![Page::ZERO; self.pages];
        self.time(format!("sparse-xor decode, 1 % changed, {name}"), simd.name(), |part| {
            for index in part {
                let (encoding, at) = &encoded.pages[index];
                let payload = &encoded.payload[at.clone()];
                decode_page(simd, *encoding, payload, Some(&bases[index]), &mut decoded[index])
                    .expect("valid");
            }
        });
        assert!(decoded == pages);
        drop(decoded);
        self.delta_batches(simd, name, &bases, &pages);
    }

    /// Times the encoding of the pages.
    fn encode(
        &mut self,
        what: String,
        simd: &'static str,
        encoder: PageEncoder,
        pages: &[Page],
        bases: Option<&[Page]>,
    ) -> Encoded {
        let mut encoded = Encoded::with_room_for(self.pages);
        self.time(what, simd, encoded.encode(encoder, pages, bases));
        if !encoded.payload.is_empty() {
            let ratio = (self.pages * PAGE_SIZE) as f64 / encoded.payload.len() as f64;
            self.lines.last_mut().expect("just added").ratio = Some(ratio);
        }
        encoded
    }

    /// The same through the backend interface: with the history, which is updated, and with the hash.
    fn delta_batches(&mut self, simd: Simd, name: &str, bases: &[Page], pages: &[Page]) {
        let backend = CpuBackend::with_simd(simd).expect("available");
        let config = EncoderConfig {
            allowed: EncodingSet::ALL,
            history_slots: self.pages as u32,
            max_batch_pages: PART,
        };
        let mut encoder = backend.encoders(config, 1).expect("encoders").remove(0);
        let jobs = |versions: &[Page], slot: fn(u32) -> SlotUse| -> Vec<EncodeJob> {
            let chunks = versions.chunks(PART).zip((0..).step_by(PART));
            chunks
                .map(|(pages, first)| EncodeJob {
                    pages: pages.to_vec(),
                    slots: (first..).take(pages.len()).map(slot).collect(),
                    ..EncodeJob::default()
                })
                .collect()
        };
        let mut run = |job: &mut EncodeJob| {
            encoder.submit(std::mem::take(job));
            *job = encoder.complete().expect("in flight").job;
        };
        jobs(bases, SlotUse::Store).iter_mut().for_each(&mut run);
        // The history alternates between the two versions, so that every round encodes the same change.
        let mut versions = [jobs(pages, SlotUse::Delta), jobs(bases, SlotUse::Delta)];
        let mut round = 0;
        let last = self.pages;
        self.time(format!("  backend: encode with history and hash, {name}"), simd.name(), |part| {
            run(&mut versions[round % 2][part.start / PART]);
            round += usize::from(part.end == last);
        });
        let [encoded, _] = versions;

        let config = DecoderConfig { allowed: EncodingSet::ALL, max_batch_pages: PART, history_slots: 0 };
        let mut decoder = backend.decoders(config, 1).expect("decoders").remove(0);
        let mut jobs: Vec<DecodeJob> = (encoded.into_iter().zip(bases.chunks(PART)))
            .map(|(job, bases)| DecodeJob {
                encoded: job.encoded,
                bases: bases.to_vec(),
                pages: job.pages,
                ..DecodeJob::default()
            })
            .collect();
        self.time(format!("  backend: decode with check of the hash, {name}"), simd.name(), |part| {
            let job = &mut jobs[part.start / PART];
            decoder.submit(std::mem::take(job));
            let done = decoder.complete().expect("in flight");
            done.result.expect("valid");
            *job = done.job;
        });
    }

    fn zero(&mut self, simd: Simd) {
        let zeros = vec![Page::ZERO; self.pages];
        let encoder = PageEncoder::new(simd, EncodingSet::ALL).expect("available");
        let encoded = self.encode("zero pages, encode".into(), simd.name(), encoder, &zeros, None);
        assert!(encoded.pages.iter().all(|(encoding, _)| *encoding == Encoding::Zero));
    }

    /// First-touch pages: ours against the C library, which other users of LZ4 have.
    fn lz4(&mut self) {
        let pages = heap_pages(self.pages);
        let (mut block_c, mut block_flex) = (vec![0; 8192], vec![0; 8192]);
        let (mut total_c, mut total_flex) = (0, 0);
        let mut c = |part: Range<usize>| {
            total_c = if part.start == 0 { 0 } else { total_c };
            for page in &pages[part] {
                total_c += lz4::block::compress_to_buffer(&page.0, None, false, &mut block_c).expect("room");
            }
        };
        let mut table = CompressTable::small();
        let mut flex = |part: Range<usize>| {
            total_flex = if part.start == 0 { 0 } else { total_flex };
            for page in &pages[part] {
                total_flex += compress_into_with_table(&page.0, &mut block_flex, &mut table).expect("room");
            }
        };
        let encoder = PageEncoder::new(Simd::detect(), EncodingSet::of(&[Encoding::Lz4])).expect("detected");
        let mut encoded = Encoded::with_room_for(self.pages);
        let mut ours = encoded.encode(encoder, &pages, None);
        let mut works: [Work<'_>; 3] = [
            ("lz4 encode, C liblz4", &mut c),
            ("lz4 encode, lz4_flex", &mut flex),
            ("lz4 encode, pagewarp", &mut ours),
        ];
        self.time_in_turn("-", &mut works);
        drop(ours);
        let lines = self.lines.iter_mut().rev();
        for (line, payload) in lines.zip([encoded.payload.len(), total_flex, total_c]) {
            line.ratio = Some((self.pages * PAGE_SIZE) as f64 / payload as f64);
        }
        assert!(
            encoded.pages.iter().all(|(encoding, _)| *encoding == Encoding::Lz4),
            "all heap pages compress"
        );

        let mut decoded = vec![Page::ZERO; self.pages];
        self.time("lz4 decode, C liblz4".into(), "-", |part| {
            for index in part {
                let payload = &encoded.payload[encoded.pages[index].1.clone()];
                let page = &mut decoded[index].0;
                let len =
                    lz4::block::decompress_to_buffer(payload, Some(PAGE_SIZE as i32), page).expect("valid");
                assert_eq!(len, PAGE_SIZE);
            }
        });
        assert!(decoded == pages);
        decoded.fill(Page::ZERO);
        self.time("lz4 decode, pagewarp".into(), "-", |part| {
            for index in part {
                let (encoding, at) = &encoded.pages[index];
                let payload = &encoded.payload[at.clone()];
                decode_page(Simd::detect(), *encoding, payload, None, &mut decoded[index]).expect("valid");
            }
        });
        assert!(decoded == pages);
    }

    fn print_table(&self) {
        println!("{} MiB of pages, best of {} rounds, CPU time of one core", self.pages / 256, self.rounds);
        println!("{:54} {:8} {:>7} {:>9} {:>7}", "what", "level", "GB/s", "x memcpy", "ratio");
        for line in &self.lines {
            let ratio = line.ratio.map_or(String::new(), |ratio| format!("{ratio:7.3}"));
            let relative = line.gb_per_s / self.memcpy;
            println!("{:54} {:8} {:7.2} {relative:9.2} {ratio:>7}", line.what, line.simd, line.gb_per_s);
        }
    }

    fn print_json(&self) {
        let lines: Vec<_> = self
            .lines
            .iter()
            .map(|line| {
                serde_json::json!({
                    "what": line.what.trim(), "level": line.simd, "gb_per_s": line.gb_per_s,
                    "of_memcpy": line.gb_per_s / self.memcpy, "ratio": line.ratio,
                })
            })
            .collect();
        let report = serde_json::json!({ "pages": self.pages, "rounds": self.rounds, "lines": lines });
        println!("{report:#}");
    }
}

/// xorshift64: a fixed, fast source of test data.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Random {
        Random((seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() >> 33) as usize % limit
    }
}

/// Pages like those of a heap of an in-memory store: small objects with headers, pointers, reference counts, keys with
/// numbers, values of text or of random bytes, and free room in size classes.
fn heap_pages(count: usize) -> Vec<Page> {
    const WORDS: [&str; 16] = [
        "user", "session", "cart", "price", "online", "token", "item", "order", "street", "amount", "status",
        "active", "country", "payment", "customer", "visited",
    ];
    let mut random = Random::new(7);
    let mut heap = Vec::with_capacity((count + 1) * PAGE_SIZE);
    while heap.len() < count * PAGE_SIZE {
        let start = heap.len();
        // A hash table entry: key, value and next pointers into a heap of 1 GiB; then the value object.
        for _ in 0..3 {
            let pointer = 0x7f3a_4000_0000 | random.next() >> 34 & !0xf;
            heap.extend_from_slice(&pointer.to_le_bytes());
        }
        heap.extend_from_slice(&[0x10, 0, 0, 0]);
        heap.extend_from_slice(&((random.next() >> 44) as u32).to_le_bytes());
        let key = format!(
            "{}:{:08}:{}\0",
            WORDS[random.below(4)],
            random.below(40_000_000),
            WORDS[random.below(16)]
        );
        heap.push(key.len() as u8);
        heap.extend_from_slice(key.as_bytes());
        let len = 16 + random.below(80);
        match random.below(8) {
            0 => (0..len / 8).for_each(|_| heap.extend_from_slice(&random.next().to_le_bytes())),
            1 => heap.extend_from_slice(format!("{}", random.next()).as_bytes()),
            _ => {
                let end = heap.len() + len;
                while heap.len() < end {
                    heap.extend_from_slice(WORDS[random.below(16)].as_bytes());
                    heap.extend_from_slice(format!("={},", random.below(1000)).as_bytes());
                }
            }
        }
        // Size classes of 32 bytes, half a class of slack on average, and some free objects.
        let size = (heap.len() - start + random.below(16)).next_multiple_of(32);
        heap.resize(start + size, 0);
    }
    heap.truncate(count * PAGE_SIZE);
    heap.as_chunks::<PAGE_SIZE>().0.iter().map(|bytes| Page(*bytes)).collect()
}

/// 41 bytes changed (1 %), in one place.
fn clustered(base: &Page, seed: u64) -> Page {
    let mut random = Random::new(seed);
    let mut page = *base;
    let start = random.below(PAGE_SIZE - 41);
    for byte in &mut page.0[start..start + 41] {
        *byte ^= 1 + random.below(255) as u8;
    }
    page
}

/// 41 bytes changed (1 %), anywhere.
fn spread(base: &Page, seed: u64) -> Page {
    let mut random = Random::new(seed);
    let mut page = *base;
    for _ in 0..41 {
        page.0[random.below(PAGE_SIZE)] ^= 1 + random.below(255) as u8;
    }
    page
}
