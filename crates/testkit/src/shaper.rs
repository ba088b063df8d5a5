//! A link of a known speed: a TCP proxy on loopback that passes bytes at a given rate, with a given latency, and breaks on request.
//!
//! All connections through one shaper share one rate per direction, as the connections over one network card do. Only the bytes of the
//! streams count, not the headers that TCP and IP would add (about 5 % on Ethernet).

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use crate::bucket::Bucket;

/// The most bytes taken at once.
const MAX_CHUNK: usize = 256 << 10;

/// How long a blocked thread may take to notice that the link was cut, killed or dropped.
const TICK: Duration = Duration::from_millis(50);

/// What a link is like; the same in both directions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkConfig {
    /// Bits per second, shared by all connections; `None` is as fast as the host.
    pub rate_bits_per_s: Option<u64>,
    /// Bytes that pass at once after the link was idle; by default 2 ms of the rate, but at least 64 KiB.
    pub burst_bytes: Option<u64>,
    /// Time from the last bit in to the first bit out, one way.
    pub latency: Duration,
    /// Bytes that each socket of the proxy may queue: small as in a network card, so that what was written is soon on the link.
    pub socket_buffer_bytes: usize,
}

impl Default for LinkConfig {
    fn default() -> LinkConfig {
        LinkConfig {
            rate_bits_per_s: None,
            burst_bytes: None,
            latency: Duration::ZERO,
            socket_buffer_bytes: 256 << 10,
        }
    }
}

impl LinkConfig {
    /// A link of this rate without latency.
    pub fn with_rate(rate_bits_per_s: u64) -> LinkConfig {
        LinkConfig { rate_bits_per_s: Some(rate_bits_per_s), ..LinkConfig::default() }
    }
}

/// What went through one direction so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkCounters {
    /// Bytes.
    pub bytes: u64,
    /// For how long these bytes occupied the link: bytes × 8 ÷ the rate at that time. Zero without a rate.
    pub busy: Duration,
}

/// A shaped link to one target. Dropping it closes every connection.
#[derive(Debug)]
pub struct LinkShaper {
    address: SocketAddr,
    link: Arc<Link>,
    accepting: Option<JoinHandle<()>>,
}

impl LinkShaper {
    /// Listens on a free port of loopback and forwards each connection to `target`.
    pub fn start(target: SocketAddr, config: LinkConfig) -> io::Result<LinkShaper> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        // Accepted sockets inherit it; set before they exist, it also bounds the window they announce.
        sockopt::set_socket_recv_buffer_size(&listener, config.socket_buffer_bytes)?;
        let address = listener.local_addr()?;
        let bucket = || Mutex::new(Bucket::new(config.rate_bits_per_s, config.burst_bytes, Instant::now()));
        let link = Arc::new(Link {
            target,
            there: bucket(),
            back: bucket(),
            gate: Mutex::new(Gate { down: false, closed: false, kills: 0 }),
            changed: Condvar::new(),
            config,
        });
        let accepting = std::thread::Builder::new().name("link-accept".into()).spawn({
            let link = Arc::clone(&link);
            move || link.accept_all(&listener)
        })?;
        Ok(LinkShaper { address, link, accepting: Some(accepting) })
    }

    /// Where to connect instead of the target.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes the rate of both directions for bytes that come from now on.
    pub fn set_rate(&self, rate_bits_per_s: Option<u64>) {
        lock(&self.link.there).set_rate(rate_bits_per_s);
        lock(&self.link.back).set_rate(rate_bits_per_s);
    }

    /// What went from those who connect to the target.
    pub fn there(&self) -> LinkCounters {
        counters(&self.link.there)
    }

    /// What came back from the target.
    pub fn back(&self) -> LinkCounters {
        counters(&self.link.back)
    }

    /// The cable is pulled: nothing passes in either direction, nothing is lost, nobody is told.
    pub fn cut(&self) {
        self.link.change(|gate| gate.down = true);
    }

    /// The cable is back.
    pub fn heal(&self) {
        let now = Instant::now();
        lock(&self.link.there).restart(now);
        lock(&self.link.back).restart(now);
        self.link.change(|gate| gate.down = false);
    }

    /// Resets every connection on both sides. Later connections work.
    pub fn kill(&self) {
        self.link.change(|gate| gate.kills += 1);
    }
}

