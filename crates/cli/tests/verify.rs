//! `send --verify` to a host whose memory is faulty: the VM stays, and the exit code says why. They need /dev/kvm.

mod support;

use std::sync::Arc;
use std::thread;

use pagewarp_cli::exit::Exit;
use pagewarp_cli::units::ByteSize;
use pagewarp_codec::CpuBackend;
use pagewarp_engine::config::DestinationConfig;
use pagewarp_engine::control::MigrationControl;
use pagewarp_engine::error::MigrationError;
use pagewarp_engine::receive;
use pagewarp_engine::transport::TcpAcceptor;
use pagewarp_testkit::memory_vm::MemoryDestination;
use pagewarp_testkit::probe::{Probe, RunLedger, Step};

use support::{PATIENCE, Rig, have_kvm};

/// Where the image of the built-in guest begins, 2 MiB: it is not zero, and nobody writes there.
const PAGE: u64 = 512;

#[test]
fn a_vm_whose_memory_would_differ_stays_on_the_source() {
    if !have_kvm("a destination with faulty memory") {
        return;
    }
    let mut rig = Rig::boot(ByteSize(64 << 20), 2_000);
    let acceptor = TcpAcceptor::bind(([127, 0, 0, 1], 0).into()).unwrap();
    let to = acceptor.local_addr().unwrap().to_string();
    let mut faulty = MemoryDestination::new(&Probe::new(&RunLedger::new())).flip(0, PAGE);
    let probe = faulty.probe();
    let receiving = thread::spawn(move || {
        let config = DestinationConfig {
            accept_timeout: PATIENCE,
            ..DestinationConfig::new(Arc::new(CpuBackend::new()))
        };
        receive(&mut faulty, &acceptor, &config, &MigrationControl::new())
    });
    // The hosts of tests are busy: it is not the downtime that matters here.
    let sent = rig.send(&to, &["--verify", "--downtime-ms", "10000"]).wait();
    let error = sent.error();
    println!("{error}");
    assert_eq!(sent.code, Some(Exit::Differs as i32), "{error}");
    for words in ["1 of 16384 pages", "page 512 of `", "the VM goes on here"] {
        assert!(error.contains(words), "no `{words}` in: {error}");
    }
    let received = receiving.join().unwrap().unwrap_err();
    assert!(matches!(received, MigrationError::Differs(_)), "{received}");
    assert_eq!((probe.calls(Step::Run), probe.is_running()), (0, false));
    rig.goes_on();
    // To a host without a fault it moves.
    rig.hop(&["--downtime-ms", "10000"]);
    rig.here.stop();
}
