//! How much of a session may be in the memory of this process, whatever the source sends.

use std::collections::HashMap;

use pagewarp_engine::flow::{Flow, Stopped, lock};
use pagewarp_engine::sync::{Condvar, Mutex};

/// Memory for segments of one connection. A source that keeps to its window stays below.
const MAX_CONNECTION: usize = 64 << 20;
/// Memory for segments of all connections together.
const MAX_SESSION: usize = 128 << 20;

/// The memory of segments between their arrival and their last byte in QEMU.
///
/// A connection that has no segment here may always have one: others may wait for it, and must not keep the place that it needs. So the limit may be exceeded by a
/// segment per connection, and no more.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    held: Mutex<Held>,
    less: Condvar,
}

#[derive(Debug, Default)]
struct Held {
    all: usize,
    by: HashMap<u16, usize>,
}

impl Held {
    fn has_room(&self, connection: u16, bytes: usize) -> bool {
        let own = self.by.get(&connection).copied().unwrap_or(0);
        own == 0 || (own + bytes <= MAX_CONNECTION && self.all + bytes <= MAX_SESSION)
    }
}

impl Memory {
    /// Waits until there is room for a segment of `bytes`, and takes it.
    pub(crate) fn hold(&self, connection: u16, bytes: usize, flow: &Flow) -> Result<(), Stopped> {
        let mut held = flow.wait(&self.held, &self.less, |held| held.has_room(connection, bytes))?;
        held.all += bytes;
        *held.by.entry(connection).or_default() += bytes;
        Ok(())
    }

    /// Gives the room of a segment back.
    pub(crate) fn release(&self, connection: u16, bytes: usize) {
        let mut held = lock(&self.held);
        held.all -= bytes;
        *held.by.entry(connection).or_default() -= bytes;
        drop(held);
        self.less.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_limit_for_each_and_for_all_and_always_room_for_a_first_segment() {
        const SEGMENT: usize = 4 << 20;
        let mut held = Held::default();
        let mut hold = |connection: u16| {
            let fits = held.has_room(connection, SEGMENT);
            if fits {
                held.all += SEGMENT;
                *held.by.entry(connection).or_default() += SEGMENT;
            }
            fits
        };
        assert_eq!((0..100).filter(|_| hold(0)).count(), MAX_CONNECTION / SEGMENT);
        for connection in 1..20 {
            while hold(connection) {}
        }
        // Those that came too late for the limit of all have one each.
        let late = 20 - MAX_SESSION / MAX_CONNECTION;
        assert_eq!(held.all, MAX_SESSION + late * SEGMENT);
    }
}
