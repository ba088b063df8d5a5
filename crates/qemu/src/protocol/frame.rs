//! Frames: a header of fixed length, a *meta* that the header's check covers, and the payload of pages.

use pagewarp_codec::PAGE_SIZE;
use pagewarp_wire::{WireError, at_most, malformed};
use xxhash_rust::xxh3::Xxh3Default;

use super::{MAX_LITERALS, MAX_MESSAGE, MAX_OPS, MAX_PAGES};

/// The first bytes of a frame: "PWQB", little-endian.
const MAGIC: u32 = 0x4251_5750;
/// Bytes of a header.
pub const HEADER_LEN: usize = 24;
/// The longest meta: everything of a segment but its pages.
pub const MAX_META: usize = MAX_LITERALS + 16 * MAX_OPS + 64 * MAX_PAGES + 4096;
/// The longest payload. Compressed pages of a segment are never sent if they are longer than plain ones.
pub const MAX_PAYLOAD: usize = MAX_PAGES * PAGE_SIZE;

/// What a frame is. The discriminant is the kind byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// First on every connection, to the destination: who connects and what it can.
    Hello = 1,
    /// The answer, to the source: what was agreed.
    HelloAck = 2,
    /// To the destination: a piece of the stream of the QEMU connection.
    Segment = 3,
    /// To the destination: the source QEMU has ended its direction after the migration was complete.
    End = 4,
    /// To the source: what has been written into the destination QEMU so far.
    Credit = 5,
    /// To the source: bytes that the destination QEMU sent, as they are.
    Reverse = 6,
    /// To the source: the destination QEMU has ended its direction.
    ReverseEnd = 7,
    /// To the source: the destination gave up; the text says why.
    Error = 8,
    /// Either way on a control connection: a message in JSON.
    Control = 9,
    /// To the destination, on a connection that measures the link: bytes that mean nothing.
    Probe = 10,
    /// To the source: what came of them, and what that host is like.
    Probed = 11,
}

impl Kind {
    const ALL: [Kind; 11] = [
        Kind::Hello,
        Kind::HelloAck,
        Kind::Segment,
        Kind::End,
        Kind::Credit,
        Kind::Reverse,
        Kind::ReverseEnd,
        Kind::Error,
        Kind::Control,
        Kind::Probe,
        Kind::Probed,
    ];

    /// Whether a frame may be so long.
    pub fn allows(self, meta_len: usize, payload_len: usize) -> bool {
        let (max_meta, max_payload) = self.limits();
        meta_len <= max_meta && payload_len <= max_payload
    }

    /// The longest meta and the longest payload.
    fn limits(self) -> (usize, usize) {
        match self {
            Kind::Segment => (MAX_META, MAX_PAYLOAD),
            Kind::Reverse | Kind::Control | Kind::Error => (MAX_MESSAGE, 0),
            Kind::Hello | Kind::HelloAck | Kind::Credit | Kind::Probed => (256, 0),
            Kind::Probe => (0, MAX_PAYLOAD),
            Kind::End | Kind::ReverseEnd => (0, 0),
        }
    }
}

/// A checked header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What follows.
    pub kind: Kind,
    /// The number of the frame on its connection and in its direction, from 0.
    pub seq: u32,
    /// Bytes of the meta.
    pub meta_len: usize,
    /// Bytes of the payload.
    pub payload_len: usize,
    check: u32,
}

/// Writes the headers of one direction of one connection.
#[derive(Debug, Default)]
pub struct FrameWriter {
    seq: u32,
}

