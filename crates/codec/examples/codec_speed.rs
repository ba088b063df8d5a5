//! Measures the codec on one core, in one run, against memcpy and the C liblz4.
//!
//! `cargo run --release -p pagewarp-codec --example codec_speed [-- --json] [--mib N] [--rounds N]`
//!
//! Every figure is the best of several rounds over the same pages, in 10^9 plain bytes per second of
//! CPU time. All buffers together
//! exceed the caches, except where a line says otherwise.

use std::hint::black_box;

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
    for simd in Simd::available().into_iter().rev() {
        for (name, changed) in [("clustered", clustered as fn(&Page, u64) -> Page), ("spread", spread)] {
            bench.delta(simd, name, changed);
        }
        bench.zero_and_hash(simd);
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
    /// Times the best round.
    fn time(&mut self, what: String, simd: &'static str, mut round: impl FnMut()) -> f64 {
        let seconds = (0..self.rounds)
            .map(|_| {
                let start = cpu_seconds();
                round();
                cpu_seconds() - start
            })
            .fold(f64::INFINITY, f64::min);
        let gb_per_s = (self.pages * PAGE_SIZE) as f64 / seconds / 1e9;
        self.lines.push(Line { what, simd, gb_per_s, ratio: None });
        gb_per_s
    }

    fn ratio(&mut self, payload: usize) {
        let plain = (self.pages * PAGE_SIZE) as f64;
        self.lines.last_mut().expect("a line").ratio = Some(plain / payload as f64);
    }

    fn memcpy(&mut self) {
        let from = heap_pages(self.pages);
        let mut to = vec![Page::ZERO; self.pages];
        let by_page = self.time("memcpy, page by page".into(), "libc", || {
            for (to, from) in to.iter_mut().zip(&from) {
                to.0.copy_from_slice(&from.0);
            }
            black_box(&mut to);
        });
        let at_once = self.time("memcpy, all at once".into(), "libc", || {
            to.copy_from_slice(&from);
            black_box(&mut to);
        });
        self.memcpy = by_page.max(at_once);
        self.time("plain_hash (xxh3-64)".into(), "-", || {
            black_box(plain_hash(&from));
        });
    }

    /// Re-sent pages of which 1 % of the bytes changed.
    fn delta(&mut self, simd: Simd, name: &str, change: fn(&Page, u64) -> Page) {
        let bases = heap_pages(self.pages);
        let pages: Vec<Page> = bases.iter().zip(0..).map(|(base, seed)| change(base, seed)).collect();
        let mut encoder = PageEncoder::new(simd, EncodingSet::ALL).expect("available");
        let mut payload = Vec::with_capacity(self.pages * 512);
        let mut lens = Vec::with_capacity(self.pages);
        self.time(format!("sparse-xor encode, 1 % changed, {name}"), simd.name(), || {
            payload.clear();
            lens.clear();
            for (page, base) in pages.iter().zip(&bases) {
                let start = payload.len();
                let encoding = encoder.encode(page, Some(base), &mut payload);
                assert_eq!(encoding, Encoding::SparseXor);
                lens.push(payload.len() - start);
            }
        });
        self.ratio(payload.len());
        let mut decoded = vec![Page::ZERO; self.pages];
        self.time(format!("sparse-xor decode, 1 % changed, {name}"), simd.name(), || {
            let mut rest = payload.as_slice();
            for ((out, base), &len) in decoded.iter_mut().zip(&bases).zip(&lens) {
                let (this, tail) = rest.split_at(len);
                rest = tail;
                decode_page(simd, Encoding::SparseXor, this, Some(base), out).expect("valid");
            }
        });
        assert!(decoded == pages);
        drop(decoded);
        self.delta_batches(simd, name, &bases, &pages);
    }

    /// The same through the backend interface: with the history, which is updated, and with the hash.
    fn delta_batches(&mut self, simd: Simd, name: &str, bases: &[Page], pages: &[Page]) {
        const BATCH: usize = 256;
        let backend = CpuBackend::with_simd(simd).expect("available");
        let config = EncoderConfig {
            allowed: EncodingSet::ALL,
            history_slots: self.pages as u32,
            max_batch_pages: BATCH,
        };
        let mut encoder = backend.encoders(config, 1).expect("encoders").remove(0);
        let jobs = |versions: &[Page], slot: fn(u32) -> SlotUse| -> Vec<EncodeJob> {
            let chunks = versions.chunks(BATCH).zip((0..).step_by(BATCH));
            chunks
                .map(|(pages, first)| EncodeJob {
                    pages: pages.to_vec(),
                    slots: (first..).take(pages.len()).map(slot).collect(),
                    ..EncodeJob::default()
                })
                .collect()
        };
        let mut run = |jobs: &mut Vec<EncodeJob>| {
            for job in jobs {
                encoder.submit(std::mem::take(job));
                *job = encoder.complete().expect("in flight").job;
            }
        };
        run(&mut jobs(bases, SlotUse::Store));
        // The history alternates between the two versions, so that every round encodes the same change.
        let mut versions = [jobs(pages, SlotUse::Delta), jobs(bases, SlotUse::Delta)];
        let mut round = 0;
        self.time(format!("  backend: encode with history and hash, {name}"), simd.name(), || {
            run(&mut versions[round % 2]);
            round += 1;
        });
        let [encoded, _] = versions;

        let config = DecoderConfig { allowed: EncodingSet::ALL, max_batch_pages: BATCH };
        let mut decoder = backend.decoders(config, 1).expect("decoders").remove(0);
        let mut jobs: Vec<DecodeJob> = (encoded.into_iter().zip(bases.chunks(BATCH)))
            .map(|(job, bases)| DecodeJob { encoded: job.encoded, bases: bases.to_vec(), pages: job.pages })
            .collect();
        self.time(format!("  backend: decode with check of the hash, {name}"), simd.name(), || {
            for job in &mut jobs {
                decoder.submit(std::mem::take(job));
                let done = decoder.complete().expect("in flight");
                done.result.expect("valid");
                *job = done.job;
            }
        });
    }

    fn zero_and_hash(&mut self, simd: Simd) {
        let zeros = vec![Page::ZERO; self.pages];
        let mut encoder = PageEncoder::new(simd, EncodingSet::ALL).expect("available");
        self.time("zero pages, encode".into(), simd.name(), || {
            let mut payload = Vec::new();
            for page in &zeros {
                assert_eq!(encoder.encode(page, None, &mut payload), Encoding::Zero);
            }
        });
    }

    /// First-touch pages: ours against the C library, which other users of LZ4 have.
    fn lz4(&mut self) {
        let pages = heap_pages(self.pages);
        let mut lens = vec![0; self.pages];

        let mut block = vec![0; 8192];
        let mut total = 0;
        self.time("lz4 encode, C liblz4".into(), "-", || {
            total = 0;
            for (page, len) in pages.iter().zip(&mut lens) {
                *len = lz4::block::compress_to_buffer(&page.0, None, false, &mut block).expect("room");
                total += *len;
            }
        });
        self.ratio(total);

        let mut table = lz4_flex::block::CompressTable::small();
        self.time("lz4 encode, lz4_flex".into(), "-", || {
            total = 0;
            for page in &pages {
                let len =
                    lz4_flex::block::compress_into_with_table(&page.0, &mut block, &mut table).expect("room");
                total += len;
            }
        });
        self.ratio(total);

        let mut encoder =
            PageEncoder::new(Simd::detect(), EncodingSet::of(&[Encoding::Lz4])).expect("detected");
        let mut payload = Vec::with_capacity(self.pages * PAGE_SIZE);
        let mut blocks = Vec::with_capacity(self.pages);
        self.time("lz4 encode, pagewarp".into(), "-", || {
            payload.clear();
            blocks.clear();
            for page in &pages {
                let start = payload.len();
                let encoding = encoder.encode(page, None, &mut payload);
                blocks.push((encoding, payload.len() - start));
            }
        });
        let total = payload.len();
        self.ratio(total);
        let unpacked = blocks.iter().filter(|(encoding, _)| *encoding != Encoding::Lz4).count();
        assert_eq!(unpacked, 0, "all heap pages compress");

        let mut decoded = vec![Page::ZERO; self.pages];
        self.time("lz4 decode, C liblz4".into(), "-", || {
            let mut rest = payload.as_slice();
            for (page, &(_, len)) in decoded.iter_mut().zip(&blocks) {
                let (this, tail) = rest.split_at(len);
                rest = tail;
                let size = lz4::block::decompress_to_buffer(this, Some(PAGE_SIZE as i32), &mut page.0)
                    .expect("valid");
                assert_eq!(size, PAGE_SIZE);
            }
        });
        assert!(decoded == pages);
        decoded.fill(Page::ZERO);
        self.time("lz4 decode, pagewarp".into(), "-", || {
            let mut rest = payload.as_slice();
            for (page, &(encoding, len)) in decoded.iter_mut().zip(&blocks) {
                let (this, tail) = rest.split_at(len);
                rest = tail;
                decode_page(Simd::detect(), encoding, this, None, page).expect("valid");
            }
        });
        assert!(decoded == pages);
    }

    fn print_table(&self) {
        println!("{} MiB of pages, best of {} rounds, one core", self.pages / 256, self.rounds);
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
