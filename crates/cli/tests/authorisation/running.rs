//! `pagewarp` processes without a VM of their own, and what stands for QEMU at both ends of a bridge.

use std::fs::File;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use pagewarp_testkit::rng::SplitMix64;
use rustix::process::Signal;

use crate::support::process::signal;
use crate::support::qemu::text;
use crate::support::{PATIENCE, PROGRAM, Sent, wait_for};

/// A `pagewarp` process; killed when dropped.
pub(crate) struct Running {
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Running {
    /// Starts it; its files in `dir` have this name.
    pub(crate) fn start(dir: &Path, name: &str, words: &[&str]) -> Running {
        Running::start_by(dir, name, &[PROGRAM], words)
    }

    /// The same, by a command that becomes the program in the end.
    pub(crate) fn start_by(dir: &Path, name: &str, by: &[&str], words: &[&str]) -> Running {
        let (stdout, stderr) = (dir.join(format!("{name}.out")), dir.join(format!("{name}.err")));
        let child = Command::new(by[0])
            .args(&by[1..])
            .args(words)
            .stdin(Stdio::null())
            .stdout(File::create(&stdout).unwrap())
            .stderr(File::create(&stderr).unwrap())
            .spawn()
            .unwrap();
        Running { child, stdout, stderr }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    pub(crate) fn stderr(&self) -> String {
        std::fs::read_to_string(&self.stderr).unwrap()
    }

    /// Waits for a whole line on standard error.
    pub(crate) fn wait_line(&mut self, what: &str, wanted: impl Fn(&str) -> bool) -> String {
        wait_for(what, || {
            let ended = self.has_ended();
            let stderr = self.stderr();
            let mut whole = stderr.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
            let found = whole.find(|line| wanted(line)).map(str::to_owned);
            assert!(found.is_some() || !ended, "it ended without {what}: {stderr}");
            found
        })
    }

    /// Waits until so many reports have been printed, a line of JSON each.
    pub(crate) fn wait_reports(&self, count: usize) {
        wait_for("a report", || {
            let printed = std::fs::read_to_string(&self.stdout).unwrap();
            (printed.lines().count() >= count).then_some(())
        });
    }

    /// Where it listens for sources.
    pub(crate) fn listening(&mut self) -> SocketAddr {
        let line = self.wait_line("where it listens", |line| line.starts_with("waiting for a "));
        line.split_whitespace().find_map(|word| word.parse().ok()).unwrap()
    }

    pub(crate) fn stop(self) -> Sent {
        signal(self.pid(), Signal::TERM);
        self.wait()
    }

    pub(crate) fn wait(mut self) -> Sent {
        let status = wait_for("pagewarp to end", || self.child.try_wait().unwrap());
        let stdout = std::fs::read_to_string(&self.stdout).unwrap();
        Sent { code: status.code(), stdout, stderr: self.stderr() }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Fails only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A stream of QEMU that opens the return path, and has nothing in it but a description of the machine.
fn stream() -> Vec<u8> {
    const BEGIN: &[u8] = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc\x08\0\x01\0\0\x08\0\x02\0\x04\0\0\0\x01\0\x06";
    let mut description = vec![0; 200_000];
    SplitMix64::new(1).fill(&mut description);
    [BEGIN, &(description.len() as u32).to_be_bytes(), &description].concat()
}

/// What a destination QEMU says when it has loaded a VM.
const LOADED: &[u8] = &[0, 1, 0, 4, 0, 0, 0, 0];

/// What stands for a destination QEMU, at the place of a bridge.
pub(crate) struct FakeDestination {
    pub(crate) path: PathBuf,
    listener: UnixListener,
}

impl FakeDestination {
    pub(crate) fn listen(path: PathBuf) -> FakeDestination {
        FakeDestination { listener: UnixListener::bind(&path).unwrap(), path }
    }

    pub(crate) fn path(&self) -> &str {
        text(&self.path)
    }

    /// Starts what stands for a source QEMU towards the source bridge at `near`. It has not sent everything before [`Passing::finish`].
    pub(crate) fn begin(&self, near: &Path) -> Passing {
        let mut source = UnixStream::connect(near).unwrap();
        source.set_read_timeout(Some(PATIENCE)).unwrap();
        let all = stream();
        source.write_all(&all[..1000]).unwrap();
        let (mut far, _) = self.listener.accept().unwrap();
        far.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut first = vec![0; 40];
        far.read_exact(&mut first).unwrap();
        Passing { source, far, all, read: first.len() }
    }
}

/// A migration from nobody to nobody, which is under way.
pub(crate) struct Passing {
    source: UnixStream,
    far: UnixStream,
    all: Vec<u8>,
    read: usize,
}

impl Passing {
    pub(crate) fn finish(self) {
        let Passing { mut source, mut far, all, read } = self;
        let (rest, missing) = (all[1000..].to_vec(), all.len() - read);
        let reading = thread::spawn(move || {
            let mut bytes = vec![0; missing];
            far.read_exact(&mut bytes).unwrap();
            far.write_all(LOADED).unwrap();
            // Until the source ends it.
            let _ = far.read_to_end(&mut Vec::new());
            bytes
        });
        source.write_all(&rest).unwrap();
        source.read_exact(&mut [0; LOADED.len()]).unwrap();
        drop(source);
        assert!(reading.join().unwrap() == all[read..], "other bytes than were sent");
    }
}

/// A source bridge that waits for something that stands for QEMU.
pub(crate) fn source_bridge(dir: &Path, name: &str, to: SocketAddr, options: &[&str]) -> (Running, PathBuf) {
    let near = dir.join(format!("{name}.sock"));
    let to = to.to_string();
    let words = ["bridge", "source", "--unix", text(&near), "--connect", &to, "--backend", "cpu"];
    let mut source = Running::start(dir, name, &[&words[..], options].concat());
    source.wait_line("that it listens", |line| line.starts_with("waiting for QEMU"));
    (source, near)
}

/// A destination bridge for what stands for QEMU, and where it listens.
pub(crate) fn destination_bridge(
    dir: &Path,
    by: &[&str],
    far: &FakeDestination,
    options: &[&str],
) -> (Running, SocketAddr) {
    let words =
        ["bridge", "destination", "--unix", far.path(), "--listen", "127.0.0.1:0", "--backend", "cpu"];
    let mut destination = Running::start_by(dir, "destination", by, &[&words[..], options].concat());
    let address = destination.listening();
    (destination, address)
}

/// Makes certificates for 127.0.0.1, also where there are some.
pub(crate) fn certs(dir: &Path) -> String {
    let words = ["--host", "127.0.0.1", "--client", "alice", "--days", "2", "--force"];
    let made = Command::new(PROGRAM).arg("certs").arg(dir).args(words).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    text(dir).to_owned()
}
