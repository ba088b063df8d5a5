//! The handshake of each connection, and what the destination says besides.

use pagewarp_codec::{Encoding, EncodingSet};
use pagewarp_wire::cursor::Cursor;
use pagewarp_wire::{WireError, at_most, malformed};

use super::meta::Form;
use super::{MAX_CONNECTIONS, MAX_SLOTS, VERSION};

/// What all connections of one migration have in common.
pub type SessionId = [u8; 16];

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// It carries the QEMU connection of this number; 0 is the main channel and comes first.
    Bridge(u16),
    /// It is the control connection of `pagewarp qemu migrate`.
    Control,
    /// It measures the link, before it is decided whether the bridge is used.
    Probe,
    /// After the handshake it is QEMU's own: nobody stands in between.
    Direct,
}

/// What both sides can do, or have agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Encodings of pages.
    pub encodings: EncodingSet,
    /// Whether the encoded pages of a segment may be compressed with zstd on top.
    pub zstd: bool,
    /// Whether each Credit carries the running hash of what was written, and the source compares it.
    pub verify: bool,
    /// Whether both QEMU processes can be given the two ends of one connection, without the bridge in between. Of a meaning on control connections only.
    pub direct: bool,
    /// History slots.
    pub history_slots: u32,
}

/// Bits of the features.
const ZSTD: u8 = 1;
const VERIFY: u8 = 2;
const DIRECT: u8 = 4;

impl Terms {
    /// What both can do.
    pub fn agree(self, other: Terms) -> Terms {
        Terms {
            encodings: self.encodings.intersection(other.encodings),
            zstd: self.zstd && other.zstd,
            verify: self.verify && other.verify,
            direct: self.direct && other.direct,
            history_slots: self.history_slots.min(other.history_slots),
        }
    }

    /// Whether pages may travel in this form.
    pub fn allow(self, form: Form) -> bool {
        match form {
            Form::Plain | Form::Encoded => true,
            Form::Zstd => self.zstd,
            Form::Lz4 => self.encodings.contains(Encoding::Lz4),
        }
    }

    fn encode(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.encodings.bits().to_le_bytes());
        let features = [(self.zstd, ZSTD), (self.verify, VERIFY), (self.direct, DIRECT)];
        out.push(features.iter().filter(|(is_on, _)| *is_on).map(|(_, bit)| bit).sum());
        out.extend_from_slice(&self.history_slots.to_le_bytes());
    }

    /// What the other side offers may contain encodings that this build does not know; what it has agreed on may not.
    fn decode(from: &mut Cursor<'_>, offered: bool) -> Result<Terms, WireError> {
        let bits = from.u16()?;
        let known = if offered { bits & EncodingSet::ALL.bits() } else { bits };
        let encodings = EncodingSet::from_bits(known)
            .ok_or_else(|| malformed("the encodings", format_args!("{bits:#06x}"), "known ones, and raw"))?;
        let features = from.u8()?;
        if !offered && features & !(ZSTD | VERIFY | DIRECT) != 0 {
            return Err(malformed("the features", format_args!("{features:#04x}"), "known ones"));
        }
        let has = |bit| features & bit != 0;
        let history_slots = from.u32()?;
        at_most("the history in slots", history_slots.into(), MAX_SLOTS.into())?;
        Ok(Terms { encodings, zstd: has(ZSTD), verify: has(VERIFY), direct: has(DIRECT), history_slots })
    }
}

/// The first frame of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The session that the connection belongs to.
    pub session: SessionId,
    /// What it is for.
    pub purpose: Purpose,
    /// What the source can do.
    pub terms: Terms,
}

/// What stands for connections that carry no connection of QEMU through the bridge.
const CONTROL: u16 = u16::MAX;
const PROBE: u16 = u16::MAX - 1;
const DIRECTLY: u16 = u16::MAX - 2;

