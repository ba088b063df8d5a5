//! How the state travels: a header and sections, each tagged and counted, little-endian.
//!
//! ```text
//! "PWVS"  version u16  zero u16  sections u32 | tag u16  vcpu u16  bytes u32  payload ... | ...
//! ```

use std::collections::BTreeMap;

use zerocopy::byteorder::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

const MAGIC: [u8; 4] = *b"PWVS";
/// The version of the format and of what is in the sections; another one is refused.
const VERSION: u16 = 1;
/// The most bytes of a section. The largest one is a vCPU's MSRs or XSAVE area.
const MAX_SECTION_BYTES: usize = 64 << 10;
/// The `vcpu` of a section that belongs to the whole VM.
pub(super) const WHOLE_VM: u16 = u16::MAX;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 4],
    version: U16,
    zero: U16,
    sections: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct SectionHeader {
    tag: U16,
    vcpu: U16,
    bytes: U32,
}

macro_rules! tags {
    ($($name:ident = $value:literal, $text:literal;)*) => {
        /// What a section holds.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub(super) enum Tag {
            $($name = $value,)*
        }

        impl Tag {
            fn from_u16(value: u16) -> Option<Tag> {
                match value {
                    $($value => Some(Tag::$name),)*
                    _ => None,
                }
            }

            /// For messages.
            pub(super) fn name(self) -> &'static str {
                match self {
                    $(Tag::$name => $text,)*
                }
            }
        }
    };
}

tags! {
    Time = 1, "time";
    PicMaster = 2, "first interrupt controller";
    PicSlave = 3, "second interrupt controller";
    IoApic = 4, "I/O APIC";
    Pit = 5, "timer (PIT)";
    Clock = 6, "paravirtual clock";
    Serial = 7, "serial port";
    Regs = 16, "registers";
    Sregs = 17, "special registers";
    Fpu = 18, "FPU";
    Xsave = 19, "XSAVE area";
    Xcrs = 20, "extended control registers";
    DebugRegs = 21, "debug registers";
    Lapic = 22, "local APIC";
    Msrs = 23, "MSRs";
    Events = 24, "pending events";
    MpState = 25, "MP state";
}

/// The sections of one state.
pub(super) struct Sections {
    map: BTreeMap<(u16, Tag), Vec<u8>>,
}

impl Sections {
    pub(super) fn new() -> Sections {
        Sections { map: BTreeMap::new() }
    }

    pub(super) fn put(&mut self, vcpu: u16, tag: Tag, payload: &[u8]) {
        self.map.insert((vcpu, tag), payload.to_vec());
    }

    /// Takes a section out, if it is there.
    pub(super) fn take(&mut self, vcpu: u16, tag: Tag) -> Option<Vec<u8>> {
        self.map.remove(&(vcpu, tag))
    }

    /// A section that nobody took.
    pub(super) fn first(&self) -> Option<(u16, Tag)> {
        self.map.keys().next().copied()
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let header = Header {
            magic: MAGIC,
            version: VERSION.into(),
            zero: 0.into(),
            sections: (self.map.len() as u32).into(),
        };
        let mut bytes = header.as_bytes().to_vec();
        for (&(vcpu, tag), payload) in &self.map {
            let section = SectionHeader {
                tag: (tag as u16).into(),
                vcpu: vcpu.into(),
                bytes: (payload.len() as u32).into(),
            };
            bytes.extend_from_slice(section.as_bytes());
            bytes.extend_from_slice(payload);
        }
        bytes
    }

    /// Reads what another host wrote. The message of an error says what was seen.
    pub(super) fn parse(bytes: &[u8]) -> Result<Sections, String> {
        let (header, mut rest) = Header::read_from_prefix(bytes)
            .map_err(|_| format!("{} bytes are too few for a header", bytes.len()))?;
        if header.magic != MAGIC {
            return Err(format!("it starts with {:02x?}, expected {MAGIC:02x?}", header.magic));
        }
        if header.version != VERSION || header.zero != 0 {
            let version = header.version;
            return Err(format!(
                "version {version}; this build knows version {VERSION}; use the same build on both hosts"
            ));
        }
        let mut sections = Sections::new();
        for i in 0..header.sections.get() {
            let (section, after) = SectionHeader::read_from_prefix(rest)
                .map_err(|_| format!("it ends in the header of section {i} of {}", header.sections))?;
            let tag = Tag::from_u16(section.tag.get())
                .ok_or_else(|| format!("section {i} has the unknown tag {}", section.tag))?;
            let length = section.bytes.get() as usize;
            if length > MAX_SECTION_BYTES {
                return Err(format!("{}: {length} bytes; expected at most {MAX_SECTION_BYTES}", tag.name()));
            }
            let (payload, after) =
                after.split_at_checked(length).ok_or_else(|| format!("it ends within {}", tag.name()))?;
            if sections.map.insert((section.vcpu.get(), tag), payload.to_vec()).is_some() {
                return Err(format!("{} comes twice", tag.name()));
            }
            rest = after;
        }
        match rest.len() {
            0 => Ok(sections),
            n => Err(format!("{n} bytes follow the last section")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let mut sections = Sections::new();
        sections.put(WHOLE_VM, Tag::Time, &[1; 16]);
        sections.put(0, Tag::Regs, &[2; 144]);
        sections.to_bytes()
    }

    #[test]
    fn sections_come_back() {
        let mut sections = Sections::parse(&sample()).unwrap();
        assert_eq!(sections.take(0, Tag::Regs), Some(vec![2; 144]));
        assert_eq!(sections.first(), Some((WHOLE_VM, Tag::Time)));
        assert_eq!(sections.take(1, Tag::Regs), None);
    }

    #[test]
    fn every_truncation_and_any_extra_byte_is_an_error() {
        let bytes = sample();
        for length in 0..bytes.len() {
            assert!(Sections::parse(&bytes[..length]).is_err(), "{length}");
        }
        assert!(Sections::parse(&[&bytes[..], &[0]].concat()).is_err());
    }

    #[test]
    fn unknown_tags_versions_and_repetitions_are_errors() {
        let with = |at: usize, value: u8| {
            let mut bytes = sample();
            bytes[at] = value;
            Sections::parse(&bytes).err().unwrap()
        };
        assert!(with(0, b'X').contains("starts with"));
        assert!(with(4, 9).contains("version 9"));
        assert!(with(12, 200).contains("unknown tag"));
        let mut twice = sample();
        let section = twice[12..12 + 8 + 144].to_vec();
        twice.extend_from_slice(&section);
        twice[8] = 3;
        assert!(Sections::parse(&twice).err().unwrap().contains("twice"));
    }
}
