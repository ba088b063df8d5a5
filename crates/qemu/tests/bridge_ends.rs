//! How migrations end: two bridges between a source and a destination that are no QEMU.

mod bridges;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::Duration;

use bridges::{Bridges, PATIENCE};
use pagewarp_qemu::bridge::Endpoint;
use pagewarp_testkit::rng::SplitMix64;
use tempfile::TempDir;

/// A stream starts with this: magic, version, and the name of a machine.
const HEADER: &[u8] = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc";
/// A channel of multifd starts with this.
const MULTIFD: &[u8] = b"\x11\x22\x33\x44";
/// Opens the return path, and pings.
const RETURN_PATH: &[u8] = b"\x08\0\x01\0\0\x08\0\x02\0\x04\0\0\0\x01";
/// The end of all sections, and the start of a description of the machine.
const END: &[u8] = b"\0\x06";
const PONG: &[u8] = &[0, 2, 0, 4, 0, 0, 0, 1];
const SHUT: &[u8] = &[0, 1, 0, 4, 0, 0, 0, 0];

fn random(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    SplitMix64::new(1).fill(&mut bytes);
    bytes
}

/// A stream whose description of the machine has so many bytes.
fn stream(return_path: bool, len: usize) -> Vec<u8> {
    let opened = if return_path { RETURN_PATH } else { &[] };
    [HEADER, opened, END, &(len as u32).to_be_bytes(), &random(len)].concat()
}

/// What TLS might look like.
fn encrypted(len: usize) -> Vec<u8> {
    [&[0x16, 3, 1, 2, 0, 1][..], &random(len)].concat()
}

/// Both bridges, with the source's connection to one and the place of the other's.
struct Ends {
    source: UnixStream,
    listener: UnixListener,
    bridges: Bridges,
    dir: TempDir,
}

impl Ends {
    fn start() -> Ends {
        let dir = TempDir::new().unwrap();
        let (near, far) = (dir.path().join("near"), dir.path().join("far"));
        let listener = UnixListener::bind(&far).unwrap();
        let bridges = Bridges::start(Endpoint::Unix(near.clone()), Endpoint::Unix(far), |_| {});
        let source = UnixStream::connect(near).unwrap();
        source.set_read_timeout(Some(PATIENCE)).unwrap();
        Ends { source, listener, bridges, dir }
    }

    /// Another connection of the source.
    fn connect(&self) -> UnixStream {
        UnixStream::connect(self.dir.path().join("near")).unwrap()
    }

    fn accept(&self) -> UnixStream {
        let (stream, _) = self.listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Writes until nobody takes any more. Returns how many bytes that were.
    fn write_until_full(&mut self, bytes: &[u8]) -> usize {
        self.source.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
        let mut written = 0;
        loop {
            match self.source.write(&bytes[written..]) {
                Ok(n) => written += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) => panic!("{e}"),
            }
            assert!(written < bytes.len(), "there is no end to what the bridges take");
        }
        written
    }
}

/// Reads to the end, however it comes.
fn read_rest(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    // It may be reset.
    let _ = stream.read_to_end(&mut bytes);
    bytes
}

/// The source hangs up while the destination does not read: nothing more may get there.
fn drops(stream: &[u8], answer: &[u8]) {
    let mut ends = Ends::start();
    ends.source.write_all(&stream[..64]).unwrap();
    let mut far = ends.accept();
    let mut start = [0; 64];
    far.read_exact(&mut start).unwrap();
    far.write_all(answer).unwrap();
    let mut answered = vec![0; answer.len()];
    ends.source.read_exact(&mut answered).unwrap();
    let written = 64 + ends.write_until_full(&stream[64..]);
    drop(ends.source);
    let (source, destination) = ends.bridges.join();
    assert!(source.is_err() && destination.is_err(), "{source:?} {destination:?}");
    let got = [&start[..], &read_rest(&mut far)].concat();
    assert!(stream.starts_with(&got));
    assert!(got.len() + (64 << 10) < written, "{} of {written} bytes came through", got.len());
}

#[test]
fn what_is_on_its_way_is_dropped_when_the_source_hangs_up() {
    drops(&stream(true, 32 << 20), PONG);
}

#[test]
fn what_is_on_its_way_is_dropped_when_an_encrypted_source_hangs_up() {
    drops(&encrypted(32 << 20), b"\x16\x03\x03");
}

/// The source closes right after its last bytes.
fn delivers(stream: &[u8], complete: bool) {
    let mut ends = Ends::start();
    let (mut near, sent) = (ends.source.try_clone().unwrap(), stream.to_vec());
    let writing = thread::spawn(move || {
        near.write_all(&sent).unwrap();
        near.shutdown(std::net::Shutdown::Both).unwrap();
    });
    let mut far = ends.accept();
    // The source is at its end before much of it is here.
    thread::sleep(Duration::from_millis(200));
    let mut got = Vec::new();
    far.read_to_end(&mut got).unwrap();
    assert!(got == stream, "{} of {} bytes", got.len(), stream.len());
    drop(far);
    writing.join().unwrap();
    let (source, destination) = ends.bridges.join();
    assert_eq!(source.unwrap().complete, complete);
    assert!(destination.unwrap().complete);
    assert_eq!(ends.source.read(&mut [0]).unwrap(), 0);
}

