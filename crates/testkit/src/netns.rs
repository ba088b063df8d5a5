//! Two network namespaces and a link of a known rate between them: real TCP, with the queue and the losses of a real bottleneck.
//!
//! Takes root, `ip` and `tc`. [`shaper`](crate::shaper) needs none of them and works on one host's loopback.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Where `ip netns` keeps its namespaces.
const NAMESPACES: &str = "/run/netns";
/// What the names begin with; the process's number and a counter follow.
const PREFIX: &str = "pagewarp-";
/// The name of the interface at both ends; each namespace has names and addresses of its own.
const INTERFACE: &str = "link0";

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// One end of the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Has [`NetPair::SOURCE`].
    Source,
    /// Has [`NetPair::DESTINATION`].
    Destination,
}

/// Two namespaces with a link; removed when dropped, so end what runs in them first.
#[derive(Debug)]
pub struct NetPair {
    /// The names of the namespaces, source first.
    names: [String; 2],
}

impl NetPair {
    /// The address of the source's end.
    pub const SOURCE: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
    /// The address of the destination's end.
    pub const DESTINATION: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 2);

    /// Makes them, with a link of `rate_bits_per_s` each way; `None`: as fast as the host can.
    pub fn new(rate_bits_per_s: Option<u64>) -> NetPair {
        assert!(
            rustix::process::geteuid().is_root(),
            "network namespaces take root: run this test as root, or in a container with CAP_NET_ADMIN and CAP_SYS_ADMIN"
        );
        remove_left_overs();
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = |end| format!("{PREFIX}{}-{number}-{end}", std::process::id());
        // From here on dropping it cleans up, also after a panic half-way.
        let pair = NetPair { names: [name('s'), name('d')] };
        let [source, destination] = &pair.names;
        run("ip", &["netns", "add", source]);
        run("ip", &["netns", "add", destination]);
        run(
            "ip",
            &[
                "link",
                "add",
                INTERFACE,
                "netns",
                source,
                "type",
                "veth",
                "peer",
                "name",
                INTERFACE,
                "netns",
                destination,
            ],
        );
        for (name, address) in [(source, NetPair::SOURCE), (destination, NetPair::DESTINATION)] {
            run("ip", &["-n", name, "addr", "add", &format!("{address}/30"), "dev", INTERFACE]);
            run("ip", &["-n", name, "link", "set", "lo", "up"]);
        }
        pair.heal();
        if rate_bits_per_s.is_some() {
            pair.set_rate(rate_bits_per_s);
        }
        pair
    }

    /// The namespace of an end, as `ip netns exec` takes it.
    pub fn name(&self, end: End) -> &str {
        match end {
            End::Source => &self.names[0],
            End::Destination => &self.names[1],
        }
    }

    /// A command that runs `program` at an end.
    pub fn command(&self, end: End, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", self.name(end), program]);
        command
    }

    /// Runs `work` on a thread of its own at an end: sockets made there, and by threads started there, belong to it.
    pub fn run_at<T: Send>(&self, end: End, work: impl FnOnce() -> T + Send) -> T {
        let namespace = File::open(Path::new(NAMESPACES).join(self.name(end))).expect("a namespace of ours");
        let enter = || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
                .expect("entering a network namespace");
            work()
        };
        thread::scope(|scope| scope.spawn(enter).join())
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Changes the rate, each way; `None`: as fast as the host can.
    pub fn set_rate(&self, rate_bits_per_s: Option<u64>) {
        for name in &self.names {
            match rate_bits_per_s {
                Some(rate) => {
                    let (rate, burst) = (format!("{rate}bit"), burst_bytes(rate).to_string());
                    let shape = ["root", "tbf", "rate", &rate, "burst", &burst, "latency", "50ms"];
                    run("tc", &[&["-n", name, "qdisc", "replace", "dev", INTERFACE], &shape[..]].concat());
                }
                // There may be none.
                None => drop(
                    Command::new("tc").args(["-n", name, "qdisc", "del", "dev", INTERFACE, "root"]).output(),
                ),
            }
        }
    }

    /// Cuts the link: nothing gets through, and nobody is told.
    pub fn cut(&self) {
        self.set_link("down");
    }

    /// Mends it.
    pub fn heal(&self) {
        self.set_link("up");
    }

    fn set_link(&self, state: &str) {
        for name in &self.names {
            run("ip", &["-n", name, "link", "set", INTERFACE, state]);
        }
    }
}

