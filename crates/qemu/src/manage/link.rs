//! The control connection between both sides.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use pagewarp_engine::control::MigrationControl;
use pagewarp_engine::error::MigrationError;
use tracing::warn;

use crate::bridge::link::{Receiving, Sending, peer_error};
use crate::protocol::control::Message;
use crate::protocol::frame::Kind;
use crate::protocol::reason_of;

/// How often a bridge that is to end is looked at.
const LOOK: Duration = Duration::from_millis(5);
/// A session has fewer messages in one direction than these.
const MAX_MESSAGES: usize = 16;

/// The way out.
pub(super) struct Outgoing {
    sending: Sending,
}

impl Outgoing {
    pub(super) fn new(sending: Sending) -> Outgoing {
        Outgoing { sending }
    }

    pub(super) fn send(&mut self, message: &Message) -> Result<(), MigrationError> {
        self.sending.send(Kind::Control, &message.encode(), &[])
    }
}

/// What comes in: messages, and at the end why there are no more.
pub(super) type News = Result<Message, MigrationError>;

/// What came in.
pub(super) struct Incoming {
    news: Receiver<News>,
}

impl Incoming {
    pub(super) fn new() -> (Sender<News>, Incoming) {
        let (to, news) = channel();
        (to, Incoming { news })
    }

    /// The next message; `None`: none came in time.
    pub(super) fn next(&self, timeout: Duration) -> Option<News> {
        match self.news.recv_timeout(timeout) {
            Ok(news) => Some(news),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => {
                std::thread::sleep(timeout);
                None
            }
        }
    }
}

/// Waits for the result of a bridge whose migration has ended, for so long. One that does not end by then is told to.
pub(super) fn end_bridge<R>(
    bridging: ScopedJoinHandle<'_, Result<R, MigrationError>>,
    control: &MigrationControl,
    patience: Duration,
) -> Result<R, MigrationError> {
    let until = Instant::now() + patience;
    while !bridging.is_finished() && Instant::now() < until {
        std::thread::sleep(LOOK);
    }
    if !bridging.is_finished() {
        if !control.is_cancelled() {
            warn!("the bridge did not end in {patience:?} after the migration; its connections are cut");
        }
        control.cancel();
    }
    bridging.join().unwrap_or_else(|_| Err(MigrationError::Internal("the bridge panicked".into())))
}

/// Reads the control connection with `peer` to its end, which is the last news.
pub(super) fn read(mut receiving: Receiving, peer: &str, news: &Sender<News>) {
    let mut body = Vec::new();
    for count in 0.. {
        let next = match receiving.receive(&mut body) {
            // They wait in memory until somebody asks for them.
            Ok(Some(_)) if count == MAX_MESSAGES => Err(MigrationError::Peer(format!(
                "more than {MAX_MESSAGES} messages on a control connection, which has no use for so many"
            ))),
            Ok(Some(header)) => match header.kind {
                Kind::Control => Message::decode(&body).map_err(peer_error),
                Kind::Error => Err(MigrationError::PeerReports(reason_of(&body))),
                kind => Err(MigrationError::Peer(format!("a {kind:?} frame on a control connection"))),
            },
            Ok(None) => Err(MigrationError::Link {
                peer: peer.into(),
                doing: "waiting for its messages".into(),
                source: io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "it ended, or was killed, without a word; see what it said on its own host",
                ),
            }),
            Err(error) => Err(error),
        };
        let is_last = next.is_err();
        // Nobody may be listening any more.
        if news.send(next).is_err() || is_last {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_peer_that_goes_on_talking_is_not_listened_to() {
        let (here, there) = UnixStream::pair().unwrap();
        let mut outgoing = Outgoing::new(Sending::new(Box::new(here), "the other side".into()));
        for _ in 0..2 * MAX_MESSAGES {
            outgoing.send(&Message::Prepared).unwrap();
        }
        let (news, incoming) = Incoming::new();
        // Ends though there is more, and nobody has taken anything.
        read(Receiving::new(Box::new(there), "the other side".into()), "the other side", &news);
        drop(news);
        for _ in 0..MAX_MESSAGES {
            assert!(matches!(incoming.next(Duration::ZERO), Some(Ok(Message::Prepared))));
        }
        assert!(matches!(incoming.next(Duration::ZERO), Some(Err(MigrationError::Peer(_)))));
        assert!(incoming.next(Duration::ZERO).is_none());
    }
}
