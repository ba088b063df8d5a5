//! Why a migration failed before the commit. What goes wrong on one side soon shows on both, in an order that is up to chance: a QEMU that is killed looks like a
//! broken connection next door. So what is seen is collected for a moment, and then it is decided what came from what.

use std::time::{Duration, Instant};

use pagewarp_engine::error::MigrationError;

use super::ManageError;
use super::link::{Incoming, News};
use crate::bridge::source::verdict::QEMU_ENDED;
use crate::protocol::control::Message;

/// How long a single wait for the peer takes.
const LOOK: Duration = Duration::from_millis(20);

/// Where this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Source,
    Destination,
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Side::Source => "the source",
            Side::Destination => "the destination",
        }
    }
}

/// What a side has seen.
#[derive(Debug)]
pub(super) struct Signs {
    pub(super) side: Side,
    /// Somebody cancelled here.
    pub(super) cancelled: bool,
    /// The other side said on the control connection why it gave up, or broke the protocol.
    pub(super) word: Option<MigrationError>,
    /// The control connection ended without a word.
    pub(super) link: Option<MigrationError>,
    /// QEMU on this host ended the migration, or itself.
    pub(super) qemu: Option<String>,
    /// And for no other reason than what it says.
    pub(super) by_itself: bool,
    /// Why the bridge on this host ended.
    pub(super) bridge: Option<MigrationError>,
}

impl Signs {
    pub(super) fn new(side: Side) -> Signs {
        Signs { side, cancelled: false, word: None, link: None, qemu: None, by_itself: false, bridge: None }
    }

    /// Something came on the control connection, where nothing does as long as all is well.
    pub(super) fn hear(&mut self, news: News) {
        let error = match news {
            Ok(Message::Failed { reason }) if self.side == Side::Source => {
                MigrationError::PeerReports(reason)
            }
            Ok(Message::Cancel { reason }) if self.side == Side::Destination => {
                MigrationError::PeerReports(format!("the source gave up: {reason}"))
            }
            Ok(message) => MigrationError::Peer(format!("{message:?} before the commit")),
            Err(error @ MigrationError::Link { .. }) => {
                self.link.get_or_insert(error);
                return;
            }
            Err(error) => error,
        };
        self.word.get_or_insert(error);
    }

    /// Waits for a better reason than what is known, but no longer than this.
    pub(super) fn wait(&mut self, incoming: &Incoming, patience: Duration) {
        let until = Instant::now() + patience;
        while !self.is_clear() && Instant::now() < until {
            if let Some(news) = incoming.next(LOOK) {
                self.hear(news);
            }
        }
    }

    /// Whether anything went wrong.
    pub(super) fn any(&self) -> bool {
        self.cancelled
            || self.word.is_some()
            || self.link.is_some()
            || self.qemu.is_some()
            || self.bridge.is_some()
    }

    /// Whether nothing that may still come would be a better reason.
    pub(super) fn is_clear(&self) -> bool {
        self.cancelled
            || self.by_itself
            || self.word.is_some()
            || self.link.is_some()
            || self.bridge_is_the_cause()
    }

    /// Why it failed.
    pub(super) fn cause(self) -> ManageError {
        let (is_local, is_of_qemu) = (self.bridge_is_the_cause(), self.bridge_lost_qemu());
        let Signs { side, cancelled, word, link, qemu, by_itself, bridge } = self;
        if cancelled {
            return MigrationError::Cancelled.into();
        }
        let bridge = bridge.filter(|error| !matches!(error, MigrationError::Cancelled));
        // Without a bridge that knows more, both may have a part in it.
        let word = match (word, &qemu, &bridge) {
            (Some(MigrationError::PeerReports(text)), Some(qemu), None) if side == Side::Source => {
                Some(MigrationError::PeerReports(format!("{text} (the source QEMU says: {qemu})")))
            }
            (word, ..) => word,
        };
        // What QEMU says by itself is better than that a connection to it ended.
        let of_qemu = |bridge: Option<MigrationError>| ManageError::Qemu {
            side: side.name(),
            reason: qemu
                .or(bridge.map(|error| error.to_string()))
                .unwrap_or_else(|| "it does not say why".into()),
        };
        match (bridge, word.or(link)) {
            (bridge, _) if by_itself => of_qemu(bridge),
            (Some(bridge), _) if is_local && !is_of_qemu => bridge.into(),
            (bridge, _) if is_local => of_qemu(bridge),
            (_, Some(error)) => error.into(),
            (Some(bridge), None) if !is_of_qemu => bridge.into(),
            (bridge, None) => of_qemu(bridge),
        }
    }

    /// Whether the bridge failed by itself or by QEMU on this host, and not by what the other side did. A source QEMU may have been told by the
    /// destination QEMU, over the bridge, that it is over.
    fn bridge_is_the_cause(&self) -> bool {
        let by_itself = |error: &MigrationError| {
            matches!(
                error,
                MigrationError::Backend(_)
                    | MigrationError::Internal(_)
                    | MigrationError::Config(_)
                    | MigrationError::Peer(_)
                    | MigrationError::Damaged(_)
                    | MigrationError::Differs(_)
            )
        };
        self.bridge.as_ref().is_some_and(by_itself)
            || (self.side == Side::Destination && self.bridge_lost_qemu())
    }

