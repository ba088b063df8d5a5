//! `pagewarp` processes without a VM of their own, and what stands for QEMU at both ends of a bridge.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use pagewarp_testkit::rng::SplitMix64;

use crate::support::process::Process;
use crate::support::qemu::text;
use crate::support::{PATIENCE, PROGRAM};

/// Starts `pagewarp`; its files in `dir` have this name.
pub(crate) fn start(dir: &Path, name: &str, words: &[&str]) -> Process {
    start_by(dir, name, &[PROGRAM], words)
}

/// The same, by a command that becomes the program in the end.
pub(crate) fn start_by(dir: &Path, name: &str, by: &[&str], words: &[&str]) -> Process {
    let mut command = Command::new(by[0]);
    command.args(&by[1..]).args(words);
    Process::start(command, &dir.join(name))
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
pub(crate) fn source_bridge(dir: &Path, name: &str, to: SocketAddr, options: &[&str]) -> (Process, PathBuf) {
    let near = dir.join(format!("{name}.sock"));
    let to = to.to_string();
    let words = ["bridge", "source", "--unix", text(&near), "--connect", &to, "--backend", "cpu"];
    let mut source = start(dir, name, &[&words[..], options].concat());
    source.wait_line("that it listens", |line| line.starts_with("waiting for QEMU"));
    (source, near)
}

/// A destination bridge for what stands for QEMU, and where it listens.
pub(crate) fn destination_bridge(
    dir: &Path,
    by: &[&str],
    far: &FakeDestination,
    options: &[&str],
) -> (Process, SocketAddr) {
    let words =
        ["bridge", "destination", "--unix", far.path(), "--listen", "127.0.0.1:0", "--backend", "cpu"];
    let mut destination = start_by(dir, "destination", by, &[&words[..], options].concat());
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
