//! The restore stage of one connection: rebuilds the stream and writes it into the destination QEMU; and the way back.

use std::io::{self, IoSlice, Read};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use pagewarp_engine::error::MigrationError;
use pagewarp_engine::flow::{Stopped, lock};
use pagewarp_engine::transport::Stream;

use crate::bridge::destination::connection::Connection;
use crate::bridge::destination::{QEMU, Session};
use crate::bridge::link::write_all;
use crate::bridge::outbox::{Next, within};
use crate::bridge::running::Running;
use crate::bridge::socket::{Endpoint, Socket};
use crate::protocol::frame::Kind;
use crate::protocol::hello::Credit;
use crate::segment::Pieces;

/// A connection on which nothing comes is opened this long after the main channel: QEMU 7 waits for the one that post-copy prefers.
const SILENT: Duration = Duration::from_secs(1);
/// How often a QEMU that does not listen is tried again.
const RETRY: Duration = Duration::from_millis(20);
/// How long an answer on an encrypted main channel waits for the news that what it answers was delivered: nothing else tells the source bridge that
/// QEMU has everything.
const ANSWER: Duration = Duration::from_millis(50);
/// Bytes of the way back that are passed on at once.
const BACK: usize = 16 << 10;

/// Writes what is finished, in order, to the end. `source` is the connection to the source bridge; `opened` gets that to QEMU
/// once there is one.
pub(crate) fn run(
    session: &Session<'_>,
    connection: &Arc<Connection>,
    source: &dyn Stream,
    mut opened: impl FnMut(Socket) -> Result<(), Stopped>,
) -> Result<(), Stopped> {
    let meter = &session.meters.restore;
    let mut qemu: Option<Socket> = None;
    let (mut delivered, mut spent) = (0u64, Duration::ZERO);
    let mut running = session.terms.verify.then(Running::new);
    let mut pieces = Pieces::default();
    let is_main = connection.number == 0;
    let mut open = |qemu: &mut Option<Socket>| -> Result<(), Stopped> {
        if qemu.is_none() {
            let stream = connect(session)?;
            opened(stream.try_clone().map_err(|e| session.fail(from_qemu("opening it", e)))?)?;
            *qemu = Some(stream);
        }
        Ok(())
    };
    loop {
        match meter.blocked_in(|| connection.outbox.take(within(SILENT), &session.flow))? {
            Next::Item(parts) => {
                if !is_main {
                    // QEMU up to 7 takes the first connection for the main one, later versions look at its first bytes.
                    meter.blocked_out(|| session.wait_for_main())?;
                }
                open(&mut qemu)?;
                if !connection.ended.load(Ordering::Acquire) && source.is_hung_up() {
                    // Not one more byte: the VM may be running on the source again.
                    return Err(session.gave_up());
                }
                let stream = qemu.as_mut().ok_or(Stopped)?;
                let len = parts.segment.stream_len();
                let start = Instant::now();
                let written = meter.timed(|| {
                    pieces.lay_out(&parts.segment);
                    let mut slices: Vec<IoSlice<'_>> = pieces.slices(&parts.segment).collect();
                    if is_main && delivered == 0 {
                        session.main_begins(slices.first().map_or(&[], |first| first));
                    }
                    if let Some(running) = &mut running {
                        slices.iter().for_each(|slice| running.update(slice));
                    }
                    connection.set_writing(true);
                    write_all(stream, &mut slices)
                });
                written.map_err(|e| {
                    let error = from_qemu("writing the stream into it", e);
                    if is_main { session.broken(error) } else { session.closed_by_qemu(error) }
                })?;
                meter.bytes(len, len);
                delivered += len as u64;
                spent += start.elapsed();
                session.memory.release(connection.number, parts.charge);
                session.deserializing.spare.give_back(parts);
                let hash = running.as_ref().map_or(0, |running| running.mark().hash);
                session.delivered(connection, delivered, spent, hash)?;
                connection.set_writing(false);
                if is_main {
                    session.main_started();
                }
            }
            Next::End => {
                connection.delivered.store(true, Ordering::Release);
                if let Some(qemu) = &qemu {
                    // It may have closed the connection already.
                    let _ = qemu.end(std::net::Shutdown::Write);
                } else {
                    // QEMU never sees a connection that carried nothing, and so cannot end it.
                    session.send(connection, Kind::ReverseEnd, &[])?;
                }
                return Ok(());
            }
            Next::Nothing if !is_main && qemu.is_none() && session.has_main_started() => open(&mut qemu)?,
            Next::Nothing => {}
        }
    }
}

/// Connects to QEMU, which may need a moment to listen.
fn connect(session: &Session<'_>) -> Result<Socket, Stopped> {
    let until = Instant::now() + session.patience();
    loop {
        match session.place().connect() {
            Ok(stream) => {
                if !session.is_by_hand && matches!(session.place(), Endpoint::Unix(_)) {
                    stream.deepen();
                }
                return Ok(stream);
            }
            Err(error) if Instant::now() >= until => {
                let place = session.place();
                return Err(session.fail(from_qemu(
                    &format!("connecting to {place} (was it started with `-incoming {place}`, or told to by `migrate-incoming`?)"),
                    error,
                )));
            }
            Err(_) => session.flow.sleep(RETRY)?,
        }
    }
}

/// Passes on what QEMU says, at once, to the end of its direction.
pub(crate) fn run_back(
    session: &Session<'_>,
    connection: &Arc<Connection>,
    mut qemu: Socket,
) -> Result<(), Stopped> {
    let mut bytes = vec![0; BACK];
    loop {
        match qemu.read(&mut bytes) {
            Ok(0) => return end_back(session, connection),
            Ok(n) => {
                if connection.number == 0 && !session.watch_return_path(&bytes[..n]) {
                    connection.wait_written(ANSWER);
                }
                session.send(connection, Kind::Reverse, &bytes[..n])?;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            // It has closed the connection with bytes in it that it did not want: an end like any other.
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return end_back(session, connection),
            Err(e) => return Err(session.broken(from_qemu("reading from it", e))),
        }
    }
}

fn end_back(session: &Session<'_>, connection: &Connection) -> Result<(), Stopped> {
    if connection.number == 0 {
        session.qemu_left();
    }
    session.send(connection, Kind::ReverseEnd, &[])
}

/// How far a connection is, for the source.
pub(crate) fn credit(
    session: &Session<'_>,
    connection: &Connection,
    delivered: u64,
    spent: Duration,
    stream_hash: u64,
) -> Credit {
    let (ns, pages) = (&session.deserializing.decode_ns, &session.deserializing.decoded_pages);
    Credit {
        delivered_bytes: delivered,
        received_bytes: connection.received_bytes.load(Ordering::Acquire),
        decode_ns: ns.load(Ordering::Relaxed),
        decoded_pages: pages.load(Ordering::Relaxed),
        restore_ns: spent.as_nanos() as u64,
        stream_hash,
    }
}

/// Sends a frame to the source bridge.
pub(crate) fn send(
    session: &Session<'_>,
    connection: &Connection,
    kind: Kind,
    body: &[u8],
) -> Result<(), Stopped> {
    let result = lock(&connection.sending).send(kind, body, &[]);
    result.map_err(|e| session.broken(e))
}

fn from_qemu(doing: &str, source: io::Error) -> MigrationError {
    MigrationError::Link { peer: QEMU.into(), doing: doing.into(), source }
}
