//! Buffers that are used over and over.

use std::sync::Mutex;

use pagewarp_engine::flow::lock;

/// Buffers that are kept for further segments: each may have grown to a few MiB.
const MAX_SPARE: usize = 8;

/// The buffers of segments that have gone their way.
#[derive(Debug, Default)]
pub(crate) struct Spare<T> {
    parts: Mutex<Vec<Box<T>>>,
}

impl<T: Default> Spare<T> {
    /// Used ones if there are any, new ones otherwise.
    pub(crate) fn take(&self) -> Box<T> {
        lock(&self.parts).pop().unwrap_or_default()
    }

    /// They are not needed any more.
    pub(crate) fn give_back(&self, parts: Box<T>) {
        let mut spare = lock(&self.parts);
        if spare.len() < MAX_SPARE {
            spare.push(parts);
        }
    }
}
