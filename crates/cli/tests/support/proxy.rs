//! A TCP proxy between source and destination that does harm: to bytes, wherever they are, or to frames, as it knows where they begin.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use pagewarp_wire::{HEADER_LEN, Header, Kind, Limits};

/// What is done to the bytes from the source to the destination, or back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Harm {
    /// Flips this bit of the byte at this place of the stream.
    Flip { at: u64, bit: u8 },
    /// Leaves bytes out.
    Skip { at: u64, count: usize },
    /// Puts bytes in.
    Insert { at: u64, bytes: Vec<u8> },
    /// Ends all connections at this byte.
    Cut { at: u64 },
    /// Ends all connections when a frame of this kind comes, before it is passed on.
    CutBefore(Kind),
    /// Cuts the source off when a frame of this kind comes, and passes it on nevertheless.
    CutAfter(Kind),
    /// Swaps a frame of this kind with the one after it.
    Swap(Kind),
}

/// Where harm is done.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// 0 is the control connection, data connections follow.
    pub(crate) connection: usize,
    /// From the destination to the source.
    pub(crate) back: bool,
    pub(crate) harm: Harm,
}

/// A proxy. Dropping it ends its connections.
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

struct Shared {
    target: SocketAddr,
    plan: Plan,
    streams: Mutex<Vec<TcpStream>>,
    closed: AtomicBool,
    done: AtomicBool,
}

impl Proxy {
    pub(crate) fn start(target: &str, plan: Plan) -> Proxy {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            target: target.parse().unwrap(),
            plan,
            streams: Mutex::default(),
            closed: AtomicBool::new(false),
            done: AtomicBool::new(false),
        });
        let accepting = std::thread::spawn({
            let shared = shared.clone();
            move || {
                for (connection, stream) in listener.incoming().enumerate() {
                    if shared.closed.load(Relaxed) {
                        return;
                    }
                    // A destination that is gone shows as a connection that ends at once.
                    let _ = stream.and_then(|stream| shared.clone().pass(connection, stream));
                }
            }
        });
        Proxy { address, shared, accepting: Some(accepting) }
    }

    /// Whether the harm has been done.
    pub(crate) fn done(&self) -> bool {
        self.shared.done.load(Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.closed.store(true, Relaxed);
        self.shared.end_all();
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.address);
        if let Some(accepting) = self.accepting.take() {
            accepting.join().unwrap();
        }
    }
}

impl Shared {
    fn pass(self: Arc<Shared>, connection: usize, source: TcpStream) -> io::Result<()> {
        let destination = TcpStream::connect(self.target)?;
        for stream in [&source, &destination] {
            stream.set_nodelay(true)?;
            self.streams.lock().unwrap().push(stream.try_clone()?);
        }
        for back in [false, true] {
            let (from, to) = if back { (&destination, &source) } else { (&source, &destination) };
            let (mut from, mut to) = (from.try_clone()?, to.try_clone()?);
            let shared = self.clone();
            std::thread::spawn(move || {
                // Either end may hang up at any time.
                let _ = if (shared.plan.connection, shared.plan.back) == (connection, back) {
                    shared.harm(&mut from, &mut to)
                } else {
                    io::copy(&mut from, &mut to).map(drop)
                };
                let _ = to.shutdown(Shutdown::Write);
            });
        }
        Ok(())
    }

    fn end_all(&self) {
        for stream in self.streams.lock().unwrap().iter() {
            // Fails only if it has ended.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn cut(&self) -> io::Result<()> {
        self.done.store(true, Relaxed);
        self.end_all();
        Err(io::ErrorKind::ConnectionAborted.into())
    }

    fn harm(&self, from: &mut TcpStream, to: &mut TcpStream) -> io::Result<()> {
        match &self.plan.harm {
            Harm::Flip { at, .. } | Harm::Skip { at, .. } | Harm::Insert { at, .. } | Harm::Cut { at } => {
                io::copy(&mut (&mut *from).take(*at), to)?;
                let mut next = [0];
                match &self.plan.harm {
                    Harm::Flip { bit, .. } => {
                        from.read_exact(&mut next)?;
                        to.write_all(&[next[0] ^ 1 << bit])?;
                    }
                    Harm::Skip { count, .. } => from.read_exact(&mut vec![0; *count])?,
                    Harm::Insert { bytes, .. } => {
                        // Not before the stream has come this far.
                        from.read_exact(&mut next)?;
                        to.write_all(bytes)?;
                        to.write_all(&next)?;
                    }
                    _ => {
                        from.read_exact(&mut next)?;
                        return self.cut();
                    }
                }
                self.done.store(true, Relaxed);
            }
            Harm::CutBefore(kind) => {
                pass_until(*kind, from, to)?;
                return self.cut();
            }
            Harm::CutAfter(kind) => {
                let frame = pass_until(*kind, from, to)?;
                // The source first: no answer may get through to it.
                from.shutdown(Shutdown::Both)?;
                to.write_all(&frame)?;
                self.done.store(true, Relaxed);
                return Ok(());
            }
            Harm::Swap(kind) => {
                let first = pass_until(*kind, from, to)?;
                let (_, second) = frame(from)?;
                to.write_all(&second)?;
                to.write_all(&first)?;
                self.done.store(true, Relaxed);
            }
        }
        io::copy(from, to).map(drop)
    }
}

/// Reads one whole frame.
fn frame(from: &mut TcpStream) -> io::Result<(Kind, Vec<u8>)> {
    let mut bytes = [0; HEADER_LEN];
    from.read_exact(&mut bytes)?;
    let header = Header::parse(&bytes, &Limits::default()).map_err(io::Error::other)?;
    let mut frame = bytes.to_vec();
    frame.resize(HEADER_LEN + header.body_len(), 0);
    from.read_exact(&mut frame[HEADER_LEN..])?;
    Ok((header.kind(), frame))
}

/// Passes frames on until one of this kind comes, and returns that one.
fn pass_until(kind: Kind, from: &mut TcpStream, to: &mut TcpStream) -> io::Result<Vec<u8>> {
    loop {
        let (seen, bytes) = frame(from)?;
        if seen == kind {
            return Ok(bytes);
        }
        to.write_all(&bytes)?;
    }
}
