//! Records of the key-value store: what they look like in memory, and what is in them.
//!
//! A record is one allocation: header, key, value, zero padding. Everything about a record that must be known
//! before it is written (key, kind, length) follows from its id.
//!
//! | bytes | field |
//! |---|---|
//! | 0..8   | address of the next record of the bucket, or 0 |
//! | 8..12  | id |
//! | 12..16 | version: 1 when new, one more with each write |
//! | 16..20 | checksum of everything else |
//! | 20     | length of the key |
//! | 21     | kind |
//! | 22..24 | length of the value |
//! | 24..   | key, value |

use super::sum::Sum;
use super::words::WORDS;
use crate::rng::{Rng, mix};

pub const HEADER: usize = 24;
/// Sizes of allocations, spaced as allocators do.
pub const CLASSES: [usize; 21] = [
    64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048,
];
const LARGEST: usize = CLASSES[CLASSES.len() - 1];
/// What browsers say they are.
const AGENTS: [&str; 4] = [
    "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0",
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/141.0.0.0 Safari/537.36",
    "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/18.6 Safari/605.1.15",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 18_6 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Mobile/15E148",
];
/// Milliseconds since 1970 when the guest's clock says 0.
const EPOCH_MS: u64 = 1_790_000_000_000;

/// What a value is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Digits and a timestamp.
    Counter,
    /// Short JSON with a random token.
    Session,
    /// JSON with names and words.
    Profile,
    /// JSON with a long text.
    Article,
    /// Bytes that do not compress: images, compressed or encrypted data.
    Blob,
}

/// What follows from an id.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub kind: Kind,
    pub value_len: usize,
    /// Index into `CLASSES`.
    pub class: usize,
    hash: u64,
}

impl Shape {
    pub fn of(id: u32, seed: u64) -> Shape {
        let hash = mix(u64::from(id) ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        // Of a hundred records; and the lengths of values, from and to.
        let (kind, from, to) = match hash % 100 {
            0..28 => (Kind::Counter, 24, 24),
            28..53 => (Kind::Session, 160, 320),
            53..87 => (Kind::Profile, 260, 560),
            87..95 => (Kind::Article, 400, 1800),
            _ => (Kind::Blob, 120, 640),
        };
        let value_len = from + (((hash >> 32) * (to - from + 1) as u64) >> 32) as usize;
        let mut shape = Shape { kind, value_len, class: 0, hash };
        let size = HEADER + shape.key_len() + value_len;
        shape.class = CLASSES.partition_point(|&class| class < size).min(CLASSES.len() - 1);
        shape
    }

    pub fn size(&self) -> usize {
        CLASSES[self.class]
    }

    /// Longest value that fits into the record's allocation.
    pub fn value_max(&self) -> usize {
        self.size() - HEADER - self.key_len()
    }

    fn key_parts(&self) -> (&'static [u8], &'static [u8]) {
        match self.kind {
            Kind::Counter => (b"cnt:page:", b":views"),
            Kind::Session => (b"session:", b""),
            Kind::Profile => (b"user:", b":profile"),
            Kind::Article => (b"article:", b":body"),
            Kind::Blob => (b"thumb:", b":jpg"),
        }
    }

    pub fn key_len(&self) -> usize {
        let (before, after) = self.key_parts();
        before.len() + self.number_len() + after.len()
    }

    fn number_len(&self) -> usize {
        if self.kind == Kind::Session { 16 } else { 9 }
    }

    /// The key, in front of whatever `text` has.
    pub fn key(&self, id: u32, text: &mut Text) {
        let (before, after) = self.key_parts();
        text.put(before);
        if self.kind == Kind::Session {
            text.hex(self.hash);
        } else {
            text.digits(u64::from(id), 9);
        }
        text.put(after);
    }

    /// A new value of `len` bytes.
    pub fn value(&self, id: u32, len: usize, now_ms: u64, rng: &mut Rng, text: &mut Text) {
        let end = (text.len + len).min(LARGEST);
        let count = rng.below(1000);
        let at = EPOCH_MS + now_ms;
        match self.kind {
            Kind::Counter => {
                text.digits(count, 10);
                text.put(b" ");
                text.digits(at, 13);
            }
            Kind::Blob => {
                text.put(b"BLB1");
                text.put(&(count as u32).to_le_bytes());
                text.put(&at.to_le_bytes());
                while text.len < end {
                    text.put(&rng.next_u64().to_le_bytes());
                }
            }
            Kind::Session | Kind::Profile | Kind::Article => {
                text.put(b"{\"hits\":");
                text.digits(count, 8);
                text.put(b",\"ts\":");
                text.digits(at, 13);
                match self.kind {
                    Kind::Session => text.session(id, rng, end),
                    Kind::Profile => text.profile(id, rng, end),
                    _ => text.article(rng, end),
                }
                text.len = end - 2;
                text.put(b"\"}");
            }
        }
        text.len = end;
    }
}

/// Counts a hit in a value, and dates it: the small write of a real store. Few bytes change.
pub fn touch(kind: Kind, value: &mut [u8], now_ms: u64, count: bool) {
    let at = EPOCH_MS + now_ms;
    let (counter, ts) = match kind {
        Kind::Counter => (0..10, 11..24),
        Kind::Session | Kind::Profile | Kind::Article => (8..16, 22..35),
        Kind::Blob => {
            if let Some(counter) = value.get_mut(4..8).filter(|_| count) {
                let n = u32::from_le_bytes([counter[0], counter[1], counter[2], counter[3]]);
                counter.copy_from_slice(&n.wrapping_add(1).to_le_bytes());
            }
            if let Some(ts) = value.get_mut(8..16) {
                ts.copy_from_slice(&at.to_le_bytes());
            }
            return;
        }
    };
    if count && let Some(digits) = value.get_mut(counter) {
        for digit in digits.iter_mut().rev() {
            *digit += 1;
            if *digit <= b'9' {
                break;
            }
            *digit = b'0';
        }
    }
    if let Some(digits) = value.get_mut(ts) {
        put_digits(digits, at);
    }
}

fn put_digits(to: &mut [u8], mut n: u64) {
    for digit in to.iter_mut().rev() {
        *digit = b'0' + (n % 10) as u8;
        n /= 10;
    }
}

/// A checksum over a record's bytes, its checksum field excepted. `record.len()` is a multiple of 16.
pub fn checksum(record: &[u8]) -> u32 {
    let mut sum = Sum::new();
    let (before, rest) = record.split_at(16);
    let (own, after) = rest.split_at(16);
    sum.add_bytes(before);
    let own = u128::from_le_bytes(*own.first_chunk().expect("16 bytes"));
    sum.add(own as u64 & !0xffff_ffff, (own >> 64) as u64);
    sum.add_bytes(after);
    sum.finish()
}

/// Room for a key and a value while they are made.
pub struct Text {
    buf: [u8; LARGEST],
    pub len: usize,
}

impl Text {
    pub const fn new() -> Self {
        Text { buf: [0; LARGEST], len: 0 }
    }

