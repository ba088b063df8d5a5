//! The control connection: in order and without loss, until it breaks.

use std::collections::VecDeque;

use crate::letter::Letter;

/// What is below the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    /// A TCP connection. When it breaks, what had arrived can still be read, and everything else is lost.
    Plain,
    /// Keeps what it was not told to have arrived, and goes on from there over another connection.
    Reconnecting,
    /// The same with a defect: it sends again what it does not know to have arrived, and the receiver does not know it again.
    Repeating,
    /// The same with another defect: what was under way when the connection broke does not come again.
    Forgetting,
}

/// One direction.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Pipe {
    /// What was sent, without what is known to have arrived.
    kept: VecDeque<Letter>,
    /// How many of these have arrived.
    arrived: u8,
}

impl Pipe {
    pub(crate) fn push(&mut self, letter: Letter) {
        self.kept.push_back(letter);
    }

    /// Whether something can arrive.
    pub(crate) fn has_news(&self) -> bool {
        usize::from(self.arrived) < self.kept.len()
    }

    /// Whether the sender can be told that something has arrived.
    pub(crate) fn has_arrived(&self) -> bool {
        self.arrived > 0
    }

    /// The next letter arrives. A plain transport keeps nothing.
    pub(crate) fn arrive(&mut self, transport: Transport) -> Option<Letter> {
        if transport == Transport::Plain {
            return self.kept.pop_front();
        }
        let letter = *self.kept.get(usize::from(self.arrived))?;
        self.arrived += 1;
        Some(letter)
    }

    /// The sender is told what has arrived.
    pub(crate) fn acknowledge(&mut self) {
        self.kept.drain(..usize::from(self.arrived));
        self.arrived = 0;
    }

    /// There is a new connection below.
    pub(crate) fn resume(&mut self, transport: Transport) {
        match transport {
            Transport::Plain => unreachable!("a plain transport does not resume"),
            // The receiver says up to where it has read.
            Transport::Reconnecting => self.acknowledge(),
            Transport::Repeating => self.arrived = 0,
            Transport::Forgetting => *self = Pipe::default(),
        }
    }

    pub(crate) fn clear(&mut self) {
        *self = Pipe::default();
    }
}
