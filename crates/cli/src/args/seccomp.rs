//! `--seccomp`, which all processes have that hold pages of guests.

use clap::ValueEnum;

/// What becomes of system calls that a process has no business to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SeccompChoice {
    /// They fail; the worst end a bridge
    On,
    /// They work, and the kernel logs them, to find out what is missing
    Log,
    /// They work
    Off,
}
