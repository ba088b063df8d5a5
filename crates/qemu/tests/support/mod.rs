//! Migration streams as QEMU writes them, with what is in them, and a driver for the reader.

#![allow(dead_code, reason = "each test binary uses its own part")]

pub mod drive;
pub mod main_stream;
pub mod multifd_stream;
pub mod source;

use pagewarp_testkit::rng::SplitMix64;

/// A version of QEMU with the machine type of the same version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    V6_2,
    V7_2,
    V8_2,
    V9_2,
    V10_0,
    V10_2,
}

pub const VERSIONS: [Version; 6] =
    [Version::V6_2, Version::V7_2, Version::V8_2, Version::V9_2, Version::V10_0, Version::V10_2];

/// What a reader must find in a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Model {
    /// Where the bytes of each page begin, and its place.
    pub pages: Vec<(u64, Option<(String, u64)>)>,
    /// Where zero records begin that continue a block.
    pub zeros: Vec<u64>,
    /// Where the peer may wait.
    pub boundaries: Vec<u64>,
}

/// A stream being written.
pub struct Writer {
    pub bytes: Vec<u8>,
    pub model: Model,
    pub rng: SplitMix64,
}

impl Writer {
    pub fn new(seed: u64) -> Writer {
        Writer { bytes: Vec::new(), model: Model::default(), rng: SplitMix64::new(seed) }
    }

    pub fn at(&self) -> u64 {
        self.bytes.len() as u64
    }

    pub fn u8(&mut self, value: u8) {
        self.bytes.push(value);
    }

    pub fn u16(&mut self, value: u16) {
        self.bytes.extend(value.to_be_bytes());
    }

    pub fn u32(&mut self, value: u32) {
        self.bytes.extend(value.to_be_bytes());
    }

    pub fn u64(&mut self, value: u64) {
        self.bytes.extend(value.to_be_bytes());
    }

    pub fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }

    pub fn counted(&mut self, text: &str) {
        self.u8(text.len() as u8);
        self.raw(text.as_bytes());
    }

    pub fn random(&mut self, len: usize) {
        let start = self.bytes.len();
        self.bytes.resize(start + len, 0);
        self.rng.fill(&mut self.bytes[start..]);
    }

    pub fn page(&mut self, place: Option<(String, u64)>) {
        self.model.pages.push((self.at(), place));
        self.random(4096);
    }

    pub fn boundary(&mut self) {
        self.model.boundaries.push(self.at());
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.rng.below(100) < percent
    }
}
