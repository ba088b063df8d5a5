//! The moments in which the right to run the VM changes hands, as the source sees them: it gives the right away, or takes the VM back.

use std::path::Path;
use std::time::{Duration, Instant};

use pagewarp_engine::control::MigrationControl;
use pagewarp_engine::error::MigrationError;
use pagewarp_wire::SourceDuty;
use tracing::debug;

use super::ManageError;
use super::link::{Incoming, Outgoing};
use super::states::{Heard, Resumption, SourceState};
use crate::protocol::control::{Message, Running};
use crate::qmp::{QmpError, Vm};

/// How long a single wait for the peer takes.
const LOOK: Duration = Duration::from_millis(20);
/// How long a VM that QEMU does not run at once is tried again: the locks of its images may be held by a destination QEMU that is about to end.
const RESUME_PATIENCE: Duration = Duration::from_secs(15);
/// How often.
const RESUME_RETRY: Duration = Duration::from_millis(200);

/// Gives the right to run the VM away, and waits for the news that the destination has it. `run`: whether it is to run there.
///
/// # Errors
///
/// [`ManageError::InDoubt`] once the right is given away; with any other error it was not.
pub(super) fn commit(
    state: &mut SourceState,
    outgoing: &mut Outgoing,
    incoming: &Incoming,
    run: bool,
    qmp: &Path,
    control: &MigrationControl,
    timeout: Duration,
) -> Result<Running, ManageError> {
    let in_doubt = |reason: String| ManageError::InDoubt { reason, qmp: qmp.display().to_string() };
    // The last moment at which everything can be undone.
    if control.is_cancelled() {
        return Err(MigrationError::Cancelled.into());
    }
    match incoming.next(Duration::ZERO) {
        None => {}
        Some(Ok(message)) => {
            return Err(match (state.on_receive(&message), message) {
                (Heard::GaveUp, Message::Failed { reason }) => MigrationError::PeerReports(reason),
                (_, message) => MigrationError::Peer(format!("{message:?} before the commit")),
            }
            .into());
        }
        Some(Err(error)) => return Err(error.into()),
    }
    debug!(run, "committing");
    let message = Message::Commit { run };
    state.on_send(&message)?;
    outgoing.send(&message).map_err(|error| in_doubt(error.to_string()))?;
    let until = Instant::now() + timeout;
    loop {
        match incoming.next(LOOK) {
            Some(Ok(message)) => match (state.on_receive(&message), message) {
                (Heard::Due, Message::Running(running)) => return Ok(running),
                (Heard::GaveUp, Message::Failed { reason }) => return Err(in_doubt(reason)),
                (_, message) => return Err(in_doubt(format!("{message:?} where `running` was expected"))),
            },
            Some(Err(error)) => return Err(in_doubt(error.to_string())),
            None if Instant::now() >= until => return Err(in_doubt(format!("no answer in {timeout:?}"))),
            None => {}
        }
    }
}

/// After a failure before the commit a VM that ran must run again, and one that was paused stays so. After the commit nothing is touched. Returns the failure, or
/// what else has to be known.
pub(super) fn keep_running(
    vm: &mut Vm,
    duty: SourceDuty,
    ran: bool,
    qmp: &Path,
    error: ManageError,
) -> ManageError {
    if duty != SourceDuty::Resume {
        return error;
    }
    if !ran {
        return match vm.status() {
            Err(gone @ QmpError::Gone { .. }) => gone.into(),
            _ => error,
        };
    }
    match resume(vm, RESUME_PATIENCE) {
        Ok(()) => error,
        // The VM has ended with its QEMU.
        Err(gone @ QmpError::Gone { .. }) => gone.into(),
        Err(resume) => {
            ManageError::StillPaused { reason: Box::new(error), resume, qmp: qmp.display().to_string() }
        }
    }
}

/// Lets a VM go on that the migration left paused. One that somebody else has stopped, or that has ended, is left as it is.
pub(super) fn resume(vm: &mut Vm, patience: Duration) -> Result<(), QmpError> {
    let until = Instant::now() + patience;
    loop {
        let failed = match vm.status() {
            Ok(run) => match Resumption::of(&run.status) {
                Resumption::Cont => match vm.cont() {
                    Ok(()) => return Ok(()),
                    Err(error) => error,
                },
                Resumption::Leave => return Ok(()),
            },
            Err(error) => error,
        };
        if !matches!(failed, QmpError::Refused { .. } | QmpError::TimedOut { .. }) || Instant::now() >= until
        {
            return Err(failed);
        }
        std::thread::sleep(RESUME_RETRY);
    }
}

#[cfg(test)]
mod tests;
