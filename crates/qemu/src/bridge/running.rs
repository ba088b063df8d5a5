//! The running hash of a stream: of all its bytes so far.

use xxhash_rust::xxh3::Xxh3;

/// XXH3-64 of what a connection of QEMU has carried.
pub(crate) struct Running {
    hash: Xxh3,
    bytes: u64,
}

impl Running {
    /// Of nothing yet.
    pub(crate) fn new() -> Running {
        Running { hash: Xxh3::new(), bytes: 0 }
    }

    /// The stream goes on with these bytes.
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
    }

    /// How many bytes there were, and their hash.
    pub(crate) fn mark(&self) -> Mark {
        Mark { bytes: self.bytes, hash: self.hash.digest() }
    }
}

/// How far a stream is, and what it was up to there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mark {
    pub(crate) bytes: u64,
    pub(crate) hash: u64,
}
