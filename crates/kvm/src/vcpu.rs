//! A vCPU's thread.

use std::io;
use std::os::raw::{c_int, c_void};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};

use kvm_ioctls::{VcpuExit, VcpuFd};
use rustix::process::{Pid, setpriority_process};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::devices::Devices;
use crate::error::Error;
use crate::gate::{ExitReason, Gate};

/// A vCPU: whoever holds the lock uses it. Its thread holds it while it is inside the gate.
pub(crate) type SharedVcpu = Arc<Mutex<VcpuFd>>;

pub(crate) fn lock(vcpu: &SharedVcpu) -> MutexGuard<'_, VcpuFd> {
    vcpu.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The handle on a vCPU's thread.
pub(crate) struct VcpuThread {
    handle: Option<JoinHandle<()>>,
    /// The thread's id, once it has started.
    tid: Arc<OnceLock<Pid>>,
    /// The priority it was given.
    nice: Option<i32>,
}

impl VcpuThread {
    /// Starts the thread; it waits at the gate.
    pub(crate) fn start(
        index: usize,
        vcpu: SharedVcpu,
        gate: Arc<Gate>,
        devices: Arc<Devices>,
        nice: Option<i32>,
    ) -> Result<VcpuThread, Error> {
        install_kick_handler()?;
        let tid = Arc::new(OnceLock::new());
        let own_tid = tid.clone();
        let body = move || {
            own_tid.get_or_init(rustix::thread::gettid);
            if let Some(nice) = nice
                && let Err(e) = setpriority_process(None, nice)
            {
                tracing::warn!("vCPU {index}: cannot set the priority to {nice}: {e}");
            }
            while gate.enter() {
                let outcome = run(&mut lock(&vcpu), &gate, &devices);
                if let Err(reason) = outcome {
                    gate.exit(reason);
                }
                gate.leave();
            }
        };
        let handle = thread::Builder::new()
            .name(format!("vcpu{index}"))
            .spawn(body)
            .map_err(|e| Error::Host(format!("vCPU {index}: cannot start a thread: {e}")))?;
        Ok(VcpuThread { handle: Some(handle), tid, nice })
    }

    /// Takes a low priority away for as long as the vCPU is to come out: a thread that others keep from running can't stop either, and the
    /// guest would be paused for longer. Needs the privilege to raise priorities; without it nothing changes.
    pub(crate) fn hurry(&self, hurry: bool) {
        if let (Some(nice @ 1..), Some(&tid)) = (self.nice, self.tid.get())
            && let Err(e) = setpriority_process(Some(tid), if hurry { 0 } else { nice })
        {
            tracing::debug!("cannot change the priority of a vCPU thread: {e}");
        }
    }

    /// Brings the vCPU out of guest mode, if it is there. A kick that comes between the vCPU's look at the gate and its entry into guest
    /// mode is lost, so whoever waits kicks again.
    pub(crate) fn kick(&self) {
        if let Some(handle) = &self.handle
            && !handle.is_finished()
            && let Err(e) = handle.kill(SIGRTMIN())
        {
            tracing::warn!("cannot signal a vCPU thread: {e}");
        }
    }

    /// Waits for the end of the thread, after the gate has been closed for good.
    pub(crate) fn join(&mut self) {
        if let Some(handle) = self.handle.take()
            && handle.join().is_err()
        {
            tracing::error!("a vCPU thread panicked");
        }
    }
}

/// The signal only has to interrupt the system call.
extern "C" fn on_kick(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {}

fn install_kick_handler() -> Result<(), Error> {
    static INSTALLED: OnceLock<Result<(), String>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| register_signal_handler(SIGRTMIN(), on_kick).map_err(|e| e.to_string()))
        .clone()
        .map_err(|e| Error::Host(format!("cannot install a signal handler: {e}")))
}

/// Runs until the gate closes, and leaves the vCPU in a state that can be saved.
fn run(vcpu: &mut VcpuFd, gate: &Gate, devices: &Devices) -> Result<(), ExitReason> {
    while !gate.is_closed() {
        step(vcpu, devices)?;
    }
    // An I/O exit is finished by the next entry: its result goes to the guest's registers only then. With `immediate_exit` set, KVM
    // does that and returns before the guest executes anything.
    vcpu.set_kvm_immediate_exit(1);
    let outcome = loop {
        match step(vcpu, devices) {
            Ok(Step::Interrupted) => break Ok(()),
            Ok(Step::Handled) => {}
            Err(reason) => break Err(reason),
        }
    };
    vcpu.set_kvm_immediate_exit(0);
    outcome
}

enum Step {
    /// An exit was handled; the guest has to be entered again for it to be complete.
    Handled,
    /// A signal or `immediate_exit`; nothing is under way.
    Interrupted,
}

/// Enters the guest once.
fn step(vcpu: &mut VcpuFd, devices: &Devices) -> Result<Step, ExitReason> {
    match vcpu.run() {
        Ok(VcpuExit::IoOut(port, data)) => devices.write(port, data),
        Ok(VcpuExit::IoIn(port, data)) => devices.read(port, data),
        Ok(VcpuExit::MmioRead(_, data)) => data.fill(0xff),
        Ok(VcpuExit::MmioWrite(..)) => {}
        // With the interrupt controllers in the kernel, halts stay there; these exits mean that there is nothing to do here.
        Ok(VcpuExit::Hlt | VcpuExit::IrqWindowOpen | VcpuExit::IoapicEoi(_)) => {}
        Ok(VcpuExit::Intr) => return Ok(Step::Interrupted),
        Ok(VcpuExit::Shutdown) => return Err(ExitReason::Shutdown),
        Ok(VcpuExit::SystemEvent(kvm_bindings::KVM_SYSTEM_EVENT_RESET, _)) => return Err(ExitReason::Reset),
        Ok(VcpuExit::SystemEvent(..)) => return Err(ExitReason::Shutdown),
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            return Err(ExitReason::Failed(format!(
                "KVM could not enter the guest on CPU {cpu}: reason {reason:#x}"
            )));
        }
        Ok(VcpuExit::InternalError) => return Err(internal_error(vcpu)),
        Ok(other) => return Err(ExitReason::Failed(format!("unexpected exit {other:?}"))),
        Err(e) => match io::Error::from_raw_os_error(e.errno()) {
            e if e.kind() == io::ErrorKind::Interrupted => return Ok(Step::Interrupted),
            e if e.kind() == io::ErrorKind::WouldBlock => {}
            e => return Err(ExitReason::Failed(format!("KVM_RUN: {e}"))),
        },
    }
    Ok(Step::Handled)
}

/// Says where the guest was when KVM gave up: mostly at an instruction that it does not emulate.
fn internal_error(vcpu: &VcpuFd) -> ExitReason {
    let place = match vcpu.get_regs() {
        Ok(regs) => format!("at rip {:#x}", regs.rip),
        Err(e) => format!("at an unknown place ({e})"),
    };
    ExitReason::Failed(format!(
        "KVM internal error {place}; most likely an instruction that it cannot emulate"
    ))
}
