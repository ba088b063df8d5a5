//! Boot, serial port, pause and the ways a VM ends.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{ask, booted, config, have_kvm};
use pagewarp_kvm::{ExitReason, KernelSource, MachineConfig, Vm};

const WAIT: Duration = Duration::from_secs(60);

#[test]
fn boots_and_talks_over_the_serial_port() {
    if !have_kvm() {
        return;
    }
    let vm = booted(&config("boot"));
    assert_eq!(ask(&vm, b'a'), "a");
    assert_eq!(ask(&vm, b'n'), "1");
    assert_eq!(ask(&vm, b'n'), "2");
    assert_eq!(ask(&vm, b'e'), "E", "an unconnected port must read as all ones");
}

#[test]
fn a_paused_guest_does_nothing_and_goes_on_when_resumed() {
    if !have_kvm() {
        return;
    }
    let vm = booted(&MachineConfig { vcpus: 4, ..config("pause") });
    let mut typed = 0;
    for _ in 0..50 {
        // Enough to have it in the middle of something.
        typed += vm.type_serial(&[b'n'; 64]).unwrap();
        vm.pause().unwrap();
        let before = vm.serial_counters();
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(vm.serial_counters(), before);
        vm.resume().unwrap();
    }
    // The first line was there before.
    common::wait_for("all answers", || vm.serial_counters().lines as usize == 1 + typed);
    assert_eq!(ask(&vm, b'n'), ((typed + 1) % 8).to_string());
}

#[test]
fn reset_shutdown_and_stop_end_the_vm_with_their_reasons() {
    if !have_kvm() {
        return;
    }
    for (command, reason) in [(b'r', ExitReason::Reset), (b'x', ExitReason::Shutdown)] {
        let vm = booted(&config("end"));
        vm.type_serial(&[command]).unwrap();
        assert_eq!(vm.wait_exit(WAIT), Some(reason));
        assert!(vm.pause().unwrap_err().to_string().contains("has ended"));
        assert!(vm.resume().is_err());
    }
    let vm = booted(&config("end"));
    assert_eq!(vm.wait_exit(Duration::from_millis(1)), None);
    vm.stop();
    assert_eq!(vm.wait_exit(WAIT), Some(ExitReason::Stopped));
}

#[test]
fn what_cannot_be_booted_is_refused_in_one_line() {
    if !have_kvm() {
        return;
    }
    let refused = |config: MachineConfig| {
        let message = Vm::boot(&config, None).err().expect("it must not boot").to_string();
        assert!(!message.contains('\n'), "{message}");
        message
    };
    let good = config("refused");
    let missing = KernelSource::Path("/nowhere/vmlinux".into());
    assert!(
        refused(MachineConfig { kernel: missing, ..good.clone() })
            .contains("kernel /nowhere/vmlinux: No such file")
    );
    let junk = KernelSource::Bytes(Arc::from(&b"#!/bin/sh\n"[..]));
    assert!(
        refused(MachineConfig { kernel: junk, ..good.clone() })
            .contains("neither an ELF image nor a bzImage")
    );
    let without_note: Vec<u8> =
        common::test_guest().iter().map(|&b| if b == b'X' { b'Y' } else { b }).collect();
    let without_note = KernelSource::Bytes(without_note.into());
    assert!(refused(MachineConfig { kernel: without_note, ..good.clone() }).contains("PVH"));
    let truncated = KernelSource::Bytes(common::test_guest()[..200].into());
    assert!(refused(MachineConfig { kernel: truncated, ..good.clone() }).starts_with("kernel:"));
    assert!(refused(MachineConfig { memory_bytes: 2 << 40, ..good.clone() }).contains("MiB available"));
    assert!(
        refused(MachineConfig { cmdline: "x".repeat(5000), ..good.clone() }).starts_with("command line:")
    );
    assert!(refused(MachineConfig { name: "a/b".into(), ..good.clone() }).starts_with("name"));
    assert!(
        refused(MachineConfig { initrd: Some("/nowhere/initrd".into()), ..good })
            .starts_with("initrd /nowhere/initrd:")
    );
}