impl Drop for NetPair {
    fn drop(&mut self) {
        for name in &self.names {
            // The link goes with either of them.
            let _ = Command::new("ip").args(["netns", "del", name]).output();
        }
    }
}

/// What may go out at once: 4 ms of the rate, as 512 KB at 1 Gbit/s, but room for the 64 KiB that the kernel hands out in one piece.
fn burst_bytes(rate_bits_per_s: u64) -> u64 {
    (rate_bits_per_s / 8 / 250).clamp(128 << 10, 4 << 20)
}

/// Removes the namespaces of test processes that were killed.
fn remove_left_overs() {
    for entry in fs::read_dir(NAMESPACES).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(owner);
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            let _ = Command::new("ip").args(["netns", "del"]).arg(&name).output();
        }
    }
}

/// The process that made the namespace of this name; `None`: none like this one.
fn owner(name: &str) -> Option<u32> {
    name.strip_prefix(PREFIX)?.split_once('-')?.0.parse().ok()
}

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap_or_else(|e| {
        panic!("this test needs `{program}`, which does not start ({e}); on Debian: apt-get install iproute2")
    });
    assert!(
        output.status.success(),
        "`{program} {}` failed: {}; expected root with CAP_NET_ADMIN and CAP_SYS_ADMIN, and a kernel with veth and tbf",
        args.join(" "),
        String::from_utf8_lossy(&output.stderr).trim()
    );
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::time::{Duration, Instant};

    use super::*;

    /// A connection from the source to the destination.
    fn connected(pair: &NetPair) -> (TcpStream, TcpStream) {
        let listener = pair
            .run_at(End::Destination, || TcpListener::bind((NetPair::DESTINATION, 0)))
            .expect("listening");
        let port = listener.local_addr().expect("an address").port();
        let near = pair
            .run_at(End::Source, || TcpStream::connect((NetPair::DESTINATION, port)))
            .expect("connecting");
        (near, listener.accept().expect("accepting").0)
    }

    #[test]
    fn the_link_carries_as_much_as_it_should_and_can_be_cut() {
        let pair = NetPair::new(Some(80_000_000));
        let (mut near, mut far) = connected(&pair);
        let start = Instant::now();
        thread::scope(|scope| {
            scope.spawn(|| near.write_all(&vec![1; 4 << 20]).expect("sending"));
            far.read_exact(&mut vec![0; 4 << 20]).expect("receiving");
        });
        // 4 MiB take 0.42 s, less what goes out at once. Slower is no error: the machine may be busy.
        assert!(start.elapsed() > Duration::from_millis(300), "{:?}", start.elapsed());

        pair.cut();
        near.write_all(&[2]).expect("into the buffer");
        far.set_read_timeout(Some(Duration::from_millis(300))).expect("a timeout");
        assert!(far.read(&mut [0]).is_err());
        pair.heal();
        pair.set_rate(None);
        far.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
        let mut got = [0];
        far.read_exact(&mut got).expect("what waited");
        assert_eq!(got, [2]);
    }

    #[test]
    fn pairs_do_not_meet_and_leave_nothing() {
        let (one, other) = (NetPair::new(None), NetPair::new(None));
        let listener =
            one.run_at(End::Destination, || TcpListener::bind((NetPair::DESTINATION, 0))).expect("listening");
        let port = listener.local_addr().expect("an address").port();
        assert!(other.run_at(End::Source, || TcpStream::connect((NetPair::DESTINATION, port))).is_err());
        let names = one.names.clone();
        assert_eq!(owner(&names[0]), Some(std::process::id()));
        assert!(one.command(End::Source, "true").status().expect("running `true`").success());
        drop(one);
        assert!(names.iter().all(|name| !Path::new(NAMESPACES).join(name).exists()));
        assert!(Path::new(NAMESPACES).join(other.name(End::Source)).exists());
    }
}
