//! The receive stage of one connection.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use pagewarp_engine::error::MigrationError;
use pagewarp_engine::flow::Stopped;
use pagewarp_wire::{WireError, at_most, malformed};

use crate::bridge::destination::Session;
use crate::bridge::destination::connection::Connection;
use crate::bridge::destination::deserialize::Parts;
use crate::bridge::link::{Receiving, peer_error};
use crate::protocol::frame::{Header, Kind};
use crate::protocol::meta::{self, Form};

/// Receives until the source has ended the connection in order.
pub(crate) fn run(
    session: &Session<'_>,
    connection: &Arc<Connection>,
    mut receiving: Receiving,
) -> Result<(), Stopped> {
    let meter = &session.meters.receive;
    let mut body = Vec::new();
    let mut count = 0;
    loop {
        let header = meter.blocked_in(|| receiving.receive(&mut body));
        let header = header.map_err(|e| session.broken(e))?;
        match header.map(|header| (header.kind, header)) {
            Some((Kind::Segment, header)) => {
                let mut parts = session.deserializing.spare.take();
                parts.number = count;
                let read = meter.timed(|| read_meta(session, connection, &header, &body, &mut parts));
                read.map_err(|e| session.broken(peer_error(e)))?;
                parts.charge = parts.footprint(header.payload_len);
                meter.blocked_out(|| session.memory.hold(connection.number, parts.charge, &session.flow))?;
                let read = meter.timed(|| read_payload(&header, &mut receiving, &mut parts));
                read.map_err(|e| session.broken(e))?;
                connection.received_bytes.store(receiving.received_bytes(), Ordering::Release);
                meter.bytes(header.meta_len + header.payload_len, header.meta_len + header.payload_len);
                let submitted = session.deserializing.submit(connection.clone(), parts, &session.meters);
                submitted.map_err(|e| session.fail(e))?;
                count += 1;
            }
            Some((Kind::End, _)) => {
                connection.ended.store(true, Ordering::Release);
                if connection.number == 0 {
                    session.main_ended();
                }
                connection.outbox.end(count);
                return Ok(());
            }
            Some((kind, _)) => {
                let seen = format!("a {kind:?} frame on its way to the destination");
                return Err(session.fail(MigrationError::Peer(seen)));
            }
            None => return Err(session.gave_up()),
        }
    }
}

/// Reads everything but the payload of the pages.
fn read_meta(
    session: &Session<'_>,
    connection: &Connection,
    header: &Header,
    body: &[u8],
    parts: &mut Parts,
) -> Result<(), WireError> {
    let Parts { segment, table, encoded, plain_len, number, .. } = parts;
    *plain_len = meta::decode(body, &session.terms, connection.number, *number, segment, table, encoded)?;
    if segment.stream_len() == 0 {
        return Err(malformed("a segment", "one of no bytes", "one that stands for something"));
    }
    check_payload_len(table.form, header.payload_len, *plain_len)
}

fn read_payload(header: &Header, receiving: &mut Receiving, parts: &mut Parts) -> Result<(), MigrationError> {
    let Parts { segment, table, encoded, packed, .. } = parts;
    match table.form {
        Form::Plain => receiving.pages(&mut segment.pages),
        Form::Encoded => {
            encoded.payload.resize(header.payload_len, 0);
            receiving.payload(&mut encoded.payload)
        }
        Form::Zstd | Form::Lz4 => {
            packed.resize(header.payload_len, 0);
            receiving.payload(packed)
        }
    }
}

fn check_payload_len(form: Form, seen: usize, plain: usize) -> Result<(), WireError> {
    match form {
        _ if form.is_packed() => at_most("the compressed payload of a segment", seen as u64, plain as u64),
        _ if seen == plain => Ok(()),
        _ => Err(malformed(
            "the payload of a segment",
            format_args!("{seen} bytes"),
            format_args!("{plain} bytes"),
        )),
    }
}
