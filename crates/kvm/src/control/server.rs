//! The answering end of a control socket: a thread for each client.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::run_dir::{self, Taken};
use super::types::{Event, Request, codes};
use crate::error::Error;

/// Clients at a time.
const MAX_CLIENTS: usize = 16;
/// The longest request that is read.
const MAX_LINE_BYTES: u64 = 64 << 10;
/// A client that does not read its events for this long is dropped.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the end of the server waits for answers that are under way.
const LINGER: Duration = Duration::from_secs(5);

/// Whoever answers requests.
pub(crate) trait Service: Send + Sync + 'static {
    /// Answers `request` through `emit`, with one final event at the end. Stops when `emit` fails: the client is gone.
    fn handle(&self, request: Request, emit: &mut dyn FnMut(&Event) -> io::Result<()>) -> io::Result<()>;
}

/// A control socket that is being served. Dropping it finishes the answers that are under way, hangs up and removes the socket.
pub(crate) struct Server {
    taken: Taken,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

struct Shared {
    service: Arc<dyn Service>,
    stopping: AtomicBool,
    clients: Mutex<Clients>,
    changed: Condvar,
}

#[derive(Default)]
struct Clients {
    /// Connections by number, to hang up on them.
    streams: HashMap<u64, UnixStream>,
    /// Requests that are being answered.
    answering: usize,
}

impl Server {
    /// Takes `name` in `run_dir` and serves its socket.
    pub(crate) fn start(run_dir: &Path, name: &str, service: Arc<dyn Service>) -> Result<Server, Error> {
        let taken = run_dir::take(run_dir, name)?;
        let shared = Arc::new(Shared {
            service,
            stopping: AtomicBool::new(false),
            clients: Mutex::default(),
            changed: Condvar::new(),
        });
        let failed = |e: io::Error| Error::Host(format!("control socket: {e}"));
        let listener = taken.listener.try_clone().map_err(failed)?;
        let accepting = {
            let shared = shared.clone();
            thread::Builder::new()
                .name("control".into())
                .spawn(move || shared.accept(&listener))
                .map_err(failed)?
        };
        Ok(Server { taken, shared, accepting: Some(accepting) })
    }

    /// Where the socket is.
    pub(crate) fn path(&self) -> PathBuf {
        self.taken.path.clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        // Wakes the thread that accepts.
        drop(UnixStream::connect(&self.taken.path));
        if let Some(accepting) = self.accepting.take() {
            drop(accepting.join());
        }
        let answering = |clients: &mut Clients| clients.answering > 0;
        let clients = self.shared.changed.wait_timeout_while(self.shared.clients(), LINGER, answering);
        let (clients, _) = clients.unwrap_or_else(PoisonError::into_inner);
        for stream in clients.streams.values() {
            drop(stream.shutdown(Shutdown::Both));
        }
    }
}

impl Shared {
    fn clients(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn accept(self: Arc<Shared>, listener: &UnixListener) {
        for number in 0.. {
            let stream = listener.accept();
            if self.stopping.load(Ordering::Acquire) {
                return;
            }
            match stream {
                Ok((stream, _)) => {
                    if let Err(e) = self.clone().start_client(number, stream) {
                        tracing::warn!("control socket: {e}");
                    }
                }
                Err(e) => {
                    tracing::warn!("control socket: {e}");
                    // Out of file descriptors, most likely: don't spin.
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    fn start_client(self: Arc<Shared>, number: u64, mut stream: UnixStream) -> io::Result<()> {
        stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        {
            let mut clients = self.clients();
            if clients.streams.len() >= MAX_CLIENTS {
                return write_event(
                    &mut stream,
                    &Event::error(codes::BUSY, "too many clients; try again later"),
                );
            }
            clients.streams.insert(number, stream.try_clone()?);
        }
        let shared = self.clone();
        let body = move || {
            let _connected = Connected { shared: &shared, number };
            if let Err(e) = shared.serve(stream) {
                tracing::debug!("control client: {e}");
            }
        };
        thread::Builder::new().name("control-client".into()).spawn(body).map(drop).inspect_err(|_| {
            self.clients().streams.remove(&number);
        })
    }

    fn serve(&self, stream: UnixStream) -> io::Result<()> {
        let mut writer = stream.try_clone()?;
        let mut reader = BufReader::new(stream);
        loop {
            let mut line = Vec::new();
            (&mut reader).take(MAX_LINE_BYTES).read_until(b'\n', &mut line)?;
            if line.last() != Some(&b'\n') {
                if line.len() as u64 == MAX_LINE_BYTES {
                    let message = format!("the request is longer than {MAX_LINE_BYTES} bytes");
                    write_event(&mut writer, &Event::error(codes::BAD_REQUEST, message))?;
                }
                return Ok(());
            }
            match serde_json::from_slice(&line) {
                Ok(request) => {
                    let _answering = Answering::start(self);
                    self.service.handle(request, &mut |event| write_event(&mut writer, event))?;
                }
                Err(e) => write_event(
                    &mut writer,
                    &Event::error(codes::BAD_REQUEST, format!("not a request: {e}")),
                )?,
            }
        }
    }
}

/// A request that is being answered, for as long as this exists: also a handler that panics comes to an end.
struct Answering<'a>(&'a Shared);

impl Answering<'_> {
    fn start(shared: &Shared) -> Answering<'_> {
        shared.clients().answering += 1;
        Answering(shared)
    }
}

impl Drop for Answering<'_> {
    fn drop(&mut self) {
        self.0.clients().answering -= 1;
        self.0.changed.notify_all();
    }
}

/// A client that is being served, likewise. Dropping it hangs up.
struct Connected<'a> {
    shared: &'a Shared,
    number: u64,
}

impl Drop for Connected<'_> {
    fn drop(&mut self) {
        self.shared.clients().streams.remove(&self.number);
        self.shared.changed.notify_all();
    }
}

