//! Connections between hosts, as the command line wants them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Error, Result};
use pagewarp_engine::transport::{Acceptor, Connector, TcpAcceptor, TcpConnector};
use pagewarp_kvm::runtime::{ConnectRequest, NoConnector};
use pagewarp_net::lasting::{DETECT, LastingAcceptor, LastingConnector};
use pagewarp_net::tls::{TlsAcceptor, TlsConnector, TlsDir, TlsError, host_of};

use crate::address::{Use, check};
use crate::args::{Admission, Encryption, Endurance, Expectation};
use crate::exit::{Exit, Failure, failure};
use crate::say;

/// How to reach the destination at `to`.
///
/// # Errors
///
/// The address may not be used, or what TLS needs is not there.
pub fn connector(
    to: &str,
    encryption: &Encryption,
    expectation: &Expectation,
    endurance: &Endurance,
    timeout: Duration,
) -> Result<Box<dyn Connector>> {
    let address = usable(to, Use::Connect, encryption)?;
    let tcp = TcpConnector { address, timeout };
    let patience = endurance.resume_timeout;
    let Some(dir) = &encryption.tls_dir else { return Ok(lasting(tcp, patience)) };
    let host = expectation.tls_hostname.as_deref().unwrap_or_else(|| host_of(to));
    Ok(lasting(TlsConnector::new(tcp, &TlsDir::new(dir), host).map_err(of_tls)?, patience))
}

/// Connections that outlast a loss of the network, if that is wanted.
fn lasting(connector: impl Connector + 'static, patience: Duration) -> Box<dyn Connector> {
    if patience.is_zero() {
        return Box::new(connector);
    }
    Box::new(LastingConnector::new(Arc::new(connector), patience))
}

/// The same for a VM's process, which was asked over its control socket.
///
/// # Errors
///
/// What TLS needs is not there.
pub fn connector_of_vm(request: &ConnectRequest<'_>) -> Result<Box<dyn Connector>, NoConnector> {
    let tcp = TcpConnector { address: request.address, timeout: request.timeout };
    let patience = request.resume_timeout;
    let Some(dir) = request.tls_dir else { return Ok(lasting(tcp, patience)) };
    let host = request.tls_hostname.unwrap_or_else(|| host_of(request.to));
    match TlsConnector::new(tcp, &TlsDir::new(dir), host) {
        Ok(connector) => Ok(lasting(connector, patience)),
        Err(error @ TlsError::Name(_)) => Err(NoConnector::Config(error.to_string())),
        Err(error) => Err(NoConnector::Unavailable(error.to_string())),
    }
}

/// Where the destination listens.
///
/// # Errors
///
/// The address may not be used or is in use, or what TLS needs is not there.
pub fn acceptor(
    listen: &str,
    encryption: &Encryption,
    admission: &Admission,
    endurance: &Endurance,
) -> Result<Box<dyn Acceptor>> {
    let address = usable(listen, Use::Listen, encryption)?;
    let tls = encryption.tls_dir.as_ref().map(|dir| TlsDir::new(dir).server(admission.allow_peer.clone()));
    let tls = tls.transpose().map_err(of_tls)?;
    let tcp = TcpAcceptor::bind(address).with_context(|| {
        let message =
            format!("cannot listen on {address}; choose another port or end the program that has it");
        Failure::new(Exit::Environment, message)
    })?;
    let acceptor: Box<dyn Acceptor> = match tls {
        Some(tls) => Box::new(TlsAcceptor::new(tcp, tls).context("cannot prepare for connections")?),
        None => Box::new(tcp),
    };
    let lasting = LastingAcceptor::new(acceptor, endurance.resume_timeout);
    Ok(Box::new(lasting.context("cannot prepare for connections")?))
}

/// Warns if a network that goes silent is going to be taken for a silent peer, before anybody notices that it could be waited for.
pub fn look_at_endurance(endurance: &Endurance, peer_timeout: Duration) {
    if !endurance.resume_timeout.is_zero() && peer_timeout <= DETECT {
        say!(
            "warning: with --peer-timeout {} a network that is silent for so long ends the migration, whatever --resume-timeout is; give more than {} s",
            peer_timeout.as_secs_f64(),
            DETECT.as_secs()
        );
    }
}

/// Resolves an address, and warns if memory is going to cross the network as it is.
///
/// # Errors
///
/// The address may not be used.
pub fn usable(text: &str, usage: Use, encryption: &Encryption) -> Result<SocketAddr> {
    let checked = check(text, usage, encryption)?;
    if checked.exposed {
        say!(
            "warning: guest memory crosses the network to or from {} unencrypted (--plaintext)",
            checked.address
        );
    }
    Ok(checked.address)
}

fn of_tls(error: TlsError) -> Error {
    let exit = if matches!(error, TlsError::Name(_)) { Exit::Usage } else { Exit::Environment };
    failure(exit, error.to_string())
}
