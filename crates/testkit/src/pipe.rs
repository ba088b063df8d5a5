//! Connections that never leave the process: no ports, no network stack.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use pagewarp_engine::transport::{Acceptor, Connector, Stream};

/// One end of a pair of connected sockets.
#[derive(Debug)]
pub struct PipeStream(UnixStream);

/// Two connected ends.
pub fn pipe_pair() -> io::Result<(PipeStream, PipeStream)> {
    let (one, other) = UnixStream::pair()?;
    Ok((PipeStream(one), PipeStream(other)))
}

impl Read for PipeStream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl Write for PipeStream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Stream for PipeStream {
    fn try_clone_stream(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(PipeStream(self.0.try_clone()?)))
    }

    fn shutdown(&self) -> io::Result<()> {
        self.0.shutdown(Shutdown::Both)
    }

    fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> io::Result<()> {
        self.0.set_read_timeout(read)?;
        self.0.set_write_timeout(write)
    }
}

/// A destination's listener and the way to it, within this process.
pub fn memory_link() -> (MemoryConnector, MemoryAcceptor) {
    let (sender, receiver) = channel();
    (MemoryConnector { sender }, MemoryAcceptor { receiver: Mutex::new(receiver) })
}

/// Connects to the [`MemoryAcceptor`] it was made with.
#[derive(Clone, Debug)]
pub struct MemoryConnector {
    sender: Sender<PipeStream>,
}

impl Connector for MemoryConnector {
    fn connect(&self) -> io::Result<Box<dyn Stream>> {
        let (ours, theirs) = pipe_pair()?;
        // As with TCP, connecting succeeds before anyone accepts, and fails when nobody listens.
        self.sender.send(theirs).map_err(|_| io::Error::from(io::ErrorKind::ConnectionRefused))?;
        Ok(Box::new(ours))
    }

    fn peer(&self) -> String {
        "memory".into()
    }
}

/// Accepts what its [`MemoryConnector`]s connect.
#[derive(Debug)]
pub struct MemoryAcceptor {
    receiver: Mutex<Receiver<PipeStream>>,
}

impl Acceptor for MemoryAcceptor {
    fn accept(&self, timeout: Duration) -> io::Result<Box<dyn Stream>> {
        let receiver = self.receiver.lock().unwrap_or_else(PoisonError::into_inner);
        match receiver.recv_timeout(timeout) {
            Ok(stream) => Ok(Box::new(stream)),
            Err(RecvTimeoutError::Timeout) => {
                Err(io::Error::new(io::ErrorKind::TimedOut, "nobody connected in time"))
            }
            // A test that dropped its connector need not sit the timeout out.
            Err(RecvTimeoutError::Disconnected) => {
                Err(io::Error::new(io::ErrorKind::ConnectionAborted, "every connector was dropped"))
            }
        }
    }

    fn local(&self) -> String {
        "memory".into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_arrive_and_shutdown_wakes_the_reader() {
        let (connector, acceptor) = memory_link();
        let mut ours = connector.connect().unwrap();
        let mut theirs = acceptor.accept(Duration::from_secs(5)).unwrap();
        ours.write_all(b"hello").unwrap();
        let mut got = [0; 5];
        theirs.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hello");

        let handle = theirs.try_clone_stream().unwrap();
        let reader = std::thread::spawn(move || theirs.read(&mut [0; 1]).unwrap());
        handle.shutdown().unwrap();
        assert_eq!(reader.join().unwrap(), 0);
        assert_eq!(ours.read(&mut [0; 1]).unwrap(), 0);
    }

    #[test]
    fn nobody_there_is_an_error_on_both_sides() {
        let (connector, acceptor) = memory_link();
        assert_eq!(acceptor.accept(Duration::from_millis(1)).err().unwrap().kind(), io::ErrorKind::TimedOut);
        drop(acceptor);
        assert_eq!(connector.connect().err().unwrap().kind(), io::ErrorKind::ConnectionRefused);
        let (connector, acceptor) = memory_link();
        drop(connector);
        assert!(acceptor.accept(Duration::from_secs(3600)).is_err());
    }

    #[test]
    fn a_read_times_out() {
        let (mut ours, _theirs) = pipe_pair().unwrap();
        ours.set_timeouts(Some(Duration::from_millis(1)), None).unwrap();
        assert_eq!(ours.read(&mut [0; 1]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
