//! The VM processes of this host: found by name through their control sockets.

use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result, bail};
use pagewarp_kvm::control::{Client, Event, Request, socket_path};

use crate::exit::{Exit, Failure, failure, of_code};

/// A connection to a VM process.
#[derive(Debug)]
pub struct Vm {
    client: Client,
}

impl Vm {
    /// Connects to the VM of this name.
    pub fn open(run_dir: &Path, name: &str) -> Result<Vm> {
        let socket = socket_path(run_dir, name).map_err(|e| failure(Exit::Usage, e.to_string()))?;
        Vm::open_socket(&socket).with_context(|| format!("cannot reach `{name}`"))
    }

    /// Connects to the VM behind this socket.
    pub fn open_socket(socket: &Path) -> Result<Vm> {
        match Client::connect(socket) {
            Ok(client) => Ok(Vm { client }),
            // Refused: the file is there, the process is not.
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                bail!(failure(
                    Exit::NoSuchVm,
                    format!(
                        "no VM of that name runs here ({} does not answer); `pagewarp status` lists them",
                        socket.display()
                    )
                ))
            }
            Err(error) => {
                let message =
                    format!("cannot connect to {}; run as the user who started the VM", socket.display());
                Err(error).context(Failure::new(Exit::Environment, message))
            }
        }
    }

    /// Asks for one thing and waits for its answer; an error event becomes an error.
    pub fn ask(&mut self, request: &Request) -> Result<Event> {
        self.follow(request, |_| ())
    }

    /// Asks, hands all that comes before to `on_event`, and returns the event that ends the answer; an error event becomes an error.
    pub fn follow(&mut self, request: &Request, mut on_event: impl FnMut(&Event)) -> Result<Event> {
        self.client.send(request).context("cannot talk to the VM process")?;
        loop {
            match self.client.receive().context("the VM process went away without an answer")? {
                Event::Error { code, message } => bail!(failure(of_code(&code), message)),
                event if event.is_final() => return Ok(event),
                event => on_event(&event),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::exit_of;

    #[test]
    fn a_vm_that_is_not_there_has_its_own_exit_code() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(exit_of(&Vm::open(dir.path(), "nobody").unwrap_err()), Exit::NoSuchVm);
        // A socket whose process has died.
        drop(std::os::unix::net::UnixListener::bind(dir.path().join("dead.sock")).unwrap());
        assert_eq!(exit_of(&Vm::open(dir.path(), "dead").unwrap_err()), Exit::NoSuchVm);
    }

    #[test]
    fn a_name_that_leaves_the_directory_is_a_usage_error() {
        assert_eq!(exit_of(&Vm::open(Path::new("/run"), "../x").unwrap_err()), Exit::Usage);
    }
}
