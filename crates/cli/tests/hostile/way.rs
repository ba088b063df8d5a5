//! How the two ends are connected, and what the program is told for it.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use pagewarp_engine::transport::{Acceptor, Connector, Stream, TcpAcceptor, TcpConnector};
use pagewarp_net::lasting::{LastingAcceptor, LastingConnector};
use pagewarp_net::tls::{TlsAcceptor, TlsConnector};

use crate::certs::{CLIENT, Ca, Set, When};
use crate::support::PATIENCE;
use crate::support::peer::Peer;

/// How long a connection that broke is waited for here: a host that is gone is told from one that comes back.
pub(crate) const RESUME: &str = "1s";
const RESUME_TIME: Duration = Duration::from_secs(1);

/// How two ends are connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// TCP.
    Plain,
    /// TLS with certificates that both trust, and connections that outlast a loss of the network: everything that lies below the protocol.
    Protected,
}

impl Way {
    pub(crate) const BOTH: [Way; 2] = [Way::Plain, Way::Protected];
}

/// Certificates for [`Way::Protected`].
pub(crate) struct Ways {
    trusted: Set,
    /// Of the same CA, with another certificate for sources.
    other: Set,
}

/// Where somebody made up listens.
pub(crate) struct Ear {
    acceptor: Box<dyn Acceptor>,
    pub(crate) address: String,
}

impl Ways {
    pub(crate) fn new() -> Ways {
        let ca = Ca::new();
        let (trusted, other) = (Set::new(&ca), Set::new(&ca));
        other.client(ca.sign(&["intruder.example"], CLIENT, When::Now));
        Ways { trusted, other }
    }

    /// What the program is told, on either side.
    pub(crate) fn options(&self, way: Way) -> Vec<&str> {
        match way {
            Way::Plain => vec!["--resume-timeout", "0"],
            Way::Protected => vec!["--resume-timeout", RESUME, "--tls-dir", self.dir()],
        }
    }

    pub(crate) fn dir(&self) -> &str {
        self.trusted.dir.path().to_str().unwrap()
    }

    pub(crate) fn connect(&self, way: Way, address: &str) -> Peer {
        Peer::over(self.stream(way, address).unwrap())
    }

    pub(crate) fn stream(&self, way: Way, address: &str) -> io::Result<Box<dyn Stream>> {
        match way {
            Way::Plain => tcp(address).connect(),
            Way::Protected => LastingConnector::new(Arc::new(self.tls(address)), RESUME_TIME).connect(),
        }
    }

    /// Inside TLS, and nothing below the protocol but that.
    pub(crate) fn tls(&self, address: &str) -> TlsConnector {
        self.trusted.connector(tcp(address).address, "localhost")
    }

    /// As somebody whom the destination trusts as well.
    pub(crate) fn other(&self, way: Way, address: &str) -> Peer {
        Peer::over(match way {
            Way::Plain => tcp(address).connect().unwrap(),
            Way::Protected => self.other_tls(address).connect().unwrap(),
        })
    }

    /// The same, to begin with.
    pub(crate) fn other_tls(&self, address: &str) -> TlsConnector {
        self.other.connector(tcp(address).address, "localhost")
    }

    pub(crate) fn tls_stream(&self, address: &str) -> Box<dyn Stream> {
        self.tls(address).connect().unwrap()
    }

    pub(crate) fn other_stream(&self, address: &str) -> Box<dyn Stream> {
        self.other_tls(address).connect().unwrap()
    }

    /// What listens there, with TLS and nothing else.
    pub(crate) fn tls_acceptor(&self, tcp: TcpAcceptor) -> TlsAcceptor {
        TlsAcceptor::new(tcp, self.trusted.tls().server(Vec::new()).unwrap()).unwrap()
    }

    pub(crate) fn listen(&self, way: Way) -> Ear {
        let tcp = TcpAcceptor::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = tcp.local_addr().unwrap().to_string();
        let acceptor: Box<dyn Acceptor> = match way {
            Way::Plain => Box::new(tcp),
            Way::Protected => {
                let tls = Box::new(self.tls_acceptor(tcp));
                Box::new(LastingAcceptor::new(tls, RESUME_TIME).unwrap())
            }
        };
        Ear { acceptor, address }
    }
}

impl Ear {
    pub(crate) fn peer(&self) -> Peer {
        Peer::accept(&*self.acceptor)
    }

    pub(crate) fn stream(&self) -> Box<dyn Stream> {
        self.acceptor.accept(PATIENCE).unwrap()
    }
}

fn tcp(address: &str) -> TcpConnector {
    let address: SocketAddr = address.parse().unwrap();
    TcpConnector { address, timeout: PATIENCE }
}
