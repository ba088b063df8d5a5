//! A QEMU with the built-in guest, which migrates to a socket of the test.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use pagewarp_guest::{ELF, Event, GuestConfig};
use serde_json::{Value, json};
use tempfile::TempDir;

const QEMU: &str = "qemu-system-x86_64";
/// How long anything may take on a busy machine before the test gives up.
const PATIENCE: Duration = Duration::from_secs(120);

/// A running guest; killed when dropped.
pub struct Source {
    qemu: Child,
    control: BufReader<UnixStream>,
    dir: TempDir,
    memory_mib: u64,
}

/// Where the memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    Private,
    /// In a file that another process may have too.
    Shared,
}

impl Source {
    /// Boots the guest, and returns when it works.
    pub fn boot(memory_mib: u64, memory: Memory, config: &GuestConfig) -> Source {
        let dir = TempDir::new().expect("a temporary directory");
        let (elf, control) = (dir.path().join("guest.elf"), dir.path().join("qmp"));
        fs::write(&elf, ELF).expect("writing the image");
        let mut command = Command::new(QEMU);
        if memory == Memory::Shared {
            let file = dir.path().join("memory");
            command.arg("-object").arg(format!(
                "memory-backend-file,id=mem,size={memory_mib}M,share=on,mem-path={}",
                file.display()
            ));
        }
        let backend = if memory == Memory::Shared { ",memory-backend=mem" } else { "" };
        let mut qemu = command
            .args(["-M", &format!("pc{backend}")])
            // Where there is no KVM, emulation does it too.
            .args(["-accel", "kvm", "-accel", "tcg", "-m", &memory_mib.to_string()])
            .args(["-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", control.display()), "-kernel"])
            .arg(&elf)
            .args(["-append", &config.cmdline()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| {
                panic!("these tests boot the guest with {QEMU}, which does not start ({e}); on Debian: apt-get install qemu-system-x86")
            });
        let mut lines = BufReader::new(qemu.stdout.take().expect("piped")).lines().map_while(Result::ok);
        let ready = lines.any(|line| matches!(Event::parse(&line), Some(Event::Ready(_))));
        assert!(ready, "the guest starts to work");
        // Nobody reads what it says from now on, but it must be able to say it.
        thread::spawn(move || lines.for_each(drop));
        let stream = UnixStream::connect(control).expect("QEMU's control socket");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let mut source = Source { qemu, control: BufReader::new(stream), dir, memory_mib };
        source.answer("QMP");
        source.run("qmp_capabilities", &json!({}));
        source
    }

    /// Runs a command of QEMU's control protocol.
    pub fn run(&mut self, command: &str, arguments: &Value) -> Value {
        let line = json!({ "execute": command, "arguments": arguments });
        writeln!(self.control.get_mut(), "{line}").expect("writing to QEMU's control socket");
        self.answer("return")
    }

    /// The value of the next object with this key; events on the way are passed over.
    fn answer(&mut self, key: &str) -> Value {
        loop {
            let mut line = String::new();
            let n = self.control.read_line(&mut line).expect("reading from QEMU's control socket");
            assert!(n > 0, "QEMU closed its control socket");
            let mut object: Value = serde_json::from_str(&line).expect("JSON");
            assert!(object.get("error").is_none(), "QEMU refuses: {line}");
            if let Some(value) = object.get_mut(key) {
                return value.take();
            }
        }
    }

    /// Migrates with these capabilities, and returns all that each connection carried, the main one first.
    pub fn record(&mut self, capabilities: &[&str]) -> Vec<Vec<u8>> {
        let on: Vec<Value> =
            capabilities.iter().map(|name| json!({ "capability": name, "state": true })).collect();
        self.run("migrate-set-capabilities", &json!({ "capabilities": on }));
        self.run("migrate-set-parameters", &json!({ "max-bandwidth": 0, "downtime-limit": 2000 }));
        let connections = if capabilities.contains(&"multifd") { 3 } else { 1 };
        let path = self.dir.path().join("migration");
        let listener = UnixListener::bind(&path).expect("a socket");
        self.run("migrate", &json!({ "uri": format!("unix:{}", path.display()) }));
        let recorders: Vec<_> = (0..connections)
            .map(|n| {
                let (stream, _) = listener.accept().expect("a connection");
                let return_path =
                    n == 0 && capabilities.iter().any(|c| matches!(*c, "postcopy-ram" | "return-path"));
                thread::spawn(move || record_connection(stream, return_path))
            })
            .collect();
        let streams = recorders.into_iter().map(|recorder| recorder.join().expect("a recording")).collect();
        self.wait_completed();
        streams
    }

    fn wait_completed(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let migration = self.run("query-migrate", &json!({}));
            match migration["status"].as_str() {
                Some("completed") => return,
                Some("failed" | "cancelled") => panic!("the migration failed: {migration}"),
                _ => assert!(Instant::now() < deadline, "the migration ends: {migration}"),
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// All memory of the guest, which does not run any more.
    pub fn memory(&mut self) -> Vec<u8> {
        let path = self.dir.path().join("dump");
        self.run(
            "pmemsave",
            &json!({ "val": 0, "size": self.memory_mib << 20, "filename": path_text(&path) }),
        );
        fs::read(&path).expect("the dump")
    }
}

fn path_text(path: &Path) -> String {
    path.display().to_string()
}

/// Reads a connection to its end. On the return path nothing is said but, at the end, that all went well: the source waits for that before it
/// closes the connection.
fn record_connection(mut stream: UnixStream, return_path: bool) -> Vec<u8> {
    const IDLE: Duration = Duration::from_millis(300);
    let mut bytes = Vec::new();
    if return_path {
        stream.set_read_timeout(Some(IDLE)).expect("a timeout");
        let deadline = Instant::now() + PATIENCE;
        // The last is the description of the machine, which is JSON.
        while stream.read_to_end(&mut bytes).is_err() && bytes.last() != Some(&b'}') {
            assert!(Instant::now() < deadline, "the source comes to an end");
        }
        stream.write_all(&[0, 1, 0, 4, 0, 0, 0, 0]).expect("writing to the source");
    }
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream.read_to_end(&mut bytes).expect("reading from the source");
    bytes
}

impl Drop for Source {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}
