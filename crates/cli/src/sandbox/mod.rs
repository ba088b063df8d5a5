//! The system calls that a process keeps for itself once it is set up: a filter (seccomp) for all threads, those that there are and those to come.
//!
//! There are two lists, both in `calls`, and a filter for each. What is on the list of hostile calls nobody here ever makes, nor does a driver of a
//! GPU. What is not on the list of allowed calls is not made as far as we know, which is not for certain: a newer libc may
//! make a call that we have never seen. What becomes of either depends on what the process has to lose.
//!
//! | process | hostile | neither hostile nor allowed |
//! |---|---|---|
//! | a bridge | kills it: QEMU still has the VM | fails |
//! | has a VM | fails: killing it would kill the VM | fails |
//!
//! What fails says "function not implemented", because whoever makes a new call must be able to go without it on an older kernel, and libc does. With a GPU only the first filter is
//! used: nobody knows what its driver needs, in which version.

mod calls;

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use pagewarp_codec::Backend;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, SeccompRule, TargetArch};

use crate::args::SeccompChoice;
use crate::exit::{Exit, Failure};

/// What the process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    /// It stands between a QEMU and the network. If it dies, a migration fails or is in doubt, and the VM is with QEMU.
    Bridge,
    /// It has a VM, or will have one. If it dies, so does the VM.
    Vm,
}

/// Who computes in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Computing {
    /// The CPU, now and later.
    Cpu,
    /// A GPU, perhaps later.
    Gpu,
}

impl Computing {
    /// Who computes in a process that has this backend and will not take another.
    pub fn with(backend: &dyn Backend) -> Computing {
        if backend.is_cpu() { Computing::Cpu } else { Computing::Gpu }
    }
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Gives up all system calls that this process does not need, for good.
///
/// # Errors
///
/// If the kernel has no such filters or does not take one.
pub fn enter(choice: SeccompChoice, process: Process, computing: Computing) -> Result<()> {
    if choice == SeccompChoice::Off {
        tracing::debug!("seccomp: off");
        return Ok(());
    }
    let or_log = |action| if choice == SeccompChoice::Log { SeccompAction::Log } else { action };
    let fail = SeccompAction::Errno(libc::ENOSYS as u32);
    let hostile = match process {
        Process::Bridge => SeccompAction::KillProcess,
        Process::Vm => fail.clone(),
    };
    // Of several filters the kernel follows the strictest one. This one comes first: the other allows no more filters.
    install(calls::hostile(), SeccompAction::Allow, or_log(hostile))?;
    if computing == Computing::Cpu {
        install(calls::allowed(process)?, or_log(fail), SeccompAction::Allow)?;
    }
    tracing::debug!(?choice, ?process, ?computing, "seccomp: the filter is installed");
    Ok(())
}

/// What happens to calls that no rule fits, and to those that one fits.
fn install(rules: Rules, otherwise: SeccompAction, fits: SeccompAction) -> Result<()> {
    let refused =
        || Failure::new(Exit::Environment, "cannot give up system calls (seccomp); --seccomp off keeps them");
    let filter = SeccompFilter::new(rules, otherwise, fits, TargetArch::x86_64).with_context(refused)?;
    let program = BpfProgram::try_from(filter).with_context(refused)?;
    seccompiler::apply_filter_all_threads(&program).with_context(refused)
}
