//! What can go wrong with a VM, by whose fault it is.

use std::io;
use std::path::PathBuf;

use pagewarp_engine::vm::VmError;
use thiserror::Error;

/// Why something could not be done.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// A value that cannot work.
    #[error("{0}")]
    Config(String),
    /// A name that another VM on this host has.
    #[error("name {0}: a VM of this name runs already; choose another, or stop it first")]
    NameTaken(String),
    /// A file that cannot be read or written.
    #[error("{what} {path}: {source}")]
    File {
        /// What it is.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The kernel image is not one that can be booted.
    #[error("kernel: {0}")]
    Kernel(String),
    /// This host cannot do it.
    #[error("{0}")]
    Host(String),
    /// A call of KVM that failed.
    #[error("KVM: {call} failed: {source}")]
    Kvm {
        /// The call.
        call: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// What the other host sent cannot be used here.
    #[error("{0}")]
    Peer(String),
    /// The VM is not in a state in which that can be done.
    #[error("{0}")]
    State(String),
}

impl Error {
    /// An error of a KVM call.
    pub(crate) fn kvm(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
        move |e| Error::Kvm { call, source: io::Error::from_raw_os_error(e.errno()) }
    }

    /// The engine's form, for its traits.
    pub(crate) fn in_vm(self, context: &str) -> VmError {
        VmError::new(context, self)
    }
}
