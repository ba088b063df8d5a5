//! Migrations that succeed, between two VMs in memory.

mod support;

use std::sync::Arc;
use std::time::Duration;

use pagewarp_codec::{CpuBackend, EncodingSet, Trace};
use pagewarp_engine::config::OnLimit;
use pagewarp_engine::transport::{TcpAcceptor, TcpConnector};
use pagewarp_testkit::image::Mutation;
use pagewarp_testkit::memory_vm::MemoryVm;

use support::Lab;

fn vm() -> MemoryVm {
    MemoryVm::new(&[1000, 77], 1).identity("vm1", b"machine", b"device state")
}

#[test]
fn a_quiet_vm_arrives_whole() {
    let outcome = Lab::new(vm()).run();
    let report = outcome.assert_migrated();
    assert_eq!(outcome.destination.name(), "vm1");
    assert_eq!(outcome.destination.machine(), b"machine");
    assert_eq!(outcome.destination.state(), Some(&b"device state"[..]));
    assert_eq!(report.guest_bytes, 1077 * 4096);
    assert!(report.wire_bytes < report.guest_bytes);
    let pages: u64 = report.encodings.values().map(|e| e.pages).sum();
    assert_eq!(pages, 1077);
    let destination = report.destination.as_ref().unwrap();
    assert_eq!(destination.guest_bytes, report.guest_bytes);
    let itself = outcome.received.as_ref().unwrap();
    assert_eq!((&destination.name, destination.wire_bytes), (&itself.name, itself.wire_bytes));
}

/// Every combination of the axes that a benchmark compares, with a guest that never rests.
#[test]
fn a_restless_vm_arrives_whole_in_every_mode() {
    for pipeline in [true, false] {
        for connections in [1, 3] {
            for encodings in ["raw", "zero", "all"] {
                for history in [0, 100 * 4096, 1 << 30] {
                    let vm = vm().restless(40, Mutation::Bytes(5), 7);
                    let mut lab = Lab::new(vm);
                    lab.source_config.pipeline = pipeline;
                    lab.source_config.connections = connections;
                    lab.source_config.encodings = encodings.parse().unwrap();
                    lab.source_config.history_bytes = history;
                    lab.source_config.serialize_threads = 2;
                    lab.source_config.verify = true;
                    // Small enough that it takes a few epochs and then stops anyway.
                    lab.source_config.downtime_limit = Duration::from_nanos(1);
                    lab.source_config.max_epochs = Some(5);
                    lab.source_config.on_limit = OnLimit::StopAnyway;
                    let outcome = lab.run();
                    let report = outcome.assert_migrated();
                    assert_eq!(report.verified, Some(true));
                    assert_eq!(report.epochs.len(), 6);
                    let deltas = report.encodings.contains_key("sparse-xor");
                    assert_eq!(
                        deltas,
                        encodings == "all" && history > 0,
                        "{pipeline} {connections} {history}"
                    );
                }
            }
        }
    }
}

#[test]
fn over_tcp_with_a_bandwidth_limit() {
    let acceptor = TcpAcceptor::bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let connector = TcpConnector { address: acceptor.local_addr().unwrap(), timeout: Duration::from_secs(5) };
    let mut lab = Lab::new(vm());
    lab.source_config.connections = 2;
    lab.source_config.bandwidth_bytes_per_s = Some(20_000_000);
    lab.run_over(connector, acceptor).assert_migrated();
}

/// The log of a hypervisor that cannot tell reading from clearing.
#[test]
fn a_log_that_clears_when_it_is_read() {
    let mut lab = Lab::new(vm().clear_on_fetch().restless(40, Mutation::Bytes(5), 7));
    lab.source_config.downtime_limit = Duration::from_nanos(1);
    lab.source_config.max_epochs = Some(5);
    lab.source_config.on_limit = OnLimit::StopAnyway;
    lab.run().assert_migrated();
}

#[test]
fn the_destination_may_accept_fewer_encodings() {
    let mut lab = Lab::new(vm());
    lab.destination_config.encodings = "zero,sparse".parse().unwrap();
    let outcome = lab.run();
    let report = outcome.assert_migrated();
    assert_eq!(report.allowed_encodings, "zero,raw,sparse");
    assert!(!report.encodings.contains_key("lz4"));
}

#[test]
fn a_vm_can_go_on_from_host_to_host() {
    let mut vm = vm().restless(10, Mutation::Bytes(3), 3);
    for _ in 0..5 {
        let outcome = Lab::new(vm).run();
        outcome.assert_migrated();
        vm = outcome.destination.into_source();
    }
}

#[test]
fn simd_levels_understand_each_other() {
    for sender in pagewarp_codec::Simd::available() {
        let mut lab = Lab::new(vm().restless(40, Mutation::Bytes(5), 9));
        lab.source_config.backend = Arc::new(CpuBackend::with_simd(sender).unwrap());
        lab.source_config.encodings = EncodingSet::ALL;
        lab.run().assert_migrated();
    }
}

/// Every stage of either host is in the trace, with batches under way at the same time in different stages.
#[test]
fn a_trace_shows_every_stage_and_batches_that_overlap() {
    let (here, there) = (Trace::new(), Trace::new());
    let mut lab = Lab::new(MemoryVm::new(&[4000], 1).restless(20, Mutation::Bytes(5), 7));
    lab.source_config.trace = Some(here.clone());
    lab.destination_config.trace = Some(there.clone());
    lab.source_config.batch_pages = 64;
    lab.run().assert_migrated();
    for (trace, stages) in
        [(&here, ["copy", "serialize 1", "send 1"]), (&there, ["receive 1", "deserialize 1", "restore 1"])]
    {
        let (spans, dropped) = trace.spans();
        assert_eq!(dropped, 0);
        for stage in stages {
            let batches = spans.iter().filter(|span| &*span.track == stage && span.name != "submit");
            assert!(batches.count() >= 4000 / 64, "{stage}");
        }
        // From its first span to its last one a batch is under way.
        let way = |batch| {
            let spans = || spans.iter().filter(move |span| span.batch == batch);
            (spans().map(|span| span.start).min(), spans().map(|span| span.end).max())
        };
        let overlap = (1..4000 / 64).any(|batch| way(batch).0 < way(batch - 1).1);
        assert!(overlap, "no two batches of {stages:?} were under way at once");
    }
}
