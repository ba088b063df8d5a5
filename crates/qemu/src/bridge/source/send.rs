//! The send stage of one connection, and the way back.

use std::io::{IoSlice, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use pagewarp_engine::error::MigrationError;
use pagewarp_engine::flow::{Stopped, lock};

use crate::bridge::link::{Receiving, Sending, peer_error};
use crate::bridge::outbox::Next;
use crate::bridge::running::Mark;
use crate::bridge::source::Session;
use crate::bridge::source::connection::Connection;
use crate::protocol::frame::Kind;
use crate::protocol::hello::Credit;
use crate::protocol::reason_of;

/// Sends what is finished, in order, to the end.
pub(crate) fn run(
    session: &Session<'_>,
    connection: &Arc<Connection>,
    mut sending: Sending,
) -> Result<(), Stopped> {
    let meter = &session.meters.send;
    loop {
        match meter.blocked_in(|| connection.outbox.take(None, &session.flow))? {
            Next::Item(parts) => {
                let result = meter.timed(|| match parts.payload() {
                    Some(payload) => sending.send(Kind::Segment, &parts.meta, &[IoSlice::new(payload)]),
                    None => {
                        let pages: Vec<_> =
                            parts.segment.pages.iter().map(|page| IoSlice::new(&page.0)).collect();
                        sending.send(Kind::Segment, &parts.meta, &pages)
                    }
                });
                result.map_err(|e| session.broken(e))?;
                let before = connection.sent_bytes.swap(sending.sent_bytes(), Relaxed);
                let sent = sending.sent_bytes() - before;
                meter.bytes(sent as usize, sent as usize);
                session.serializing.give_back(parts);
            }
            Next::End => {
                sending.send(Kind::End, &[], &[]).map_err(|e| session.broken(e))?;
                connection.sent_bytes.store(sending.sent_bytes(), Relaxed);
                return Ok(());
            }
            Next::Nothing => {}
        }
    }
}

/// Takes what the destination says, to the end of its direction.
pub(crate) fn run_back(
    session: &Session<'_>,
    connection: &Arc<Connection>,
    mut receiving: Receiving,
) -> Result<(), Stopped> {
    let mut body = Vec::new();
    loop {
        let header = receiving.receive(&mut body).map_err(|e| session.broken(e))?;
        match header.map(|header| header.kind) {
            Some(Kind::Credit) => {
                let credit = Credit::decode(&body).map_err(|e| session.flow.fail(peer_error(e)))?;
                take_credit(session, connection, &credit)?;
            }
            Some(Kind::Reverse) => {
                if connection.number == 0 {
                    session.answer(&body);
                }
                match (&connection.qemu).write_all(&body) {
                    Ok(()) if connection.number == 0 => session.passed_on(),
                    Ok(()) => {}
                    // QEMU may be gone already: then its own direction says so.
                    Err(error) => {
                        tracing::debug!(%error, connection = connection.number, "the source QEMU takes no more");
                    }
                }
            }
            Some(Kind::ReverseEnd) => {
                // An error means that QEMU has closed the connection already.
                let _ = connection.qemu.end(std::net::Shutdown::Write);
                // Nobody else would notice if the destination gave up now, while the source QEMU waits for room.
            }
            Some(Kind::Error) => {
                return Err(session.broken(MigrationError::PeerReports(reason_of(&body))));
            }
            Some(kind) => {
                let seen = format!("a {kind:?} frame on its way to the source");
                return Err(session.flow.fail(MigrationError::Peer(seen)));
            }
            None => {
                return Err(session.broken(MigrationError::Link {
                    peer: session.peer.clone(),
                    doing: "receiving".into(),
                    source: std::io::ErrorKind::UnexpectedEof.into(),
                }));
            }
        }
    }
}

fn take_credit(session: &Session<'_>, connection: &Arc<Connection>, credit: &Credit) -> Result<(), Stopped> {
    let wrong = |what: &str, seen: u64, most: u64| {
        session.flow.fail(MigrationError::Peer(format!("{seen} bytes {what}, expected at most {most}")))
    };
    let delivered = credit.delivered_bytes;
    let newly = connection
        .deliver(delivered, credit.received_bytes)
        .map_err(|most| wrong("delivered", delivered, most))?;
    if session.verify {
        let compared = lock(&connection.marks).compare(Mark { bytes: delivered, hash: credit.stream_hash });
        compared.map_err(|agreed| session.differs(connection.number, agreed, delivered))?;
        session.look_whether_verified();
    }
    let before = connection.received_bytes.swap(credit.received_bytes, Relaxed);
    let more = credit.received_bytes.saturating_sub(before);
    session.credit(connection.number, credit, more, newly);
    Ok(())
}
