//! Waiting for a peer, but not for ever.

use std::io;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::transport::Stream;

/// How often it is looked whether anybody still wants what is waited for.
const LOOK: Duration = Duration::from_millis(50);

/// Does `work`, which waits for the peer at the other end of `stream`, and shuts the connection down when that takes until `until`, or when `is_wanted` says no.
/// `None`: that has happened, whatever the work came to.
///
/// Timeouts of reads do not bound it: each byte that a peer sends now and then begins a new one, and a connection that is being mended has none.
///
/// # Errors
///
/// The system has no descriptor or thread left.
pub fn within<T>(
    stream: &dyn Stream,
    until: Option<Instant>,
    is_wanted: &(dyn Fn() -> bool + Sync),
    work: impl FnOnce() -> T,
) -> io::Result<Option<T>> {
    let watched = stream.try_clone_stream()?;
    let (working, is_done) = channel::<()>();
    let watch = move || {
        loop {
            let left = until.map_or(LOOK, |until| until.saturating_duration_since(Instant::now()));
            if left.is_zero() || !is_wanted() {
                // A connection that is gone already needs no shutdown.
                let _ = watched.shutdown();
                return true;
            }
            if is_done.recv_timeout(left.min(LOOK)) != Err(RecvTimeoutError::Timeout) {
                return false;
            }
        }
    };
    thread::scope(|scope| {
        let watching = thread::Builder::new().name("patience".into()).spawn_scoped(scope, watch)?;
        let result = work();
        drop(working);
        // It cannot panic, unless `is_wanted` does.
        let was_ended = watching.join().unwrap_or(true);
        Ok((!was_ended).then_some(result))
    })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    #[test]
    fn neither_silence_nor_dripping_is_waited_for() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut far = listener.accept().unwrap().0;
        let mut handle = near.try_clone().unwrap();
        near.set_read_timeout(Some(PATIENCE)).unwrap();
        let is_over = AtomicBool::new(false);
        let start = Instant::now();
        thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(SeqCst) {
                    let _ = far.write_all(b"x");
                    thread::sleep(Duration::from_millis(20));
                }
            });
            let until = Some(start + Duration::from_millis(300));
            let read = within(&near, until, &|| true, || handle.read_to_end(&mut Vec::new())).unwrap();
            is_over.store(true, SeqCst);
            assert!(read.is_none());
        });
        assert!(start.elapsed() < PATIENCE / 2);
    }

    #[test]
    fn what_nobody_wants_is_not_waited_for() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut far = listener.accept().unwrap().0;
        let mut handle = near.try_clone().unwrap();
        far.write_all(b"x").unwrap();
        let read = within(&near, None, &|| true, || handle.read(&mut [0; 9]).unwrap()).unwrap();
        assert_eq!(read, Some(1));
        assert!(within(&near, None, &|| false, || handle.read(&mut [0])).unwrap().is_none());
    }
}
