//! A relay that changes its mind about where connections go.
#![allow(dead_code, reason = "each test program uses some of it")]

use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;

/// Passes connections on: the first so many to one place, all others to another.
pub(crate) struct Relay {
    pub(crate) address: SocketAddr,
    live: Arc<Mutex<Vec<TcpStream>>>,
}

impl Relay {
    pub(crate) fn start(first: SocketAddr, many: usize, then: SocketAddr) -> Relay {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let live: Arc<Mutex<Vec<TcpStream>>> = Arc::default();
        let (all, count) = (live.clone(), AtomicUsize::new(0));
        thread::spawn(move || {
            for near in listener.incoming() {
                let to = if count.fetch_add(1, SeqCst) < many { first } else { then };
                let (Ok(near), Ok(far)) = (near, TcpStream::connect(to)) else { return };
                all.lock().unwrap().extend([near.try_clone().unwrap(), far.try_clone().unwrap()]);
                for (mut from, mut to) in [
                    (near.try_clone().unwrap(), far.try_clone().unwrap()),
                    (far.try_clone().unwrap(), near.try_clone().unwrap()),
                ] {
                    thread::spawn(move || {
                        let _ = std::io::copy(&mut from, &mut to);
                        let _ = to.shutdown(Shutdown::Write);
                    });
                }
            }
        });
        Relay { address, live }
    }

    /// Ends all connections so far.
    pub(crate) fn cut(&self) {
        for stream in self.live.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}