impl Drop for LinkShaper {
    fn drop(&mut self) {
        self.link.change(|gate| gate.closed = true);
        if let Some(accepting) = self.accepting.take() {
            // A panic in there was reported on stderr already; the threads are gone either way.
            let _ = accepting.join();
        }
    }
}

fn counters(bucket: &Mutex<Bucket>) -> LinkCounters {
    let bucket = lock(bucket);
    LinkCounters { bytes: bucket.bytes(), busy: bucket.busy() }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct Link {
    target: SocketAddr,
    config: LinkConfig,
    there: Mutex<Bucket>,
    back: Mutex<Bucket>,
    gate: Mutex<Gate>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug)]
struct Gate {
    down: bool,
    closed: bool,
    /// A connection lives as long as this is what it was at its start.
    kills: u64,
}

/// What tells the threads of one connection that it is over.
struct Life {
    /// The kills at its start.
    kills: u64,
    /// One direction failed.
    broken: AtomicBool,
}

impl Life {
    fn is_over(&self, gate: &Gate) -> bool {
        gate.closed || gate.kills != self.kills || self.broken.load(Ordering::Acquire)
    }
}

/// What becomes of bytes that are through, and when their last bit was.
type HandOn<'a> = dyn FnMut(Instant, &[u8]) -> Result<Waited, Ended> + 'a;

/// The connection is to end: it was killed, the link was dropped, or one end is gone.
struct Ended;

impl From<io::Error> for Ended {
    fn from(_: io::Error) -> Ended {
        // The two ends learn of it by the reset of their own connection.
        Ended
    }
}

impl From<Errno> for Ended {
    fn from(_: Errno) -> Ended {
        Ended
    }
}

impl Link {
    fn change(&self, change: impl FnOnce(&mut Gate)) {
        change(&mut lock(&self.gate));
        self.changed.notify_all();
    }

