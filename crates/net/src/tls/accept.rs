//! The destination's side.
//!
//! Anybody can connect, and say nothing or a byte now and then. So each handshake has a thread of its own and a few seconds, there are only so many at a time, and when a
//! further one comes, one of the host that has most of them goes, its oldest: a host cannot keep another one out.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use pagewarp_engine::flow::lock;
use pagewarp_engine::seldom::Seldom;
use pagewarp_engine::transport::{Acceptor, Stream, TcpAcceptor, Untrusted};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustls::{Connection, ServerConnection};
use tracing::{debug, warn};

use super::config::TlsServer;
use super::explain::Words;
use super::handshake::{Handshake, linger};
use super::renew::FromFiles;
use super::stream::TlsStream;

/// How long a handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Handshakes at the same time, and connections that wait for somebody who accepts them.
const MAX_HANDSHAKES: usize = 16;
/// Threads at the same time, with those that are about to end.
const MAX_THREADS: usize = 2 * MAX_HANDSHAKES;

/// Listens on TCP and speaks TLS. Only connections whose peer has proved who it is are accepted.
pub struct TlsAcceptor {
    tcp: TcpAcceptor,
    pending: Arc<Pending>,
}

/// Handshakes, and what has become of them.
struct Pending {
    server: Mutex<Arc<TlsServer>>,
    state: Mutex<State>,
    turned_away: Seldom,
    /// Readable when a thread has ended since that was looked at last.
    news: OwnedFd,
}

#[derive(Default)]
struct State {
    under_way: Vec<UnderWay>,
    ready: VecDeque<TlsStream>,
    threads: usize,
    next: u64,
}

impl State {
    /// Takes a handshake off the list. Returns whether it was there: it may have had to go.
    fn take(&mut self, number: u64) -> bool {
        let at = self.under_way.iter().position(|one| one.number == number);
        at.map(|at| self.under_way.remove(at)).is_some()
    }
}

struct UnderWay {
    number: u64,
    from: IpAddr,
    socket: Arc<TcpStream>,
}

impl TlsAcceptor {
    /// Accepts what comes to `tcp` and shows that it is allowed to.
    ///
    /// # Errors
    ///
    /// The system has no descriptors left.
    pub fn new(tcp: TcpAcceptor, server: TlsServer) -> io::Result<TlsAcceptor> {
        let news = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(TlsAcceptor {
            tcp,
            pending: Arc::new(Pending {
                server: Mutex::new(Arc::new(server)),
                state: Mutex::default(),
                turned_away: Seldom::default(),
                news,
            }),
        })
    }

    /// Where it listens; tells the port if 0 was asked for.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.tcp.local_addr()
    }
}

impl Acceptor for TlsAcceptor {
    fn accept(&self, timeout: Duration) -> io::Result<Box<dyn Stream>> {
        let until = Instant::now() + timeout;
        loop {
            let has_room = {
                let mut state = lock(&self.pending.state);
                if let Some(stream) = state.ready.pop_front() {
                    return Ok(Box::new(stream));
                }
                state.threads < MAX_THREADS
            };
            let left = until.saturating_duration_since(Instant::now());
            let news = PollFd::new(&self.pending.news, PollFlags::IN);
            let mut fds = [news, PollFd::new(&self.tcp, PollFlags::IN)];
            let fds = if has_room { &mut fds[..] } else { &mut fds[..1] };
            match poll(fds, Some(&timespec(left))) {
                Ok(0) if left.is_zero() => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "nobody connected in time"));
                }
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            // There may be none.
            let _ = rustix::io::read(&self.pending.news, &mut [0; 8]);
            if has_room && let Some((socket, from)) = self.tcp.accept_tcp()? {
                Pending::begin(&self.pending, socket, from);
            }
        }
    }

    fn local(&self) -> String {
        self.tcp.local()
    }

    /// Handshakes that are under way go on with the files of before.
    fn renew(&self) {
        Arc::make_mut(&mut lock(&self.pending.server)).renew();
    }
}

impl Drop for TlsAcceptor {
    /// Ends the threads.
    fn drop(&mut self) {
        for one in lock(&self.pending.state).under_way.drain(..) {
            let _ = one.socket.shutdown(Shutdown::Both);
        }
    }
}

