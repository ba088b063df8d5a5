//! A relay for TCP connections that does what bad networks do.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use pagewarp_engine::transport::Stream;

/// How long the destination may take to answer a new connection, where the link may be down.
const CONNECT: Duration = Duration::from_secs(5);

/// A relay at an address of its own; its connections end when it is dropped.
pub(crate) struct Relay {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    target: SocketAddr,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    is_over: bool,
    is_refusing: bool,
    /// Nothing is passed on.
    is_holding: bool,
    /// Nothing of this connection is passed on.
    stalled: Option<usize>,
    /// A bit of the next bytes of this connection and direction is flipped.
    corrupt: Option<(usize, bool, u64)>,
    opened: usize,
    /// The connections that live, by number.
    live: Vec<(usize, [TcpStream; 2])>,
}

impl Relay {
    /// In front of `target`. Its threads belong to the network namespace of the one that starts it.
    pub(crate) fn start(target: &str) -> Relay {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            target: target.parse().unwrap(),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let accepting = shared.clone();
        thread::spawn(move || {
            for near in listener.incoming() {
                let Ok(near) = near else { return };
                if accepting.state().is_over {
                    return;
                }
                let joining = accepting.clone();
                // Where the link is down this takes its time.
                thread::spawn(move || joining.join(near));
            }
        });
        Relay { address, shared }
    }

    /// Resets those of the connections whose bit is set, but at least one.
    pub(crate) fn reset(&self, which: u64) {
        self.shared.reset(|number| which & 1 << (number % 64) != 0);
    }

    /// Whether new connections end at once. Those that are there are reset.
    pub(crate) fn refuse(&self, refuse: bool) {
        self.shared.state().is_refusing = refuse;
        if refuse {
            self.shared.reset(|_| true);
        }
    }

    /// Whether nothing is passed on.
    pub(crate) fn hold(&self, hold: bool) {
        self.shared.state().is_holding = hold;
        self.shared.changed.notify_all();
    }

    /// Passes nothing on of one connection, until told otherwise.
    pub(crate) fn stall(&self, which: Option<u64>) {
        let mut state = self.shared.state();
        state.stalled = which.and_then(|which| state.choose(which));
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Flips a bit in what comes next on one of the connections, in one of the directions.
    pub(crate) fn corrupt(&self, which: u64) {
        let mut state = self.shared.state();
        // Much more flows towards the destination.
        let back = which.is_multiple_of(4);
        state.corrupt = state.choose(which / 4).map(|number| (number, back, which / 64));
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.state().is_over = true;
        self.shared.changed.notify_all();
        self.shared.reset(|_| true);
        // Wakes the thread that accepts, if it can be reached from here.
        let _ = TcpStream::connect_timeout(&self.address, Duration::from_millis(100));
    }
}

impl State {
    fn choose(&self, which: u64) -> Option<usize> {
        let count = self.live.len() as u64;
        (count > 0).then(|| self.live[(which % count) as usize].0)
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reset(&self, which: impl Fn(usize) -> bool) {
        let state = self.state();
        let chosen = |(number, _): &&(usize, [TcpStream; 2])| which(*number);
        let mut links: Vec<_> = state.live.iter().filter(chosen).collect();
        if links.is_empty() {
            links.extend(state.live.first());
        }
        for end in links.into_iter().flat_map(|(_, ends)| ends) {
            // Fails only if it has ended.
            let _ = Stream::reset(end);
        }
    }

    fn join(self: Arc<Shared>, near: TcpStream) {
        if self.state().is_refusing {
            return;
        }
        // A destination that is gone, or cannot be reached, shows as a connection that ends.
        let Ok(far) = TcpStream::connect_timeout(&self.target, CONNECT) else { return };
        let copies = |stream: &TcpStream| {
            stream.set_nodelay(true)?;
            Ok::<_, std::io::Error>([stream.try_clone()?, stream.try_clone()?])
        };
        let (Ok([near_a, near_b]), Ok([far_a, far_b])) = (copies(&near), copies(&far)) else { return };
        let number = {
            let mut state = self.state();
            state.opened += 1;
            let number = state.opened;
            state.live.push((number, [near, far]));
            number
        };
        let back = self.clone();
        thread::spawn(move || back.pump(number, true, far_a, near_a));
        self.pump(number, false, near_b, far_b);
        self.state().live.retain(|(other, _)| *other != number);
    }

    fn pump(&self, number: usize, back: bool, mut from: TcpStream, mut to: TcpStream) {
        let mut bytes = vec![0; 64 << 10];
        while let Ok(len) = from.read(&mut bytes)
            && len > 0
        {
            self.wait_until_free(number);
            let mut state = self.state();
            if let Some((which, direction, random)) = state.corrupt
                && (which, direction) == (number, back)
            {
                bytes[random as usize / 8 % len] ^= 1 << (random % 8);
                state.corrupt = None;
            }
            drop(state);
            if to.write_all(&bytes[..len]).is_err() {
                break;
            }
        }
        self.wait_until_free(number);
        let _ = to.shutdown(Shutdown::Write);
    }

    fn wait_until_free(&self, number: usize) {
        let is_held =
            |state: &mut State| !state.is_over && (state.is_holding || state.stalled == Some(number));
        drop(self.changed.wait_while(self.state(), is_held).unwrap_or_else(PoisonError::into_inner));
    }
}
