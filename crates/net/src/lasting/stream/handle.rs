//! A lasting connection, seen by those who read and write it.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use pagewarp_engine::flow::lock;
use pagewarp_engine::transport::Stream;

use super::{Inner, Status};
use crate::lasting::DETECT;

/// A handle to a lasting connection.
pub(in crate::lasting) struct LastingStream {
    shared: Arc<Shared>,
}

/// What all handles have in common; the last one closes the connection.
struct Shared {
    inner: Arc<Inner>,
    /// Hears, each time that it is closed, whether the other end was told that it is over.
    closed: Box<dyn Fn(bool) + Send + Sync>,
}

impl Shared {
    fn close(&self, in_order: bool) {
        (self.closed)(self.inner.close(in_order));
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.close(true);
    }
}

impl LastingStream {
    pub(in crate::lasting) fn new(
        inner: Arc<Inner>,
        closed: impl Fn(bool) + Send + Sync + 'static,
    ) -> LastingStream {
        LastingStream { shared: Arc::new(Shared { inner, closed: Box::new(closed) }) }
    }

    fn inner(&self) -> &Inner {
        &self.shared.inner
    }
}

impl Read for LastingStream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.inner().read(&mut [IoSliceMut::new(bytes)])
    }

    fn read_vectored(&mut self, bytes: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.inner().read(bytes)
    }
}

impl Write for LastingStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.inner().write(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, bytes: &[IoSlice<'_>]) -> io::Result<usize> {
        self.inner().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for LastingStream {
    fn try_clone_stream(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(LastingStream { shared: self.shared.clone() }))
    }

    fn shutdown(&self) -> io::Result<()> {
        self.shared.close(true);
        Ok(())
    }

    fn reset(&self) -> io::Result<()> {
        self.shared.close(false);
        Ok(())
    }

    fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> io::Result<()> {
        let mut state = lock(&self.inner().state);
        (state.read_timeout, state.write_timeout) = (read, write);
        match state.status {
            Status::Up => state.below.set_timeouts(read, write),
            // The next one gets them.
            _ => Ok(()),
        }
    }

    fn detect_death(&self, within: Duration) -> io::Result<()> {
        let state = lock(&self.inner().state);
        match state.status {
            Status::Up => state.below.detect_death(within.min(DETECT)),
            _ => Ok(()),
        }
    }

    fn is_hung_up(&self) -> bool {
        self.inner().is_hung_up()
    }

    fn wait_readable(&self, timeout: Duration) -> io::Result<bool> {
        let inner = self.inner();
        // Somebody reads already, and so would this one have to wait for him.
        let Ok(reading) = inner.reading.try_lock() else { return Ok(true) };
        if !reading.inbox.is_empty() || inner.ended.load(SeqCst) || inner.check().is_err() {
            return Ok(true);
        }
        reading.below.wait_readable(timeout)
    }

    fn peer_identity(&self) -> Option<Arc<str>> {
        self.inner().identity.clone()
    }

    fn round_trip(&self) -> Option<Duration> {
        self.inner().round_trip
    }
}
