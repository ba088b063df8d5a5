//! Peers that send what they must not: garbage, damage, too much, the wrong thing, or nothing.
//!
//! Both ends must say in one line what they saw, in bounded time and memory, and the VM must not notice. docs/robustness.md has the table of what is tried.

#[path = "../../../net/tests/support/mod.rs"]
mod certs;
#[path = "../support/mod.rs"]
mod support;

mod bridge;
mod bridge_destination;
mod bridge_source;
mod destination;
mod links;
mod lower;
mod qemu_receive;
mod receiver;
mod session;
mod source;
mod strangers;
mod way;

use std::net::TcpListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use pagewarp_cli::exit::Exit;
use pagewarp_cli::units::ByteSize;

use support::{Rig, have_kvm};
use way::{Way, Ways};

/// How long either end waits for a silent peer here.
const PEER_TIMEOUT: &str = "1500ms";
/// Twice that.
const WAITED: Duration = Duration::from_secs(3);
/// Within so long everything ends in an error. Measured from what the hostile peer did last.
const BOUND: Duration = Duration::from_secs(5);
/// Cases at a time: most of their time is spent waiting.
const AT_A_TIME: usize = 4;

/// Does this with all cases, a few at a time. All are tried, whatever becomes of the others.
fn each<T: Send>(cases: impl Iterator<Item = T> + Send, work: impl Fn(T) + Sync) {
    let (cases, failed) = (Mutex::new(cases), AtomicU32::new(0));
    let next = || cases.lock().unwrap().next();
    std::thread::scope(|scope| {
        for _ in 0..AT_A_TIME {
            scope.spawn(|| {
                while let Some(case) = next() {
                    if catch_unwind(AssertUnwindSafe(|| work(case))).is_err() {
                        failed.fetch_add(1, Relaxed);
                    }
                }
            });
        }
    });
    assert_eq!(failed.into_inner(), 0, "cases failed, see above");
}

/// Nobody is there at all.
fn nobody(rig: &Rig) {
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let sent = rig.send(&nobody, &[]).wait();
    assert_eq!(sent.code, Some(Exit::Link as i32));
    assert!(sent.error().contains("refused"), "{}", sent.stderr);
}

/// What destinations do to a VM on its way, over one way.
fn towards_a_source(way: Way) {
    if !have_kvm("hostile destinations") {
        return;
    }
    let ways = Ways::new();
    let mut rig = Rig::boot(ByteSize(64 << 20), 5_000);
    destination::hostile_destinations(&mut rig, &ways, way);
    destination::a_destination_that_never_accepts_can_be_left(&mut rig, &ways, way);
    lower::hostile_links_to_a_source(&mut rig, &ways, way);
    if way == Way::Protected {
        lower::hostile_handshakes_to_a_source(&mut rig, &ways);
    }
    nobody(&rig);
    rig.goes_on();
    rig.hop(&[]);
    rig.here.stop();
}

#[test]
fn a_vm_does_not_notice_hostile_destinations() {
    towards_a_source(Way::Plain);
}

#[test]
fn a_vm_does_not_notice_hostile_destinations_within_tls() {
    towards_a_source(Way::Protected);
}

#[test]
fn a_vm_does_not_notice_hostile_sources_and_bad_links() {
    if !have_kvm("hostile sources") {
        return;
    }
    let ways = Ways::new();
    let mut rig = Rig::boot(ByteSize(64 << 20), 5_000);
    let offer = destination::offer_of(&rig, &ways);
    session::hostile_sessions(&ways, &offer);
    session::intruders(&ways, &offer);
    links::bad_links(&mut rig);
    strangers::strangers(&mut rig);
    strangers::handshakes(&mut rig, &ways);
    rig.hop(&[]);
    rig.here.stop();
}