    /// Whether the bridge ended because a connection to QEMU on this host did.
    fn bridge_lost_qemu(&self) -> bool {
        match &self.bridge {
            Some(MigrationError::Link { peer, .. }) => {
                ["the source QEMU", "the destination QEMU"].iter().any(|qemu| peer.starts_with(qemu))
            }
            Some(MigrationError::PeerReports(text)) => self.side == Side::Source && text == QEMU_ENDED,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(peer: &str) -> MigrationError {
        let source = std::io::ErrorKind::ConnectionReset.into();
        MigrationError::Link { peer: peer.into(), doing: "receiving".into(), source }
    }

    fn signs(side: Side) -> Signs {
        Signs::new(side)
    }

    #[test]
    fn without_a_bridge_the_destination_knows_better_unless_somebody_cancels_the_source_qemu() {
        let word = || Some(MigrationError::PeerReports("the destination QEMU ended".into()));
        let failed = Signs { word: word(), qemu: Some("broken pipe".into()), ..signs(Side::Source) };
        let cause = failed.cause().to_string();
        assert!(cause.contains("the destination QEMU ended") && cause.contains("broken pipe"), "{cause}");
        let cancelled =
            Signs { word: word(), qemu: Some("x".into()), by_itself: true, ..signs(Side::Source) };
        assert!(cancelled.is_clear());
        let cause = cancelled.cause();
        assert!(matches!(&cause, ManageError::Qemu { side: "the source", .. }), "{cause}");
    }

    #[test]
    fn a_destination_qemu_that_is_killed_is_the_cause_on_both_sides() {
        let there = Signs {
            qemu: Some("it ended".into()),
            bridge: Some(link("the destination QEMU")),
            // The source says so, because its connections ended.
            word: Some(MigrationError::PeerReports("the source gave up".into())),
            ..signs(Side::Destination)
        };
        assert!(there.is_clear());
        assert_eq!(there.cause().to_string(), "the destination QEMU ended the migration: it ended");
        let here = Signs {
            qemu: Some("Bad file descriptor".into()),
            bridge: Some(MigrationError::PeerReports(QEMU_ENDED.into())),
            ..signs(Side::Source)
        };
        assert!(here.any() && !here.is_clear(), "the destination may say more");
        let here = Signs { word: Some(MigrationError::PeerReports("it ended".into())), ..here };
        assert!(here.is_clear());
        assert_eq!(here.cause().to_string(), "the peer reports: it ended");
    }

    #[test]
    fn a_source_qemu_that_gives_up_is_the_cause() {
        let here = Signs {
            qemu: Some("somebody cancelled it".into()),
            bridge: Some(MigrationError::PeerReports(QEMU_ENDED.into())),
            ..signs(Side::Source)
        };
        assert_eq!(here.cause().to_string(), "the source QEMU ended the migration: somebody cancelled it");
    }

    #[test]
    fn what_a_cancel_causes_is_no_failure() {
        for side in [Side::Source, Side::Destination] {
            let here = Signs {
                cancelled: true,
                link: Some(link("x")),
                bridge: Some(link("the destination QEMU")),
                ..signs(side)
            };
            assert!(matches!(here.cause(), ManageError::Migration(MigrationError::Cancelled)));
        }
    }

    #[test]
    fn a_link_that_breaks_is_told_as_such() {
        for side in [Side::Source, Side::Destination] {
            // A QEMU whose connections end gives up as well.
            let here =
                Signs { qemu: Some("failed".into()), bridge: Some(link("10.0.0.1:7474")), ..signs(side) };
            assert!(!here.is_clear());
            assert!(matches!(here.cause(), ManageError::Migration(MigrationError::Link { .. })));
            let here = Signs {
                link: Some(link("the other side")),
                bridge: Some(MigrationError::PeerReports("it ended before it was complete".into())),
                ..signs(side)
            };
            assert!(matches!(here.cause(), ManageError::Migration(MigrationError::Link { .. })));
        }
    }

    #[test]
    fn a_bridge_that_fails_by_itself_says_why() {
        let here = Signs {
            bridge: Some(MigrationError::Internal("x".into())),
            qemu: Some("y".into()),
            ..signs(Side::Source)
        };
        assert!(here.is_clear());
        assert!(matches!(here.cause(), ManageError::Migration(MigrationError::Internal(_))));
        // The source, which was told, may be quicker to say so than the bridge here is to end.
        let there = Signs {
            bridge: Some(MigrationError::Damaged("x".into())),
            word: Some(MigrationError::PeerReports("the source gave up".into())),
            ..signs(Side::Destination)
        };
        assert!(matches!(there.cause(), ManageError::Migration(MigrationError::Damaged(_))));
        let cancelled =
            Signs { bridge: Some(MigrationError::Cancelled), qemu: Some("y".into()), ..signs(Side::Source) };
        assert_eq!(cancelled.cause().to_string(), "the source QEMU ended the migration: y");
    }
}
