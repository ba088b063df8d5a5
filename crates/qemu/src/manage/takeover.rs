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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::manage::fake::{Reply, with_monitor};

    fn state(status: &str) -> Reply {
        Reply::Return(json!({ "status": status, "running": status == "running" }))
    }

    #[test]
    fn a_vm_that_does_not_run_at_once_is_tried_again() {
        let mut asked = 0;
        let reply = move |command: &str| {
            assert_eq!(command, "cont");
            asked += 1;
            let at = json!({ "seconds": 3, "microseconds": 4 });
            if asked < 3 {
                return Reply::Refused;
            }
            Reply::After(json!({ "event": "RESUME", "timestamp": at }), json!({}))
        };
        with_monitor(reply, |vm| {
            assert_eq!(take_over(vm, true).unwrap(), Running { resumed_at_us: Some(3_000_004) });
        });
    }

    #[test]
    fn a_vm_that_runs_without_a_word_is_seen() {
        let reply = |command: &str| if command == "cont" { Reply::Silence } else { state("running") };
        with_monitor(reply, |vm| {
            assert_eq!(take_over(vm, true).unwrap(), Running { resumed_at_us: None });
        });
    }

    #[test]
    fn a_paused_vm_is_not_told_anything() {
        let mut states = ["inmigrate", "inmigrate", "paused"].into_iter();
        let reply = move |command: &str| {
            assert_eq!(command, "query-status");
            state(states.next().expect("it is there"))
        };
        with_monitor(reply, |vm| {
            assert_eq!(take_over(vm, false).unwrap(), Running { resumed_at_us: None });
        });
    }
}
