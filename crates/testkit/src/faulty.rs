//! Connections that fail as told: at a given byte, in a given way, reproducibly.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pagewarp_engine::transport::{Acceptor, Connector, Stream};

use crate::rng::SplitMix64;

/// What happens at a byte of the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// The connection breaks: this side gets an error, the peer an end of stream.
    Cut,
    /// The stream ends early and nobody is told: a reader sees the end of the stream; a writer goes on writing into the void while the peer
    /// sees the end.
    Truncate,
    /// One bit of the byte flips: the bit with this number, 0 to 7.
    FlipBit(u8),
    /// Nothing moves for this long (or until a timeout or shutdown ends the wait), then all goes on.
    Stall(Duration),
    /// From here on every read or write call takes this much longer.
    Slow(Duration),
    /// These bytes come in before the byte.
    Insert(Vec<u8>),
    /// This many bytes are lost.
    Skip(u64),
    /// This many bytes come twice.
    Duplicate(u64),
}

/// What goes wrong on one connection. Offsets count the bytes that the wrapped stream would have carried in that direction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FaultPlan {
    reads: Vec<(u64, FaultKind)>,
    writes: Vec<(u64, FaultKind)>,
}

impl FaultPlan {
    /// Nothing goes wrong.
    pub fn none() -> FaultPlan {
        FaultPlan::default()
    }

    /// `kind` happens when byte `at` is read.
    pub fn on_read(mut self, at: u64, kind: FaultKind) -> FaultPlan {
        insert(&mut self.reads, at, kind);
        self
    }

    /// `kind` happens when byte `at` is written.
    pub fn on_write(mut self, at: u64, kind: FaultKind) -> FaultPlan {
        insert(&mut self.writes, at, kind);
        self
    }

    /// One random fault among the first `horizon` bytes (at least 1) of either direction. Stalls are at most 50 ms.
    pub fn seeded(seed: u64, horizon: u64) -> FaultPlan {
        let mut rng = SplitMix64::new(seed);
        let kind = match rng.below(7) {
            0 => FaultKind::Cut,
            1 => FaultKind::Truncate,
            2 => FaultKind::FlipBit(rng.below(8) as u8),
            3 => FaultKind::Stall(Duration::from_millis(rng.below(50))),
            4 => {
                let mut junk = vec![0; 1 + rng.index(64)];
                rng.fill(&mut junk);
                FaultKind::Insert(junk)
            }
            5 => FaultKind::Skip(1 + rng.below(64)),
            _ => FaultKind::Duplicate(1 + rng.below(64)),
        };
        let at = rng.below(horizon.max(1));
        if rng.below(2) == 0 {
            FaultPlan::none().on_read(at, kind)
        } else {
            FaultPlan::none().on_write(at, kind)
        }
    }
}

fn insert(faults: &mut Vec<(u64, FaultKind)>, at: u64, kind: FaultKind) {
    let place = faults.partition_point(|(other, _)| *other <= at);
    faults.insert(place, (at, kind));
}

/// A connection with a [`FaultPlan`]. Clones of it share the plan and the byte counts.
pub struct FaultyStream {
    inner: Box<dyn Stream>,
    shared: Arc<Shared>,
}

impl std::fmt::Debug for FaultyStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FaultyStream").field("fired", &self.fired()).finish_non_exhaustive()
    }
}

struct Shared {
    reading: Mutex<Direction>,
    writing: Mutex<Direction>,
    status: Mutex<Status>,
    closed: Condvar,
    fired: Arc<AtomicUsize>,
}

/// What both directions need to know without waiting for each other.
#[derive(Default)]
struct Status {
    closed: bool,
    read_timeout: Option<Duration>,
    write_timeout: Option<Duration>,
}

#[derive(Default)]
struct Direction {
    /// Bytes of the wrapped stream that have passed.
    position: u64,
    /// The faults to come, in order.
    faults: VecDeque<(u64, FaultKind)>,
    /// A fault that takes time or bytes and is under way.
    active: Option<Active>,
    /// Bytes that must go out before any other: to the reader, or to the wrapped stream.
    pending: Vec<u8>,
    /// Extra time for each call.
    slow: Duration,
    /// The stream ended early here.
    ended: bool,
}

