//! The directory of the control sockets: `NAME.sock` for each VM, and `NAME.lock`, which its process holds.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use pagewarp_engine::unix_socket::bind_private;
use rustix::fs::{FlockOperation, flock};

use crate::config::check_name;
use crate::error::Error;

const SOCKET: &str = "sock";
const LOCK: &str = "lock";

/// The directory: `asked` for, else `$PAGEWARP_RUN_DIR`, else `$XDG_RUNTIME_DIR/pagewarp`, else `/run/pagewarp` for root and
/// `/tmp/pagewarp-UID` for others. It need not exist.
pub fn run_dir(asked: Option<PathBuf>) -> PathBuf {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let uid = rustix::process::getuid();
    asked
        .or_else(|| variable("PAGEWARP_RUN_DIR"))
        .or_else(|| Some(variable("XDG_RUNTIME_DIR")?.join("pagewarp")))
        .unwrap_or_else(|| {
            if uid.is_root() {
                "/run/pagewarp".into()
            } else {
                format!("/tmp/pagewarp-{}", uid.as_raw()).into()
            }
        })
}

/// Where the control socket of the VM of this name is. Fails if the name cannot be one.
pub fn socket_path(run_dir: &Path, name: &str) -> Result<PathBuf, Error> {
    check_name(name)?;
    Ok(run_dir.join(format!("{name}.{SOCKET}")))
}

/// The names of the VMs with a socket in `run_dir`, in order. Some of their processes may have died.
pub fn list(run_dir: &Path) -> io::Result<Vec<String>> {
    let entries = match std::fs::read_dir(run_dir) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names = Vec::new();
    for entry in entries {
        if let Ok(file) = entry?.file_name().into_string()
            && let Some(name) = file.strip_suffix(SOCKET).and_then(|f| f.strip_suffix('.'))
        {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// A name that this process has taken, and its socket. Dropping it removes the socket and frees the name.
#[derive(Debug)]
pub(crate) struct Taken {
    pub listener: UnixListener,
    pub path: PathBuf,
    /// Locked for as long as the name is taken; the system unlocks it when the process dies, however it does.
    _lock: File,
}

impl Drop for Taken {
    fn drop(&mut self) {
        if let Err(e) = std::fs::remove_file(&self.path) {
            tracing::warn!("cannot remove {}: {e}", self.path.display());
        }
    }
}

/// Takes `name`, unless a living process has it, and binds its socket, which only this user can open.
pub(crate) fn take(run_dir: &Path, name: &str) -> Result<Taken, Error> {
    let path = socket_path(run_dir, name)?;
    let failed = |what, path: &Path| {
        let path = path.to_owned();
        move |source| Error::File { what, path, source }
    };
    prepare(run_dir)?;
    let lock_path = run_dir.join(format!("{name}.{LOCK}"));
    let lock = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(false)
        .mode(0o600)
        .open(&lock_path)
        .map_err(failed("lock file", &lock_path))?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            return Err(Error::NameTaken(name.to_owned()));
        }
        Err(e) => return Err(failed("lock file", &lock_path)(e.into())),
    }
    // With the lock held, a socket that is still there was left by a process that died.
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != ErrorKind::NotFound => return Err(failed("control socket", &path)(e)),
        _ => {}
    }
    let listener = bind_private(&path).map_err(failed("control socket", &path))?;
    Ok(Taken { listener, path, _lock: lock })
}

/// Makes the directory, and refuses one that somebody else could put files into.
fn prepare(run_dir: &Path) -> Result<(), Error> {
    let failed = |source| Error::File { what: "run directory", path: run_dir.to_owned(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(run_dir).map_err(failed)?;
    let metadata = std::fs::symlink_metadata(run_dir).map_err(failed)?;
    let own = metadata.uid() == rustix::process::getuid().as_raw();
    if !metadata.is_dir() || !own || metadata.mode() & 0o022 != 0 {
        return Err(Error::Config(format!(
            "run directory {}: expected a directory that is yours and that only you can write to (chmod go-w)",
            run_dir.display()
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_name_is_taken_once_and_a_dead_processs_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let run_dir = dir.path().join("run");
        let first = take(&run_dir, "vm").unwrap();
        for (path, mode) in [(&run_dir, 0o700), (&first.path, 0o600), (&run_dir.join("vm.lock"), 0o600)] {
            assert_eq!(std::fs::metadata(path).unwrap().mode() & 0o777, mode, "{}", path.display());
        }
        assert!(take(&run_dir, "vm").unwrap_err().to_string().contains("runs already"));
        assert_eq!(list(&run_dir).unwrap(), ["vm"]);
        drop(first);
        assert!(list(&run_dir).unwrap().is_empty());
        // A socket that nobody listens to.
        drop(UnixListener::bind(socket_path(&run_dir, "vm").unwrap()).unwrap());
        assert_eq!(list(&run_dir).unwrap(), ["vm"]);
        drop(take(&run_dir, "vm").unwrap());
    }

    #[test]
    fn a_directory_that_others_can_write_to_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), Permissions::from_mode(0o777)).unwrap();
        assert!(take(dir.path(), "vm").unwrap_err().to_string().contains("only you can write"));
        assert!(take(dir.path(), "../vm").is_err());
    }
}
