//! Opening connections to the destination bridge.

use std::io;
use std::time::{Duration, Instant};

use pagewarp_engine::error::MigrationError;
use pagewarp_engine::patience::within;
use pagewarp_engine::transport::{Connector, OneDestination, Stream};

use crate::bridge::link::{Receiving, Sending, peer_error, settle};
use crate::protocol::frame::Kind;
use crate::protocol::hello::{Hello, Terms, decode_ack};
use crate::protocol::reason_of;

/// A connection to the destination bridge whose handshake is done.
pub(crate) struct Link {
    pub(crate) stream: Box<dyn Stream>,
    pub(crate) sending: Sending,
    pub(crate) receiving: Receiving,
}

/// Opens a connection to the destination and says hello.
pub(crate) fn connect(
    connector: &dyn Connector,
    hello: &Hello,
    destination: &OneDestination,
    timeout: Duration,
) -> Result<(Link, Terms, Duration), MigrationError> {
    connect_while(connector, hello, destination, timeout, &|| true)
}

/// The same, but gives up soon after `go_on` says no.
pub(crate) fn connect_while(
    connector: &dyn Connector,
    hello: &Hello,
    destination: &OneDestination,
    timeout: Duration,
    go_on: &(dyn Fn() -> bool + Sync),
) -> Result<(Link, Terms, Duration), MigrationError> {
    let peer = connector.peer();
    let link = |doing: &str, source: io::Error| MigrationError::of_connection(&peer, doing, source);
    // The kernels alone answer each other here, so that this is the round trip of the link without the work of the peer.
    let asked = Instant::now();
    let stream = connector.connect_while(go_on).map_err(|e| link("connecting", e))?;
    destination.check(&*stream).map_err(|e| link("connecting", e.into()))?;
    let round_trip = stream.round_trip().unwrap_or_else(|| asked.elapsed());
    let prepare = || -> io::Result<(Sending, Receiving)> {
        // The answer as a whole has its limit below, which should not race with that of a read.
        stream.set_timeouts(Some(2 * timeout), Some(timeout))?;
        let sending = Sending::new(stream.try_clone_stream()?, peer.clone());
        Ok((sending, Receiving::new(stream.try_clone_stream()?, peer.clone())))
    };
    let (mut sending, mut receiving) = prepare().map_err(|e| link("setting up the connection", e))?;
    sending.send(Kind::Hello, &hello.encode(), &[])?;
    let until = Instant::now() + timeout;
    let mut body = Vec::new();
    let answer = within(&*stream, Some(until), go_on, || receiving.receive(&mut body));
    let Some(answer) = answer.map_err(|e| link("setting up the connection", e))? else {
        let kind = if go_on() { io::ErrorKind::TimedOut } else { io::ErrorKind::Interrupted };
        return Err(link("waiting for its answer", kind.into()));
    };
    let terms = match answer?.map(|header| header.kind) {
        Some(Kind::HelloAck) => decode_ack(&body).map_err(peer_error)?,
        Some(Kind::Error) => {
            return Err(MigrationError::Refused(reason_of(&body)));
        }
        Some(kind) => return Err(MigrationError::Peer(format!("a {kind:?} frame, expected HelloAck"))),
        None => return Err(link("waiting for its answer", io::ErrorKind::UnexpectedEof.into())),
    };
    if terms != hello.terms.agree(terms) {
        return Err(MigrationError::Peer(format!(
            "an agreement to {terms:?}, expected no more than {:?}",
            hello.terms
        )));
    }
    if hello.terms.verify && !terms.verify {
        return Err(MigrationError::Refused("it cannot verify what it writes (--verify)".into()));
    }
    settle(&*stream, timeout).map_err(|e| link("setting up the connection", e))?;
    Ok((Link { stream, sending, receiving }, terms, round_trip))
}
