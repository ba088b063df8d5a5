//! A relay in front of a listener whose connections can be cut.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use pagewarp_engine::transport::Stream;

/// Relays connections, until they are cut.
pub(crate) struct Cutter {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    to: SocketAddr,
    live: Mutex<Vec<[TcpStream; 2]>>,
    is_refusing: AtomicBool,
    is_over: AtomicBool,
}

impl Cutter {
    pub(crate) fn new(to: SocketAddr) -> Cutter {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            to,
            live: Mutex::default(),
            is_refusing: AtomicBool::new(false),
            is_over: AtomicBool::new(false),
        });
        let accepting = shared.clone();
        thread::spawn(move || {
            for near in listener.incoming() {
                let Ok(near) = near else { return };
                if accepting.is_over.load(SeqCst) {
                    return;
                }
                if accepting.is_refusing.load(SeqCst) {
                    continue;
                }
                let Ok(far) = TcpStream::connect(accepting.to) else { continue };
                let pair = [near.try_clone().unwrap(), far.try_clone().unwrap()];
                accepting.live.lock().unwrap().push(pair);
                pump(near.try_clone().unwrap(), far.try_clone().unwrap());
                pump(far, near);
            }
        });
        Cutter { address, shared }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends all connections, by a reset or in order.
    pub(crate) fn cut(&self, by_reset: bool) {
        for [near, far] in self.shared.live.lock().unwrap().drain(..) {
            for stream in [near, far] {
                let _ = if by_reset { Stream::reset(&stream) } else { Stream::shutdown(&stream) };
            }
        }
    }

    /// Whether new connections end at once.
    pub(crate) fn refuse(&self, refuse: bool) {
        self.shared.is_refusing.store(refuse, SeqCst);
    }
}

impl Drop for Cutter {
    fn drop(&mut self) {
        self.shared.is_over.store(true, SeqCst);
        self.cut(true);
        let _ = TcpStream::connect_timeout(&self.address, Duration::from_secs(1));
    }
}

fn pump(mut from: TcpStream, mut to: TcpStream) {
    thread::spawn(move || {
        let mut bytes = vec![0; 64 << 10];
        while let Ok(n) = from.read(&mut bytes)
            && n > 0
            && to.write_all(&bytes[..n]).is_ok()
        {}
        let _ = to.shutdown(std::net::Shutdown::Write);
    });
}
