//! What the two ends of a lasting connection say to each other, besides the bytes they carry. `docs/link-protocol.md` is the description.

use std::io;
use std::time::Duration;

use pagewarp_engine::transport::OutOfProtocol;

/// What a connection that may be continued begins with.
pub(super) const MAGIC: &[u8; 4] = b"PWLK";
const VERSION: u8 = 1;
/// Length of an opening.
pub(super) const OPENING_LEN: usize = 40;
/// Length of its answer.
pub(super) const ANSWER_LEN: usize = 24;
/// Length of the header of a piece.
pub(super) const HEADER_LEN: usize = 12;
/// Bytes in a piece, at most.
pub(super) const MAX_PIECE: usize = 4 << 20;

/// Names a connection: 14 random bytes that all connections of a migration have in common, and a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Token {
    pub(super) group: [u8; 14],
    pub(super) number: u16,
}

/// What the opening end wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// A new connection.
    Open,
    /// To go on with the connection of this name, of which it has received so many bytes.
    Resume { received: u64 },
    /// To give up all connections of the group.
    Abandon,
}

/// The first bytes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Opening {
    pub(super) wish: Wish,
    pub(super) token: Token,
    /// How long the opening end tries to mend a broken connection.
    pub(super) patience: Duration,
}

impl Opening {
    pub(super) fn encode(&self) -> [u8; OPENING_LEN] {
        let (wish, received) = match self.wish {
            Wish::Open => (0, 0),
            Wish::Resume { received } => (1, received),
            Wish::Abandon => (2, 0),
        };
        let mut bytes = [0; OPENING_LEN];
        bytes[..4].copy_from_slice(MAGIC);
        bytes[4] = VERSION;
        bytes[5] = wish;
        bytes[8..22].copy_from_slice(&self.token.group);
        bytes[22..24].copy_from_slice(&self.token.number.to_le_bytes());
        bytes[24..32].copy_from_slice(&received.to_le_bytes());
        bytes[32..36].copy_from_slice(&millis(self.patience).to_le_bytes());
        bytes
    }

    /// `bytes` begin with [`MAGIC`].
    pub(super) fn decode(bytes: &[u8; OPENING_LEN]) -> io::Result<Opening> {
        if bytes[4] != VERSION {
            return Err(invalid(format!("version {} of the link protocol, expected {VERSION}", bytes[4])));
        }
        let received = u64::from_le_bytes(array(&bytes[24..32]));
        let wish = match (bytes[5], received) {
            (0, 0) => Wish::Open,
            (1, received) => Wish::Resume { received },
            (2, 0) => Wish::Abandon,
            (wish, _) => return Err(invalid(format!("wish {wish} and {received} bytes in an opening"))),
        };
        if bytes[6..8] != [0; 2] || bytes[36..] != [0; 4] {
            return Err(invalid("reserved bytes of an opening that are not 0".into()));
        }
        let token = Token { group: array(&bytes[8..22]), number: u16::from_le_bytes(array(&bytes[22..24])) };
        let patience = Duration::from_millis(u32::from_le_bytes(array(&bytes[32..36])).into());
        Ok(Opening { wish, token, patience })
    }
}

/// What the accepting end says to an opening.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// It goes on; this end has received so many bytes, and waits for so long if it breaks.
    Go { received: u64, patience: Duration },
    /// There is no such connection, or no more.
    Over,
}

impl Answer {
    pub(super) fn encode(&self) -> [u8; ANSWER_LEN] {
        let (verdict, received, patience) = match *self {
            Answer::Go { received, patience } => (0, received, millis(patience)),
            Answer::Over => (1, 0, 0),
        };
        let mut bytes = [0; ANSWER_LEN];
        bytes[..4].copy_from_slice(MAGIC);
        bytes[4] = VERSION;
        bytes[5] = verdict;
        bytes[8..16].copy_from_slice(&received.to_le_bytes());
        bytes[16..20].copy_from_slice(&patience.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; ANSWER_LEN]) -> io::Result<Answer> {
        if &bytes[..4] != MAGIC || bytes[4] != VERSION {
            return Err(invalid(format!(
                "{:02x?} in answer to an opening: no pagewarp, or one that cannot mend connections (turn that off with `--resume-timeout 0`)",
                &bytes[..5]
            )));
        }
        let received = u64::from_le_bytes(array(&bytes[8..16]));
        let patience = u32::from_le_bytes(array(&bytes[16..20]));
        match (bytes[5], received, patience) {
            (0, ..) => Ok(Answer::Go { received, patience: Duration::from_millis(patience.into()) }),
            (1, 0, 0) => Ok(Answer::Over),
            (verdict, ..) => Err(invalid(format!("verdict {verdict} in answer to an opening"))),
        }
    }
}

