//! One end of a connection that speaks the protocol as badly as it is told to.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use pagewarp_engine::transport::{Acceptor, Stream};
use pagewarp_wire::{
    BatchView, FrameReader, FrameWriter, HEADER_LEN, Header, Hello, Kind, Limits, Message, Offer, Region,
    Role, state_hash,
};

/// Nobody under test stays silent for longer without a reason.
const PATIENCE: Duration = Duration::from_secs(30);

/// The session of all connections made up here.
pub(crate) const SESSION: [u8; 16] = *b"0123456789abcdef";

/// See the module.
pub(crate) struct Peer {
    stream: Box<dyn Stream>,
    frames: FrameWriter,
    /// Whether all that was sent so far could be sent.
    connected: bool,
}

impl Peer {
    /// Over TCP, with nothing in between.
    pub(crate) fn connect(address: &str) -> Peer {
        Peer::over(Box::new(TcpStream::connect(address).unwrap()))
    }

    pub(crate) fn accept(acceptor: &dyn Acceptor) -> Peer {
        Peer::over(acceptor.accept(PATIENCE).unwrap())
    }

    pub(crate) fn over(stream: Box<dyn Stream>) -> Peer {
        stream.set_timeouts(Some(PATIENCE), Some(PATIENCE)).unwrap();
        Peer { stream, frames: FrameWriter::new(), connected: true }
    }

    /// Opens a session as a source does, up to the answer to its hello.
    pub(crate) fn greeted(self) -> Peer {
        self.greeted_as(Role::Control)
    }

    /// The same, for any connection of the session.
    pub(crate) fn greeted_as(mut self, role: Role) -> Peer {
        self.say(&Message::Hello(Hello::new(role, SESSION)));
        let (kind, body) = self.hear().unwrap();
        assert_eq!(kind, Kind::HelloAck, "{}", String::from_utf8_lossy(&body));
        self
    }

    /// Another handle, to read from while this one writes, or the other way round.
    pub(crate) fn handle(&self) -> Peer {
        Peer::over(self.stream.try_clone_stream().unwrap())
    }

    /// The frame of a message, numbered as the next one.
    pub(crate) fn frame(&mut self, message: &Message) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.frames.control(message, &mut bytes).unwrap();
        bytes
    }

    pub(crate) fn say(&mut self, message: &Message) {
        let bytes = self.frame(message);
        self.raw(&bytes);
    }

    /// Sends a batch of the first region whose payload is as long as its lengths say.
    pub(crate) fn batch(&mut self, epoch: u32, pages: &[u64], tag: u8, payload: &[u8]) {
        let len = (payload.len() / pages.len()) as u16;
        let (tags, lens) = (vec![tag; pages.len()], vec![len; pages.len()]);
        let view = BatchView { epoch, region: 0, pages, tags: &tags, lens: &lens, slots: &[], plain_hash: 7 };
        let mut bytes = Vec::new();
        self.frames.batch_prefix(&view, payload.len(), &mut bytes).unwrap();
        bytes.extend_from_slice(payload);
        self.raw(&bytes);
    }

    /// Sends bytes. The other end may have hung up: what it makes of that is seen elsewhere.
    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.connected &= self.stream.write_all(bytes).is_ok();
    }

    /// Sends bytes one at a time, each after this pause, until the other end hangs up.
    pub(crate) fn drip(&mut self, bytes: &[u8], pause: Duration) {
        for byte in bytes {
            if !self.connected || self.stream.is_hung_up() {
                return;
            }
            self.raw(&[*byte]);
            std::thread::sleep(pause);
        }
    }

    /// Whether the other end was still there when something was sent last.
    pub(crate) fn is_connected(&self) -> bool {
        self.connected
    }

    /// The next frame.
    pub(crate) fn hear(&mut self) -> io::Result<(Kind, Vec<u8>)> {
        let (_, header, body) = self.hear_frame()?;
        Ok((header.kind(), body))
    }

    fn hear_frame(&mut self) -> io::Result<([u8; HEADER_LEN], Header, Vec<u8>)> {
        let mut bytes = [0; HEADER_LEN];
        self.stream.read_exact(&mut bytes)?;
        let header = Header::parse(&bytes, &Limits::default()).map_err(io::Error::other)?;
        let mut body = vec![0; header.body_len()];
        self.stream.read_exact(&mut body)?;
        Ok((bytes, header, body))
    }

    /// Hears what a source offers, up to there as a destination should.
    pub(crate) fn hear_offer(&mut self) -> Offer {
        let mut frames = FrameReader::accepting(Limits::default());
        loop {
            let (bytes, _, body) = self.hear_frame().unwrap();
            let header = frames.header(&bytes).unwrap();
            match frames.message(&header, &body).unwrap() {
                Message::Hello(_) => self.say(&Message::HelloAck { version: 1 }),
                Message::Offer(offer) => return offer,
                _ => {}
            }
        }
    }

    /// Reads until a frame of this kind comes. `None`: the other end has hung up.
    pub(crate) fn hear_until(&mut self, kind: Kind) -> Option<Vec<u8>> {
        loop {
            match self.hear() {
                Ok((seen, body)) if seen == kind => return Some(body),
                Ok(_) => {}
                Err(e) => {
                    let timed_out = matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
                    assert!(!timed_out, "the other end neither gave up nor hung up");
                    return None;
                }
            }
        }
    }

    /// Reads until the other end says why it gives up; empty if it hangs up without a word.
    pub(crate) fn hear_error(&mut self) -> String {
        let body = self.hear_until(Kind::Error).unwrap_or_default();
        String::from_utf8_lossy(&body).into_owned()
    }

    /// Reads until the other end hangs up.
    pub(crate) fn drain(&mut self) {
        let _ = io::copy(&mut self.stream, &mut io::sink());
    }

    pub(crate) fn hang_up(&self) {
        // Fails only if the other end was faster.
        let _ = self.stream.shutdown();
    }
}

/// A header with these lengths that passes every check before that of the lengths.
pub(crate) fn header(kind: u8, seq: u64, body_len: u32, meta_len: u32) -> Vec<u8> {
    header_of(kind, seq, body_len, meta_len, 0)
}

/// A frame of this kind with this meta, whose checks are right, and so much payload announced.
pub(crate) fn frame(kind: u8, seq: u64, meta: &[u8], payload_len: u32) -> Vec<u8> {
    let len = meta.len() as u32;
    [header_of(kind, seq, len + payload_len, len, state_hash(meta)), meta.to_vec()].concat()
}

fn header_of(kind: u8, seq: u64, body_len: u32, meta_len: u32, meta_check: u64) -> Vec<u8> {
    let mut bytes = b"PGWP".to_vec();
    bytes.extend([1, kind, 0, 0]);
    bytes.extend(seq.to_le_bytes());
    bytes.extend(body_len.to_le_bytes());
    bytes.extend(meta_len.to_le_bytes());
    bytes.extend(meta_check.to_le_bytes());
    bytes.extend(state_hash(&bytes).to_le_bytes());
    assert_eq!(bytes.len(), HEADER_LEN);
    bytes
}

/// An offer that is in order, of a machine that nobody can build.
pub(crate) fn offer(pages: u64) -> Offer {
    Offer {
        vm_name: "intruder".into(),
        page_size: pagewarp_wire::PAGE_SIZE,
        regions: vec![Region { id: 0, name: "ram".into(), pages }],
        encodings: 0x7f,
        history_slots: 0,
        max_batch_pages: 256,
        connections: 1,
        pipeline: true,
        verify: false,
        downtime_limit_ms: 300,
        machine: b"nonsense".to_vec(),
    }
}
