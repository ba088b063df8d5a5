//! Bounded queues that behave as crossbeam's do, made of a lock and two conditions.

use std::collections::VecDeque;
use std::fmt::{self, Debug, Formatter};

use super::time::Duration;
use super::{Arc, Condvar, Defect, LOOK, Mutex, MutexGuard, PoisonError, is_broken};

/// Nothing came in time, or nothing will.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecvTimeoutError {
    /// In time.
    Timeout,
    /// Ever: it is empty, and nobody can fill it.
    Disconnected,
}

/// What was not taken, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendTimeoutError<T> {
    /// There was no room in time.
    Timeout(T),
    /// Nobody can take it.
    Disconnected(T),
}

struct State<T> {
    items: VecDeque<T>,
    room: usize,
    senders: usize,
    receivers: usize,
}

struct Queue<T> {
    state: Mutex<State<T>>,
    more: Condvar,
    less: Condvar,
}

impl<T> Queue<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The end that fills.
pub struct Sender<T>(Arc<Queue<T>>);
/// The end that takes.
pub struct Receiver<T>(Arc<Queue<T>>);

/// A queue with room for so many.
pub fn bounded<T>(room: usize) -> (Sender<T>, Receiver<T>) {
    let state = State { items: VecDeque::new(), room, senders: 1, receivers: 1 };
    let queue = Arc::new(Queue { state: Mutex::new(state), more: Condvar::new(), less: Condvar::new() });
    (Sender(queue.clone()), Receiver(queue))
}

impl<T> Sender<T> {
    /// Waits for room, for so long.
    pub fn send_timeout(&self, item: T, time: Duration) -> Result<(), SendTimeoutError<T>> {
        let mut state = self.0.lock();
        loop {
            if state.receivers == 0 {
                return Err(SendTimeoutError::Disconnected(item));
            }
            if state.items.len() < state.room {
                state.items.push_back(item);
                self.0.more.notify_all();
                return Ok(());
            }
            let (back, is_late) =
                self.0.less.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner);
            if is_late {
                return Err(SendTimeoutError::Timeout(item));
            }
            state = back;
        }
    }

    /// Fills it if there is room.
    pub fn try_send(&self, item: T) -> Result<(), T> {
        let mut state = self.0.lock();
        if state.receivers == 0 || state.items.len() == state.room {
            return Err(item);
        }
        state.items.push_back(item);
        self.0.more.notify_all();
        Ok(())
    }
}

impl<T> Receiver<T> {
    /// Waits for an item, for so long.
    pub fn recv_timeout(&self, time: Duration) -> Result<T, RecvTimeoutError> {
        let mut state = self.0.lock();
        loop {
            if let Some(item) = state.items.pop_front() {
                self.0.less.notify_all();
                return Ok(item);
            }
            if state.senders == 0 {
                return Err(RecvTimeoutError::Disconnected);
            }
            if time < LOOK {
                drop(state);
                super::thread::sleep(time);
                return Err(RecvTimeoutError::Timeout);
            }
            let (back, is_late) =
                self.0.more.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner);
            if is_late {
                return Err(RecvTimeoutError::Timeout);
            }
            state = back;
        }
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Sender<T> {
        self.0.lock().senders += 1;
        Sender(self.0.clone())
    }
}

impl<T> Clone for Receiver<T> {
    fn clone(&self) -> Receiver<T> {
        self.0.lock().receivers += 1;
        Receiver(self.0.clone())
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        self.0.lock().senders -= 1;
        if !is_broken(Defect::SilentEnd) {
            self.0.more.notify_all();
        }
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        self.0.lock().receivers -= 1;
        self.0.less.notify_all();
    }
}

impl<T> Debug for Sender<T> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("Sender")
    }
}

impl<T> Debug for Receiver<T> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("Receiver")
    }
}
