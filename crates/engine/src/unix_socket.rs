//! Unix sockets that nobody else can use, from their first moment on.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::fs::{Mode, fchmod};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};

/// As many as the standard library lets wait.
const BACKLOG: i32 = 128;

/// Makes a socket that only this user (and root) can connect to, mode 0600, and listens there.
///
/// The file never has another mode, whatever the umask is: Linux gives it the mode of the socket, which is set before there is a file. A change of the
/// mode afterwards would leave a moment for others, and a change of the umask would be for all threads.
///
/// # Errors
///
/// Those of [`UnixListener::bind`].
pub fn bind_private(path: &Path) -> io::Result<UnixListener> {
    let address = SocketAddrUnix::new(path)?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &address)?;
    listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// The umask is the process's, and other tests make files. Therefore this looks at what no umask takes away, in a process of its own.
    #[test]
    fn a_socket_is_private_whatever_the_umask() {
        const CHILD: &str = "PAGEWARP_TEST_PRIVATE_SOCKET";
        let Some(path) = std::env::var_os(CHILD) else {
            let dir = tempfile::tempdir().unwrap();
            let status = std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "unix_socket::tests::a_socket_is_private_whatever_the_umask"])
                .env(CHILD, dir.path().join("socket"))
                .stdout(std::process::Stdio::null())
                .status()
                .unwrap();
            assert!(status.success(), "{status}");
            return;
        };
        rustix::process::umask(Mode::empty());
        let path = Path::new(&path);
        let listener = bind_private(path).unwrap();
        assert_eq!(std::fs::symlink_metadata(path).unwrap().mode() & 0o7777, 0o600);
        let _near = UnixStream::connect(path).unwrap();
        listener.accept().unwrap();
        assert_eq!(bind_private(path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }
}
