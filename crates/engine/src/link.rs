//! Frames over connections: the I/O around the I/O-free protocol.

use std::io::{self, IoSlice, Read, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use pagewarp_wire::{BatchView, FrameReader, FrameWriter, HEADER_LEN, Header, Message, WireError};

use crate::error::MigrationError;
use crate::flow::{Flow, lock};
use crate::limiter::Limiter;
use crate::transport::{SPEAKS_TLS, Stream, speaks_tls};

/// Bytes counted on all connections of one migration.
#[derive(Debug, Default)]
pub(crate) struct WireBytes {
    sent: AtomicU64,
    received: AtomicU64,
}

impl WireBytes {
    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(Relaxed)
    }

    pub(crate) fn received(&self) -> u64 {
        self.received.load(Relaxed)
    }
}

/// Writes messages to one connection; any thread may.
pub(crate) struct MessageWriter<'a> {
    inner: Mutex<Writing>,
    peer: &'a str,
    bytes: &'a WireBytes,
}

struct Writing {
    frames: FrameWriter,
    stream: Box<dyn Stream>,
    buffer: Vec<u8>,
    /// Why a message was not written, or in part only. Nothing may follow it.
    torn: Option<(io::ErrorKind, String)>,
}

impl<'a> MessageWriter<'a> {
    pub(crate) fn new(stream: Box<dyn Stream>, peer: &'a str, bytes: &'a WireBytes) -> MessageWriter<'a> {
        MessageWriter {
            inner: Mutex::new(Writing { frames: FrameWriter::new(), stream, buffer: Vec::new(), torn: None }),
            peer,
            bytes,
        }
    }

    /// Sends one message at once.
    pub(crate) fn send(&self, message: &Message) -> Result<(), MigrationError> {
        self.send_if(message, || Ok(()))
    }

    /// Sends one message at once if `check` agrees. Messages go out in the order in which they were checked. Where one could not be sent, `check` is not even asked about
    /// the next: the state does not change for what never leaves.
    pub(crate) fn send_if(
        &self,
        message: &Message,
        check: impl FnOnce() -> Result<(), MigrationError>,
    ) -> Result<(), MigrationError> {
        let mut inner = lock(&self.inner);
        let failed = |e| link_error(self.peer, &format!("sending {}", message.kind()), e);
        let Writing { frames, stream, buffer, torn } = &mut *inner;
        if let Some((kind, why)) = torn {
            return Err(failed(io::Error::new(*kind, format!("{why} (an earlier message)"))));
        }
        check()?;
        buffer.clear();
        frames.control(message, buffer).map_err(own_error)?;
        stream.write_all(buffer).and_then(|()| stream.flush()).map_err(|e| {
            let e = explained(e);
            *torn = Some((e.kind(), e.to_string()));
            failed(e)
        })?;
        self.bytes.sent.fetch_add(buffer.len() as u64, Relaxed);
        Ok(())
    }

    /// Gives the connection to a writer of batches, which goes on counting frames.
    pub(crate) fn into_batch_writer(self, limiter: Option<(&'a Limiter, &'a Flow)>) -> BatchWriter<'a> {
        let Writing { frames, stream, buffer, .. } =
            self.inner.into_inner().unwrap_or_else(|e| e.into_inner());
        BatchWriter { frames, stream, prefix: buffer, peer: self.peer, bytes: self.bytes, limiter }
    }
}

/// Writes batches and barriers to one data connection.
pub(crate) struct BatchWriter<'a> {
    frames: FrameWriter,
    stream: Box<dyn Stream>,
    prefix: Vec<u8>,
    peer: &'a str,
    bytes: &'a WireBytes,
    limiter: Option<(&'a Limiter, &'a Flow)>,
}

impl BatchWriter<'_> {
    /// Sends a batch and returns the bytes it took.
    pub(crate) fn batch(&mut self, batch: &BatchView<'_>, payload: &[u8]) -> Result<usize, MigrationError> {
        self.prefix.clear();
        self.frames.batch_prefix(batch, payload.len(), &mut self.prefix).map_err(own_error)?;
        self.write(payload, "sending pages")
    }

    /// Sends a message and returns the bytes it took.
    pub(crate) fn message(&mut self, message: &Message) -> Result<usize, MigrationError> {
        self.prefix.clear();
        self.frames.control(message, &mut self.prefix).map_err(own_error)?;
        self.write(&[], "sending a barrier")
    }

    fn write(&mut self, payload: &[u8], doing: &str) -> Result<usize, MigrationError> {
        let total = self.prefix.len() + payload.len();
        write_both(&mut *self.stream, &self.prefix, payload, self.limiter, &self.bytes.sent)
            .map_err(|e| link_error(self.peer, doing, e))?;
        Ok(total)
    }
}

