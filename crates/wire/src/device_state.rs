//! The device state: one opaque piece of bytes, in chunks.

use xxhash_rust::xxh3::xxh3_64;

use crate::error::{WireError, at_most, malformed};
use crate::limits::{MAX_STATE_CHUNK, MAX_STATE_LEN};
use crate::message::Message;

/// The hash of a device state: XXH3-64.
pub fn state_hash(state: &[u8]) -> u64 {
    xxh3_64(state)
}

/// The messages that carry `state`: its pieces and the end. A state of no bytes has no pieces.
pub fn state_messages(state: &[u8]) -> impl Iterator<Item = Message> {
    let total_len = state.len() as u64;
    let piece = move |(i, bytes): (usize, &[u8])| Message::DeviceState {
        total_len,
        offset: (i * MAX_STATE_CHUNK) as u64,
        bytes: bytes.to_vec(),
    };
    let end = Message::StateEnd { len: total_len, xxh3: state_hash(state) };
    state.chunks(MAX_STATE_CHUNK).enumerate().map(piece).chain([end])
}

/// Puts the pieces together at the destination. Memory grows with what has arrived, not with what was announced.
#[derive(Debug)]
pub struct StateAssembler {
    limit: u64,
    bytes: Vec<u8>,
}

impl StateAssembler {
    /// For a state of at most `limit` bytes.
    pub fn new(limit: u64) -> StateAssembler {
        StateAssembler { limit: limit.min(MAX_STATE_LEN), bytes: Vec::new() }
    }

    /// Takes the next piece, the fields of a [`Message::DeviceState`].
    ///
    /// # Errors
    /// If it is not the next one or the state gets too large.
    pub fn piece(&mut self, total_len: u64, offset: u64, bytes: &[u8]) -> Result<(), WireError> {
        at_most("the device state", total_len, self.limit)?;
        if offset != self.bytes.len() as u64 {
            return Err(malformed("offset of a piece of device state", offset, self.bytes.len()));
        }
        at_most("the end of a piece of device state", offset.saturating_add(bytes.len() as u64), total_len)?;
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    /// The whole state, checked against the fields of a [`Message::StateEnd`].
    ///
    /// # Errors
    /// If bytes are missing or differ.
    pub fn finish(self, len: u64, xxh3: u64) -> Result<Vec<u8>, WireError> {
        if self.bytes.len() as u64 != len {
            return Err(malformed("length of the device state", len, self.bytes.len()));
        }
        let seen = state_hash(&self.bytes);
        if seen != xxh3 {
            return Err(WireError::Checksum { what: "the device state", seen, expected: xxh3 });
        }
        Ok(self.bytes)
    }
}

/// How much of the device state has passed a state machine, which keeps no bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct StateProgress {
    passed: u64,
    total: Option<u64>,
    end: Option<(u64, u64)>,
}

impl StateProgress {
    /// A piece passes.
    pub(crate) fn piece(&mut self, total_len: u64, offset: u64, len: u64) -> Result<(), WireError> {
        if self.end.is_some() {
            return Err(malformed("a piece of device state", "one after StateEnd", "none"));
        }
        if *self.total.get_or_insert(total_len) != total_len {
            return Err(malformed("length of the device state", total_len, "the same in all pieces"));
        }
        if offset != self.passed {
            return Err(malformed("offset of a piece of device state", offset, self.passed));
        }
        self.passed += len;
        Ok(())
    }

    /// The end passes.
    pub(crate) fn end(&mut self, len: u64, xxh3: u64) -> Result<(), WireError> {
        if self.end.is_some() {
            return Err(malformed("StateEnd", "a second one", "one"));
        }
        if len != self.passed || self.total.is_some_and(|total| total != len) {
            let expected =
                format_args!("{}, of {} announced", self.passed, self.total.unwrap_or(0)).to_string();
            return Err(malformed("length of the device state", len, expected));
        }
        self.end = Some((len, xxh3));
        Ok(())
    }

    /// `Prepare` passes: it must say the same as the end.
    pub(crate) fn prepare(&self, len: u64, xxh3: u64) -> Result<(), WireError> {
        match self.end {
            Some(end) if end == (len, xxh3) => Ok(()),
            Some(_) => {
                Err(malformed("device state in Prepare", "another length or hash", "those of StateEnd"))
            }
            None => Err(malformed("Prepare", "no StateEnd before it", "StateEnd first")),
        }
    }
}
