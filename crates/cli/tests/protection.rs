//! What processes that hold pages of guests have given up: core dumps, and system calls.

use std::io::{BufRead, BufReader};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use pagewarp_cli::args::SeccompChoice;
use pagewarp_cli::protect::keep_private;
use pagewarp_cli::sandbox::{Computing, Process, enter};
use rustix::fs::{CWD, Mode, mkfifoat};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};

const PROGRAM: &str = env!("CARGO_BIN_EXE_pagewarp");
/// Says which test a child is to go on with, in a sandbox.
const INSIDE: &str = "PAGEWARP_TEST_INSIDE";

/// Runs this test once more in a process of its own, where `is_inside` is true.
fn inside(test: &str, what: &str) -> ExitStatus {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", test, "--test-threads=1"]).env(INSIDE, what);
    child.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap()
}

/// What the child is to do.
fn told() -> Option<String> {
    std::env::var(INSIDE).ok()
}

/// Starts another program in this process.
fn start_program() -> Option<i32> {
    Command::new("/bin/true").exec().raw_os_error()
}

#[test]
fn what_is_hostile_kills_a_bridge_and_fails_in_a_vm() {
    let Some(what) = told() else {
        for computing in ["cpu", "gpu"] {
            let status =
                inside("what_is_hostile_kills_a_bridge_and_fails_in_a_vm", &format!("bridge {computing}"));
            assert_eq!(status.signal(), Some(Signal::SYS.as_raw()), "{computing}: {status}");
            let status =
                inside("what_is_hostile_kills_a_bridge_and_fails_in_a_vm", &format!("vm {computing}"));
            assert!(status.success(), "{computing}: {status}");
        }
        return;
    };
    let process = if what.starts_with("bridge") { Process::Bridge } else { Process::Vm };
    let computing = if what.ends_with("cpu") { Computing::Cpu } else { Computing::Gpu };
    // It dies as after a crash.
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }).unwrap();
    enter(SeccompChoice::On, process, computing).unwrap();
    assert_eq!(start_program(), Some(libc::ENOSYS));
}

/// Threads that there were before are held to it as well, and so are those that come later.
#[test]
fn what_is_unknown_fails_in_all_threads() {
    if told().is_none() {
        let status = inside("what_is_unknown_fails_in_all_threads", "");
        assert!(status.success(), "{status}");
        return;
    }
    // A call that is neither hostile nor ever made.
    let make_pipe = || mkfifoat(CWD, "/does/not/exist", Mode::empty());
    let (go, wait) = std::sync::mpsc::channel();
    let before = std::thread::spawn(move || {
        wait.recv().unwrap();
        make_pipe()
    });
    enter(SeccompChoice::On, Process::Bridge, Computing::Cpu).unwrap();
    go.send(()).unwrap();
    let after = std::thread::spawn(make_pipe);
    for result in [before.join().unwrap(), after.join().unwrap(), make_pipe()] {
        assert_eq!(result.unwrap_err(), rustix::io::Errno::NOSYS);
    }
    // No other program, no more rights, no other kinds of sockets.
    assert!(Command::new("/bin/true").status().is_err());
    let raw = rustix::net::socket(rustix::net::AddressFamily::PACKET, rustix::net::SocketType::RAW, None);
    assert_eq!(raw.unwrap_err(), rustix::io::Errno::NOSYS);
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    assert!(status.contains("NoNewPrivs:\t1\n"), "{status}");
}

#[test]
fn a_process_that_only_logs_or_does_nothing_can_do_all() {
    let Some(what) = told() else {
        for what in ["log", "off"] {
            let status = inside("a_process_that_only_logs_or_does_nothing_can_do_all", what);
            assert!(status.success(), "{what}: {status}");
        }
        return;
    };
    let choice = if what == "log" { SeccompChoice::Log } else { SeccompChoice::Off };
    enter(choice, Process::Bridge, Computing::Cpu).unwrap();
    assert!(Command::new("/bin/true").status().unwrap().success());
}

/// A process that waits, with the largest core dump allowed that may be.
fn waiting(program: &str, words: &[&str], dir: &Path) -> Child {
    let mut child = Command::new(program);
    child.args(words).current_dir(dir).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    child.spawn().unwrap()
}

fn abort(mut child: Child) -> ExitStatus {
    kill_process(rustix::process::Pid::from_child(&child), Signal::ABORT).unwrap();
    child.wait().unwrap()
}

#[test]
fn a_bridge_that_crashes_leaves_no_core_dump() {
    let dir = tempfile::tempdir().unwrap();
    let mut limit = getrlimit(Resource::Core);
    limit.current = limit.maximum;
    setrlimit(Resource::Core, limit).unwrap();
    // Whether anything is dumped here at all.
    let dumps = abort(waiting("/bin/cat", &[], dir.path())).core_dumped();
    if !dumps {
        eprintln!("NOT RUN: this host dumps nothing (a limit, or kernel.core_pattern)");
    }
    let place = dir.path().join("socket");
    let words = ["bridge", "destination", "--listen", "127.0.0.1:0", "--backend", "cpu", "--unix"];
    let mut bridge = waiting(PROGRAM, &[&words[..], &[place.to_str().unwrap()]].concat(), dir.path());
    let mut line = String::new();
    BufReader::new(bridge.stderr.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert!(line.starts_with("waiting for a source bridge"), "{line}");
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", bridge.id())).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().filter(|&word| word == "0").count(), 2, "{core}");
    let status = std::fs::read_to_string(format!("/proc/{}/status", bridge.id())).unwrap();
    for (what, value) in [("NoNewPrivs:", "1"), ("Seccomp:", "2")] {
        let line = status.lines().find_map(|line| line.strip_prefix(what)).unwrap();
        assert_eq!(line.trim(), value, "{what}");
    }
    let status = abort(bridge);
    assert_eq!((status.signal(), status.core_dumped()), (Some(Signal::ABORT.as_raw()), false));
}

/// Not only because of the limit.
#[test]
fn a_process_that_keeps_private_cannot_be_dumped() {
    if told().is_none() {
        let status = inside("a_process_that_keeps_private_cannot_be_dumped", "");
        assert!(status.success(), "{status}");
        return;
    }
    keep_private().unwrap();
    let behavior = rustix::process::dumpable_behavior().unwrap();
    assert_eq!(behavior, rustix::process::DumpableBehavior::NotDumpable);
}
