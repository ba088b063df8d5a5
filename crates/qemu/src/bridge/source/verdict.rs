//! What it means when the source QEMU ends the main channel: the migration is complete, or the VM stays and what is on its way must be dropped.

use pagewarp_engine::error::MigrationError;

use crate::return_path::ReturnPath;
use crate::stream::{ConnectionKind, StreamReader};

/// What is known of the stream of the main channel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    /// It is none that can be read, nor are the answers to it: encrypted, for example.
    pub(crate) opaque: bool,
    /// It opens the return path.
    pub(crate) return_path: bool,
    /// The pages are at their end.
    pub(crate) ram_ended: bool,
    /// From some point on it was not understood.
    pub(crate) raw: bool,
}

impl Seen {
    pub(crate) fn of(reader: &StreamReader) -> Seen {
        Seen {
            opaque: !matches!(reader.kind(), ConnectionKind::Main | ConnectionKind::Unknown),
            return_path: reader.return_path(),
            ram_ended: reader.ram_ended(),
            raw: reader.raw().is_some(),
        }
    }
}

/// How the main channel ended, when nothing of it was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// The destination QEMU has said that it has loaded the VM.
    Confirmed,
    /// There is no return path, and the stream came to its end.
    Unconfirmed,
    /// Everything is delivered, or will be, and nobody but QEMU can tell whether that is all of it.
    Unknown,
}

/// The main channel in both directions.
#[derive(Debug, Default)]
pub(crate) struct MainChannel {
    return_path: ReturnPath,
    /// Whether the destination QEMU has said anything.
    answered: bool,
    /// Whether the source QEMU has got the last message of the return path.
    told: bool,
    seen: Seen,
    ending: Option<Ending>,
}

impl MainChannel {
    /// The destination QEMU said this. Must be called before the source QEMU can know of it.
    pub(crate) fn answer(&mut self, bytes: &[u8]) {
        self.answered |= !bytes.is_empty();
        self.return_path.read(bytes);
    }

    /// The source QEMU has got all that was said so far.
    pub(crate) fn passed_on(&mut self) {
        self.told |= self.return_path.shut().is_some();
    }

    /// The stream was read up to here.
    pub(crate) fn see(&mut self, seen: Seen) {
        self.seen = seen;
    }

    /// Whether the destination QEMU has said that it has loaded the VM.
    pub(crate) fn is_confirmed(&self) -> bool {
        !self.seen.opaque && self.return_path.shut() == Some(0)
    }

    /// Whether it has, and the source QEMU knows.
    pub(crate) fn is_handed_over(&self) -> bool {
        self.is_confirmed() && self.told
    }

    /// How it ended, if it has.
    pub(crate) fn ending(&self) -> Option<Ending> {
        self.ending
    }

    fn uses_return_path(&self) -> bool {
        self.seen.return_path || self.answered
    }

    /// The source QEMU has hung up; there may be more to read. Fails if the migration was cancelled or has failed: then nothing more may be delivered.
    ///
    /// With a return path QEMU does not hang up before it has heard that all is well. Where that cannot be read, all is well only if nothing is on its way, as it must
    /// be when the destination has said so. Without one, QEMU hangs up after its last bytes, which count.
    pub(crate) fn hung_up(&self, in_flight: u64) -> Result<(), MigrationError> {
        if self.is_confirmed() || !self.uses_return_path() {
            return Ok(());
        }
        let readable = !self.seen.opaque && !self.return_path.is_lost();
        if readable || in_flight > 0 { Err(stays()) } else { Ok(()) }
    }

    /// The source QEMU has ended its direction and everything was read.
    pub(crate) fn ended(&mut self, in_flight: u64) -> Result<(), MigrationError> {
        self.hung_up(in_flight)?;
        self.ending = Some(match self.seen {
            _ if self.is_confirmed() => Ending::Confirmed,
            _ if self.uses_return_path() => Ending::Unknown,
            Seen { ram_ended: true, .. } => Ending::Unconfirmed,
            Seen { raw: true, .. } => Ending::Unknown,
            _ => return Err(stays()),
        });
        Ok(())
    }
}

/// The reason of a migration that the source QEMU ended too early.
pub(crate) const QEMU_ENDED: &str =
    "the source QEMU ended the migration before it was complete; the VM stays with it";

fn stays() -> MigrationError {
    MigrationError::PeerReports(QEMU_ENDED.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHUT: &[u8] = &[0, 1, 0, 4, 0, 0, 0, 0];
    const FAILED: &[u8] = &[0, 1, 0, 4, 0, 0, 0, 1];
    const PONG: &[u8] = &[0, 2, 0, 4, 0, 0, 0, 1];

    fn main(seen: Seen, said: &[&[u8]]) -> MainChannel {
        let mut main = MainChannel::default();
        main.see(seen);
        said.iter().for_each(|bytes| main.answer(bytes));
        main
    }

    #[test]
    fn with_a_return_path_only_its_last_message_counts() {
        let seen = Seen { return_path: true, ram_ended: true, ..Seen::default() };
        for said in [&[][..], &[PONG], &[PONG, FAILED]] {
            assert!(main(seen, said).hung_up(0).is_err(), "{said:?}");
            assert!(main(seen, said).ended(0).is_err(), "{said:?}");
        }
        let mut complete = main(seen, &[PONG, SHUT]);
        complete.hung_up(1000).unwrap();
        complete.ended(1000).unwrap();
        assert_eq!(complete.ending(), Some(Ending::Confirmed));
        assert!(!complete.is_handed_over(), "the source QEMU has not heard of it");
        complete.passed_on();
        assert!(complete.is_handed_over());
    }

    #[test]
    fn without_one_the_last_bytes_count() {
        let mut complete = main(Seen { ram_ended: true, ..Seen::default() }, &[]);
        complete.hung_up(1000).unwrap();
        complete.ended(1000).unwrap();
        assert_eq!(complete.ending(), Some(Ending::Unconfirmed));
        let mut cancelled = main(Seen::default(), &[]);
        cancelled.hung_up(1000).unwrap();
        assert!(cancelled.ended(1000).is_err(), "among the pages");
    }

    #[test]
    fn a_stream_that_is_not_understood_is_delivered_to_its_end() {
        let mut raw = main(Seen { raw: true, ..Seen::default() }, &[]);
        raw.hung_up(1000).unwrap();
        raw.ended(1000).unwrap();
        assert_eq!(raw.ending(), Some(Ending::Unknown));
        // The answers tell of a return path though its opening was not understood.
        let mut raw = main(Seen { raw: true, ..Seen::default() }, &[PONG]);
        assert!(raw.hung_up(0).is_err());
        raw.answer(SHUT);
        raw.ended(0).unwrap();
        assert_eq!(raw.ending(), Some(Ending::Confirmed));
    }

    #[test]
    fn an_encrypted_stream_must_have_been_delivered_before_its_end() {
        let seen = Seen { opaque: true, raw: true, ..Seen::default() };
        let mut tls = main(seen, &[&[22, 3, 3, 0, 90]]);
        assert!(tls.hung_up(1).is_err());
        tls.hung_up(0).unwrap();
        tls.ended(0).unwrap();
        assert_eq!(tls.ending(), Some(Ending::Unknown));
        assert!(!main(seen, &[SHUT]).is_confirmed(), "what looks like an answer is none");
    }
}
