//! What an operator decides about a VM whose hand-over is in doubt.

use std::path::Path;
use std::time::Duration;

use super::ManageError;
use super::handover::resume;
use super::states::is_open_to_decision;
use crate::qmp::Vm;

/// What is to become of the VM on the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It surely does not run on the destination, and never will: run it here.
    Resume,
    /// It runs on the destination: end it here.
    Discard,
}

/// Carries the decision out on the source QEMU, which must have completed a migration.
pub fn resolve(qmp: &Path, decision: Decision, timeout: Duration) -> Result<(), ManageError> {
    let mut vm = Vm::connect(qmp, timeout)?;
    let state = vm.status()?;
    if !is_open_to_decision(&state.status) {
        return Err(ManageError::Host(format!(
            "the VM is {:?}, expected \"postmigrate\": it is not in doubt, so nothing is done",
            state.status
        )));
    }
    match decision {
        // A destination QEMU that is about to end may still hold the locks of the images.
        Decision::Resume => resume(&mut vm, timeout)?,
        Decision::Discard => vm.quit()?,
    }
    Ok(())
}
