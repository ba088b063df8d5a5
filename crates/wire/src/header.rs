//! The fixed header in front of every frame.

use xxhash_rust::xxh3::xxh3_64;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::error::{WireError, at_most, malformed};
use crate::kind::Kind;
use crate::limits::Limits;

/// Bytes of a header.
pub const HEADER_LEN: usize = size_of::<RawHeader>();

/// The ASCII characters `PGWP`.
pub(crate) const MAGIC: u32 = u32::from_le_bytes(*b"PGWP");
/// The layout of header and frame. Versions of the messages are negotiated; this is not.
pub(crate) const FRAME_FORMAT: u8 = 1;

/// The header as it is on the wire.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    format: u8,
    kind: u8,
    flags: U16,
    seq: U64,
    body_len: U32,
    meta_len: U32,
    meta_check: U64,
    header_check: U64,
}

/// Bytes that `header_check` covers.
const CHECKED_LEN: usize = HEADER_LEN - 8;

/// A header whose checksum fits and whose lengths are within limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    kind: Kind,
    seq: u64,
    body_len: u32,
    meta_len: u32,
    meta_check: u64,
}

impl Header {
    /// Parses and checks everything that the header alone can tell. Until it has returned `Ok` nothing should be
    /// allocated for the frame.
    ///
    /// # Errors
    /// [`WireError`] of nearly any reason; the stream cannot be used any more.
    pub fn parse(bytes: &[u8; HEADER_LEN], limits: &Limits) -> Result<Header, WireError> {
        let raw = RawHeader::read_from_bytes(bytes).expect("both are HEADER_LEN bytes long");
        if raw.magic.get() != MAGIC {
            return Err(WireError::BadMagic { seen: raw.magic.get(), expected: MAGIC });
        }
        if raw.format != FRAME_FORMAT {
            return Err(WireError::UnsupportedVersion {
                what: "frame format",
                seen: raw.format.to_string(),
                expected: FRAME_FORMAT.to_string(),
            });
        }
        let seen = xxh3_64(&bytes[..CHECKED_LEN]);
        if seen != raw.header_check.get() {
            return Err(WireError::Checksum {
                what: "a frame header",
                seen,
                expected: raw.header_check.get(),
            });
        }
        let last = Kind::ALL.len() as u8;
        let kind = Kind::from_byte(raw.kind).ok_or(WireError::UnknownKind { seen: raw.kind, last })?;
        if raw.flags.get() != 0 {
            return Err(malformed("flags of a frame header", raw.flags, 0));
        }
        let header = Header {
            kind,
            seq: raw.seq.get(),
            body_len: raw.body_len.get(),
            meta_len: raw.meta_len.get(),
            meta_check: raw.meta_check.get(),
        };
        header.check_lengths(limits)?;
        Ok(header)
    }

    fn check_lengths(&self, limits: &Limits) -> Result<(), WireError> {
        let (shortest, longest) = self.kind.meta_bounds(limits);
        let meta_len = self.meta_len as usize;
        at_most(what_of(self.kind), meta_len as u64, longest as u64)?;
        if meta_len < shortest {
            return Err(WireError::Truncated {
                what: what_of(self.kind),
                seen: meta_len as u64,
                expected: shortest as u64,
            });
        }
        let Some(payload_len) = self.body_len.checked_sub(self.meta_len) else {
            return Err(malformed("body length", self.body_len, format_args!("at least {meta_len}")));
        };
        let most = match self.kind {
            Kind::Batch => u64::from(limits.max_batch_pages) * u64::from(crate::PAGE_SIZE),
            _ => 0,
        };
        at_most("a frame's payload", payload_len.into(), most)
    }

    /// The kind of frame.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The number of this frame on its connection and in its direction, from 0.
    pub fn seq(&self) -> u64 {
        self.seq
    }

    /// Bytes after the header: meta and payload.
    pub fn body_len(&self) -> usize {
        self.body_len as usize
    }

    /// Bytes of the meta of a batch; of any other kind, of its body.
    pub fn meta_len(&self) -> usize {
        self.meta_len as usize
    }

    /// Bytes of the payload that follows the meta; 0 unless this is a batch.
    pub fn payload_len(&self) -> usize {
        self.body_len() - self.meta_len()
    }

    /// Checks the meta that followed the header.
    pub(crate) fn check_meta(&self, meta: &[u8]) -> Result<(), WireError> {
        if meta.len() != self.meta_len() {
            return Err(WireError::Truncated {
                what: what_of(self.kind),
                seen: meta.len() as u64,
                expected: self.meta_len() as u64,
            });
        }
        let seen = xxh3_64(meta);
        if seen != self.meta_check {
            return Err(WireError::Checksum { what: what_of(self.kind), seen, expected: self.meta_check });
        }
        Ok(())
    }
}

/// The header of a frame with this meta and a payload of this length.
pub(crate) fn header_bytes(kind: Kind, seq: u64, meta: &[u8], payload_len: u32) -> [u8; HEADER_LEN] {
    let meta_len = u32::try_from(meta.len()).expect("the writer checked the length against the caps");
    let mut raw = RawHeader {
        magic: MAGIC.into(),
        format: FRAME_FORMAT,
        kind: kind.byte(),
        flags: 0.into(),
        seq: seq.into(),
        body_len: (meta_len + payload_len).into(),
        meta_len: meta_len.into(),
        meta_check: xxh3_64(meta).into(),
        header_check: 0.into(),
    };
    raw.header_check = xxh3_64(&raw.as_bytes()[..CHECKED_LEN]).into();
    zerocopy::transmute!(raw)
}

fn what_of(kind: Kind) -> &'static str {
    match kind {
        Kind::Batch => "the meta of a Batch",
        Kind::Hello => "the body of Hello",
        Kind::Offer => "the body of Offer",
        Kind::DeviceState => "the body of DeviceState",
        Kind::Running => "the body of Running",
        Kind::Digests => "the body of Digests",
        _ => "the body of a control frame",
    }
}
