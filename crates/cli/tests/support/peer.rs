//! One end of a connection that speaks the protocol as badly as it is told to.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::Duration;

use pagewarp_wire::{
    FrameWriter, HEADER_LEN, Header, Hello, Kind, Limits, Message, Offer, Region, Role, state_hash,
};

/// Nobody under test stays silent for longer without a reason.
const PATIENCE: Duration = Duration::from_secs(30);

/// The session of all connections made up here.
pub(crate) const SESSION: [u8; 16] = *b"0123456789abcdef";

/// See the module.
pub(crate) struct Peer {
    stream: TcpStream,
    frames: FrameWriter,
    /// Whether all that was sent so far could be sent.
    connected: bool,
}

impl Peer {
    pub(crate) fn connect(address: &str) -> Peer {
        Peer::over(TcpStream::connect(address).unwrap())
    }

    pub(crate) fn accept(listener: &TcpListener) -> Peer {
        Peer::over(listener.accept().unwrap().0)
    }

    fn over(stream: TcpStream) -> Peer {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Peer { stream, frames: FrameWriter::new(), connected: true }
    }

    /// Connects as a source does, up to the answer to its hello.
    pub(crate) fn greeted(address: &str) -> Peer {
        let mut peer = Peer::connect(address);
        peer.say(&Message::Hello(Hello::new(Role::Control, SESSION)));
        assert_eq!(peer.hear().unwrap().0, Kind::HelloAck);
        peer
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

    /// Sends bytes. The other end may have hung up: what it makes of that is seen elsewhere.
    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.connected &= self.stream.write_all(bytes).is_ok();
    }

    /// Whether the other end was still there when something was sent last.
    pub(crate) fn is_connected(&self) -> bool {
        self.connected
    }

    /// The next frame.
    pub(crate) fn hear(&mut self) -> io::Result<(Kind, Vec<u8>)> {
        let mut bytes = [0; HEADER_LEN];
        self.stream.read_exact(&mut bytes)?;
        let header = Header::parse(&bytes, &Limits::default()).map_err(io::Error::other)?;
        let mut body = vec![0; header.body_len()];
        self.stream.read_exact(&mut body)?;
        Ok((header.kind(), body))
    }

    /// Reads until the other end says why it gives up; empty if it hangs up without a word.
    pub(crate) fn hear_error(&mut self) -> String {
        loop {
            match self.hear() {
                Ok((Kind::Error, body)) => return String::from_utf8_lossy(&body).into_owned(),
                Ok(_) => {}
                Err(e) => {
                    let timed_out = matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
                    assert!(!timed_out, "the other end neither gave up nor hung up");
                    return String::new();
                }
            }
        }
    }

    /// Reads until the other end hangs up.
    pub(crate) fn drain(&mut self) {
        let _ = io::copy(&mut self.stream, &mut io::sink());
    }

    pub(crate) fn hang_up(&self) {
        // Fails only if the other end was faster.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// A header with these lengths that passes every check before that of the lengths.
pub(crate) fn header(kind: u8, seq: u64, body_len: u32, meta_len: u32) -> Vec<u8> {
    let mut bytes = b"PGWP".to_vec();
    bytes.extend([1, kind, 0, 0]);
    bytes.extend(seq.to_le_bytes());
    bytes.extend(body_len.to_le_bytes());
    bytes.extend(meta_len.to_le_bytes());
    bytes.extend(0u64.to_le_bytes());
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
