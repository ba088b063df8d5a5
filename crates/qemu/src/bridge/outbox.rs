//! Puts what several threads finish back into the order of a connection.

use std::collections::BTreeMap;

use pagewarp_engine::flow::{Flow, Stopped, lock};
use pagewarp_engine::sync::time::{Duration, Instant};
use pagewarp_engine::sync::{Condvar, Mutex};

/// Items of one connection, numbered from 0, that are finished in any order and taken in order.
#[derive(Debug)]
pub(crate) struct Outbox<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

#[derive(Debug)]
struct State<T> {
    ready: BTreeMap<u64, T>,
    next: u64,
    /// The number after the last item, once that is known.
    end: Option<u64>,
}

/// What there is to take.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next<T> {
    /// The next item.
    Item(T),
    /// There will be no more.
    End,
    /// Nothing came in time.
    Nothing,
}

impl<T> Outbox<T> {
    pub(crate) fn new() -> Outbox<T> {
        Outbox {
            state: Mutex::new(State { ready: BTreeMap::new(), next: 0, end: None }),
            changed: Condvar::new(),
        }
    }

    /// Item `number` is finished.
    pub(crate) fn put(&self, number: u64, item: T) {
        lock(&self.state).ready.insert(number, item);
        self.changed.notify_all();
    }

    /// Whether there is an item that nobody has taken: one more would have to wait.
    pub(crate) fn is_behind(&self) -> bool {
        !lock(&self.state).ready.is_empty()
    }

    /// There are `count` items in all.
    pub(crate) fn end(&self, count: u64) {
        lock(&self.state).end = Some(count);
        self.changed.notify_all();
    }

    /// Waits for the next item, at most until `until`, or finds out that it should stop.
    pub(crate) fn take(&self, until: Option<Instant>, flow: &Flow) -> Result<Next<T>, Stopped> {
        let late = || until.is_some_and(|until| Instant::now() >= until);
        let mut state = flow.wait(&self.state, &self.changed, |state| state.is_due() || late())?;
        let next = state.next;
        match state.ready.remove(&next) {
            Some(item) => {
                state.next += 1;
                Ok(Next::Item(item))
            }
            None if state.end == Some(next) => Ok(Next::End),
            None => Ok(Next::Nothing),
        }
    }
}

impl<T> State<T> {
    fn is_due(&self) -> bool {
        self.ready.contains_key(&self.next) || self.end == Some(self.next)
    }
}

/// The instant after this time.
pub(crate) fn within(time: Duration) -> Option<Instant> {
    Some(Instant::now() + time)
}

#[cfg(test)]
mod tests {
    use pagewarp_engine::control::MigrationControl;

    use super::*;

    #[test]
    fn items_come_out_in_order() {
        let (outbox, flow) = (Outbox::new(), Flow::new(MigrationControl::new()));
        outbox.put(1, "b");
        assert_eq!(outbox.take(within(Duration::ZERO), &flow), Ok(Next::Nothing));
        outbox.put(0, "a");
        assert_eq!(outbox.take(None, &flow), Ok(Next::Item("a")));
        outbox.end(2);
        assert_eq!(outbox.take(None, &flow), Ok(Next::Item("b")));
        assert_eq!(outbox.take(None, &flow), Ok(Next::End));
    }
}
