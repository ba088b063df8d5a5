//! The control connection of either end: every message passes the state machine.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use pagewarp_wire::{DestinationState, Message, SourceState, WireError};

use crate::error::MigrationError;
use crate::flow::lock;
use crate::link::{MessageWriter, own_error, peer_error};

/// The state machine of one end.
pub(crate) trait Machine {
    /// `message` is about to be sent.
    fn on_send(&mut self, message: &Message) -> Result<(), WireError>;
    /// `message` came.
    fn on_receive(&mut self, message: &Message) -> Result<(), WireError>;
}

impl Machine for SourceState {
    fn on_send(&mut self, message: &Message) -> Result<(), WireError> {
        SourceState::on_send(self, message)
    }

    fn on_receive(&mut self, message: &Message) -> Result<(), WireError> {
        SourceState::on_receive(self, message)
    }
}

impl Machine for DestinationState {
    fn on_send(&mut self, message: &Message) -> Result<(), WireError> {
        DestinationState::on_send(self, message)
    }

    fn on_receive(&mut self, message: &Message) -> Result<(), WireError> {
        DestinationState::on_receive(self, message)
    }
}

/// The control connection and the state machine of this end.
pub(crate) struct Channel<'a, S> {
    state: Mutex<S>,
    writer: MessageWriter<'a>,
    /// Whether a `Pong` could not be sent.
    unheard: AtomicBool,
}

impl<'a, S: Machine> Channel<'a, S> {
    pub(crate) fn new(state: S, writer: MessageWriter<'a>) -> Channel<'a, S> {
        Channel { state: Mutex::new(state), writer, unheard: AtomicBool::new(false) }
    }

    /// Sends a message if the protocol allows it now.
    pub(crate) fn send(&self, message: &Message) -> Result<(), MigrationError> {
        self.writer.send_if(message, || lock(&self.state).on_send(message).map_err(own_error))
    }

    /// Answers a `Ping`. That this fails is no error the first time: if the peer has gone and said why, that is still to be read, and if it
    /// has not, reading fails too.
    pub(crate) fn pong(&self, id: u64) -> Result<(), MigrationError> {
        match self.send(&Message::Pong { id }) {
            Err(MigrationError::Link { .. }) if !self.unheard.swap(true, Ordering::Relaxed) => Ok(()),
            sent => sent,
        }
    }

    /// Checks that the peer may say this now.
    pub(crate) fn received(&self, message: &Message) -> Result<(), MigrationError> {
        lock(&self.state).on_receive(message).map_err(peer_error)
    }

    /// Changes the state without a message.
    pub(crate) fn with_state<T>(&self, change: impl FnOnce(&mut S) -> T) -> T {
        change(&mut lock(&self.state))
    }

    /// Sends a message if `check`, which sees the state, agrees.
    pub(crate) fn send_checked(
        &self,
        message: &Message,
        check: impl FnOnce(&mut S) -> Result<(), MigrationError>,
    ) -> Result<(), MigrationError> {
        self.writer.send_if(message, || check(&mut lock(&self.state)))
    }
}