    pub fn bytes(&self) -> &[u8] {
        &self.buf[..self.len]
    }

    /// Appends; what does not fit is cut off.
    fn put(&mut self, bytes: &[u8]) {
        let n = bytes.len().min(LARGEST - self.len);
        self.buf[self.len..self.len + n].copy_from_slice(&bytes[..n]);
        self.len += n;
    }

    fn digits(&mut self, n: u64, width: usize) {
        let mut digits = [0; 20];
        put_digits(&mut digits[..width], n);
        self.put(&digits[..width]);
    }

    fn hex(&mut self, n: u64) {
        let digit = |i: usize| b"0123456789abcdef"[(n >> (60 - 4 * i) & 15) as usize];
        self.put(&core::array::from_fn::<u8, 16, _>(digit));
    }

    /// Eleven random characters of base 64.
    fn token(&mut self, n: u64) {
        const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
        self.put(&core::array::from_fn::<u8, 11, _>(|i| ALPHABET[(n >> (5 * i) & 63) as usize]));
    }

    fn word(&mut self, rng: &mut Rng) {
        let n = rng.next_u64();
        // Two draws, the smaller counts: frequent words and rare ones.
        let i = (n as u32 as usize % WORDS.len()).min((n >> 32) as usize % WORDS.len());
        self.put(WORDS[i].as_bytes());
    }

    fn words(&mut self, rng: &mut Rng, end: usize) {
        while self.len < end {
            self.word(rng);
            self.put(b" ");
        }
    }

    fn session(&mut self, id: u32, rng: &mut Rng, end: usize) {
        self.put(b",\"uid\":");
        self.digits(u64::from(id), 9);
        self.put(b",\"ip\":\"10.");
        self.digits(rng.below(256), 3);
        self.put(b".");
        self.digits(rng.below(256), 3);
        self.put(b"\",\"token\":\"");
        self.token(rng.next_u64());
        self.token(rng.next_u64());
        self.put(b"\",\"ua\":\"");
        self.put(AGENTS[rng.below(AGENTS.len() as u64) as usize].as_bytes());
        self.put(b"\",\"path\":\"/");
        while self.len < end {
            self.word(rng);
            self.put(b"/");
        }
    }

    fn profile(&mut self, id: u32, rng: &mut Rng, end: usize) {
        self.put(b",\"id\":");
        self.digits(u64::from(id), 9);
        self.put(b",\"name\":\"");
        self.word(rng);
        self.put(b" ");
        self.word(rng);
        self.put(b"\",\"mail\":\"");
        self.word(rng);
        self.digits(rng.below(1000), 3);
        self.put(b"@example.org\",\"key\":\"");
        self.hex(rng.next_u64());
        self.put(b"\",\"tags\":[\"");
        self.word(rng);
        self.put(b"\",\"");
        self.word(rng);
        self.put(
            b"\"],\"lang\":\"en\",\"verified\":true,\"notify\":{\"mail\":true,\"push\":false},\"about\":\"",
        );
        self.words(rng, end);
    }

    fn article(&mut self, rng: &mut Rng, end: usize) {
        self.put(b",\"title\":\"");
        self.word(rng);
        self.put(b" ");
        self.word(rng);
        self.put(b"\",\"body\":\"");
        self.words(rng, end);
    }
}
