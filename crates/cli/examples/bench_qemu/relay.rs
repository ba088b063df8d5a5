//! A relay that passes bytes on and does nothing else: what any proxy between two QEMU processes costs at least, as long as it reads and writes.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use rustix::net::{Shutdown, shutdown};

/// Bytes read at once: more than QEMU writes at once.
const BUFFER: usize = 256 << 10;

/// Relays one connection from `from` to `to`, each `unix:PATH` or `tcp:HOST:PORT`, until both directions have ended.
pub(crate) fn relay(from: &str, to: &str) -> Result<(), String> {
    let incoming = accept(from).map_err(|e| format!("{from}: {e}"))?;
    let outgoing = connect(to).map_err(|e| format!("{to}: {e}"))?;
    thread::scope(|scope| {
        scope.spawn(|| pump(&outgoing, &incoming));
        pump(&incoming, &outgoing);
    });
    Ok(())
}

/// Listens, says so, and waits for a connection. Sockets of both kinds are read and written as files are.
fn accept(from: &str) -> io::Result<File> {
    let socket: OwnedFd = if let Some(path) = from.strip_prefix("unix:") {
        let listener = UnixListener::bind(path)?;
        eprintln!("relaying");
        listener.accept()?.0.into()
    } else {
        let listener = TcpListener::bind(from.trim_start_matches("tcp:"))?;
        eprintln!("relaying");
        listener.accept()?.0.into()
    };
    Ok(socket.into())
}

fn connect(to: &str) -> io::Result<File> {
    let socket: OwnedFd = match to.strip_prefix("unix:") {
        Some(path) => UnixStream::connect(path)?.into(),
        None => TcpStream::connect(to.trim_start_matches("tcp:"))?.into(),
    };
    Ok(socket.into())
}

/// Passes on one direction to its end. An error is an end as well: QEMU closes connections that have bytes in them.
fn pump(mut from: &File, mut to: &File) {
    let mut buffer = vec![0; BUFFER];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    // It may be closed already.
    let _ = shutdown(to, Shutdown::Write);
}
