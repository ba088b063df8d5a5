//! Strangers who connect and say nothing, or nothing of use: what they cost, and that a source gets through between them.

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with};

use crate::support::process::anonymous_bytes;

/// Connections that are opened at once.
const CROWD: usize = 200;
/// How long they are watched. Nobody is listened to for longer than 5 s, so that whatever grows has grown by then.
const WATCH: Duration = Duration::from_secs(7);
/// What a receiver may use for strangers, on top of what it used before: as docs/security.md says.
const MOST: Usage = Usage { threads: 200, descriptors: 700, bytes: 24 << 20 };

/// What a process uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Usage {
    threads: u64,
    descriptors: u64,
    bytes: u64,
}

impl Usage {
    fn of(pid: u32) -> Usage {
        let count =
            |what| std::fs::read_dir(format!("/proc/{pid}/{what}")).map_or(0, |all| all.count() as u64);
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|line| line.trim().parse::<u64>().ok()).unwrap()
        };
        // A process that cannot be looked into has its descriptors for itself; the size of its table bounds them.
        let descriptors = match count("fd") {
            0 => field("FDSize:"),
            counted => counted,
        };
        Usage { threads: field("Threads:"), descriptors, bytes: anonymous_bytes(pid) }
    }

    fn max(self, other: Usage) -> Usage {
        Usage {
            threads: self.threads.max(other.threads),
            descriptors: self.descriptors.max(other.descriptors),
            bytes: self.bytes.max(other.bytes),
        }
    }
}

/// A connection from an address of its own, so that strangers and sources are different hosts.
fn stranger(to: SocketAddr) -> Result<TcpStream, Errno> {
    let socket: OwnedFd = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    bind(&socket, &SocketAddr::from((Ipv4Addr::new(127, 0, 0, 2), 0)))?;
    connect(&socket, &to)?;
    Ok(socket.into())
}

/// What strangers say before they fall silent: nothing, noise, the beginnings of TLS and of all protocols, and a whole opening of a lasting connection.
fn words(number: usize) -> Vec<u8> {
    match number % 6 {
        0 => vec![],
        1 => b"P".to_vec(),
        2 => b"X".to_vec(),
        3 => vec![22, 3, 1, 2],
        4 => b"PGWP\x01\x01".to_vec(),
        _ => {
            let mut opening = b"PWLK\x01\0\0\0".to_vec();
            opening.extend((number as u64).to_le_bytes());
            opening.resize(32, 0);
            opening.extend(60_000u32.to_le_bytes());
            opening.resize(40, 0);
            opening
        }
    }
}

fn crowd(to: SocketAddr, many: usize) -> Vec<TcpStream> {
    let all = (0..many).filter_map(|number| {
        let mut stream = stranger(to).ok()?;
        // It may have had to go by now.
        let _ = stream.write_all(&words(number));
        Some(stream)
    });
    all.collect()
}

/// Sends strangers to a receiver, sees what they cost, and sends more of them while `good` gets through.
pub(crate) fn visit<T>(what: &str, to: SocketAddr, pid: u32, good: impl FnOnce() -> T) -> T {
    let before = Usage::of(pid);
    let silent = crowd(to, CROWD);
    let (since, mut peak) = (Instant::now(), before);
    while since.elapsed() < WATCH {
        peak = peak.max(Usage::of(pid));
        thread::sleep(Duration::from_millis(20));
    }
    println!("{what}: {before:?} before, up to {peak:?} with {} strangers", silent.len());
    assert!(peak.threads <= before.threads + MOST.threads, "{what}: {before:?} {peak:?}");
    assert!(peak.descriptors <= before.descriptors + MOST.descriptors, "{what}: {before:?} {peak:?}");
    assert!(peak.bytes <= before.bytes + MOST.bytes, "{what}: {before:?} {peak:?}");
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut all = silent;
            while !done.load(Relaxed) {
                // A few at a time: how many can be opened a second is a matter of the machine.
                all.extend(crowd(to, 12));
                let old = all.len().saturating_sub(CROWD);
                all.drain(..old);
                thread::sleep(Duration::from_millis(100));
            }
        });
        let stop = Stop(&done);
        let result = good();
        drop(stop);
        result
    })
}

/// Ends the strangers, also if the test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}