/// Writes two buffers as one, in slices if there is a limit.
fn write_both(
    stream: &mut dyn Stream,
    first: &[u8],
    second: &[u8],
    limiter: Option<(&Limiter, &Flow)>,
    sent: &AtomicU64,
) -> io::Result<()> {
    let total = first.len() + second.len();
    let most = limiter.map_or(total, |(limiter, _)| limiter.slice());
    let (mut done, mut granted) = (0, 0);
    while done < total {
        if granted == done {
            granted = (done + most).min(total);
            if let Some((limiter, flow)) = limiter
                && limiter.acquire(granted - done, flow).is_err()
            {
                return Err(io::Error::new(io::ErrorKind::Interrupted, "the migration was stopped"));
            }
        }
        let head = &first[done.min(first.len())..granted.min(first.len())];
        let tail = &second[done.saturating_sub(first.len())..granted.saturating_sub(first.len())];
        match stream.write_vectored(&[IoSlice::new(head), IoSlice::new(tail)]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                done += written;
                sent.fetch_add(written as u64, Relaxed);
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    stream.flush()
}

/// Reads frames from one connection.
pub(crate) struct Reading<'a> {
    pub(crate) frames: FrameReader,
    stream: Box<dyn Stream>,
    body: Vec<u8>,
    peer: &'a str,
    bytes: &'a WireBytes,
    /// Whether nothing has come yet.
    is_new: bool,
}

impl<'a> Reading<'a> {
    pub(crate) fn new(
        frames: FrameReader,
        stream: Box<dyn Stream>,
        peer: &'a str,
        bytes: &'a WireBytes,
    ) -> Reading<'a> {
        Reading { frames, stream, body: Vec::new(), peer, bytes, is_new: true }
    }

    /// Goes on where another reader of the same connection has stopped, which has taken so many bytes.
    pub(crate) fn continued(
        frames: FrameReader,
        stream: Box<dyn Stream>,
        peer: &'a str,
        bytes: &'a WireBytes,
        taken: u64,
    ) -> Reading<'a> {
        bytes.received.fetch_add(taken, Relaxed);
        Reading { is_new: false, ..Reading::new(frames, stream, peer, bytes) }
    }

    /// Reads the header of the next frame.
    pub(crate) fn header(&mut self) -> Result<Header, MigrationError> {
        let mut bytes = [0; HEADER_LEN];
        let filled = self.fill(&mut bytes);
        // Its alert is shorter than a header.
        if self.is_new && speaks_tls(&bytes) {
            return Err(MigrationError::Peer(SPEAKS_TLS.into()));
        }
        filled?;
        self.is_new = false;
        self.frames.header(&bytes).map_err(peer_error)
    }

    /// Reads the rest of a frame that is not a batch.
    pub(crate) fn message(&mut self, header: &Header) -> Result<Message, MigrationError> {
        let mut body = std::mem::take(&mut self.body);
        // The header was checked against the limits, so the peer does not choose what is allocated here.
        body.resize(header.body_len(), 0);
        let result =
            self.fill(&mut body).and_then(|()| self.frames.message(header, &body).map_err(peer_error));
        self.body = body;
        result
    }

    /// Reads the next frame, which must not be a batch.
    pub(crate) fn next(&mut self) -> Result<Message, MigrationError> {
        let header = self.header()?;
        self.message(&header)
    }

    /// Fills `buffer` from the connection.
    pub(crate) fn fill(&mut self, buffer: &mut [u8]) -> Result<(), MigrationError> {
        self.stream.read_exact(buffer).map_err(|e| link_error(self.peer, "receiving", e))?;
        self.bytes.received.fetch_add(buffer.len() as u64, Relaxed);
        Ok(())
    }
}

/// An error of the connection, with what the usual kinds mean here.
pub(crate) fn link_error(peer: &str, doing: &str, source: io::Error) -> MigrationError {
    MigrationError::of_connection(peer, doing, explained(source))
}

/// What the usual kinds mean here.
fn explained(source: io::Error) -> io::Error {
    match source.kind() {
        io::ErrorKind::UnexpectedEof => io::Error::new(source.kind(), "the peer closed the connection"),
        // Unless it says more than that itself.
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut if source.get_ref().is_none() => {
            io::Error::new(io::ErrorKind::TimedOut, "the peer was silent or took no data for too long")
        }
        _ => source,
    }
}

/// The peer did not come to the end of what it had to say.
pub(crate) fn too_late(peer: &str, doing: &str) -> MigrationError {
    link_error(peer, doing, io::ErrorKind::TimedOut.into())
}

/// What the peer sent is not valid.
pub(crate) fn peer_error(error: WireError) -> MigrationError {
    MigrationError::Peer(error.to_string())
}

/// What this end was about to send is not valid.
pub(crate) fn own_error(error: WireError) -> MigrationError {
    MigrationError::Internal(format!("a frame that must not be sent: {error}"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn nothing_follows_a_message_that_could_not_be_sent() {
        let (here, there) = UnixStream::pair().unwrap();
        let bytes = WireBytes::default();
        let writer = MessageWriter::new(Box::new(here), "a peer", &bytes);
        writer.send(&Message::Ping { id: 1 }).unwrap();
        drop(there);
        writer.send(&Message::Ping { id: 2 }).unwrap_err();
        let refused =
            writer.send_if(&Message::Commit, || panic!("the state would change for what never leaves"));
        let why = refused.unwrap_err().to_string();
        assert!(why.contains("sending Commit") && why.contains("an earlier message"), "{why}");
    }
}