enum Active {
    FlipBit(u8),
    Stall(Instant),
    Skip(u64),
    Duplicate { left: u64, copy: Vec<u8> },
}

impl FaultyStream {
    /// `inner`, with this plan.
    pub fn new(inner: Box<dyn Stream>, plan: FaultPlan) -> FaultyStream {
        FaultyStream::counting(inner, plan, Arc::default())
    }

    fn counting(inner: Box<dyn Stream>, plan: FaultPlan, fired: Arc<AtomicUsize>) -> FaultyStream {
        let direction =
            |faults: Vec<_>| Mutex::new(Direction { faults: faults.into(), ..Direction::default() });
        let shared = Shared {
            reading: direction(plan.reads),
            writing: direction(plan.writes),
            status: Mutex::default(),
            closed: Condvar::new(),
            fired,
        };
        FaultyStream { inner, shared: Arc::new(shared) }
    }

    /// How many faults of the plan have happened.
    pub fn fired(&self) -> usize {
        self.shared.fired.load(Ordering::Acquire)
    }
}

/// What the next bytes are subject to.
enum Next {
    /// Pass at most this many bytes.
    Pass(usize),
    /// The active fault applies.
    Fault,
    /// End of stream.
    Ended,
}

impl Shared {
    fn status(&self) -> MutexGuard<'_, Status> {
        lock(&self.status)
    }

    /// Starts every fault that is due and says what holds for the next at most `len` bytes.
    fn next(&self, direction: &mut Direction, len: usize, inner: &dyn Stream) -> io::Result<Next> {
        if !direction.slow.is_zero() {
            self.wait(Instant::now() + direction.slow, None)?;
        }
        while direction.active.is_none() && !direction.ended && direction.pending.is_empty() {
            let Some(&(at, _)) = direction.faults.front() else { return Ok(Next::Pass(len)) };
            if at > direction.position {
                return Ok(Next::Pass(len.min((at - direction.position).try_into().unwrap_or(usize::MAX))));
            }
            let (_, kind) = direction.faults.pop_front().expect("it was looked at just now");
            self.fired.fetch_add(1, Ordering::AcqRel);
            match kind {
                FaultKind::Cut => {
                    self.close();
                    // The peer may be gone already; the cut is complete either way.
                    let _ = inner.shutdown();
                    return Err(cut());
                }
                FaultKind::Skip(0) | FaultKind::Duplicate(0) => {}
                FaultKind::Truncate => direction.ended = true,
                FaultKind::Slow(each) => direction.slow = each,
                FaultKind::Insert(junk) => direction.pending = junk,
                FaultKind::FlipBit(bit) => direction.active = Some(Active::FlipBit(bit & 7)),
                FaultKind::Stall(time) => direction.active = Some(Active::Stall(Instant::now() + time)),
                FaultKind::Skip(count) => direction.active = Some(Active::Skip(count)),
                FaultKind::Duplicate(count) => {
                    direction.active = Some(Active::Duplicate { left: count, copy: Vec::new() });
                }
            }
        }
        Ok(if direction.ended { Next::Ended } else { Next::Fault })
    }

    /// Waits until `until`, or fails as a socket would when the timeout passes or the connection is shut down first.
    fn wait(&self, until: Instant, timeout: Option<Duration>) -> io::Result<()> {
        let give_up = timeout.map(|timeout| Instant::now() + timeout);
        let mut status = self.status();
        loop {
            if status.closed {
                return Err(cut());
            }
            let now = Instant::now();
            if now >= until {
                return Ok(());
            }
            if give_up.is_some_and(|give_up| now >= give_up) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let end = give_up.map_or(until, |give_up| give_up.min(until));
            status = self.closed.wait_timeout(status, end - now).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn close(&self) {
        self.status().closed = true;
        self.closed.notify_all();
    }

    /// Fails if the connection was cut or shut down.
    fn check_open(&self) -> io::Result<()> {
        if self.status().closed { Err(cut()) } else { Ok(()) }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn cut() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, "the connection was cut")
}

impl Read for FaultyStream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let shared = Arc::clone(&self.shared);
        let mut direction = lock(&shared.reading);
        let direction = &mut *direction;
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            shared.check_open()?;
            let next = shared.next(direction, buf.len(), &*self.inner)?;
            if !direction.pending.is_empty() {
                let count = buf.len().min(direction.pending.len());
                buf[..count].copy_from_slice(&direction.pending[..count]);
                direction.pending.drain(..count);
                return Ok(count);
            }
            match next {
                Next::Ended => return Ok(0),
                Next::Pass(limit) => {
                    let count = self.inner.read(&mut buf[..limit])?;
                    direction.position += count as u64;
                    return Ok(count);
                }
                Next::Fault => {}
            }
            match direction.active.take() {
                None => {}
                Some(Active::FlipBit(bit)) => {
                    direction.active = Some(Active::FlipBit(bit));
                    let count = self.inner.read(&mut buf[..1])?;
                    direction.active = None;
                    direction.position += count as u64;
                    buf[0] ^= 1 << bit;
                    return Ok(count);
                }
                Some(Active::Stall(until)) => {
                    direction.active = Some(Active::Stall(until));
                    let timeout = shared.status().read_timeout;
                    shared.wait(until, timeout)?;
                    direction.active = None;
                }
                Some(Active::Skip(left)) => {
                    direction.active = Some(Active::Skip(left));
                    let mut lost = [0; 4096];
                    let count = self.inner.read(&mut lost[..(left as usize).min(4096)])? as u64;
                    direction.position += count;
                    if count == 0 {
                        return Ok(0);
                    }
                    direction.active = (left > count).then_some(Active::Skip(left - count));
                }
                Some(Active::Duplicate { left, mut copy }) => {
                    let limit = buf.len().min(left as usize);
                    let result = self.inner.read(&mut buf[..limit]);
                    let count = *result.as_ref().unwrap_or(&0);
                    copy.extend_from_slice(&buf[..count]);
                    direction.position += count as u64;
                    let left = left - count as u64;
                    if left == 0 {
                        direction.pending = copy;
                    } else {
                        direction.active = Some(Active::Duplicate { left, copy });
                    }
                    return result;
                }
            }
        }
    }
}

