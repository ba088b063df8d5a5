//! The guest in QEMU.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use pagewarp_guest::{ELF, Event, GuestConfig};
use tempfile::TempDir;

const QEMU: &str = "qemu-system-x86_64";
/// How long anything may take on a busy machine before the test gives up.
const PATIENCE: Duration = Duration::from_secs(120);

/// A running guest; killed when dropped.
pub struct Machine {
    qemu: Child,
    lines: Receiver<String>,
    /// Everything the guest said so far.
    pub log: Vec<String>,
    dir: TempDir,
}

impl Machine {
    /// Boots the guest with `memory_mib` of memory. `microvm` has no BIOS to speak of and starts at once.
    pub fn boot(memory_mib: u64, config: &GuestConfig) -> Machine {
        Machine::boot_cmdline(memory_mib, &config.cmdline())
    }

    pub fn boot_cmdline(memory_mib: u64, cmdline: &str) -> Machine {
        let dir = TempDir::new().expect("a temporary directory");
        let elf = dir.path().join("guest.elf");
        fs::write(&elf, ELF).expect("writing the image");
        let control = format!("unix:{},server=on,wait=off", dir.path().join("qmp").display());
        let mut qemu = Command::new(QEMU)
            .args(["-M", "microvm,pit=on,pic=on,rtc=off,isa-serial=on,x-option-roms=off"])
            // Where there is no KVM, emulation does it too.
            .args(["-accel", "kvm", "-accel", "tcg", "-m", &memory_mib.to_string()])
            .args(["-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio", "-qmp", &control])
            .arg("-kernel")
            .arg(&elf)
            .args(["-append", cmdline])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| {
                panic!("these tests boot the guest with {QEMU}, which does not start ({e}); on Debian: apt-get install qemu-system-x86")
            });
        let stdout = qemu.stdout.take().expect("piped");
        let (to, lines) = channel();
        thread::spawn(move || {
            let lines = BufReader::new(stdout).lines().map_while(Result::ok);
            // The test may be over already.
            lines.for_each(|line| drop(to.send(line)));
        });
        Machine { qemu, lines, log: Vec::new(), dir }
    }

    /// The next line of the guest that is an event, or `None` when the machine is off.
    pub fn next_event(&mut self) -> Option<Event> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    let event = Event::parse(&line);
                    self.log.push(line);
                    if event.is_some() {
                        return event;
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {
                    panic!("the guest says nothing more; so far: {:#?}", self.log)
                }
            }
        }
    }

    /// Waits for the first event that `pick` makes something of. Corruption and faults on the way fail the
    /// test.
    pub fn wait_for<T>(&mut self, what: &str, mut pick: impl FnMut(&Event) -> Option<T>) -> T {
        loop {
            let Some(event) = self.next_event() else {
                panic!("the machine went off before: {what}; so far: {:#?}", self.log);
            };
            if let Some(picked) = pick(&event) {
                return picked;
            }
            if matches!(event, Event::Corrupt(_) | Event::Fault(_)) {
                panic!("{event:?}; so far: {:#?}", self.log);
            }
        }
    }

    /// A connection to QEMU's control socket.
    pub fn control(&self) -> Control {
        let stream = UnixStream::connect(self.dir.path().join("qmp")).expect("QEMU's control socket");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let mut control = Control { stream: BufReader::new(stream) };
        control.answer("QMP");
        control.run("qmp_capabilities", "");
        control
    }

    /// All memory (here all of it lies below the device hole) with the machine stopped while it is taken, and
    /// when it went on.
    pub fn dump(&self, control: &mut Control, memory_mib: u64) -> (Vec<u8>, Instant) {
        let path = self.dir.path().join("memory");
        let size = memory_mib << 20;
        control.run("stop", "");
        control
            .run("pmemsave", &format!("\"val\": 0, \"size\": {size}, \"filename\": \"{}\"", path.display()));
        let resumed = Instant::now();
        control.run("cont", "");
        let image = fs::read(&path).expect("the dump");
        assert_eq!(image.len() as u64, size);
        fs::remove_file(&path).expect("removing the dump");
        (image, resumed)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// QEMU's control protocol, as much of it as is needed here.
pub struct Control {
    stream: BufReader<UnixStream>,
}

impl Control {
    /// Runs a command and waits for its end.
    pub fn run(&mut self, command: &str, arguments: &str) {
        let line = format!("{{\"execute\": \"{command}\", \"arguments\": {{{arguments}}}}}");
        writeln!(self.stream.get_mut(), "{line}").expect("writing to QEMU's control socket");
        self.answer("return");
    }

    /// Reads up to the object whose first key is `key`; events on the way are passed over.
    fn answer(&mut self, key: &str) {
        let start = format!("{{\"{key}\"");
        let mut line = String::new();
        while !line.starts_with(&start) {
            assert!(!line.starts_with("{\"error\""), "QEMU refuses: {line}");
            line.clear();
            let n = self.stream.read_line(&mut line).expect("reading from QEMU's control socket");
            assert!(n > 0, "QEMU closed its control socket");
        }
    }
}
