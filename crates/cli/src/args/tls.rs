//! Options on encryption, the same for all commands that connect or listen.

use std::path::PathBuf;

use clap::Args;

/// Whether connections between hosts are encrypted.
#[derive(Clone, Debug, Default, Args)]
pub struct Encryption {
    /// Encrypt with TLS, with certificates on both sides: a directory with ca-cert.pem and, on the source, client-cert.pem and client-key.pem, on the destination
    /// server-cert.pem and server-key.pem. `pagewarp certs` makes a set
    #[arg(long, value_name = "DIR", conflicts_with = "plaintext")]
    pub tls_dir: Option<PathBuf>,
    /// Neither encrypt nor check who the other end is, also where the address is not loopback
    #[arg(long)]
    pub plaintext: bool,
}

/// What a source expects of the other end.
#[derive(Clone, Debug, Default, Args)]
pub struct Expectation {
    /// The name that the destination's certificate has to have, if it is not the host of the address
    #[arg(long, value_name = "NAME", requires = "tls_dir")]
    pub tls_hostname: Option<String>,
}

/// Whom a destination accepts.
#[derive(Clone, Debug, Default, Args)]
pub struct Admission {
    /// Accept only sources whose certificate has this DNS name or common name; may be given several times [default: all that the CA has signed]
    #[arg(long, value_name = "NAME", requires = "tls_dir")]
    pub allow_peer: Vec<String>,
}
