//! The destination QEMU, from the moment in which this side has the right to run the VM.
//!
//! From then on nothing here ends that QEMU: the VM may run in it, whatever goes wrong with the monitor, and the source never runs it by itself.

use std::time::{Duration, Instant, SystemTime};

use crate::protocol::control::Running;
use crate::qmp::{QmpError, Vm};

/// How long the VM may take until it runs. The source waits for longer.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long QEMU is waited for at a time.
const ANSWER: Duration = Duration::from_secs(5);
/// How often a QEMU that was told to run the VM is looked at.
const POLL: Duration = Duration::from_millis(2);
/// How often it is asked, in case it does not tell by itself.
const ASK: Duration = Duration::from_secs(1);
/// How often a VM that QEMU does not run is tried again.
const RETRY: Duration = Duration::from_millis(200);

/// Takes the VM over: runs it, or, if `run` is not set, leaves it paused. An error says that QEMU never told that it has it.
pub(super) fn take_over(vm: &mut Vm, run: bool) -> Result<Running, QmpError> {
    vm.qmp().set_timeout(ANSWER);
    let until = Instant::now() + PATIENCE;
    if run { run_vm(vm, until) } else { keep_paused(vm, until) }
}

fn run_vm(vm: &mut Vm, until: Instant) -> Result<Running, QmpError> {
    loop {
        match vm.cont() {
            // A QEMU that is slow to answer may run it nevertheless, which is seen below.
            Ok(()) | Err(QmpError::TimedOut { .. }) => break,
            // The source may have to let go of the locks of the images, which takes a moment where they are on a network.
            Err(QmpError::Refused { .. }) if Instant::now() < until => std::thread::sleep(RETRY),
            Err(error) => return Err(error),
        }
    }
    let mut asked = Instant::now();
    loop {
        if let Some(event) = vm.next_event(POLL)?
            && event.name == "RESUME"
        {
            let since = event.at.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok());
            return Ok(Running { resumed_at_us: since.map(|since| since.as_micros() as u64) });
        }
        let is_over = Instant::now() >= until;
        if is_over || asked.elapsed() >= ASK {
            match vm.status() {
                Ok(state) if state.running => return Ok(Running { resumed_at_us: None }),
                Ok(_) | Err(QmpError::TimedOut { .. }) => {}
                Err(error) => return Err(error),
            }
            asked = Instant::now();
        }
        if is_over {
            return Err(QmpError::TimedOut { command: "cont".into(), waited: PATIENCE });
        }
    }
}

/// A VM that was paused stays so, in the state that came with it. It is there once QEMU has loaded it.
fn keep_paused(vm: &mut Vm, until: Instant) -> Result<Running, QmpError> {
    loop {
        match vm.status() {
            Ok(state) if state.status != "inmigrate" => return Ok(Running { resumed_at_us: None }),
            Ok(_) | Err(QmpError::TimedOut { .. }) if Instant::now() < until => std::thread::sleep(RETRY),
            Ok(_) => return Err(QmpError::TimedOut { command: "query-status".into(), waited: PATIENCE }),
            Err(error) => return Err(error),
        }
    }
}
