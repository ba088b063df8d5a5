//! Migrations whose connections break on the way, and that go on. Through the binary; they need /dev/kvm.

#[path = "../../net/tests/support/cutter.rs"]
mod cutter;
mod support;

use std::time::Duration;

use pagewarp_cli::backend::BackendName;
use pagewarp_cli::exit::Exit;
use pagewarp_cli::units::ByteSize;
use pagewarp_engine::report::SourceReport;

use cutter::Cutter;
use support::Rig;

#[test]
fn a_migration_goes_on_after_its_connections_broke() {
    let mut rig = Rig::boot_filled(ByteSize(96 << 20), 2000, Some(100), BackendName::Auto);
    let (there, address) = rig.receiver();
    let cutter = Cutter::new(address.parse().unwrap());
    let to = cutter.address().to_string();
    let options =
        ["--resume-timeout", "60", "--bandwidth", "200Mbit", "--connections", "2", "--verify", "--json"];
    // The hosts of tests are busy, and comparing takes its time: it is not the downtime that matters here.
    let options = [&options[..], &["--downtime-ms", "5000"]].concat();
    let sending = rig.send(&to, &options);
    for n in 0..3 {
        std::thread::sleep(Duration::from_millis(400));
        cutter.cut(n % 2 == 0);
    }
    let sent = sending.wait();
    assert_eq!(
        sent.code,
        Some(0),
        "{}\nsource: {}\ndestination: {}",
        sent.stderr,
        Rig::log(&rig.here),
        Rig::log(&there)
    );
    let report: SourceReport = serde_json::from_str(&sent.stdout).unwrap();
    assert!(report.interruptions.breaks > 0, "{:?}", report.interruptions);
    assert_eq!(report.verified, Some(true));
    rig.moved(there);
}

#[test]
fn a_network_that_does_not_come_back_leaves_the_vm_where_it_was() {
    let mut rig = Rig::boot_filled(ByteSize(96 << 20), 2000, Some(100), BackendName::Auto);
    let (there, address) = rig.receiver();
    let cutter = Cutter::new(address.parse().unwrap());
    let to = cutter.address().to_string();
    let sending = rig.send(&to, &["--resume-timeout", "2", "--bandwidth", "50Mbit"]);
    std::thread::sleep(Duration::from_millis(500));
    cutter.refuse(true);
    cutter.cut(true);
    let sent = sending.wait();
    assert_eq!(sent.code, Some(Exit::Link as i32), "{}", sent.stderr);
    assert!(sent.stderr.contains("could not be mended in 2s"), "{}", sent.stderr);
    rig.stayed(&there);
}