impl Pending {
    fn begin(pending: &Arc<Pending>, socket: TcpStream, from: SocketAddr) {
        let socket = Arc::new(socket);
        let number = {
            let mut state = lock(&pending.state);
            if state.under_way.len() >= MAX_HANDSHAKES
                && let Some(victim) = victim(&state.under_way.iter().map(|one| one.from).collect::<Vec<_>>())
            {
                let victim = state.under_way.remove(victim);
                debug!(from = %victim.from, "too many TLS handshakes at once: one is given up");
                // Ends the thread.
                let _ = victim.socket.shutdown(Shutdown::Both);
            }
            let number = state.next;
            state.next += 1;
            state.threads += 1;
            state.under_way.push(UnderWay { number, from: from.ip(), socket: socket.clone() });
            number
        };
        let this = pending.clone();
        let spawned = thread::Builder::new().name("tls".into()).spawn(move || {
            let stream = this.serve(number, &socket, from);
            this.end(number, stream);
        });
        if let Err(error) = spawned {
            warn!(%error, "no thread for a TLS handshake");
            pending.end(number, None);
        }
    }

    /// A thread has come to its end.
    fn end(&self, number: u64, stream: Option<TlsStream>) {
        let mut state = lock(&self.state);
        state.threads -= 1;
        state.take(number);
        if let Some(stream) = stream {
            if state.ready.len() >= MAX_HANDSHAKES {
                // Nobody has accepted any for long.
                state.ready.pop_front();
            }
            state.ready.push_back(stream);
        }
        drop(state);
        let _ = rustix::io::write(&self.news, &1u64.to_ne_bytes());
    }

    /// Shakes hands. `None`: the peer was turned away.
    fn serve(&self, number: u64, socket: &Arc<TcpStream>, from: SocketAddr) -> Option<TlsStream> {
        match self.shake(number, socket) {
            Ok(stream) => Some(stream),
            Err(error) if error.get_ref().is_some_and(|inner| inner.is::<Untrusted>()) => {
                self.turned_away.tell(|more| warn!(%from, "turned a connection away: {error}{more}"));
                linger(socket);
                None
            }
            Err(error) => {
                debug!(%from, %error, "a connection that came to nothing");
                None
            }
        }
    }

    fn shake(&self, number: u64, socket: &Arc<TcpStream>) -> io::Result<TlsStream> {
        let server = lock(&self.server).clone();
        let tls = ServerConnection::new(server.config.clone()).map_err(io::Error::other)?;
        let mut handshake = Handshake {
            socket,
            tls: Connection::Server(tls),
            words: Words { peer: "the source", cert: &server.cert, ca: &server.ca },
            until: Instant::now() + HANDSHAKE_TIMEOUT,
            go_on: &|| true,
            heard: false,
        };
        let identity = handshake.shake()?;
        if !server.allowed.is_empty() && !identity.is_one_of(&server.allowed) {
            let names =
                if identity.names.is_empty() { "no name".to_owned() } else { identity.names.join(", ") };
            handshake.refuse(&format!(
                "its certificate is for {names}, which is none of those that --allow-peer names there"
            ))?;
            return Err(Untrusted(format!("{identity} is none of those that --allow-peer names")).into());
        }
        // Whoever is welcome has no longer to make room for others.
        if !lock(&self.state).take(number) {
            return Err(io::Error::other("it had to make room for others"));
        }
        handshake.welcome()?;
        let tls = handshake.done()?;
        Ok(TlsStream::new(socket.try_clone()?, tls, &identity, None))
    }
}

/// Which handshake has to go, of these, oldest first: the oldest of the host that has most of them.
fn victim(hosts: &[IpAddr]) -> Option<usize> {
    let of = |host: &IpAddr| hosts.iter().filter(|other| *other == host).count();
    let most = hosts.iter().map(of).max()?;
    hosts.iter().position(|host| of(host) == most)
}

fn timespec(time: Duration) -> Timespec {
    Timespec { tv_sec: time.as_secs().try_into().unwrap_or(i64::MAX), tv_nsec: time.subsec_nanos().into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_makes_room_for_others() {
        let hosts = |numbers: &[u8]| -> Vec<IpAddr> {
            numbers.iter().map(|number| IpAddr::from([192, 0, 2, *number])).collect()
        };
        assert_eq!(victim(&hosts(&[1, 2, 3, 3, 2, 3])), Some(2));
        assert_eq!(victim(&hosts(&[1, 2, 2, 1])), Some(0));
        assert_eq!(victim(&[]), None);
    }
}