impl Hello {
    /// The body.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = VERSION.to_le_bytes().to_vec();
        out.extend_from_slice(&self.session);
        let purpose = match self.purpose {
            Purpose::Bridge(number) => number,
            Purpose::Control => CONTROL,
            Purpose::Probe => PROBE,
            Purpose::Direct => DIRECTLY,
        };
        out.extend_from_slice(&purpose.to_le_bytes());
        self.terms.encode(&mut out);
        out
    }

    /// Reads the body.
    pub fn decode(body: &[u8]) -> Result<Hello, WireError> {
        let mut from = Cursor::new("Hello", body);
        check_version(from.u16()?)?;
        let session = from.array()?;
        let purpose = match from.u16()? {
            CONTROL => Purpose::Control,
            PROBE => Purpose::Probe,
            DIRECTLY => Purpose::Direct,
            number => {
                at_most("the number of a connection", number.into(), MAX_CONNECTIONS as u64 - 1)?;
                Purpose::Bridge(number)
            }
        };
        let terms = Terms::decode(&mut from, true)?;
        from.end()?;
        Ok(Hello { session, purpose, terms })
    }
}

/// The body of HelloAck: what was agreed.
pub fn encode_ack(terms: Terms) -> Vec<u8> {
    let mut out = VERSION.to_le_bytes().to_vec();
    terms.encode(&mut out);
    out
}

/// Reads the body of HelloAck.
pub fn decode_ack(body: &[u8]) -> Result<Terms, WireError> {
    let mut from = Cursor::new("HelloAck", body);
    check_version(from.u16()?)?;
    let terms = Terms::decode(&mut from, false)?;
    from.end()?;
    Ok(terms)
}

fn check_version(seen: u16) -> Result<(), WireError> {
    if seen == VERSION {
        return Ok(());
    }
    Err(WireError::UnsupportedVersion {
        what: "bridge protocol",
        seen: seen.to_string(),
        expected: VERSION.to_string(),
    })
}

/// How far the destination is with one connection. All counts are totals of the connection, or of the whole session where it says so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Credit {
    /// Bytes of the stream that were written into the destination QEMU.
    pub delivered_bytes: u64,
    /// Bytes of frames received.
    pub received_bytes: u64,
    /// Time that the destination has worked on decoding, over all connections and threads.
    pub decode_ns: u64,
    /// Pages decoded in that time.
    pub decoded_pages: u64,
    /// Time spent on writing into the destination QEMU on this connection.
    pub restore_ns: u64,
    /// XXH3 of all that was written into the destination QEMU; 0 unless it was agreed on.
    pub stream_hash: u64,
}

impl Credit {
    /// The body.
    pub fn encode(&self) -> Vec<u8> {
        let Credit { delivered_bytes, received_bytes, decode_ns, decoded_pages, restore_ns, stream_hash } =
            self;
        [delivered_bytes, received_bytes, decode_ns, decoded_pages, restore_ns, stream_hash]
            .into_iter()
            .flat_map(|field| field.to_le_bytes())
            .collect()
    }

    /// Reads the body.
    pub fn decode(body: &[u8]) -> Result<Credit, WireError> {
        let mut from = Cursor::new("Credit", body);
        let credit = Credit {
            delivered_bytes: from.u64()?,
            received_bytes: from.u64()?,
            decode_ns: from.u64()?,
            decoded_pages: from.u64()?,
            restore_ns: from.u64()?,
            stream_hash: from.u64()?,
        };
        from.end()?;
        Ok(credit)
    }
}

/// What came of a probe, and what the destination is like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Probed {
    /// Bytes of payload received so far on this connection.
    pub received_bytes: u64,
    /// The destination.
    pub host: Host,
}

/// What a host can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// Processors that its pagewarp may use.
    pub processors: u32,
    /// CPU time that it takes to pass a MiB through a local socket, in nanoseconds.
    pub pass_ns_per_mib: u64,
    /// The same number on the same machine, at least until that is booted again.
    pub machine: u64,
}

impl Probed {
    /// The body.
    pub fn encode(&self) -> Vec<u8> {
        let Host { processors, pass_ns_per_mib, machine } = self.host;
        let mut out = self.received_bytes.to_le_bytes().to_vec();
        out.extend_from_slice(&processors.to_le_bytes());
        out.extend_from_slice(&pass_ns_per_mib.to_le_bytes());
        out.extend_from_slice(&machine.to_le_bytes());
        out
    }

