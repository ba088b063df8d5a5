//! How one page is written: the tags of `docs/page-encodings.md`.

use std::fmt;
use std::str::FromStr;

use crate::page::PAGE_SIZE;

/// How one page is written on the wire. The discriminant is the tag byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Encoding {
    /// All bytes are zero; no payload.
    Zero = 0,
    /// Equal to its base; no payload.
    Same = 1,
    /// The 4096 bytes themselves.
    Raw = 2,
    /// Masks and non-zero bytes of the page.
    Sparse = 3,
    /// Masks and non-zero bytes of the page XOR its base.
    SparseXor = 4,
    /// One LZ4 block of the page.
    Lz4 = 5,
    /// One LZ4 block of the page XOR its base.
    Lz4Xor = 6,
}

impl Encoding {
    /// Every encoding, in tag order.
    pub const ALL: [Encoding; 7] = [
        Encoding::Zero,
        Encoding::Same,
        Encoding::Raw,
        Encoding::Sparse,
        Encoding::SparseXor,
        Encoding::Lz4,
        Encoding::Lz4Xor,
    ];

    /// The encoding with this tag byte, if there is one.
    pub fn from_tag(tag: u8) -> Option<Encoding> {
        Encoding::ALL.get(usize::from(tag)).copied()
    }

    /// The tag byte.
    pub fn tag(self) -> u8 {
        self as u8
    }

    /// Whether the destination needs the version sent before to decode it.
    pub fn needs_base(self) -> bool {
        matches!(self, Encoding::Same | Encoding::SparseXor | Encoding::Lz4Xor)
    }

    /// The payload length in bytes where the tag alone decides it.
    pub fn fixed_len(self) -> Option<usize> {
        match self {
            Encoding::Zero | Encoding::Same => Some(0),
            Encoding::Raw => Some(PAGE_SIZE),
            _ => None,
        }
    }

    /// The name used on the command line, in reports and in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Encoding::Zero => "zero",
            Encoding::Same => "same",
            Encoding::Raw => "raw",
            Encoding::Sparse => "sparse",
            Encoding::SparseXor => "sparse-xor",
            Encoding::Lz4 => "lz4",
            Encoding::Lz4Xor => "lz4-xor",
        }
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A set of encodings. `raw` is always a member: something must fit every page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncodingSet(u16);

impl EncodingSet {
    /// Only `raw`.
    pub const RAW: EncodingSet = EncodingSet(1 << Encoding::Raw as u16);
    /// Everything this build knows.
    pub const ALL: EncodingSet = EncodingSet((1 << Encoding::ALL.len()) - 1);

    /// The set of these encodings, and `raw`.
    pub fn of(encodings: &[Encoding]) -> EncodingSet {
        encodings.iter().fold(EncodingSet::RAW, |set, &e| EncodingSet(set.0 | 1 << e.tag()))
    }

    /// The set with these bits (bit i = tag i); `None` if a bit is unknown or `raw` is missing.
    pub fn from_bits(bits: u16) -> Option<EncodingSet> {
        (bits & !EncodingSet::ALL.0 == 0 && bits & EncodingSet::RAW.0 != 0).then_some(EncodingSet(bits))
    }

    /// Bit i is set if the encoding with tag i is a member.
    pub fn bits(self) -> u16 {
        self.0
    }

    /// Whether `encoding` is a member.
    pub fn contains(self, encoding: Encoding) -> bool {
        self.0 & 1 << encoding.tag() != 0
    }

    /// Whether any member needs a base, i.e. whether a history is worth keeping.
    pub fn needs_base(self) -> bool {
        self.iter().any(Encoding::needs_base)
    }

    /// What both sets contain.
    pub fn intersection(self, other: EncodingSet) -> EncodingSet {
        EncodingSet(self.0 & other.0)
    }

    /// The members, in tag order.
    pub fn iter(self) -> impl Iterator<Item = Encoding> {
        Encoding::ALL.into_iter().filter(move |&e| self.contains(e))
    }
}

impl fmt::Display for EncodingSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.iter().map(Encoding::name).collect();
        f.write_str(&names.join(","))
    }
}

impl FromStr for EncodingSet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "all" {
            return Ok(EncodingSet::ALL);
        }
        let mut set = EncodingSet::RAW;
        for name in text.split(',').map(str::trim) {
            let encoding = Encoding::ALL.into_iter().find(|e| e.name() == name).ok_or_else(|| {
                format!("unknown encoding `{name}`; expected `all` or a list of {}", EncodingSet::ALL)
            })?;
            set.0 |= 1 << encoding.tag();
        }
        Ok(set)
    }
}
