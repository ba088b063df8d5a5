use std::io::{Read, Write};

use super::*;
use crate::rng::SplitMix64;

const PATIENCE: Duration = Duration::from_secs(20);

/// A shaper with a target that this test accepts connections of.
fn link(config: LinkConfig) -> (LinkShaper, TcpListener) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    (LinkShaper::start(listener.local_addr().unwrap(), config).unwrap(), listener)
}

fn connect(shaper: &LinkShaper, listener: &TcpListener) -> (TcpStream, TcpStream) {
    let near = TcpStream::connect(shaper.address()).unwrap();
    let far = listener.accept().unwrap().0;
    for stream in [&near, &far] {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
    }
    (near, far)
}

/// Sends random bytes both ways at once over several connections and checks that all arrive.
fn exchange(config: LinkConfig, connections: usize, bytes: usize) -> LinkShaper {
    let (shaper, listener) = link(config);
    let transfer = |mut from: &TcpStream, mut to: &TcpStream, seed: u64| {
        let mut sent = vec![0; bytes];
        SplitMix64::new(seed).fill(&mut sent);
        let mut got = Vec::new();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                from.write_all(&sent).unwrap();
                from.shutdown(Shutdown::Write).unwrap();
            });
            to.read_to_end(&mut got).unwrap();
        });
        assert!(got == sent, "{} of {bytes} bytes arrived, or others", got.len());
    };
    let pairs: Vec<_> = (0..connections).map(|_| connect(&shaper, &listener)).collect();
    std::thread::scope(|scope| {
        for (k, (near, far)) in pairs.iter().enumerate() {
            let seed = k as u64;
            scope.spawn(move || transfer(near, far, seed));
            scope.spawn(move || transfer(far, near, seed + 100));
        }
    });
    shaper
}

#[test]
fn all_bytes_arrive_and_are_counted() {
    let shaper = exchange(LinkConfig::default(), 2, 3_000_001);
    assert_eq!(shaper.there(), LinkCounters { bytes: 6_000_002, busy: Duration::ZERO });
    assert_eq!(shaper.back(), shaper.there());
}

#[test]
fn busy_time_is_bytes_over_rate() {
    let shaper = exchange(LinkConfig::with_rate(1_000_000_000), 3, 1_000_000);
    for counters in [shaper.there(), shaper.back()] {
        assert_eq!(counters.bytes, 3_000_000);
        // 24 Mbit at 1 Gbit/s, less the rounding of each chunk.
        assert!(counters.busy <= Duration::from_millis(24), "{counters:?}");
        assert!(counters.busy > Duration::from_micros(23_900), "{counters:?}");
    }
}

#[test]
fn latency_changes_no_byte() {
    let latency = Duration::from_millis(3);
    let shaped = LinkConfig { latency, ..LinkConfig::with_rate(2_000_000_000) };
    assert_eq!(exchange(shaped, 2, 1_500_000).there().bytes, 3_000_000);
    let unshaped = LinkConfig { latency, ..LinkConfig::default() };
    assert_eq!(exchange(unshaped, 1, 1_500_000).back().bytes, 1_500_000);
}

#[test]
fn a_cut_link_holds_the_bytes_until_it_is_healed() {
    let (shaper, listener) = link(LinkConfig::default());
    let (mut near, mut far) = connect(&shaper, &listener);
    near.write_all(b"a").unwrap();
    far.read_exact(&mut [0; 1]).unwrap();
    shaper.cut();
    near.write_all(b"b").unwrap();
    far.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert_eq!(far.read(&mut [0; 1]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    shaper.heal();
    far.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut got = [0; 1];
    far.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"b");
}

#[test]
fn a_killed_connection_is_reset_on_both_sides_and_the_next_one_works() {
    let (shaper, listener) = link(LinkConfig::with_rate(1_000_000));
    let (mut near, mut far) = connect(&shaper, &listener);
    near.write_all(b"a").unwrap();
    far.read_exact(&mut [0; 1]).unwrap();
    shaper.kill();
    for stream in [&mut near, &mut far] {
        assert_eq!(stream.read(&mut [0; 1]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }
    let (mut near, mut far) = connect(&shaper, &listener);
    far.write_all(b"z").unwrap();
    let mut got = [0; 1];
    near.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"z");
}

#[test]
fn dropping_the_shaper_ends_connections_that_wait_cut_or_blocked() {
    let (shaper, listener) =
        link(LinkConfig { latency: Duration::from_secs(3600), ..LinkConfig::with_rate(8000) });
    let (mut near, mut far) = connect(&shaper, &listener);
    near.write_all(&[1; 10_000]).unwrap();
    drop(shaper);
    assert_eq!(far.read(&mut [0; 1]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);

    let (shaper, listener) = link(LinkConfig::default());
    let (mut near, _far) = connect(&shaper, &listener);
    near.set_nonblocking(true).unwrap();
    // Nobody reads at the far end: fill the way until it takes no more.
    while near.write(&[0; 65536]).is_ok() {}
    shaper.cut();
    drop(shaper);
    near.set_nonblocking(false).unwrap();
    assert!(near.read(&mut [0; 1]).is_err());
}

#[test]
fn a_target_that_is_not_there_resets_the_connection() {
    let nobody = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
    let shaper = LinkShaper::start(nobody, LinkConfig::default()).unwrap();
    let mut near = TcpStream::connect(shaper.address()).unwrap();
    near.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(near.read(&mut [0; 1]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

#[test]
fn an_end_that_goes_away_is_noticed_at_the_other() {
    let (shaper, listener) = link(LinkConfig::default());
    let (near, mut far) = connect(&shaper, &listener);
    drop(near);
    assert_eq!(far.read(&mut [0; 1]).unwrap(), 0);
    let (mut near, far) = connect(&shaper, &listener);
    sockopt::set_socket_linger(&far, Some(Duration::ZERO)).unwrap();
    drop(far);
    assert_eq!(near.read(&mut [0; 1]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

#[test]
fn the_rate_can_be_lifted_while_bytes_are_on_the_way() {
    let (shaper, listener) = link(LinkConfig { burst_bytes: Some(0), ..LinkConfig::with_rate(1_000_000) });
    let (mut near, mut far) = connect(&shaper, &listener);
    // At 1 Mbit/s this would take 80 s, longer than the reader's patience.
    let writer = std::thread::spawn(move || near.write_all(&[7; 10_000_000]));
    far.read_exact(&mut [0; 5000]).unwrap();
    shaper.set_rate(None);
    let mut rest = vec![0; 10_000_000 - 5000];
    far.read_exact(&mut rest).unwrap();
    writer.join().unwrap().unwrap();
    assert_eq!(shaper.there().bytes, 10_000_000);
}
