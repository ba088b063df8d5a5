//! How a trial ended.

use super::draw::{Fault, Strike};

/// Where the VM is after a trial.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Outcome {
    /// It never left.
    Stayed,
    /// It has moved.
    Moved,
    /// It was in doubt or left paused, was not at the destination, and what the documentation says let it go on here.
    Resumed,
    /// It was in doubt, ran at the destination, and what the documentation says ended it here.
    Discarded,
    /// The process that owned it was killed by the trial, and it died with it.
    Killed,
    /// What must not be.
    Failed,
}

impl Outcome {
    pub(crate) const ALL: [Outcome; 6] = [
        Outcome::Stayed,
        Outcome::Moved,
        Outcome::Resumed,
        Outcome::Discarded,
        Outcome::Killed,
        Outcome::Failed,
    ];
}

/// What was seen of a trial.
pub(crate) struct Seen {
    pub(crate) outcome: Outcome,
    /// The faults that came before the end.
    pub(crate) dealt: Vec<Strike>,
    pub(crate) source_exit: Option<i32>,
    pub(crate) destination_exit: Option<i32>,
    /// How many breaks of connections the source reports.
    pub(crate) breaks: Option<u64>,
}

/// Whether this fault was dealt.
pub(crate) fn was_dealt(dealt: &[Strike], fault: Fault) -> bool {
    dealt.iter().any(|strike| strike.fault == fault)
}

/// What `pagewarp` must not end with, whatever is done to its migration: a failure that nobody has thought of (1), a usage error, damage.
pub(crate) const NEVER: [i32; 4] = [1, 2, 10, 101];
