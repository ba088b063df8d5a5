//! A relay that passes bytes on and does nothing else: what any proxy between two QEMU processes costs at least, as long as it reads and writes.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;

/// Bytes read at once: more than QEMU writes at once.
const BUFFER: usize = 256 << 10;

/// Relays one connection from `from` to `to`, each `unix:PATH` or `tcp:HOST:PORT`, until both directions have ended.
pub(crate) fn relay(from: &str, to: &str) -> Result<(), String> {
    let incoming = listen(from).map_err(|e| format!("{from}: {e}"))?;
    eprintln!("relaying");
    let incoming = incoming().map_err(|e| format!("{from}: {e}"))?;
    let outgoing = connect(to).map_err(|e| format!("{to}: {e}"))?;
    thread::scope(|scope| {
        scope.spawn(|| pump(&outgoing, &incoming));
        pump(&incoming, &outgoing);
    });
    Ok(())
}

enum Connection {
    Unix(UnixStream),
    Tcp(TcpStream),
}

fn listen(from: &str) -> io::Result<Box<dyn FnOnce() -> io::Result<Connection>>> {
    if let Some(path) = from.strip_prefix("unix:") {
        let listener = UnixListener::bind(Path::new(path))?;
        return Ok(Box::new(move || Ok(Connection::Unix(listener.accept()?.0))));
    }
    let listener = TcpListener::bind(from.trim_start_matches("tcp:"))?;
    Ok(Box::new(move || Ok(Connection::Tcp(listener.accept()?.0))))
}

fn connect(to: &str) -> io::Result<Connection> {
    match to.strip_prefix("unix:") {
        Some(path) => UnixStream::connect(path).map(Connection::Unix),
        None => TcpStream::connect(to.trim_start_matches("tcp:")).map(Connection::Tcp),
    }
}

/// Passes on one direction to its end. An error is an end as well: QEMU closes connections that have bytes in them.
fn pump(from: &Connection, to: &Connection) {
    let mut buffer = vec![0; BUFFER];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        if to.write(&buffer[..n]).is_err() {
            break;
        }
    }
    to.end();
}

impl Connection {
    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Connection::Unix(stream) => { stream }.read(buffer),
            Connection::Tcp(stream) => { stream }.read(buffer),
        }
    }

    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Connection::Unix(stream) => { stream }.write_all(bytes),
            Connection::Tcp(stream) => { stream }.write_all(bytes),
        }
    }

    fn end(&self) {
        let _ = match self {
            Connection::Unix(stream) => stream.shutdown(Shutdown::Write),
            Connection::Tcp(stream) => stream.shutdown(Shutdown::Write),
        };
    }
}
