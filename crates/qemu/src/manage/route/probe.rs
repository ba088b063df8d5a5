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
/// How long all of it may take. The destination ends connections that have not said in 5 s what they want, and that of whoever measures waits meanwhile.
const PATIENCE: Duration = Duration::from_secs(3);
/// What is taken for the round trip was measured when the connection was opened, and may have been anything: no more than this part of a round is left out of it.
const MOST_ROUND_TRIP: f64 = 0.75;
/// The destination reads so many bytes at a time.
const PIECE: usize = 64 << 10;

/// What the link to the destination carries, and what both hosts do.
pub(super) fn measure(
    connector: &dyn Connector,
    hello: &Hello,
    destination: &OneDestination,
    timeout: Duration,
    go_on: &(dyn Fn() -> bool + Sync),
) -> Result<Rates, MigrationError> {
    let until = Instant::now() + PATIENCE;
    let go_on = || go_on() && Instant::now() < until;
    let (mut link, _, round_trip) = connect_while(&Bare(connector), hello, destination, timeout, &go_on)?;
    let broken = |error| MigrationError::of_connection(&connector.peer(), "measuring the link", error);
    let stream = link.stream.try_clone_stream().map_err(broken)?;
    let here = here(&hello.session);
    let measured = within(&*stream, Some(until), &go_on, || rounds(&mut link, round_trip, here));
    measured.map_err(broken)?.unwrap_or_else(|| Err(broken(io::ErrorKind::TimedOut.into())))
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
        let elapsed = started.elapsed().max(Duration::from_micros(1));
        let took = elapsed - round_trip.min(elapsed.mul_f64(MOST_ROUND_TRIP));
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

/// Opens bare connections only.
pub(super) struct Bare<'a>(pub(super) &'a dyn Connector);

impl Connector for Bare<'_> {
    fn connect(&self) -> io::Result<Box<dyn Stream>> {
        self.connect_while(&|| true)
    }

    fn connect_while(&self, go_on: &dyn Fn() -> bool) -> io::Result<Box<dyn Stream>> {
        self.0.connect_bare(go_on)
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

#[cfg(test)]
mod tests {
    use pagewarp_codec::EncodingSet;
    use pagewarp_engine::transport::{Acceptor, TcpAcceptor, TcpConnector};

    use super::*;
    use crate::protocol::hello::Purpose;

    /// Longer than anything takes on a busy machine.
    const LONG: Duration = Duration::from_secs(60);
    const TERMS: Terms =
        Terms { encodings: EncodingSet::ALL, zstd: true, verify: false, direct: true, history_slots: 1 };

    /// What is measured with a destination that does this with a new connection.
    fn measured(
        destination: impl FnOnce(Greeted) + Send,
        go_on: &(dyn Fn() -> bool + Sync),
    ) -> Result<Rates, MigrationError> {
        let acceptor = TcpAcceptor::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let connector = TcpConnector { address: acceptor.local_addr().unwrap(), timeout: LONG };
        let hello = Hello { session: [7; 16], purpose: Purpose::Probe, terms: TERMS };
        std::thread::scope(|scope| {
            scope.spawn(move || destination(Greeted::read(acceptor.accept(LONG).unwrap()).unwrap()));
            measure(&connector, &hello, &OneDestination::default(), LONG, go_on)
        })
    }

    #[test]
    fn both_hosts_and_the_link_are_seen() {
        let rates = measured(|greeted| answer(greeted, TERMS, LONG).unwrap(), &|| true).unwrap();
        assert!(rates.link_bytes_per_s > 0.0);
        assert_eq!(rates.here, rates.there, "one machine, asked twice in one session");
    }

    #[test]
    fn a_destination_that_does_not_answer_is_not_waited_for_long() {
        let silent = |mut greeted: Greeted| {
            greeted.accept(TERMS, LONG).unwrap();
            while !greeted.stream.is_hung_up() {
                std::thread::sleep(Duration::from_millis(5));
            }
        };
        let started = Instant::now();
        measured(silent, &|| true).unwrap_err();
        assert!(started.elapsed() >= PATIENCE);
        // Nor is one whose greeting does not come, nor for longer than somebody wants to know.
        let mute = |greeted: Greeted| {
            while !greeted.stream.is_hung_up() {
                std::thread::sleep(Duration::from_millis(5));
            }
        };
        measured(mute, &|| true).unwrap_err();
        let started = Instant::now();
        measured(silent, &|| started.elapsed() < Duration::from_millis(100)).unwrap_err();
        assert!(started.elapsed() < LONG);
    }

    #[test]
    fn a_destination_that_talks_nonsense_is_not_believed() {
        for (kind, body) in [(Kind::Credit, &[0; 28][..]), (Kind::Probed, &[0; 27]), (Kind::Probed, &[])] {
            let talking = |mut greeted: Greeted| {
                greeted.accept(TERMS, LONG).unwrap();
                let _ = greeted.sending.send(kind, body, &[]);
                while !greeted.stream.is_hung_up() {
                    std::thread::sleep(Duration::from_millis(5));
                }
            };
            let error = measured(talking, &|| true).unwrap_err();
            assert!(matches!(error, MigrationError::Peer(_)), "{error}");
        }
    }
}
