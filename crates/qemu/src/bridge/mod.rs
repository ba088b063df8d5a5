//! The bridge: threads and sockets around the pure parts of this crate.
//!
//! ```text
//! source       per QEMU connection: copy (read, take apart) ─▶ shared: serialize ─▶ per connection: send, and the way back
//! destination  per connection: receive ─▶ shared: deserialize ─▶ per connection: restore (rebuild, write), and the way back
//! ```

use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

mod config;
pub(crate) mod destination;
pub(crate) mod link;
mod order;
mod outbox;
mod report;
pub(crate) mod source;

pub use config::{BridgeConfig, Compression};
pub use destination::DestinationBridge;
pub use report::{DestinationBridgeReport, LevelReport, SourceBridgeReport};
pub use source::SourceBridge;

/// Listens on a Unix socket at `path`, for this user alone. A socket that nobody listens on any more is replaced.
fn listen(path: &Path) -> io::Result<UnixListener> {
    if is_abandoned(path) {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    // A connection may be gone again between poll and accept, which must not block then.
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn is_abandoned(path: &Path) -> bool {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    is_socket && UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
}