fn write_event(stream: &mut UnixStream, event: &Event) -> io::Result<()> {
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    stream.write_all(&line)
}

#[cfg(test)]
mod tests {
    use super::super::client::Client;
    use super::*;

    struct Echo;

    impl Service for Echo {
        fn handle(&self, request: Request, emit: &mut dyn FnMut(&Event) -> io::Result<()>) -> io::Result<()> {
            match request {
                Request::Watch => {
                    emit(&Event::Progress(Default::default()))?;
                    emit(&Event::Progress(Default::default()))?;
                    emit(&Event::Ok)
                }
                Request::Stop => panic!("a test"),
                other => emit(&Event::error("echo", format!("{other:?}"))),
            }
        }
    }

    #[test]
    fn several_clients_are_served_and_answers_end() {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::start(&dir.path().join("run"), "vm", Arc::new(Echo)).unwrap();
        let mut first = Client::connect(server.path()).unwrap();
        let mut second = Client::connect(server.path()).unwrap();
        let mut progress = 0;
        assert_eq!(first.request(&Request::Watch, |_| progress += 1).unwrap(), Event::Ok);
        assert_eq!(progress, 2);
        for client in [&mut second, &mut first] {
            let answer = client.request(&Request::Status, |_| ()).unwrap();
            assert_eq!(answer, Event::error("echo", "Status"));
        }
        let path = server.path();
        drop(server);
        assert!(first.request(&Request::Status, |_| ()).is_err());
        assert!(Client::connect(path).is_err());
    }

    #[test]
    fn what_is_no_request_is_answered_and_too_much_of_it_ends_the_connection() {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::start(dir.path(), "vm", Arc::new(Echo)).unwrap();
        let mut raw = UnixStream::connect(server.path()).unwrap();
        raw.write_all(b"{\"request\":\"dance\"}\nnonsense\n").unwrap();
        let mut reader = BufReader::new(raw.try_clone().unwrap());
        for _ in 0..2 {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            assert!(line.contains(codes::BAD_REQUEST), "{line}");
        }
        // The server may hang up before it has read everything.
        drop(raw.write_all(&vec![b'x'; 2 * MAX_LINE_BYTES as usize]));
        let mut rest = String::new();
        drop(reader.read_to_string(&mut rest));
        assert!(rest.is_empty() || rest.contains("longer than"), "{rest}");
    }

    #[test]
    fn a_handler_that_panics_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::start(dir.path(), "vm", Arc::new(Echo)).unwrap();
        let mut client = Client::connect(server.path()).unwrap();
        assert!(client.request(&Request::Stop, |_| ()).is_err());
        let done = |clients: &mut Clients| clients.answering > 0 || !clients.streams.is_empty();
        let clients = server.shared.clients();
        let (clients, _) = server.shared.changed.wait_timeout_while(clients, LINGER, done).unwrap();
        assert_eq!((clients.answering, clients.streams.len()), (0, 0));
    }

    #[test]
    fn one_client_too_many_is_told_so() {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::start(dir.path(), "vm", Arc::new(Echo)).unwrap();
        let mut clients: Vec<_> = (0..MAX_CLIENTS).map(|_| Client::connect(server.path()).unwrap()).collect();
        for client in &mut clients {
            client.request(&Request::Status, |_| ()).unwrap();
        }
        let answer = Client::connect(server.path()).unwrap().receive().unwrap();
        assert!(matches!(answer, Event::Error { code, .. } if code == codes::BUSY));
    }
}
