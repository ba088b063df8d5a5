//! How the program ends: exit codes, and one-line error messages.

use std::process::ExitCode;

use pagewarp_engine::error::MigrationError;
use pagewarp_kvm::control::codes;
use thiserror::Error;

/// Why the program ends, as a number for scripts. The table in the user guide follows this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// All went well.
    Ok = 0,
    /// A failure that none of the others describes.
    Failure = 1,
    /// The command line makes no sense.
    Usage = 2,
    /// Somebody cancelled; the VM is where it was.
    Cancelled = 3,
    /// The epoch or time limit was reached first; the VM is where it was.
    NotConverged = 4,
    /// The peer refused, failed or broke the protocol; the VM is where it was.
    Peer = 5,
    /// The network, or a peer that went away; the VM is where it was.
    Link = 6,
    /// The hand-over was committed but not confirmed: an operator must look at the destination.
    InDoubt = 7,
    /// No VM of this name runs here.
    NoSuchVm = 8,
    /// This host cannot do it: no /dev/kvm, too little memory, a port or a name in use, a missing file.
    Environment = 9,
    /// Verifying has found that the memory at the destination is not that of the source; the VM is where it was.
    Differs = 10,
}

impl Exit {
    /// Every code, for the documentation.
    pub const ALL: [Exit; 11] = [
        Exit::Ok,
        Exit::Failure,
        Exit::Usage,
        Exit::Cancelled,
        Exit::NotConverged,
        Exit::Peer,
        Exit::Link,
        Exit::InDoubt,
        Exit::NoSuchVm,
        Exit::Environment,
        Exit::Differs,
    ];

    /// One line on what it means.
    pub fn meaning(self) -> &'static str {
        match self {
            Exit::Ok => "success",
            Exit::Failure => "failure of another kind",
            Exit::Usage => "the command line makes no sense",
            Exit::Cancelled => "cancelled; the VM is where it was",
            Exit::NotConverged => "did not converge within the limits; the VM is where it was",
            Exit::Peer => "the peer refused, failed or broke the protocol; the VM is where it was",
            Exit::Link => "the connection failed; the VM is where it was",
            Exit::InDoubt => {
                "in doubt: committed but not confirmed; look at the destination, then `pagewarp resolve`"
            }
            Exit::NoSuchVm => "no VM of that name runs on this host",
            Exit::Environment => {
                "this host cannot do it (no /dev/kvm, too little memory, port or name in use, missing file)"
            }
            Exit::Differs => {
                "--verify found that the memory at the destination differs; the VM is where it was"
            }
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// An error that knows its exit code. `anyhow` carries it up; context may be put around it.
#[derive(Debug, Error)]
#[error("{message}")]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// What was seen, and what to do.
    pub message: String,
}

impl Failure {
    /// An error with this exit code and message.
    pub fn new(exit: Exit, message: impl Into<String>) -> Failure {
        Failure { exit, message: message.into() }
    }
}

/// An error of this exit code, ready for `?`.
pub fn failure(exit: Exit, message: impl Into<String>) -> anyhow::Error {
    Failure::new(exit, message).into()
}

/// An error of the engine, with its exit code.
pub fn of_migration(error: MigrationError) -> anyhow::Error {
    failure(of_code(codes::of(&error)), error.to_string())
}

/// The exit code for an error of a VM process, by its code on the control socket.
pub fn of_code(code: &str) -> Exit {
    match code {
        codes::CANCELLED => Exit::Cancelled,
        codes::NOT_CONVERGED => Exit::NotConverged,
        codes::REFUSED | codes::PEER | codes::PEER_REPORTS | codes::UNTRUSTED => Exit::Peer,
        codes::LINK => Exit::Link,
        codes::DIFFERS => Exit::Differs,
        // A VM that does not start on the destination is in doubt on the source, and wants the same decision there.
        codes::IN_DOUBT | codes::START_FAILED => Exit::InDoubt,
        codes::VM | codes::BACKEND | codes::TLS => Exit::Environment,
        codes::CONFIG => Exit::Usage,
        // Among them a VM that is still paused: where it was, but not as it was, which is what the other codes promise.
        _ => Exit::Failure,
    }
}

/// The exit code of an error: that of the outermost [`Failure`], be it the error itself or a context.
pub fn exit_of(error: &anyhow::Error) -> Exit {
    if let Some(failure) = error.downcast_ref::<Failure>() {
        return failure.exit;
    }
    Exit::Failure
}

/// Whether the error is only that whoever read our output has seen enough, as in `pagewarp man | head`.
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

/// The whole chain on one line: `error: outer: inner: innermost`.
///
/// A cause that the text before it already quotes is left out.
pub fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        if line.contains(&text) {
            continue;
        }
        if !line.is_empty() {
            line.push_str(": ");
        }
        line.push_str(&text);
    }
    line
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn the_code_survives_context() {
        let error = Err::<(), _>(failure(Exit::Link, "gone")).context("cannot send").unwrap_err();
        assert_eq!(exit_of(&error), Exit::Link);
        assert_eq!(one_line(&error), "cannot send: gone");
        let error = Err::<(), _>(std::io::Error::from(std::io::ErrorKind::NotFound))
            .context(Failure::new(Exit::Environment, "no file"))
            .context("cannot run")
            .unwrap_err();
        assert_eq!(exit_of(&error), Exit::Environment);
    }

    #[test]
    fn a_broken_pipe_is_told_from_other_errors() {
        let pipe = anyhow::Error::from(std::io::Error::from(std::io::ErrorKind::BrokenPipe));
        assert!(is_broken_pipe(&pipe.context("cannot print")));
        let other = anyhow::Error::from(std::io::Error::from(std::io::ErrorKind::NotFound));
        assert!(!is_broken_pipe(&other));
        assert_eq!(exit_of(&other), Exit::Failure);
    }

    #[test]
    fn a_message_is_one_line_and_says_nothing_twice() {
        let error = anyhow::anyhow!("no\nsuch   file").context("cannot open `x`: no such file");
        assert_eq!(one_line(&error), "cannot open `x`: no such file");
    }

    #[test]
    fn an_error_has_the_same_exit_code_on_either_way_to_the_user() {
        for (error, exit) in [
            (MigrationError::Peer("x".into()), Exit::Peer),
            (MigrationError::Cancelled, Exit::Cancelled),
            (MigrationError::NotConverged("x".into()), Exit::NotConverged),
            (MigrationError::Differs("x".into()), Exit::Differs),
            (MigrationError::InDoubt("x".into()), Exit::InDoubt),
            (MigrationError::StartFailed("x".into()), Exit::InDoubt),
            (MigrationError::Config("x".into()), Exit::Usage),
            (MigrationError::Internal("x".into()), Exit::Failure),
        ] {
            assert_eq!(exit_of(&of_migration(error)), exit);
        }
        for (code, exit) in [
            (codes::VM, Exit::Environment),
            (codes::BACKEND, Exit::Environment),
            (codes::STILL_PAUSED, Exit::Failure),
            (codes::BUSY, Exit::Failure),
            ("a code of a later version", Exit::Failure),
        ] {
            assert_eq!(of_code(code), exit, "{code}");
        }
    }

    #[test]
    fn codes_are_distinct_and_in_order() {
        for (i, exit) in Exit::ALL.into_iter().enumerate() {
            assert_eq!(exit as usize, i);
        }
    }
}
