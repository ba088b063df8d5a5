//! Reads the migration stream of QEMU, to find the pages in it.
//!
//! Source of the format: QEMU's `migration/savevm.c`, `migration/ram.c` and `migration/multifd.c` of versions 6.2 to 10.2.

mod command;
mod cursor;
mod main;
mod multifd;
mod ram;
mod reader;
mod resync;
mod sections;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

pub use reader::{ConnectionKind, Limits, Stop, StreamReader};

/// Numbers for the names of RAM blocks, the same on all connections of a migration.
#[derive(Clone, Debug, Default)]
pub struct Blocks {
    numbers: Arc<Mutex<HashMap<Vec<u8>, u32>>>,
}

impl Blocks {
    /// More blocks than any VM has: pages of others are not tracked.
    const MAX: usize = 4096;

    /// The number of the block of this name.
    pub fn number(&self, name: &[u8]) -> Option<u32> {
        let mut numbers = self.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&number) = numbers.get(name) {
            return Some(number);
        }
        let next = numbers.len();
        (next < Blocks::MAX).then(|| {
            numbers.insert(name.to_vec(), next as u32);
            next as u32
        })
    }
}
