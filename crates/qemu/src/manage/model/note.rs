//! The messages that the model sends, small enough to be stored a million times.

use crate::protocol::control::{Message, Running};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Note {
    Prepared,
    Commit { run: bool },
    Running,
    Report,
    Cancel,
    Failed,
}

impl Note {
    pub(super) fn message(self) -> Message {
        match self {
            Note::Prepared => Message::Prepared,
            Note::Commit { run } => Message::Commit { run },
            Note::Running => Message::Running(Running::default()),
            Note::Report => Message::Report(Box::default()),
            Note::Cancel => Message::Cancel { reason: String::new() },
            Note::Failed => Message::Failed { reason: String::new() },
        }
    }
}
