//! What this host can do.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::thread::available_parallelism;
use std::time::Duration;

use pagewarp_engine::metrics::thread_cpu;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::protocol::hello::{Host, SessionId};

/// Bytes that are passed through a socket to see what that costs; more than the caches next to a processor hold.
const TRIAL: usize = 4 << 20;
/// The cheapest of so many trials counts: the first one finds nothing in the caches.
const TRIALS: usize = 2;
/// Bytes at a time: less than a local socket holds.
const PIECE: usize = 64 << 10;
/// What it is taken to cost where it cannot be tried.
const USUAL_NS_PER_MIB: u64 = 250_000;
/// Names the machine, until it is booted again; the same in all containers.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// What a pass costs on this host.
static PASS: OnceLock<u64> = OnceLock::new();

/// This host. Takes some milliseconds when it is asked for first. What names the machine means nothing in another session.
pub(in crate::manage) fn here(session: &SessionId) -> Host {
    let boot = fs::read(BOOT_ID).unwrap_or_else(|_| std::process::id().to_le_bytes().to_vec());
    Host {
        processors: available_parallelism().map_or(1, |many| many.get() as u32),
        // Once, however many strangers ask at the same time: it takes memory.
        pass_ns_per_mib: *PASS.get_or_init(|| pass_ns_per_mib().unwrap_or(USUAL_NS_PER_MIB)),
        machine: xxh3_64_with_seed(&[&session[..], &boot].concat(), 0),
    }
}

/// CPU time that it takes to pass a MiB through a local socket: what a bridge does on either host, besides all else. CPU time, so that it does not matter who else wants a processor.
fn pass_ns_per_mib() -> io::Result<u64> {
    let (mut near, mut far) = UnixStream::pair()?;
    let from = vec![1; TRIAL];
    let mut to = vec![2; TRIAL];
    let mut least = Duration::MAX;
    for _ in 0..TRIALS {
        let started = thread_cpu();
        for (piece, into) in from.chunks(PIECE).zip(to.chunks_mut(PIECE)) {
            near.write_all(piece)?;
            far.read_exact(into)?;
        }
        least = least.min(thread_cpu().saturating_sub(started));
    }
    Ok((least.as_nanos() as u64 / (TRIAL >> 20) as u64).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_knows_itself_and_nobody_else() {
        let [one, again, later] = [[1; 16], [1; 16], [2; 16]].map(|session| here(&session));
        assert!(one.processors > 0 && one.pass_ns_per_mib > 0);
        assert_eq!(one.machine, again.machine);
        assert_ne!(one.machine, later.machine);
    }
}
