//! A migration belongs to one peer, where peers can be told from each other.

mod support;

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use pagewarp_engine::error::MigrationError;
use pagewarp_engine::transport::{Acceptor, Connector, Stream};
use pagewarp_testkit::memory_vm::MemoryVm;
use pagewarp_testkit::pipe::{MemoryAcceptor, MemoryConnector, memory_link};

use support::Lab;

/// An acceptor that knows whom each connection comes from, in this order; the last one comes again and again.
struct Knowing {
    inner: MemoryAcceptor,
    peers: &'static [&'static str],
    count: AtomicUsize,
}

/// A connector that knows whom each connection reaches.
struct Reaching {
    inner: MemoryConnector,
    hosts: &'static [&'static str],
    count: AtomicUsize,
}

impl Connector for Reaching {
    fn connect(&self) -> io::Result<Box<dyn Stream>> {
        let inner = self.inner.connect()?;
        let number = self.count.fetch_add(1, Ordering::Relaxed).min(self.hosts.len() - 1);
        Ok(Box::new(Known { inner, peer: self.hosts[number] }))
    }

    fn peer(&self) -> String {
        self.inner.peer()
    }
}

struct Known {
    inner: Box<dyn Stream>,
    peer: &'static str,
}

impl Acceptor for Knowing {
    fn accept(&self, timeout: Duration) -> io::Result<Box<dyn Stream>> {
        let inner = self.inner.accept(timeout)?;
        let number = self.count.fetch_add(1, Ordering::Relaxed).min(self.peers.len() - 1);
        Ok(Box::new(Known { inner, peer: self.peers[number] }))
    }

    fn local(&self) -> String {
        self.inner.local()
    }
}

impl Read for Known {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.inner.read(bytes)
    }
}

impl Write for Known {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.inner.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl Stream for Known {
    fn try_clone_stream(&self) -> io::Result<Box<dyn Stream>> {
        self.inner.try_clone_stream()
    }

    fn shutdown(&self) -> io::Result<()> {
        self.inner.shutdown()
    }

    fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> io::Result<()> {
        self.inner.set_timeouts(read, write)
    }

    fn peer_identity(&self) -> Option<Arc<str>> {
        Some(self.peer.into())
    }
}

#[test]
fn all_connections_of_a_migration_come_from_one_peer() {
    for (peers, moves) in [(&["alice"][..], true), (&["alice", "alice", "bob"], false)] {
        let mut lab = Lab::new(MemoryVm::new(&[64], 1));
        lab.source_config.connections = 2;
        let (connector, inner) = memory_link();
        let outcome = lab.run_over(connector, Knowing { inner, peers, count: AtomicUsize::new(0) });
        if moves {
            outcome.assert_migrated();
            continue;
        }
        let (sent, _) = outcome.assert_stayed();
        let MigrationError::Refused(why) = sent else { panic!("{sent:?}") };
        assert!(why.contains("the certificate of this connection, bob, is not that of the session"), "{why}");
        assert!(!why.contains("alice"), "who the other one is is nobody else's business: {why}");
    }
}

#[test]
fn all_connections_of_a_migration_reach_one_host() {
    for (hosts, moves) in
        [(&["dst"][..], true), (&["dst", "dst", "other"], false), (&["dst", "other"], false)]
    {
        let mut lab = Lab::new(MemoryVm::new(&[64], 1));
        lab.source_config.connections = 2;
        let (inner, acceptor) = memory_link();
        let outcome = lab.run_over(Reaching { inner, hosts, count: AtomicUsize::new(0) }, acceptor);
        if moves {
            outcome.assert_migrated();
            continue;
        }
        let (sent, _) = outcome.assert_stayed();
        let MigrationError::Untrusted { why, .. } = sent else { panic!("{sent:?}") };
        for word in ["another host than the first one", "that of other", "that of dst", "load balancer"] {
            assert!(why.0.contains(word), "{why}");
        }
    }
}

#[test]
fn a_vm_that_is_not_named_is_refused_and_no_other_is_kept_out() {
    let vm = || MemoryVm::new(&[64], 1);
    let name = pagewarp_engine::vm::SourceVm::name(&vm());
    let mut lab = Lab::new(vm());
    lab.destination_config.allowed_vms = vec!["db1".into(), format!("{name}2")];
    let outcome = lab.run();
    let (sent, received) = outcome.assert_stayed();
    let MigrationError::Refused(why) = sent else { panic!("{sent:?}") };
    assert!(why.contains(&format!("`{name}`")) && why.contains("--allow-vm"), "{why}");
    assert!(!why.contains("db1"), "which it would take is nobody else's business: {why}");
    // It went on waiting, for somebody who never came.
    assert!(matches!(received, MigrationError::Link { .. }), "{received:?}");

    let mut lab = Lab::new(vm());
    lab.destination_config.allowed_vms = vec!["db1".into(), name];
    lab.run().assert_migrated();
}