impl FrameWriter {
    /// The header of the next frame.
    ///
    /// # Panics
    ///
    /// If it is longer than its kind may be: whoever makes frames keeps to the limits.
    pub fn header(&mut self, kind: Kind, meta: &[u8], payload_len: usize) -> [u8; HEADER_LEN] {
        assert!(
            kind.allows(meta.len(), payload_len),
            "a {kind:?} frame of {} + {payload_len} bytes",
            meta.len()
        );
        let mut header = [0; HEADER_LEN];
        header[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        header[4] = kind as u8;
        header[8..12].copy_from_slice(&self.seq.to_le_bytes());
        header[12..16].copy_from_slice(&(meta.len() as u32).to_le_bytes());
        header[16..20].copy_from_slice(&(payload_len as u32).to_le_bytes());
        let check = check(&header, meta);
        header[20..24].copy_from_slice(&check.to_le_bytes());
        self.seq = self.seq.wrapping_add(1);
        header
    }
}

/// Reads the headers of one direction of one connection.
#[derive(Debug, Default)]
pub struct FrameReader {
    seq: u32,
}

impl FrameReader {
    /// Checks a header as far as it can be checked without the meta, above all the lengths.
    pub fn header(&mut self, bytes: &[u8; HEADER_LEN]) -> Result<Header, WireError> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if word(0) != MAGIC {
            return Err(WireError::BadMagic { seen: word(0), expected: MAGIC });
        }
        let Some(&kind) = usize::from(bytes[4]).checked_sub(1).and_then(|at| Kind::ALL.get(at)) else {
            return Err(WireError::UnknownKind { seen: bytes[4], last: Kind::ALL.len() as u8 });
        };
        if bytes[5..8] != [0; 3] {
            return Err(malformed("the flags of a frame", format_args!("{:?}", &bytes[5..8]), "zeros"));
        }
        let (max_meta, max_payload) = kind.limits();
        at_most("the meta of a frame", word(12).into(), max_meta as u64)?;
        at_most("the payload of a frame", word(16).into(), max_payload as u64)?;
        if word(8) != self.seq {
            return Err(WireError::Sequence { seen: word(8).into(), expected: self.seq.into() });
        }
        self.seq = self.seq.wrapping_add(1);
        Ok(Header {
            kind,
            seq: word(8),
            meta_len: word(12) as usize,
            payload_len: word(16) as usize,
            check: word(20),
        })
    }
}

impl Header {
    /// Checks the meta, and with it the rest of the header.
    pub fn verify(&self, bytes: &[u8; HEADER_LEN], meta: &[u8]) -> Result<(), WireError> {
        let seen = check(bytes, meta);
        if seen == self.check {
            return Ok(());
        }
        Err(WireError::Checksum {
            what: "a frame without its pages",
            seen: seen.into(),
            expected: self.check.into(),
        })
    }
}

/// Half of the xxh3-64 of header and meta.
fn check(header: &[u8; HEADER_LEN], meta: &[u8]) -> u32 {
    let mut hash = Xxh3Default::new();
    hash.update(&header[..HEADER_LEN - 4]);
    hash.update(meta);
    hash.digest() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_come_back() {
        let (mut writer, mut reader) = (FrameWriter::default(), FrameReader::default());
        for (kind, meta, payload) in
            [(Kind::Hello, &b"abc"[..], 0), (Kind::Segment, b"", 4096), (Kind::End, b"", 0)]
        {
            let bytes = writer.header(kind, meta, payload);
            let header = reader.header(&bytes).unwrap();
            assert_eq!((header.kind, header.meta_len, header.payload_len), (kind, meta.len(), payload));
            header.verify(&bytes, meta).unwrap();
        }
    }

    #[test]
    fn every_changed_bit_is_noticed() {
        let bytes = FrameWriter::default().header(Kind::Segment, b"meta", 100);
        for bit in 0..8 * HEADER_LEN {
            let mut broken = bytes;
            broken[bit / 8] ^= 1 << (bit % 8);
            let result =
                FrameReader::default().header(&broken).and_then(|header| header.verify(&broken, b"meta"));
            assert!(result.is_err(), "bit {bit}");
        }
    }

    #[test]
    fn lengths_are_bounded_by_kind() {
        let mut bytes = FrameWriter::default().header(Kind::Segment, b"", 0);
        bytes[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(FrameReader::default().header(&bytes), Err(WireError::TooLarge { .. })));
        bytes[4] = Kind::End as u8;
        bytes[16..20].copy_from_slice(&1u32.to_le_bytes());
        assert!(matches!(FrameReader::default().header(&bytes), Err(WireError::TooLarge { .. })));
    }
}
