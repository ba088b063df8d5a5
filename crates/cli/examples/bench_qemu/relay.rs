//! A relay that passes bytes on and does nothing else: what any proxy between two QEMU processes costs at least, as long as it reads and writes; and
//! one that does not even see them, which is the least that standing in between can cost; and one that sees them and has the kernel move them: what it costs
//! to look for pages and write nothing.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use rustix::net::{RecvFlags, Shutdown, recv, shutdown};
use rustix::pipe::{SpliceFlags, fcntl_setpipe_size, pipe, splice};

/// Bytes read at once: more than QEMU writes at once.
const BUFFER: usize = 256 << 10;

/// What a pipe is made to hold at once: the most that a user may have.
const PIPE: usize = 1 << 20;

/// Relays one connection from `from` to `to`, each `unix:PATH` or `tcp:HOST:PORT`, until both directions have ended.
pub(crate) fn relay(
    from: &str,
    to: &str,
    pass: impl Fn(&File, &File) -> io::Result<()> + Sync,
) -> Result<(), String> {
    let incoming = accept(from).map_err(|e| format!("{from}: {e}"))?;
    let outgoing = connect(to).map_err(|e| format!("{to}: {e}"))?;
    thread::scope(|scope| {
        scope.spawn(|| pump(&outgoing, &incoming, &pass));
        pump(&incoming, &outgoing, &pass);
    });
    Ok(())
}

/// Listens, says so, and waits for a connection. Sockets of both kinds are read and written as files are.
fn accept(from: &str) -> io::Result<File> {
    let listens = || eprintln!("relaying");
    let socket: OwnedFd = match from.strip_prefix("unix:") {
        Some(path) => UnixListener::bind(path).inspect(|_| listens())?.accept()?.0.into(),
        None => TcpListener::bind(from.trim_start_matches("tcp:")).inspect(|_| listens())?.accept()?.0.into(),
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
fn pump(from: &File, to: &File, pass: impl Fn(&File, &File) -> io::Result<()>) {
    let _ = pass(from, to);
    // It may be closed already.
    let _ = shutdown(to, Shutdown::Write);
}

/// Reads and writes.
pub(crate) fn copy(mut from: &File, mut to: &File) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            n => to.write_all(&buffer[..n])?,
        }
    }
}

/// Has the kernel move the bytes.
pub(crate) fn splice_through(from: &File, to: &File) -> io::Result<()> {
    let (output, input) = pipe()?;
    fcntl_setpipe_size(&input, PIPE)?;
    while splice_some(from, &output, &input, to, PIPE)? > 0 {}
    Ok(())
}

/// The same, but looks at them before.
pub(crate) fn peek_and_splice(from: &File, to: &File) -> io::Result<()> {
    let (output, input) = pipe()?;
    fcntl_setpipe_size(&input, PIPE)?;
    let mut buffer = vec![0; BUFFER];
    loop {
        let (_, mut seen) = recv(from, &mut buffer[..], RecvFlags::PEEK)?;
        if seen == 0 {
            return Ok(());
        }
        while seen > 0 {
            match splice_some(from, &output, &input, to, seen)? {
                // A reset takes away what was seen before.
                0 => return Ok(()),
                n => seen -= n,
            }
        }
    }
}

/// Moves what there is, at most so many bytes. Returns how many; 0 at the end.
fn splice_some(from: &File, output: &OwnedFd, input: &OwnedFd, to: &File, most: usize) -> io::Result<usize> {
    let some = splice(from, None, input, None, most, SpliceFlags::MOVE)?;
    let mut left = some;
    while left > 0 {
        left -= splice(output, None, to, None, left, SpliceFlags::MOVE)?;
    }
    Ok(some)
}
