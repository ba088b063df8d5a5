//! A disk that is full takes no logs, reports and traces, and costs nothing else.

mod support;

use std::fs;
use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use pagewarp_cli::demo::machine::{Extras, Machine};
use pagewarp_cli::exit::Exit;
use pagewarp_cli::units::ByteSize;

use support::{PROGRAM, Rig, have_kvm};

fn full() -> File {
    File::options().write(true).open("/dev/full").unwrap()
}

#[test]
fn a_command_that_cannot_say_what_is_wrong_says_it_with_its_exit_code() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(PROGRAM);
    command.arg("--run-dir").arg(dir.path()).args(["-vvv", "cancel", "nobody"]).stderr(full());
    assert_eq!(command.status().unwrap().code(), Some(Exit::NoSuchVm as i32));
}

#[test]
fn a_vm_moves_though_nothing_can_be_written_about_it() {
    if !have_kvm("a_vm_moves_though_nothing_can_be_written_about_it") {
        return;
    }
    let mut rig = Rig::boot(ByteSize(64 << 20), 2_000);
    let program = rig.dir().join("program");
    fs::write(&program, format!("#!/bin/sh\nexec {PROGRAM} -vv \"$@\" 2>/dev/full\n")).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    // To a process that cannot say anything, and on from there.
    for by in [program.as_path(), program.as_path(), PROGRAM.as_ref()] {
        let (there, address) = rig.receiver_by(by, &Extras::args(["--trace", "/dev/full"])).unwrap();
        let sent = Command::new(PROGRAM)
            .arg("--run-dir")
            .arg(rig.here.run_dir())
            .args(["send", Machine::NAME, "--to", &address, "--verify", "--json", "--trace", "/dev/full"])
            .stdin(Stdio::null())
            .stdout(full())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&sent.stderr);
        assert_eq!(sent.status.code(), Some(0), "{said}");
        assert!(said.contains("its report cannot be printed"), "{said}");
        assert!(said.contains("cannot write the trace"), "{said}");
        rig.moved(there);
    }
}