/// A piece of what flows in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// So many bytes follow.
    Data(usize),
    /// So many bytes of the other direction have been received in all.
    Confirm(u64),
    /// There is nothing more.
    Close,
}

impl Piece {
    pub(super) fn encode(self) -> [u8; HEADER_LEN] {
        let (kind, value) = match self {
            Piece::Data(len) => (0, len as u64),
            Piece::Confirm(total) => (1, total),
            Piece::Close => (2, 0),
        };
        let mut bytes = [0; HEADER_LEN];
        bytes[0] = kind;
        bytes[4..].copy_from_slice(&value.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; HEADER_LEN]) -> io::Result<Piece> {
        let value = u64::from_le_bytes(array(&bytes[4..]));
        match (bytes[0], &bytes[1..4], value) {
            (0, [0, 0, 0], 1..) if value <= MAX_PIECE as u64 => Ok(Piece::Data(value as usize)),
            (1, [0, 0, 0], _) => Ok(Piece::Confirm(value)),
            (2, [0, 0, 0], 0) => Ok(Piece::Close),
            _ => Err(invalid(format!("{bytes:02x?} where a piece of a lasting connection begins"))),
        }
    }
}

fn millis(time: Duration) -> u32 {
    time.as_millis().try_into().unwrap_or(u32::MAX)
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("as many bytes as the field has")
}

pub(super) fn invalid(what: String) -> io::Error {
    OutOfProtocol(what).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: Token = Token { group: *b"fourteen bytes", number: 0x1234 };

    #[test]
    fn what_is_said_is_understood() {
        let patience = Duration::from_millis(61_234);
        for wish in [Wish::Open, Wish::Resume { received: 0x1_0000_0007 }, Wish::Abandon] {
            let opening = Opening { wish, token: TOKEN, patience };
            assert_eq!(Opening::decode(&opening.encode()).unwrap(), opening);
        }
        for answer in [Answer::Go { received: u64::MAX, patience }, Answer::Over] {
            assert_eq!(Answer::decode(&answer.encode()).unwrap(), answer);
        }
        for piece in [Piece::Data(1), Piece::Data(MAX_PIECE), Piece::Confirm(u64::MAX), Piece::Close] {
            assert_eq!(Piece::decode(&piece.encode()).unwrap(), piece);
        }
    }

    #[test]
    fn nothing_else_is() {
        let opening = Opening { wish: Wish::Open, token: TOKEN, patience: Duration::ZERO }.encode();
        for (at, value) in [(4, 2), (5, 3), (6, 1), (7, 1), (24, 1), (36, 1), (39, 1)] {
            let mut bytes = opening;
            bytes[at] = value;
            assert!(Opening::decode(&bytes).is_err(), "byte {at}");
        }
        for (at, value) in [(0, 0), (4, 0), (5, 2)] {
            let mut bytes = Answer::Over.encode();
            bytes[at] = value;
            assert!(Answer::decode(&bytes).is_err(), "byte {at}");
        }
        let mut too_long = Piece::Data(1).encode();
        too_long[4..].copy_from_slice(&(MAX_PIECE as u64 + 1).to_le_bytes());
        let mut empty = Piece::Data(1).encode();
        empty[4] = 0;
        let mut unknown = Piece::Close.encode();
        unknown[0] = 3;
        let mut reserved = Piece::Close.encode();
        reserved[2] = 1;
        for bytes in [too_long, empty, unknown, reserved] {
            assert!(Piece::decode(&bytes).is_err(), "{bytes:?}");
        }
    }
}