#[test]
fn without_a_return_path_the_last_bytes_arrive() {
    delivers(&stream(false, 100_000), true);
    delivers(&stream(false, 3 << 20), true);
}

#[test]
fn the_last_bytes_of_a_stream_that_is_not_understood_arrive() {
    let unknown = b"\x01\0\0\0\x05\x07unknown\0\0\0\0\0\0\0\x01";
    delivers(&[HEADER, unknown, &random(100_000)].concat(), false);
    delivers(&[HEADER, unknown, &random(3 << 20)].concat(), false);
}

#[test]
fn without_a_return_path_a_destination_that_does_not_take_all_is_a_failure() {
    let mut ends = Ends::start();
    // What the sockets do not take fits the smallest window: the source bridge comes to the end of it.
    ends.source.write_all(&stream(false, 280_000)).unwrap();
    ends.source.shutdown(std::net::Shutdown::Both).unwrap();
    let far = ends.accept();
    thread::sleep(Duration::from_millis(500));
    drop(far);
    let (source, destination) = ends.bridges.join();
    assert!(source.is_err() && destination.is_err(), "{source:?} {destination:?}");
}

/// The source closes once the destination has confirmed.
fn confirms(stream: &[u8], answer: &[u8], complete: bool) {
    let ends = Ends::start();
    let (mut near, sent) = (ends.source.try_clone().unwrap(), stream.to_vec());
    let writing = thread::spawn(move || near.write_all(&sent).unwrap());
    let mut far = ends.accept();
    let mut got = vec![0; stream.len()];
    far.read_exact(&mut got).unwrap();
    assert!(got == stream);
    far.write_all(answer).unwrap();
    drop(far);
    let mut answered = vec![0; answer.len()];
    let mut near = ends.source;
    near.read_exact(&mut answered).unwrap();
    drop(near);
    writing.join().unwrap();
    let (source, destination) = ends.bridges.join();
    assert_eq!(source.unwrap().complete, complete);
    assert!(destination.unwrap().complete);
}

#[test]
fn a_confirmed_migration_is_complete() {
    confirms(&stream(true, 1 << 20), SHUT, true);
}

#[test]
fn an_encrypted_migration_is_delivered_and_only_qemu_knows_the_outcome() {
    for _ in 0..5 {
        confirms(&encrypted(1 << 20), b"\x17\x03\x03", false);
    }
}

#[test]
fn a_destination_that_could_not_load_the_vm_is_a_failure() {
    let mut ends = Ends::start();
    let sent = stream(true, 10_000);
    ends.source.write_all(&sent).unwrap();
    let mut far = ends.accept();
    let mut got = vec![0; sent.len()];
    far.read_exact(&mut got).unwrap();
    far.write_all(&[0, 1, 0, 4, 0, 0, 0, 1]).unwrap();
    drop(far);
    let mut answer = [0; 8];
    ends.source.read_exact(&mut answer).unwrap();
    drop(ends.source);
    let (source, destination) = ends.bridges.join();
    assert!(source.is_err() && destination.is_err(), "{source:?} {destination:?}");
}

#[test]
fn a_destination_that_leaves_first_is_named_even_if_the_source_is_quicker() {
    let stream = stream(true, 100_000);
    let mut ends = Ends::start();
    ends.source.write_all(&stream[..64]).unwrap();
    let mut far = ends.accept();
    far.read_exact(&mut [0; 64]).unwrap();
    far.write_all(PONG).unwrap();
    ends.source.read_exact(&mut [0; PONG.len()]).unwrap();
    // It goes on taking what comes, so that nobody else notices.
    far.shutdown(Shutdown::Write).unwrap();
    assert!(read_rest(&mut ends.source).is_empty());
    drop(ends.source);
    let (source, destination) = ends.bridges.join();
    source.unwrap_err();
    let error = destination.unwrap_err().to_string();
    assert!(error.contains("the destination QEMU"), "{error}");
}

/// QEMU that waits for one of its channels while another one breaks may wait for ever: none of them may break before it has noticed that the migration has failed.
#[test]
fn channels_of_multifd_outlast_a_migration_that_fails() {
    let mut ends = Ends::start();
    ends.source.write_all(HEADER).unwrap();
    let mut far = ends.accept();
    far.read_exact(&mut vec![0; HEADER.len()]).unwrap();
    let mut channel = ends.connect();
    channel.write_all(MULTIFD).unwrap();
    let far_channel = ends.accept();
    // The destination is gone.
    drop((far, far_channel));
    assert!(read_rest(&mut ends.source).is_empty());
    // More than there is room for on the way; one of them is opened only now.
    channel.write_all(&random(8 << 20)).unwrap();
    let mut late = ends.connect();
    late.write_all(&[MULTIFD, &random(1 << 20)].concat()).unwrap();
    drop((channel, late));
    let (source, _) = ends.bridges.join();
    source.unwrap_err();
}