    /// Reads the body.
    pub fn decode(body: &[u8]) -> Result<Probed, WireError> {
        let mut from = Cursor::new("Probed", body);
        let received_bytes = from.u64()?;
        let host = Host { processors: from.u32()?, pass_ns_per_mib: from.u64()?, machine: from.u64()? };
        from.end()?;
        Ok(Probed { received_bytes, host })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERMS: Terms =
        Terms { encodings: EncodingSet::ALL, zstd: true, verify: true, direct: true, history_slots: 77 };

    #[test]
    fn messages_come_back() {
        for purpose in
            [Purpose::Bridge(0), Purpose::Bridge(259), Purpose::Control, Purpose::Probe, Purpose::Direct]
        {
            let hello = Hello { session: [7; 16], purpose, terms: TERMS };
            assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
        }
        assert_eq!(decode_ack(&encode_ack(TERMS)), Ok(TERMS));
        for (zstd, verify, direct) in [(false, false, true), (false, true, false), (true, false, false)] {
            let terms = Terms { zstd, verify, direct, ..TERMS };
            assert_eq!(decode_ack(&encode_ack(terms)), Ok(terms));
        }
        let credit = Credit {
            delivered_bytes: 1,
            received_bytes: 2,
            decode_ns: 3,
            decoded_pages: 4,
            restore_ns: 5,
            stream_hash: 6,
        };
        assert_eq!(Credit::decode(&credit.encode()), Ok(credit));
        let host = Host { processors: 2, pass_ns_per_mib: 3, machine: 4 };
        let probed = Probed { received_bytes: 1, host };
        assert_eq!(Probed::decode(&probed.encode()), Ok(probed));
        assert!(Probed::decode(&probed.encode()[1..]).is_err());
    }

    #[test]
    fn what_cannot_be_is_rejected() {
        let hello = Hello { session: [7; 16], purpose: Purpose::Bridge(1), terms: TERMS }.encode();
        for len in 0..hello.len() {
            assert!(Hello::decode(&hello[..len]).is_err(), "{len} bytes");
        }
        let mut version = hello.clone();
        version[0] = 9;
        assert!(matches!(Hello::decode(&version), Err(WireError::UnsupportedVersion { .. })));
        let mut number = hello;
        number[18..20].copy_from_slice(&300u16.to_le_bytes());
        assert!(matches!(Hello::decode(&number), Err(WireError::TooLarge { .. })));
        let mut unknown = encode_ack(TERMS);
        unknown[3] = 0x80;
        assert!(decode_ack(&unknown).is_err(), "an encoding this build does not know was agreed on");
        let mut unknown = encode_ack(TERMS);
        unknown[4] |= 0x80;
        assert!(decode_ack(&unknown).is_err(), "a feature this build does not know was agreed on");
        let mut newer = Hello { session: [7; 16], purpose: Purpose::Bridge(1), terms: TERMS };
        let mut offer = newer.encode();
        let features = offer.len() - 5;
        offer[features] = 0x80;
        (newer.terms.zstd, newer.terms.verify, newer.terms.direct) = (false, false, false);
        assert_eq!(Hello::decode(&offer), Ok(newer), "what is offered need not be known");
    }

    #[test]
    fn pages_travel_as_was_agreed_on() {
        assert_eq!(Form::ALL.map(|form| TERMS.allow(form)), [true; 4]);
        let few = Terms {
            encodings: EncodingSet::RAW,
            zstd: false,
            verify: false,
            direct: false,
            history_slots: 0,
        };
        assert_eq!(Form::ALL.map(|form| few.allow(form)), [true, true, false, false]);
    }

    #[test]
    fn the_smaller_of_both_is_agreed_on() {
        let other = Terms {
            encodings: EncodingSet::RAW,
            zstd: false,
            verify: false,
            direct: false,
            history_slots: 100,
        };
        assert_eq!(TERMS.agree(other), Terms { history_slots: 77, ..other });
    }
}
