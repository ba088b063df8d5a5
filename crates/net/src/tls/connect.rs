//! The source's side.

use std::io;
use std::net::TcpStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pagewarp_engine::flow::lock;
use pagewarp_engine::transport::{Connector, Stream, TcpConnector};
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, Connection};

use super::config::{TlsClient, TlsDir, TlsError, server_name};
use super::explain::Words;
use super::handshake::Handshake;
use super::renew::FromFiles;
use super::stream::TlsStream;

/// Connects over TCP and TLS.
#[derive(Debug)]
pub struct TlsConnector {
    tcp: TcpConnector,
    client: Mutex<Arc<TlsClient>>,
    name: ServerName<'static>,
}

impl TlsConnector {
    /// Connects to where `tcp` does, and expects a certificate for `host` there: a host name or an IP address. Both together have the time that `tcp` has for an
    /// attempt.
    ///
    /// # Errors
    ///
    /// What is wrong with the files in `dir`, or with the name.
    pub fn new(tcp: TcpConnector, dir: &TlsDir, host: &str) -> Result<TlsConnector, TlsError> {
        let client = Mutex::new(Arc::new(dir.client()?));
        Ok(TlsConnector { tcp, client, name: server_name(host)? })
    }

    fn secure(
        &self,
        socket: TcpStream,
        started: Instant,
        go_on: &dyn Fn() -> bool,
    ) -> io::Result<Box<dyn Stream>> {
        let round_trip = started.elapsed();
        let client = lock(&self.client).clone();
        let tls =
            ClientConnection::new(client.config.clone(), self.name.clone()).map_err(io::Error::other)?;
        let mut handshake = Handshake {
            socket: &socket,
            tls: Connection::Client(tls),
            words: Words { peer: "the destination", cert: &client.cert, ca: &client.ca },
            until: started + self.tcp.timeout.max(Duration::from_secs(1)),
            go_on,
            heard: false,
        };
        let identity = handshake.shake()?;
        handshake.await_welcome()?;
        let tls = handshake.done()?;
        Ok(Box::new(TlsStream::new(socket, tls, &identity, Some(round_trip))))
    }
}

impl Connector for TlsConnector {
    fn connect(&self) -> io::Result<Box<dyn Stream>> {
        let started = Instant::now();
        self.secure(self.tcp.connect_tcp()?, started, &|| true)
    }

    fn connect_while(&self, go_on: &dyn Fn() -> bool) -> io::Result<Box<dyn Stream>> {
        let started = Instant::now();
        self.secure(self.tcp.connect_tcp_while(go_on)?, started, go_on)
    }

    fn peer(&self) -> String {
        self.tcp.peer()
    }

    fn renew(&self) {
        Arc::make_mut(&mut lock(&self.client)).renew();
    }
}

/// The host of an address as it was typed, `HOST:PORT`, without the brackets of IPv6: what its certificate has to be for.
pub fn host_of(address: &str) -> &str {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_has_no_port_and_no_brackets() {
        for (address, host) in [
            ("db1.example:7474", "db1.example"),
            ("192.0.2.1:1", "192.0.2.1"),
            ("[2001:db8::1]:1", "2001:db8::1"),
        ] {
            assert_eq!(host_of(address), host);
            assert!(server_name(host).is_ok());
        }
        assert!(matches!(server_name("a b"), Err(TlsError::Name(_))));
    }
}
