//! What TLS costs: CPU time per gigabyte over loopback, with and without, for both ends together and each alone.
//!
//! `cargo run --release -p pagewarp-net --example tls_speed [GIGABYTES]`

use std::io::{IoSlice, Read, Write};
use std::thread;
use std::time::{Duration, Instant};

use pagewarp_engine::transport::{Acceptor, Connector, TcpAcceptor, TcpConnector};
use pagewarp_net::tls::certs::{LabSet, make};
use pagewarp_net::tls::{TlsAcceptor, TlsConnector, TlsDir};
use rustix::time::{ClockId, clock_gettime};

/// A batch of the native path, about.
const CHUNK: usize = 1 << 20;

fn cpu() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

fn measure(name: &str, acceptor: &dyn Acceptor, connector: &dyn Connector, total: usize, piece: usize) {
    let (sent, received, took) = thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut stream = connector.connect().expect("a connection");
            let bytes: Vec<u8> = (0..CHUNK).map(|i| (i * 7 % 251) as u8).collect();
            let before = (cpu(), Instant::now());
            for _ in 0..total / CHUNK {
                let pieces: Vec<_> = bytes.chunks(piece).map(IoSlice::new).collect();
                let mut left = pieces;
                let mut left = &mut left[..];
                while !left.is_empty() {
                    let n = stream.write_vectored(left).expect("a write");
                    IoSlice::advance_slices(&mut left, n);
                }
            }
            (cpu() - before.0, before.1)
        });
        let mut stream = acceptor.accept(Duration::from_secs(10)).expect("a connection");
        let mut bytes = vec![0; CHUNK];
        let before = cpu();
        for _ in 0..total / CHUNK {
            stream.read_exact(&mut bytes).expect("a read");
        }
        let (received, end) = (cpu() - before, Instant::now());
        let (sent, start) = sender.join().expect("the sender");
        (sent, received, end - start)
    });
    let gigabytes = total as f64 / 1e9;
    println!(
        "{name:24} {:5.2} GB/s   CPU seconds per GB: {:.3} sending, {:.3} receiving, {:.3} both",
        gigabytes / took.as_secs_f64(),
        sent.as_secs_f64() / gigabytes,
        received.as_secs_f64() / gigabytes,
        (sent + received).as_secs_f64() / gigabytes,
    );
}

fn main() {
    let gigabytes: usize = std::env::args().nth(1).map_or(4, |text| text.parse().expect("a number"));
    let total = gigabytes * 1_000_000_000 / CHUNK * CHUNK;
    let dir = std::env::temp_dir().join(format!("pagewarp-tls-speed-{}", std::process::id()));
    let set = LabSet { hosts: vec!["127.0.0.1".into()], client: "speed".into(), days: 1 };
    make(&dir, &set, false).expect("certificates");
    let any = || TcpAcceptor::bind(([127, 0, 0, 1], 0).into()).expect("a port");
    let plain = any();
    let timeout = Duration::from_secs(10);
    let to_plain = TcpConnector { address: plain.local_addr().expect("an address"), timeout };
    let files = TlsDir::new(&dir);
    let tls = TlsAcceptor::new(any(), files.server(Vec::new()).expect("files")).expect("descriptors");
    let tcp = TcpConnector { address: tls.local_addr().expect("an address"), timeout };
    let to_tls = TlsConnector::new(tcp, &files, "127.0.0.1").expect("files");
    std::fs::remove_dir_all(&dir).expect("to remove the certificates");
    for piece in [CHUNK, 4096] {
        measure(&format!("plain, pieces of {piece}"), &plain, &to_plain, total, piece);
        measure(&format!("TLS, pieces of {piece}"), &tls, &to_tls, total, piece);
    }
}
