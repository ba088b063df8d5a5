//! What a process does before it holds pages of a guest: no core dump will show them, and no program it might start gets more rights than it has.

use anyhow::{Context, Result};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::set_no_new_privs;

use crate::exit::{Exit, Failure};

/// Keeps what this process holds to itself. To be called while it has one thread: what is said of threads holds for those that it starts later.
///
/// * Nothing dumps it: neither the kernel when it crashes, into a file or to a program that collects dumps, nor another process of the same user, which
///   could otherwise trace it and read its memory. Root still can. That is asked of the whole process because pages are in buffers everywhere; guest memory
///   and the history are left out of dumps besides, see `madvise` there.
/// * The size of core files is limited to nothing, should something make it dumpable again.
/// * No program that it starts gains rights by being set-user-ID.
///
/// # Errors
///
/// If the kernel does not do it.
pub fn keep_private() -> Result<()> {
    // rustix looks into /proc/self/auxv the first time, if the kernel is older than 6.4. Afterwards that belongs to root.
    let _ = rustix::param::clock_ticks_per_second();
    let refused = || Failure::new(Exit::Environment, "cannot keep guest memory out of core dumps");
    set_dumpable_behavior(DumpableBehavior::NotDumpable).with_context(refused)?;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }).with_context(refused)?;
    set_no_new_privs(true).with_context(|| Failure::new(Exit::Environment, "cannot give up new rights"))
}
