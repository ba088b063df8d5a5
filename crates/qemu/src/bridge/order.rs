//! Which segments are done, for those that use a history slot after them.

use std::collections::{BTreeSet, HashMap};

use pagewarp_engine::flow::{Flow, Stopped, lock};
use pagewarp_engine::sync::{Condvar, Mutex};

use crate::protocol::meta::After;

/// The segments of a session that are done, connection by connection.
#[derive(Debug, Default)]
pub(crate) struct Order {
    connections: Mutex<HashMap<u16, Done>>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Done {
    /// All segments before this one are done.
    before: u64,
    /// Others that are.
    beyond: BTreeSet<u64>,
}

impl Order {
    /// This segment is done.
    pub(crate) fn done(&self, connection: u16, segment: u64) {
        let mut connections = lock(&self.connections);
        let done = connections.entry(connection).or_default();
        done.beyond.insert(segment);
        while done.beyond.remove(&done.before) {
            done.before += 1;
        }
        drop(connections);
        self.changed.notify_all();
    }

    /// Whether all these segments, and those before them on their connections, are done.
    pub(crate) fn are_done(&self, after: &[After]) -> bool {
        are_done(&lock(&self.connections), after)
    }

    /// Waits until they are, or finds out that it should stop.
    pub(crate) fn wait(&self, after: &[After], flow: &Flow) -> Result<(), Stopped> {
        flow.wait(&self.connections, &self.changed, |connections| are_done(connections, after)).map(drop)
    }
}

fn are_done(connections: &HashMap<u16, Done>, after: &[After]) -> bool {
    after
        .iter()
        .all(|after| connections.get(&after.connection).is_some_and(|done| after.segment < done.before))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_counts_once_all_before_it_are_done() {
        let order = Order::default();
        let after = [After { connection: 3, segment: 1 }];
        assert!(order.are_done(&[]));
        order.done(3, 1);
        order.done(2, 0);
        assert!(!order.are_done(&after), "segment 0 is missing");
        order.done(3, 0);
        assert!(order.are_done(&after));
        assert!(!order.are_done(&[after[0], After { connection: 2, segment: 1 }]));
    }
}
