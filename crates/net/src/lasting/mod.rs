//! Connections that outlast a loss of the network.
//!
//! A lasting connection is a reliable, ordered stream of bytes over one ordinary connection after another. What was sent stays in memory until the other end says
//! that it has it. If the connection below breaks, the end that opened it opens another, with increasing pauses, until its patience is at an end; both say how much
//! they have received, and what is missing is sent again. Nothing above notices, except that it took longer: no message is lost, repeated or out of order.
//!
//! [`LastingConnector`] and [`LastingAcceptor`] wrap any connector and acceptor. An acceptor takes ordinary connections as well, and hands them on as they are.
//! What is said on the wire: `docs/link-protocol.md`.

mod accept;
mod connect;
mod frame;
pub(crate) mod fuzzing;
mod limit;
mod replay;
mod stream;

use std::time::Duration;

pub use accept::LastingAcceptor;
pub use connect::LastingConnector;

/// How long a connection may be broken before it is given up, unless told otherwise.
pub const DEFAULT_PATIENCE: Duration = Duration::from_secs(60);
/// The longest patience: a destination that waits holds the memory of a VM.
pub const MAX_PATIENCE: Duration = Duration::from_secs(3600);

/// How long the kernel waits for a peer's host that does not answer, before a connection counts as broken. No less, though a caller may wait for less: the kernel also
/// counts the time in which a host that answers takes nothing.
pub const DETECT: Duration = Duration::from_secs(6);
/// A connection that is there for so long, longer than the kernel takes to give it up, is mended though nothing has got through: there may have been nothing to send.
const MENDED: Duration = Duration::from_secs(3 * DETECT.as_secs());
/// Bytes that may be on the way, or received and not confirmed yet, on a connection.
const WINDOW: usize = 16 << 20;
/// Above so many, confirmations are looked for though nobody waits for any.
const SOFT_WINDOW: usize = 4 << 20;
/// So many bytes are confirmed at a time.
const CONFIRM_EVERY: u64 = 256 << 10;
/// How long a new connection may take to say what it is.
const GREETING: Duration = Duration::from_secs(5);
