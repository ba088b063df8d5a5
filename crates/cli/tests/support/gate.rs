//! A TCP proxy in front of `pagewarp qemu receive` that knows where frames begin, and asks the test about each one that passes.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use pagewarp_testkit::netns::{End, NetPair};
use pagewarp_wire::state_hash;

/// Bytes of a frame's header, and of those before the check.
const HEADER: usize = 24;
const CHECK: usize = 20;
/// Kinds of frames, of docs/bridge-protocol.md.
const CREDIT: u8 = 5;
const REVERSE: u8 = 6;
const REVERSE_END: u8 = 7;
const CONTROL: u8 = 9;
/// What the destination QEMU says once it has loaded the VM: SHUT, 4 bytes, no error.
const LOADED: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 0];

/// A frame on its way, without its payload.
pub(crate) struct Frame<'a> {
    /// 0 is the control connection, the main channel is 1.
    connection: usize,
    back: bool,
    kind: u8,
    meta: &'a [u8],
}

impl Frame<'_> {
    /// Whether it is this message of the control connection.
    pub(crate) fn is_message(&self, name: &str) -> bool {
        let text = format!("\"message\":\"{name}\"");
        self.kind == CONTROL && self.meta.windows(text.len()).any(|window| window == text.as_bytes())
    }

    /// Whether it brings the news that the destination QEMU has loaded the VM.
    pub(crate) fn is_loaded(&self) -> bool {
        self.connection == 1 && self.back && self.kind == REVERSE && self.meta.ends_with(&LOADED)
    }

    /// Whether it says what was written into the destination QEMU on this connection of it, and ends with the hash of that.
    pub(crate) fn is_credit(&self, number: usize) -> bool {
        self.connection == number + 1 && self.back && self.kind == CREDIT
    }

    /// Whether it says that the destination QEMU has ended the main channel.
    pub(crate) fn is_main_end(&self) -> bool {
        self.connection == 1 && self.back && self.kind == REVERSE_END
    }
}

/// What becomes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pass {
    Yes,
    /// Neither this one nor any after it in its direction of its connection, which stays open.
    Never,
    /// It does not, and all connections end.
    Cut,
    /// It does, with another last byte, for which its check is right.
    Damaged,
}

type Asked = Box<dyn FnMut(&Frame<'_>) -> Pass + Send>;

/// The proxy. Its connections end when it is dropped.
pub(crate) struct Gate {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    target: SocketAddr,
    asked: Mutex<Asked>,
    streams: Mutex<Vec<TcpStream>>,
    closed: AtomicBool,
}

impl Gate {
    /// In front of `target`, at this end of the link.
    pub(crate) fn start(
        net: &NetPair,
        end: End,
        target: &str,
        asked: impl FnMut(&Frame<'_>) -> Pass + Send + 'static,
    ) -> Gate {
        let shared = Arc::new(Shared {
            target: target.parse().unwrap(),
            asked: Mutex::new(Box::new(asked)),
            streams: Mutex::default(),
            closed: AtomicBool::new(false),
        });
        // Threads that are started there stay there.
        let address = net.run_at(end, || {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            let address = listener.local_addr().unwrap();
            let shared = shared.clone();
            std::thread::spawn(move || {
                for (connection, stream) in listener.incoming().enumerate() {
                    if shared.closed.load(Relaxed) {
                        return;
                    }
                    // A destination that is gone shows as a connection that ends at once.
                    let _ = stream.and_then(|stream| shared.clone().join(connection, stream));
                }
            });
            address
        });
        Gate { address, shared }
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.shared.closed.store(true, Relaxed);
        self.shared.cut();
    }
}

impl Shared {
    fn cut(&self) {
        for stream in self.streams.lock().unwrap().iter() {
            // Fails only if it has ended.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn join(self: Arc<Shared>, connection: usize, source: TcpStream) -> io::Result<()> {
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
                if let Ok(Pass::Yes) | Err(_) = shared.pass(connection, back, &mut from, &mut to) {
                    let _ = to.shutdown(Shutdown::Write);
                }
            });
        }
        Ok(())
    }

    fn pass(
        &self,
        connection: usize,
        back: bool,
        from: &mut TcpStream,
        to: &mut TcpStream,
    ) -> io::Result<Pass> {
        loop {
            let mut header = [0; HEADER];
            if from.read(&mut header[..1])? == 0 {
                return Ok(Pass::Yes);
            }
            from.read_exact(&mut header[1..])?;
            let number = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
            let payload = number(16);
            let mut body = vec![0; number(12) as usize];
            from.read_exact(&mut body)?;
            let frame = Frame { connection, back, kind: header[4], meta: &body };
            let pass = (self.asked.lock().unwrap())(&frame);
            match pass {
                Pass::Yes => {}
                Pass::Never => {
                    // Nobody may notice that it is not read any more.
                    io::copy(from, &mut io::sink())?;
                    return Ok(pass);
                }
                Pass::Cut => {
                    self.cut();
                    return Ok(pass);
                }
                Pass::Damaged => {
                    *body.last_mut().expect("only frames with a body can be damaged") ^= 1;
                    let check = state_hash(&[&header[..CHECK], &body].concat()) as u32;
                    header[CHECK..].copy_from_slice(&check.to_le_bytes());
                }
            }
            to.write_all(&header)?;
            to.write_all(&body)?;
            io::copy(&mut from.take(payload.into()), to)?;
        }
    }
}
