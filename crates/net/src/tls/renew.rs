//! Files that change while this host uses what was in them.
//!
//! Certificates are renewed, and a process that waits for migrations for months must not have to be started again for that. Files are read anew only between
//! migrations: the other end holds all connections of a migration to one certificate.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use tracing::{info, warn};

use super::config::TlsError;

/// What the system says of some files: another time, size or place if they are others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Stamp(Vec<Option<[i64; 6]>>);

impl Stamp {
    /// Of these files of a directory. One that cannot be looked at is none.
    pub(super) fn of(dir: &Path, names: &[&str]) -> Stamp {
        let stamp = |name: &&str| {
            let seen = fs::metadata(dir.join(name)).ok()?;
            let (modified, changed) = ((seen.mtime(), seen.mtime_nsec()), (seen.ctime(), seen.ctime_nsec()));
            Some([modified.0, modified.1, changed.0, changed.1, seen.ino() as i64, seen.size() as i64])
        };
        Stamp(names.iter().map(stamp).collect())
    }
}

/// What was read from files.
pub(super) trait FromFiles: Sized {
    /// Where they are.
    fn dir(&self) -> &Path;
    /// As they were before they were read.
    fn stamp(&mut self) -> &mut Stamp;
    /// As they are now.
    fn stamp_now(&self) -> Stamp;
    /// Reads them.
    fn read_again(&self) -> Result<Self, TlsError>;

    /// Reads the files again if they are others than before. Those that cannot be used are left alone, until they change once more: they may be just being written.
    fn renew(&mut self) {
        let now = self.stamp_now();
        if now == *self.stamp() {
            return;
        }
        match self.read_again() {
            Ok(read) => {
                *self = read;
                info!(
                    "the certificates in `{}` have changed, and are used from now on",
                    self.dir().display()
                );
            }
            Err(error) => {
                warn!(
                    "the certificates in `{}` have changed and cannot be used; those from before stay in use: {error}",
                    self.dir().display()
                );
                *self.stamp() = now;
            }
        }
    }
}
