//! Reading the fields at the start of some bytes, of which the end may not have come yet.

use crate::segment::Place;
use pagewarp_codec::PAGE_SIZE;

/// Why the next item could not be read.
#[derive(Debug)]
pub(super) enum Stuck {
    /// Its end, or what tells where it ends, has not come yet.
    Hungry,
    /// It is not understood, and so nothing after it can be: what it is.
    Raw(String),
}

/// What to do with the next bytes of the stream.
#[derive(Clone, Copy, Debug)]
pub(super) enum Item {
    /// So many literal bytes, never none. They need not be there yet: they are passed as they come.
    Literal(u64),
    /// A page.
    Page(Option<Place>),
    /// A word and a page.
    PageRecord(Option<Place>),
    /// A word and a zero byte. Both are there.
    ZeroRecord,
    /// The header of a multifd packet: literal bytes, then words. All of it is there.
    Packet,
    /// No bytes: the peer may be waiting for what came so far.
    Boundary,
}

/// Bytes of a multifd packet before its offsets.
pub(super) const PACKET_LITERALS: usize = 320;
/// Offsets in a multifd packet: those of the pages in half a MiB.
pub(super) const PACKET_OFFSETS: usize = (512 << 10) / PAGE_SIZE;

impl Item {
    /// Bytes of the stream that it stands for.
    pub(super) fn len(self) -> u64 {
        match self {
            Item::Literal(n) => n,
            Item::Page(_) => PAGE_SIZE as u64,
            Item::PageRecord(_) => 8 + PAGE_SIZE as u64,
            Item::ZeroRecord => 9,
            Item::Packet => (PACKET_LITERALS + 8 * PACKET_OFFSETS) as u64,
            Item::Boundary => 0,
        }
    }
}

/// The fields at the start of `bytes`, big-endian, one after another.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Cursor<'a> {
        Cursor { bytes, at: 0 }
    }

    /// Bytes read so far.
    pub(super) fn len(&self) -> u64 {
        self.at as u64
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Stuck> {
        let bytes = self.bytes[self.at..].first_chunk::<N>().ok_or(Stuck::Hungry)?;
        self.at += N;
        Ok(*bytes)
    }

    pub(super) fn u8(&mut self) -> Result<u8, Stuck> {
        self.array().map(u8::from_be_bytes)
    }

    pub(super) fn u16(&mut self) -> Result<u16, Stuck> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Stuck> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Stuck> {
        self.array().map(u64::from_be_bytes)
    }

    pub(super) fn bytes(&mut self, n: usize) -> Result<&'a [u8], Stuck> {
        let bytes = self.bytes[self.at..].get(..n).ok_or(Stuck::Hungry)?;
        self.at += n;
        Ok(bytes)
    }

    /// A string after its length in a byte.
    pub(super) fn counted(&mut self) -> Result<&'a [u8], Stuck> {
        let n = self.u8()?;
        self.bytes(usize::from(n))
    }

    /// A counted string that names something, so that it is not empty.
    pub(super) fn name(&mut self) -> Result<&'a [u8], Stuck> {
        match self.counted()? {
            [] => Err(Stuck::Raw("an empty name".into())),
            name => Ok(name),
        }
    }

    /// What has not been read yet.
    pub(super) fn rest(&self) -> &'a [u8] {
        &self.bytes[self.at..]
    }
}

/// Whether a name looks like one that QEMU would give to a RAM block or a section.
pub(super) fn printable(name: &[u8]) -> bool {
    !name.is_empty() && name.iter().all(|b| (0x20..0x7f).contains(b))
}
