//! What the tests of both bridges share: the processes, and a peer that speaks their protocol as badly as it is told to.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pagewarp_codec::EncodingSet;
use pagewarp_engine::transport::Stream;
use pagewarp_qemu::protocol::frame::{FrameReader, FrameWriter, HEADER_LEN, Kind};
use pagewarp_qemu::protocol::hello::{Hello, Purpose, Terms};
use tempfile::TempDir;

use crate::BOUND;
use crate::support::process::peak_bytes;
use crate::support::{PATIENCE, PROGRAM, wait_for};

/// What a bridge may use for all of these, with the program itself, in bytes.
const MEMORY_BOUND: u64 = 96 << 20;

pub(crate) const TERMS: Terms =
    Terms { encodings: EncodingSet::ALL, zstd: true, verify: false, direct: false, history_slots: 10 };

/// A `pagewarp bridge` that takes one migration after another. Killed when dropped.
pub(crate) struct Bridge {
    child: Child,
    log: PathBuf,
    /// How much of the log has been read.
    read: usize,
    dir: TempDir,
}

impl Bridge {
    /// Runs one with these words, and what `place` names in its directory as the socket to QEMU.
    pub(crate) fn start(words: &[&str], place: &str, options: &[&str]) -> Bridge {
        let dir = tempfile::Builder::new().prefix("pagewarp-test-").tempdir().unwrap();
        let log = dir.path().join("log");
        let child = Command::new(PROGRAM)
            .arg("bridge")
            .args(words)
            .arg("--unix")
            .arg(dir.path().join(place))
            .args(["--backend", "cpu", "--threads", "2", "--history", "1M"])
            .args(options)
            .stdin(Stdio::null())
            .stdout(File::create(dir.path().join("out")).unwrap())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        Bridge { child, log, read: 0, dir }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Waits for the report of a migration that has succeeded.
    pub(crate) fn report(&self) -> String {
        let text = || std::fs::read_to_string(self.path("out")).unwrap();
        wait_for("a report", || Some(text()).filter(|text| !text.is_empty()))
    }

    /// The next line of the log that begins like this, without that.
    pub(crate) fn line(&mut self, begin: &str) -> String {
        let (log, read) = (self.log.clone(), &mut self.read);
        let child = &mut self.child;
        wait_for(&format!("a line that begins with `{begin}`"), || {
            let text = std::fs::read_to_string(&log).unwrap();
            for line in text[*read..].split_inclusive('\n') {
                let Some(whole) = line.strip_suffix('\n') else { break };
                *read += line.len();
                assert!(!whole.contains("panicked"), "{text}");
                if let Some(rest) = whole.strip_prefix(begin) {
                    return Some(rest.to_owned());
                }
            }
            assert!(child.try_wait().unwrap().is_none(), "it has ended: {text}");
            None
        })
    }

    /// Waits for the end of a migration, which must come soon, and says why it failed.
    pub(crate) fn failed(&mut self, case: &str, since: Instant) -> String {
        let line = self.line("the migration failed: ");
        crate::receiver::soon(since, BOUND, case);
        println!("{case}: {line}");
        assert!(!line.contains('\u{1b}'), "{case}: control characters of the peer reach the terminal");
        line
    }

    pub(crate) fn check_memory(&self) {
        let peak = peak_bytes(self.child.id());
        println!("the bridge used up to {} MiB", peak >> 20);
        assert!(peak > 0 && peak <= MEMORY_BOUND, "{} MiB", peak >> 20);
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        // Fails only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One end of a connection between bridges.
pub(crate) struct BridgePeer {
    pub(crate) stream: Box<dyn Stream>,
    writer: FrameWriter,
    reader: FrameReader,
}

impl BridgePeer {
    pub(crate) fn over(stream: Box<dyn Stream>) -> BridgePeer {
        stream.set_timeouts(Some(PATIENCE), Some(PATIENCE)).unwrap();
        BridgePeer { stream, writer: FrameWriter::default(), reader: FrameReader::default() }
    }

    /// A frame, numbered as the next one.
    pub(crate) fn frame(&mut self, kind: Kind, meta: &[u8], payload: &[u8]) -> Vec<u8> {
        [&self.writer.header(kind, meta, payload.len())[..], meta, payload].concat()
    }

    pub(crate) fn send(&mut self, kind: Kind, body: &[u8]) {
        let frame = self.frame(kind, body, &[]);
        self.raw(&frame);
    }

    /// Sends bytes. The other end may have hung up: what it makes of that is seen elsewhere.
    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
    }

    /// Sends bytes one at a time, each after this pause, until the other end hangs up.
    pub(crate) fn drip(&mut self, bytes: &[u8], pause: Duration) {
        for byte in bytes {
            if self.stream.is_hung_up() || self.stream.write_all(&[*byte]).is_err() {
                return;
            }
            std::thread::sleep(pause);
        }
    }

    /// The next frame; `None` at the end.
    pub(crate) fn receive(&mut self) -> Option<(Kind, Vec<u8>)> {
        let mut header = [0; HEADER_LEN];
        self.stream.read_exact(&mut header).ok()?;
        let seen = self.reader.header(&header).unwrap();
        let mut body = vec![0; seen.meta_len];
        self.stream.read_exact(&mut body).ok()?;
        self.stream.read_exact(&mut vec![0; seen.payload_len]).ok()?;
        Some((seen.kind, body))
    }

    /// What it is told last; empty: nothing.
    pub(crate) fn last_word(&mut self) -> String {
        let mut last = String::new();
        while let Some((kind, body)) = self.receive() {
            if kind == Kind::Error {
                last = String::from_utf8_lossy(&body).into_owned();
            }
        }
        last
    }

    /// Says hello and returns the kind of the answer and its text.
    pub(crate) fn greet(&mut self, session: u8, purpose: Purpose) -> (Kind, String) {
        self.say_hello(&hello(session, purpose))
    }

    /// The same for a control connection that offers the direct route.
    pub(crate) fn greet_directly(&mut self, session: u8) -> (Kind, String) {
        let terms = Terms { direct: true, ..TERMS };
        self.say_hello(&Hello { session: [session; 16], purpose: Purpose::Control, terms }.encode())
    }

    fn say_hello(&mut self, hello: &[u8]) -> (Kind, String) {
        self.send(Kind::Hello, hello);
        let (kind, body) = self.receive().expect("an answer");
        (kind, String::from_utf8_lossy(&body).into_owned())
    }
}

pub(crate) fn hello(session: u8, purpose: Purpose) -> Vec<u8> {
    Hello { session: [session; 16], purpose, terms: TERMS }.encode()
}

/// A header of a frame whose lengths are announced and do not come.
pub(crate) fn announced(kind: u8, seq: u32, meta_len: u32, payload_len: u32) -> Vec<u8> {
    let mut bytes = b"PWQB".to_vec();
    bytes.extend([kind, 0, 0, 0]);
    for word in [seq, meta_len, payload_len, 0] {
        bytes.extend(word.to_le_bytes());
    }
    bytes
}

/// The path of a socket.
pub(crate) fn exists(path: &Path) {
    wait_for("a socket", || path.exists().then_some(()));
}