    fn accept_all(self: &Arc<Self>, listener: &TcpListener) {
        let mut connections: Vec<JoinHandle<()>> = Vec::new();
        let tick = Timespec { tv_sec: 0, tv_nsec: TICK.subsec_nanos().into() };
        while !lock(&self.gate).closed {
            connections.retain(|connection| !connection.is_finished());
            if !matches!(poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&tick)), Ok(1)) {
                continue;
            }
            let Ok((near, _)) = listener.accept() else { continue };
            let life = Life { kills: lock(&self.gate).kills, broken: AtomicBool::new(false) };
            let link = Arc::clone(self);
            let run = move || {
                // Whatever ended it, both ends have been told by then.
                let _ = link.connection(near, &life);
            };
            // Without a thread the connection is dropped, which its end notices.
            connections.extend(std::thread::Builder::new().name("link-connection".into()).spawn(run).ok());
        }
        connections.into_iter().for_each(|connection| drop(connection.join()));
    }

    /// One connection from its beginning to its end.
    fn connection(&self, near: TcpStream, life: &Life) -> Result<(), Ended> {
        prepare(&near, self.config.socket_buffer_bytes)?;
        // Unless both directions end in order, closing the sockets resets both connections.
        sockopt::set_socket_linger(&near, Some(Duration::ZERO))?;
        self.wait_up(life)?;
        let far = self.connect()?;
        sockopt::set_socket_linger(&far, Some(Duration::ZERO))?;
        let (near, far) = (&near, &far);
        let ended_in_order = std::thread::scope(|scope| {
            let back = std::thread::Builder::new()
                .name("link-back".into())
                .spawn_scoped(scope, || self.direction(&self.back, far, near, life));
            let there = self.direction(&self.there, near, far, life);
            let back = back.is_ok_and(|back| matches!(back.join(), Ok(Ok(()))));
            there.is_ok() && back
        });
        if ended_in_order {
            sockopt::set_socket_linger(near, None)?;
            sockopt::set_socket_linger(far, None)?;
        }
        Ok(())
    }

    fn connect(&self) -> Result<TcpStream, Ended> {
        let family = if self.target.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        sockopt::set_socket_recv_buffer_size(&socket, self.config.socket_buffer_bytes)?;
        rustix::net::connect(&socket, &self.target)?;
        let stream = TcpStream::from(socket);
        prepare(&stream, self.config.socket_buffer_bytes)?;
        Ok(stream)
    }

    /// Passes one direction on until its end, and the end as well.
    fn direction(
        &self,
        bucket: &Mutex<Bucket>,
        from: &TcpStream,
        to: &TcpStream,
        life: &Life,
    ) -> Result<(), Ended> {
        let result = if self.config.latency.is_zero() {
            self.forward(bucket, from, life, &mut |_, bytes| self.deliver(to, bytes, life))
        } else {
            let line = DelayLine::new(self.delay_line_bytes(bucket));
            std::thread::scope(|scope| {
                let out =
                    std::thread::Builder::new().name("link-delay".into()).spawn_scoped(scope, || {
                        let result = self.drain(&line, to, life);
                        line.close();
                        result
                    })?;
                let latency = self.config.latency;
                let result = self
                    .forward(bucket, from, life, &mut |due, bytes| line.push(due + latency, bytes.to_vec()));
                line.close();
                result.and(out.join().unwrap_or(Err(Ended)))
            })
        };
        match result {
            Ok(()) => to.shutdown(Shutdown::Write)?,
            Err(Ended) => {
                life.broken.store(true, Ordering::Release);
                // Wakes the other direction, which would wait for bytes that nobody will send.
                let _ = to.shutdown(Shutdown::Read);
                let _ = from.shutdown(Shutdown::Read);
                return Err(Ended);
            }
        }
        Ok(())
    }

    /// Takes bytes at the link's rate and hands them on when their last bit is through.
    fn forward(
        &self,
        bucket: &Mutex<Bucket>,
        from: &TcpStream,
        life: &Life,
        hand_on: &mut HandOn<'_>,
    ) -> Result<(), Ended> {
        let mut buffer = vec![0; MAX_CHUNK];
        // When the last chunk was through, as long as this thread has had something to do ever since.
        let mut busy_since = None;
        loop {
            self.wait_up(life)?;
            let limit = lock(bucket).chunk_bytes(MAX_CHUNK);
            let (count, waited) = self.receive(from, &mut buffer[..limit], life)?;
            if count == 0 {
                // The end of the stream, unless the other direction brought it about.
                return self.check(life);
            }
            let now = Instant::now();
            let late = busy_since
                .filter(|_| waited == Waited::No)
                .map_or(Duration::ZERO, |since| now.duration_since(since));
            let due = lock(bucket).accept(now, count as u64, late);
            self.sleep_until(due, life)?;
            self.wait_up(life)?;
            let waited = hand_on(due.max(now), &buffer[..count])?;
            busy_since = (waited == Waited::No).then_some(due);
        }
    }

    /// Hands on what the delay line holds, each piece when it is due.
    fn drain(&self, line: &DelayLine, to: &TcpStream, life: &Life) -> Result<(), Ended> {
        while let Some((due, bytes)) = line.pop() {
            self.sleep_until(due, life)?;
            self.wait_up(life)?;
            self.deliver(to, &bytes, life)?;
        }
        Ok(())
    }

    /// Room for what is on the way at full speed, twice over because threads are late.
    fn delay_line_bytes(&self, bucket: &Mutex<Bucket>) -> usize {
        const UNSHAPED_BYTES: usize = 64 << 20;
        let in_flight = lock(bucket).bytes_in(self.config.latency);
        in_flight.map_or(UNSHAPED_BYTES, |bytes| (2 * bytes as usize).clamp(1 << 20, 1 << 30))
    }

    fn receive(&self, from: &TcpStream, buffer: &mut [u8], life: &Life) -> Result<(usize, Waited), Ended> {
        let mut flags = RecvFlags::DONTWAIT;
        let mut waited = Waited::No;
        loop {
            match rustix::net::recv(from, &mut *buffer, flags) {
                Ok((count, _)) => return Ok((count, waited)),
                Err(Errno::AGAIN | Errno::INTR) => {
                    self.check(life)?;
                    (flags, waited) = (RecvFlags::empty(), Waited::Yes);
                }
                Err(_) => return Err(Ended),
            }
        }
    }

    fn deliver(&self, to: &TcpStream, mut bytes: &[u8], life: &Life) -> Result<Waited, Ended> {
        let mut flags = SendFlags::DONTWAIT;
        let mut waited = Waited::No;
        while !bytes.is_empty() {
            match rustix::net::send(to, bytes, flags | SendFlags::NOSIGNAL) {
                Ok(count) => bytes = &bytes[count..],
                Err(Errno::AGAIN | Errno::INTR) => {
                    self.check(life)?;
                    (flags, waited) = (SendFlags::empty(), Waited::Yes);
                }
                Err(_) => return Err(Ended),
            }
        }
        Ok(waited)
    }

    fn check(&self, life: &Life) -> Result<(), Ended> {
        let gate = *lock(&self.gate);
        if life.is_over(&gate) { Err(Ended) } else { Ok(()) }
    }

    /// Waits while the link is down.
    fn wait_up(&self, life: &Life) -> Result<(), Ended> {
        let mut gate = lock(&self.gate);
        while gate.down && !life.is_over(&gate) {
            gate = self.changed.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        if life.is_over(&gate) { Err(Ended) } else { Ok(()) }
    }

    fn sleep_until(&self, due: Instant, life: &Life) -> Result<(), Ended> {
        let mut gate = lock(&self.gate);
        loop {
            if life.is_over(&gate) {
                return Err(Ended);
            }
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            gate = self.changed.wait_timeout(gate, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Whether a call had to wait for the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waited {
    No,
    Yes,
}

fn prepare(stream: &TcpStream, buffer_bytes: usize) -> Result<(), Ended> {
    stream.set_nodelay(true)?;
    sockopt::set_socket_send_buffer_size(stream, buffer_bytes)?;
    sockopt::set_socket_timeout(stream, Timeout::Recv, Some(TICK))?;
    sockopt::set_socket_timeout(stream, Timeout::Send, Some(TICK))?;
    Ok(())
}

/// Bytes on their way, in order, at most so many.
struct DelayLine {
    state: Mutex<InFlight>,
    changed: Condvar,
    capacity_bytes: usize,
}

#[derive(Default)]
struct InFlight {
    pieces: VecDeque<(Instant, Vec<u8>)>,
    bytes: usize,
    closed: bool,
}

impl DelayLine {
    fn new(capacity_bytes: usize) -> DelayLine {
        DelayLine { state: Mutex::default(), changed: Condvar::new(), capacity_bytes }
    }

    /// Nothing more goes in; what is in still comes out.
    fn close(&self) {
        lock(&self.state).closed = true;
        self.changed.notify_all();
    }

    fn push(&self, due: Instant, bytes: Vec<u8>) -> Result<Waited, Ended> {
        let mut state = lock(&self.state);
        let mut waited = Waited::No;
        while !state.closed && state.bytes > 0 && state.bytes + bytes.len() > self.capacity_bytes {
            waited = Waited::Yes;
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.closed {
            return Err(Ended);
        }
        state.bytes += bytes.len();
        state.pieces.push_back((due, bytes));
        self.changed.notify_all();
        Ok(waited)
    }

    fn pop(&self) -> Option<(Instant, Vec<u8>)> {
        let mut state = lock(&self.state);
        loop {
            if let Some((due, bytes)) = state.pieces.pop_front() {
                state.bytes -= bytes.len();
                self.changed.notify_all();
                return Some((due, bytes));
            }
            if state.closed {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests;
