//! Frames of one connection: numbered, checked, bounded.

use crate::batch::{self, BatchMeta, BatchView};
use crate::error::{WireError, at_most, malformed};
use crate::header::{HEADER_LEN, Header, header_bytes};
use crate::kind::{Channel, Direction, Kind};
use crate::limits::Limits;
use crate::message::{Message, Role};
use crate::session::Session;

/// Writes the frames of one direction of one connection.
#[derive(Debug, Default)]
pub struct FrameWriter {
    next_seq: u64,
}

impl FrameWriter {
    /// For a new connection.
    pub fn new() -> FrameWriter {
        FrameWriter::default()
    }

    /// Appends a whole frame with `message` to `out`. Everything appended must be sent before the next frame.
    ///
    /// # Errors
    /// If the message breaks a rule of the protocol; then `out` is as it was.
    pub fn control(&mut self, message: &Message, out: &mut Vec<u8>) -> Result<(), WireError> {
        self.frame(message.kind(), 0, out, |out| message.encode(out))
    }

    /// Appends header and meta of a batch to `out`. The payload, `payload_len` bytes, must be sent right after them.
    ///
    /// # Errors
    /// If the batch breaks a rule of the protocol; then `out` is as it was.
    pub fn batch_prefix(
        &mut self,
        batch: &BatchView<'_>,
        payload_len: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), WireError> {
        let most = batch.pages.len() as u64 * u64::from(crate::PAGE_SIZE);
        at_most("the payload of a Batch", payload_len as u64, most)?;
        let sum: usize = batch.lens.iter().copied().map(usize::from).sum();
        if sum != payload_len {
            return Err(malformed(
                "the payload of a Batch",
                payload_len,
                format_args!("{sum}, the sum of its lengths"),
            ));
        }
        self.frame(Kind::Batch, payload_len as u32, out, |out| batch::encode(batch, out))
    }

    fn frame(
        &mut self,
        kind: Kind,
        payload_len: u32,
        out: &mut Vec<u8>,
        encode: impl FnOnce(&mut Vec<u8>) -> Result<(), WireError>,
    ) -> Result<(), WireError> {
        let start = out.len();
        let body = start + HEADER_LEN;
        out.resize(body, 0);
        if let Err(error) = encode(out) {
            out.truncate(start);
            return Err(error);
        }
        let header = header_bytes(kind, self.next_seq, &out[body..], payload_len);
        out[start..body].copy_from_slice(&header);
        self.next_seq += 1;
        Ok(())
    }
}

/// Reads the frames of one direction of one connection: header, then the rest with the method for its kind.
///
/// After an error the connection is of no use any more.
#[derive(Debug)]
pub struct FrameReader {
    next_seq: u64,
    direction: Direction,
    /// `None` until the hello has told.
    channel: Option<Channel>,
    limits: Limits,
    scratch: Vec<u32>,
}

impl FrameReader {
    /// For the destination, which accepts connections: the first frame must be a `Hello`, which tells the channel.
    pub fn accepting(limits: Limits) -> FrameReader {
        FrameReader {
            next_seq: 0,
            direction: Direction::ToDestination,
            channel: None,
            limits,
            scratch: Vec::new(),
        }
    }

    /// For the source, which opens connections: the first frame must be a `HelloAck` or an `Error`.
    pub fn opening(channel: Channel, limits: Limits) -> FrameReader {
        FrameReader {
            next_seq: 0,
            direction: Direction::ToSource,
            channel: Some(channel),
            limits,
            scratch: Vec::new(),
        }
    }

    /// Replaces the limits, once the size of batches is agreed.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// Checks the header of the next frame. On `Ok`, [`Header::body_len`] further bytes are to be read, and no more
    /// than the limits allow.
    ///
    /// # Errors
    /// [`WireError`] if the frame is damaged, too large, out of sequence, or does not belong on this connection.
    pub fn header(&mut self, bytes: &[u8; HEADER_LEN]) -> Result<Header, WireError> {
        let header = Header::parse(bytes, &self.limits)?;
        if header.seq() != self.next_seq {
            return Err(WireError::Sequence { seen: header.seq(), expected: self.next_seq });
        }
        self.check_place(header.kind())?;
        self.next_seq += 1;
        Ok(header)
    }

    fn check_place(&self, kind: Kind) -> Result<(), WireError> {
        let opens = match self.direction {
            Direction::ToDestination => kind == Kind::Hello,
            Direction::ToSource => matches!(kind, Kind::HelloAck | Kind::Error),
        };
        let unexpected = |state, expected| Err(WireError::Unexpected { state, message: kind, expected });
        match (self.next_seq, self.channel) {
            (0, _) if opens => Ok(()),
            (0, _) if self.direction == Direction::ToDestination => unexpected("a connection opens", "Hello"),
            (0, _) => unexpected("a connection opens", "HelloAck or Error"),
            (_, _) if matches!(kind, Kind::Hello | Kind::HelloAck) => {
                unexpected("a connection is open", "any other frame")
            }
            (_, None) => unexpected("a connection opens", "nothing before the body of Hello was read"),
            (_, Some(channel)) if kind.travels(channel, self.direction) => Ok(()),
            (_, Some(channel)) => Err(WireError::WrongChannel { kind, channel, direction: self.direction }),
        }
    }

    /// Parses the body of any frame but a batch.
    ///
    /// # Errors
    /// [`WireError`] if the body is damaged or malformed.
    pub fn message(&mut self, header: &Header, body: &[u8]) -> Result<Message, WireError> {
        header.check_meta(body)?;
        let message = Message::decode(header.kind(), body, &self.limits)?;
        if let Message::Hello(hello) = &message {
            self.channel = Some(match hello.role {
                Role::Control => Channel::Control,
                Role::Data { .. } => Channel::Data,
            });
        }
        Ok(message)
    }

    /// Parses the meta of a batch into `out`, whose buffers are reused: once they have grown to the size of the
    /// largest batch, nothing is allocated.
    ///
    /// # Errors
    /// [`WireError`] if the meta is damaged, malformed, or names what was not agreed. Then `out` holds rubbish.
    pub fn batch_meta(
        &mut self,
        header: &Header,
        meta: &[u8],
        session: &Session,
        out: &mut BatchMeta,
    ) -> Result<(), WireError> {
        if header.kind() != Kind::Batch {
            return Err(malformed("the frame", header.kind(), Kind::Batch));
        }
        header.check_meta(meta)?;
        batch::decode(meta, session, &mut self.scratch, out)?;
        if out.payload_len != header.payload_len() {
            let expected = format_args!("{}, the sum of its lengths", out.payload_len).to_string();
            return Err(malformed("the payload of a Batch", header.payload_len(), expected));
        }
        Ok(())
    }
}
