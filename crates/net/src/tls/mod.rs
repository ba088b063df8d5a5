//! TLS 1.3 with certificates on both sides.
//!
//! A directory holds what a host needs, under the names that QEMU and libvirt use ([`TlsDir`]). The source is the TLS client, and checks that the certificate of the
//! destination is for the host that it wanted to reach; the destination takes certificates of its CA alone, and if told to only some of these. Both sides know before
//! a single byte of a migration is exchanged: [`TlsConnector::connect`](TlsConnector) returns once the destination has accepted the certificate of this host, and
//! [`TlsAcceptor::accept`](TlsAcceptor) only connections whose peer has proved who it is.
//!
//! There is no session resumption and no early data: a connection lasts for a migration, and a replayed byte would be one too many.

mod accept;
pub mod certs;
mod config;
mod connect;
mod explain;
pub(crate) mod fuzzing;
mod handshake;
mod identity;
mod renew;
mod stream;

pub use accept::TlsAcceptor;
pub use config::{FileNames, TlsDir, TlsError, TlsServer};
pub use connect::{TlsConnector, host_of};
