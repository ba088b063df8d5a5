//! Measures how fast the link is, over a connection of its own: the source sends bytes that mean nothing, in rounds of growing length, and the destination says when it has them.

use std::io;
use std::time::{Duration, Instant};

use pagewarp_engine::error::MigrationError;
use pagewarp_engine::patience::within;
use pagewarp_engine::transport::{Connector, OneDestination, Stream};

use super::choice::Rates;
use super::host::here;
use crate::bridge::destination::Greeted;
use crate::bridge::link::peer_error;
use crate::bridge::source::link::{Link, connect_while};
use crate::protocol::frame::{Kind, MAX_PAYLOAD};
use crate::protocol::hello::{Hello, Host, Probed, Terms};

/// Bytes of the first round, and how many times as long the next one is: long enough for TCP to have found its speed, and short enough for a link of any speed.
const FIRST: usize = 64 << 10;
const GROWTH: usize = 4;
const LAST: usize = FIRST * GROWTH.pow(4);
/// A round that would take longer is left out.
const ROUND: Duration = Duration::from_millis(20);
/// All rounds.
const MOST: usize = LAST * GROWTH / (GROWTH - 1) + 1;
/// How long the other end may take for anything.
const PATIENCE: Duration = Duration::from_secs(4);
/// The destination reads so many bytes at a time.
const PIECE: usize = 64 << 10;

/// What the link to the destination carries, and what both hosts do. `None`: connections there are never bare.
pub(super) fn measure(
    connector: &dyn Connector,
    hello: &Hello,
    destination: &OneDestination,
    timeout: Duration,
    go_on: &(dyn Fn() -> bool + Sync),
) -> Result<Option<Rates>, MigrationError> {
    let Some((mut link, round_trip)) = connect_bare(connector, hello, destination, timeout, go_on)? else {
        return Ok(None);
    };
    let stream = link.stream.try_clone_stream();
    let broken = |doing: &str, error| MigrationError::of_connection(&connector.peer(), doing, error);
    let stream = stream.map_err(|e| broken("measuring the link", e))?;
    let limits = stream.set_timeouts(Some(PATIENCE), Some(PATIENCE));
    limits.map_err(|e| broken("measuring the link", e))?;
    let until = Some(Instant::now() + PATIENCE);
    let measured = within(&*stream, until, go_on, || rounds(&mut link, round_trip, here(&hello.session)));
    match measured.map_err(|e| broken("measuring the link", e))? {
        Some(measured) => measured.map(Some),
        None => Err(broken("measuring the link", io::ErrorKind::TimedOut.into())),
    }
}

fn rounds(link: &mut Link, round_trip: Duration, here: Host) -> Result<Rates, MigrationError> {
    let bytes = vec![0; MAX_PAYLOAD];
    let (mut sent, mut round) = (0, FIRST);
    loop {
        let started = Instant::now();
        let frames = round.div_ceil(MAX_PAYLOAD);
        for at in 0..frames {
            let len = (round - at * MAX_PAYLOAD).min(MAX_PAYLOAD);
            link.sending.send(Kind::Probe, &[], &[io::IoSlice::new(&bytes[..len])])?;
        }
        sent += round as u64;
        let there = loop {
            let probed = answered(link)?;
            if probed.received_bytes >= sent {
                break probed.host;
            }
        };
        let took = started.elapsed().saturating_sub(round_trip).max(Duration::from_micros(1));
        let link_bytes_per_s = round as f64 / took.as_secs_f64();
        let rates = Rates { link_bytes_per_s, here, there };
        round *= GROWTH;
        let is_long = round as f64 / link_bytes_per_s > ROUND.as_secs_f64();
        if round > LAST || is_long || (sent > FIRST as u64 && rates.is_link_slow()) {
            return Ok(rates);
        }
    }
}

fn answered(link: &mut Link) -> Result<Probed, MigrationError> {
    let mut body = Vec::new();
    match link.receiving.receive(&mut body)?.map(|header| header.kind) {
        Some(Kind::Probed) => Probed::decode(&body).map_err(peer_error),
        Some(kind) => Err(MigrationError::Peer(format!("a {kind:?} frame, expected Probed"))),
        None => Err(MigrationError::Peer("it ended a probe before the answer".into())),
    }
}

/// Opens a connection that can be given away, and says hello. Returns the round trip as well.
pub(super) fn connect_bare(
    connector: &dyn Connector,
    hello: &Hello,
    destination: &OneDestination,
    timeout: Duration,
    go_on: &(dyn Fn() -> bool + Sync),
) -> Result<Option<(Link, Duration)>, MigrationError> {
    match connect_while(&Bare(connector), hello, destination, timeout, go_on) {
        Ok((link, _, round_trip)) => Ok(Some((link, round_trip))),
        Err(MigrationError::Link { source, .. }) if source.kind() == io::ErrorKind::Unsupported => Ok(None),
        Err(error) => Err(error),
    }
}

/// Opens bare connections only.
struct Bare<'a>(&'a dyn Connector);

impl Connector for Bare<'_> {
    fn connect(&self) -> io::Result<Box<dyn Stream>> {
        self.connect_while(&|| true)
    }

    fn connect_while(&self, go_on: &dyn Fn() -> bool) -> io::Result<Box<dyn Stream>> {
        self.0.connect_bare(go_on)?.ok_or_else(|| io::ErrorKind::Unsupported.into())
    }

    fn peer(&self) -> String {
        self.0.peer()
    }
}

/// The destination's part.
pub(in crate::manage) fn answer(
    mut greeted: Greeted,
    terms: Terms,
    timeout: Duration,
) -> Result<(), MigrationError> {
    let host = here(&greeted.hello.session);
    greeted.accept(terms, timeout)?;
    let mut probed = Probed { received_bytes: 0, host };
    let (mut body, mut piece) = (Vec::new(), vec![0; PIECE]);
    while let Some(header) = greeted.receiving.receive(&mut body)? {
        if header.kind != Kind::Probe {
            return Err(MigrationError::Peer(format!("a {:?} frame, expected Probe", header.kind)));
        }
        probed.received_bytes += header.payload_len as u64;
        if probed.received_bytes > MOST as u64 {
            return Err(MigrationError::Peer(format!("a probe of more than {MOST} bytes")));
        }
        let mut left = header.payload_len;
        while left > 0 {
            let len = left.min(PIECE);
            greeted.receiving.payload(&mut piece[..len])?;
            left -= len;
        }
        greeted.sending.send(Kind::Probed, &probed.encode(), &[])?;
    }
    Ok(())
}
