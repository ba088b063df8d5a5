//! A handle on a migration for other threads: watch it, cancel it.

use crate::report::Progress;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Arc, Mutex, PoisonError};

/// Watches and cancels one migration. Clones share the same migration.
#[derive(Clone, Debug, Default)]
pub struct MigrationControl {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    cancelled: AtomicBool,
    progress: Mutex<Progress>,
}

impl MigrationControl {
    /// A handle for a migration that has not started.
    pub fn new() -> MigrationControl {
        MigrationControl::default()
    }

    /// Asks the migration to stop. Takes effect within a fraction of a second, unless the right to run the VM has been
    /// given away already: then the migration is finished instead.
    pub fn cancel(&self) {
        self.shared.cancelled.store(true, Ordering::Release);
    }

    /// Whether somebody asked.
    pub fn is_cancelled(&self) -> bool {
        self.shared.cancelled.load(Ordering::Acquire)
    }

    /// Where the migration is.
    pub fn progress(&self) -> Progress {
        self.shared.progress.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes what `progress` tells: for whoever carries the migration out.
    pub fn update(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.shared.progress.lock().unwrap_or_else(PoisonError::into_inner));
    }
}