impl FaultyStream {
    /// Writes what a fault left over. It stays pending when that fails.
    fn write_pending(&mut self, direction: &mut Direction) -> io::Result<()> {
        while !direction.pending.is_empty() {
            let count = self.inner.write(&direction.pending)?;
            if count == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            direction.pending.drain(..count);
        }
        Ok(())
    }
}

impl Write for FaultyStream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let shared = Arc::clone(&self.shared);
        let mut direction = lock(&shared.writing);
        let direction = &mut *direction;
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            if direction.ended {
                // The void takes everything.
                return Ok(buf.len());
            }
            shared.check_open()?;
            self.write_pending(direction)?;
            match shared.next(direction, buf.len(), &*self.inner)? {
                // The peer sees the end; whatever the socket says of it is not this writer's to know.
                Next::Ended => drop(self.inner.shutdown()),
                Next::Pass(limit) => {
                    let count = self.inner.write(&buf[..limit])?;
                    direction.position += count as u64;
                    return Ok(count);
                }
                Next::Fault => {}
            }
            match direction.active.take() {
                None => {}
                Some(Active::FlipBit(bit)) => {
                    direction.active = Some(Active::FlipBit(bit));
                    let count = self.inner.write(&[buf[0] ^ (1 << bit)])?;
                    direction.active = None;
                    direction.position += count as u64;
                    return Ok(count);
                }
                Some(Active::Stall(until)) => {
                    direction.active = Some(Active::Stall(until));
                    let timeout = shared.status().write_timeout;
                    shared.wait(until, timeout)?;
                    direction.active = None;
                }
                Some(Active::Skip(left)) => {
                    let count = left.min(buf.len() as u64);
                    direction.position += count;
                    direction.active = (left > count).then_some(Active::Skip(left - count));
                    return Ok(count as usize);
                }
                Some(Active::Duplicate { left, mut copy }) => {
                    let limit = buf.len().min(left as usize);
                    let result = self.inner.write(&buf[..limit]);
                    let count = *result.as_ref().unwrap_or(&0);
                    copy.extend_from_slice(&buf[..count]);
                    direction.position += count as u64;
                    let left = left - count as u64;
                    if left > 0 {
                        direction.active = Some(Active::Duplicate { left, copy });
                    } else {
                        direction.pending = copy;
                        // The caller's bytes are out; if the copy fails now, the next call reports it.
                        let _ = self.write_pending(direction);
                    }
                    return result;
                }
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl Stream for FaultyStream {
    fn try_clone_stream(&self) -> io::Result<Box<dyn Stream>> {
        let inner = self.inner.try_clone_stream()?;
        Ok(Box::new(FaultyStream { inner, shared: Arc::clone(&self.shared) }))
    }

    fn shutdown(&self) -> io::Result<()> {
        self.shared.close();
        self.inner.shutdown()
    }

    fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> io::Result<()> {
        let mut status = self.shared.status();
        (status.read_timeout, status.write_timeout) = (read, write);
        self.inner.set_timeouts(read, write)
    }
}

/// The plans of a sequence of connections, counted from 0.
#[derive(Clone, Debug, Default)]
pub struct ConnectionFaults {
    plans: HashMap<usize, FaultPlan>,
    refused: Vec<usize>,
    count: Arc<AtomicUsize>,
    fired: Arc<AtomicUsize>,
}

impl ConnectionFaults {
    /// No connection has a fault.
    pub fn new() -> ConnectionFaults {
        ConnectionFaults::default()
    }

    /// The k-th connection has this plan.
    pub fn plan(mut self, k: usize, plan: FaultPlan) -> ConnectionFaults {
        self.plans.insert(k, plan);
        self
    }

    /// The k-th connection is not made at all.
    pub fn refuse(mut self, k: usize) -> ConnectionFaults {
        self.refused.push(k);
        self
    }

    /// How many faults have happened on all connections, refusals included. Clones share the count.
    pub fn fired(&self) -> usize {
        self.fired.load(Ordering::Acquire)
    }

    /// Wraps the next connection.
    fn wrap(&self, open: impl FnOnce() -> io::Result<Box<dyn Stream>>) -> io::Result<Box<dyn Stream>> {
        let stream = open()?;
        let k = self.count.fetch_add(1, Ordering::AcqRel);
        if self.refused.contains(&k) {
            self.fired.fetch_add(1, Ordering::AcqRel);
            let _ = stream.shutdown();
            return Err(io::Error::new(
                io::ErrorKind::ConnectionRefused,
                format!("connection {k} was refused"),
            ));
        }
        let plan = self.plans.get(&k).cloned().unwrap_or_default();
        Ok(Box::new(FaultyStream::counting(stream, plan, Arc::clone(&self.fired))))
    }
}

/// A connector whose connections fail as told.
#[derive(Debug)]
pub struct FaultyConnector<C> {
    inner: C,
    faults: ConnectionFaults,
}

impl<C: Connector> FaultyConnector<C> {
    /// `inner`, with these faults.
    pub fn new(inner: C, faults: ConnectionFaults) -> FaultyConnector<C> {
        FaultyConnector { inner, faults }
    }
}

impl<C: Connector> Connector for FaultyConnector<C> {
    fn connect(&self) -> io::Result<Box<dyn Stream>> {
        self.faults.wrap(|| self.inner.connect())
    }

    fn peer(&self) -> String {
        self.inner.peer()
    }
}

/// An acceptor whose connections fail as told.
#[derive(Debug)]
pub struct FaultyAcceptor<A> {
    inner: A,
    faults: ConnectionFaults,
}

impl<A: Acceptor> FaultyAcceptor<A> {
    /// `inner`, with these faults.
    pub fn new(inner: A, faults: ConnectionFaults) -> FaultyAcceptor<A> {
        FaultyAcceptor { inner, faults }
    }
}

impl<A: Acceptor> Acceptor for FaultyAcceptor<A> {
    fn accept(&self, timeout: Duration) -> io::Result<Box<dyn Stream>> {
        self.faults.wrap(|| self.inner.accept(timeout))
    }

    fn local(&self) -> String {
        self.inner.local()
    }

    fn patience(&self) -> Duration {
        self.inner.patience()
    }

    fn limit_outage(&self, most: Option<Duration>) {
        self.inner.limit_outage(most);
    }

    fn renew(&self) {
        self.inner.renew();
    }
}

#[cfg(test)]
mod tests;
