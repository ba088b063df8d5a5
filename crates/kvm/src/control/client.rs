//! The asking end of a control socket.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::types::{Event, Request};

/// The longest answer that is read.
const MAX_LINE_BYTES: u64 = 16 << 20;

/// A connection to a VM process.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the socket at `path`; see [`socket_path`](super::socket_path).
    pub fn connect(path: impl AsRef<Path>) -> io::Result<Client> {
        Ok(Client { stream: BufReader::new(UnixStream::connect(path)?) })
    }

    /// Sends a request. The answer to the one before must have [ended](Event::is_final).
    pub fn send(&mut self, request: &Request) -> io::Result<()> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line)
    }

    /// Waits for the next event of the answer.
    pub fn receive(&mut self) -> io::Result<Event> {
        let mut line = Vec::new();
        (&mut self.stream).take(MAX_LINE_BYTES).read_until(b'\n', &mut line)?;
        if line.last() != Some(&b'\n') {
            return Err(io::Error::new(ErrorKind::UnexpectedEof, "the VM process closed the control socket"));
        }
        serde_json::from_slice(&line).map_err(|e| io::Error::new(ErrorKind::InvalidData, e))
    }

    /// Sends a request, hands the events on the way to `on_event`, and returns the event that ends the answer.
    pub fn request(&mut self, request: &Request, mut on_event: impl FnMut(&Event)) -> io::Result<Event> {
        self.send(request)?;
        loop {
            let event = self.receive()?;
            if event.is_final() {
                return Ok(event);
            }
            on_event(&event);
        }
    }
}
