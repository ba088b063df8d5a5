//! Frames over a byte stream.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::time::Duration;

use pagewarp_codec::Page;
use pagewarp_engine::error::MigrationError;
use pagewarp_engine::transport::{SPEAKS_TLS, Stream, speaks_tls};
use pagewarp_wire::WireError;

use crate::protocol::frame::{FrameReader, FrameWriter, HEADER_LEN, Header, Kind};
use crate::protocol::shorten;

/// How long the last word may take.
const LAST_WORD: Duration = Duration::from_secs(1);
/// The most pieces in one system call (`IOV_MAX` of Linux).
const MAX_PIECES: usize = 1024;

/// Writes frames to one connection.
pub(crate) struct Sending {
    stream: Box<dyn Stream>,
    frames: FrameWriter,
    peer: String,
    sent_bytes: u64,
}

impl Sending {
    pub(crate) fn new(stream: Box<dyn Stream>, peer: String) -> Sending {
        Sending { stream, frames: FrameWriter::default(), peer, sent_bytes: 0 }
    }

    /// Bytes sent so far.
    pub(crate) fn sent_bytes(&self) -> u64 {
        self.sent_bytes
    }

    /// Sends a frame whose payload is in pieces.
    pub(crate) fn send(
        &mut self,
        kind: Kind,
        meta: &[u8],
        payload: &[IoSlice<'_>],
    ) -> Result<(), MigrationError> {
        let payload_len = payload.iter().map(|piece| piece.len()).sum();
        if !kind.allows(meta.len(), payload_len) {
            let what =
                format!("a {kind:?} frame of {} + {payload_len} bytes is too long to be sent", meta.len());
            return Err(MigrationError::Internal(what));
        }
        let header = self.frames.header(kind, meta, payload_len);
        let mut pieces = Vec::with_capacity(2 + payload.len());
        pieces.extend([IoSlice::new(&header), IoSlice::new(meta)]);
        pieces.extend_from_slice(payload);
        self.sent_bytes += (HEADER_LEN + meta.len() + payload_len) as u64;
        write_all(&mut self.stream, &mut pieces).map_err(|source| self.broken("sending", source))
    }

    /// Tells the peer why it is over, or refused. Nothing is sent after it.
    pub(crate) fn send_error(&mut self, why: &str) -> Result<(), MigrationError> {
        // Nor may a peer that does not listen keep this side from ending.
        let _ = self.stream.set_timeouts(None, Some(LAST_WORD));
        self.send(Kind::Error, shorten(why).as_bytes(), &[])
    }

    fn broken(&self, doing: &str, source: io::Error) -> MigrationError {
        MigrationError::of_connection(&self.peer, doing, source)
    }
}

/// Writes all pieces, as many at a time as the system takes.
pub(crate) fn write_all(
    stream: &mut (impl Write + ?Sized),
    mut pieces: &mut [IoSlice<'_>],
) -> io::Result<()> {
    // Empty pieces at the front would look like a peer that takes nothing.
    IoSlice::advance_slices(&mut pieces, 0);
    while !pieces.is_empty() {
        let many = pieces.len().min(MAX_PIECES);
        match stream.write_vectored(&pieces[..many]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => IoSlice::advance_slices(&mut pieces, n),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Reads frames from one connection.
pub(crate) struct Receiving {
    stream: Box<dyn Stream>,
    frames: FrameReader,
    peer: String,
    received_bytes: u64,
    /// Whether nothing has come yet.
    is_new: bool,
}

impl Receiving {
    pub(crate) fn new(stream: Box<dyn Stream>, peer: String) -> Receiving {
        Receiving { stream, frames: FrameReader::default(), peer, received_bytes: 0, is_new: true }
    }

    /// Bytes received so far.
    pub(crate) fn received_bytes(&self) -> u64 {
        self.received_bytes
    }

    /// Reads the header and the meta of the next frame; the payload must be read next. `None` if the peer has ended the connection
    /// between two frames.
    pub(crate) fn receive(&mut self, meta: &mut Vec<u8>) -> Result<Option<Header>, MigrationError> {
        let mut bytes = [0; HEADER_LEN];
        let first = loop {
            match self.stream.read(&mut bytes) {
                Ok(n) => break n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.broken(e)),
            }
        };
        if first == 0 {
            return Ok(None);
        }
        let rest = self.stream.read_exact(&mut bytes[first..]);
        // Its alert is shorter than a header.
        if self.is_new && speaks_tls(&bytes) {
            return Err(MigrationError::Peer(SPEAKS_TLS.into()));
        }
        self.is_new = false;
        rest.map_err(|e| self.broken(e))?;
        let header = self.frames.header(&bytes).map_err(peer_error)?;
        meta.resize(header.meta_len, 0);
        self.stream.read_exact(meta).map_err(|e| self.broken(e))?;
        header.verify(&bytes, meta).map_err(peer_error)?;
        self.received_bytes += (HEADER_LEN + header.meta_len) as u64;
        Ok(Some(header))
    }

    /// Reads a payload.
    pub(crate) fn payload(&mut self, payload: &mut [u8]) -> Result<(), MigrationError> {
        self.stream.read_exact(payload).map_err(|e| self.broken(e))?;
        self.received_bytes += payload.len() as u64;
        Ok(())
    }

    /// Reads a payload of plain pages.
    pub(crate) fn pages(&mut self, pages: &mut [Page]) -> Result<(), MigrationError> {
        let bytes = std::mem::size_of_val(pages) as u64;
        let mut pieces: Vec<_> = pages.iter_mut().map(|page| IoSliceMut::new(&mut page.0)).collect();
        let mut left = &mut pieces[..];
        while !left.is_empty() {
            let many = left.len().min(MAX_PIECES);
            match self.stream.read_vectored(&mut left[..many]) {
                Ok(0) => return Err(self.broken(io::ErrorKind::UnexpectedEof.into())),
                Ok(n) => IoSliceMut::advance_slices(&mut left, n),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(self.broken(e)),
            }
        }
        self.received_bytes += bytes;
        Ok(())
    }

    fn broken(&self, source: io::Error) -> MigrationError {
        MigrationError::of_connection(&self.peer, "receiving", source)
    }
}

/// The handshake is done: from now on waits for as long as it takes, but not for a peer that is gone.
pub(crate) fn settle(stream: &dyn Stream, timeout: Duration) -> io::Result<()> {
    stream.set_timeouts(None, None)?;
    stream.detect_death(timeout)
}

/// The peer broke the protocol.
pub(crate) fn peer_error(error: WireError) -> MigrationError {
    MigrationError::Peer(error.to_string())
}
