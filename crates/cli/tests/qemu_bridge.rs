//! `pagewarp bridge`: migrations that are started by QEMU's monitor alone, through the two ends of a bridge. Takes root, because of the network
//! namespaces.

mod support;

use std::num::NonZeroU8;
use std::path::PathBuf;
use std::time::Duration;

use pagewarp_cli::exit::Exit;
use pagewarp_qemu::bridge::{DestinationBridgeReport, SourceBridgeReport};
use pagewarp_qemu::qmp::check::{self, Seen, Wish};
use pagewarp_testkit::rng::SplitMix64;
use rustix::process::Signal;

use support::qemu::{BUSY, Host, Hosts, Moment, PLAIN, Process, SLOW, address, text};
use support::wait_for;

const STEADY: u64 = 3_000;

/// Both ends of a bridge.
struct Bridge {
    source: Process,
    destination: Process,
    near: PathBuf,
    far: PathBuf,
}

impl Bridge {
    fn start(hosts: &mut Hosts, options: &[&str]) -> Bridge {
        Bridge::with_patience(hosts, options, "0")
    }

    /// Connections that break are waited for.
    fn with_patience(hosts: &mut Hosts, options: &[&str], seconds: &str) -> Bridge {
        let (here, there) = (hosts.here.end, hosts.there());
        let (near, far) = (hosts.path("near"), hosts.path("far"));
        let listen = format!("{}:0", address(there));
        let patience = ["--resume-timeout", seconds];
        let words = ["bridge", "destination", "--listen", &listen, "--unix", text(&far)];
        let mut destination = hosts.run(there, &[&words, &PLAIN[..], &patience, options].concat());
        let line = destination.wait_line("where it listens", |line| line.starts_with("waiting for a source"));
        let to = line.split_whitespace().nth(6).unwrap();
        let words = ["bridge", "source", "--unix", text(&near), "--connect", to, "--verify"];
        let mut source = hosts.run(here, &[&words, &PLAIN[..], &patience, options].concat());
        source.wait_line("that it listens", |line| line.starts_with("waiting for QEMU"));
        Bridge { source, destination, near, far }
    }

    /// Starts a migration through it.
    fn migrate(&self, hosts: &mut Hosts, there: &mut Host) {
        hosts.here.forget_events();
        there.watch.migrate_incoming(&format!("unix:{}", self.far.display())).unwrap();
        hosts.here.watch.migrate(&format!("unix:{}", self.near.display())).unwrap();
    }
}

fn prepare(hosts: &mut Hosts, there: &mut Host, wish: &Wish) {
    let vm = &mut hosts.here.watch;
    check::source(&Seen::ask(vm).unwrap(), wish).unwrap().apply(vm).unwrap();
    let vm = &mut there.watch;
    check::destination(&Seen::ask(vm).unwrap(), wish).unwrap().apply(vm).unwrap();
}

/// A migration that never completes, however little the guest gets to write on a busy machine: QEMU asks before it would.
fn endless() -> Wish {
    Wish { downtime_ms: 1, pause_before_switchover: true, ..Wish::default() }
}

/// Waits until the destination QEMU has got the beginning of the stream. One that never heard of a migration waits for the next.
fn wait_begun(there: &mut Host) {
    wait_for("the destination to be reached", || (there.migration().status == "active").then_some(()));
}

/// Waits until the source QEMU has noticed that its connections are gone. One that asks before the switch-over does not until it may go on.
fn wait_noticed(here: &mut Host) {
    wait_for("the source to notice", || {
        let status = here.migration();
        if status.status == "pre-switchover" {
            // It may have noticed meanwhile.
            let _ = here.watch.migrate_continue();
        }
        (!status.is_under_way()).then_some(())
    });
}

/// A whole migration, after which both ends of the bridge end by themselves.
fn migrates(wish: &Wish, return_path: bool) -> (SourceBridgeReport, DestinationBridgeReport) {
    let mut hosts = Hosts::boot(256, STEADY, 1_000_000_000);
    let mut there = hosts.fresh();
    prepare(&mut hosts, &mut there, wish);
    if !return_path {
        hosts.here.watch.set_capabilities([("return-path", false)]).unwrap();
        there.watch.set_capabilities([("return-path", false)]).unwrap();
    }
    let bridge = Bridge::start(&mut hosts, &["--once", "--json"]);
    bridge.migrate(&mut hosts, &mut there);
    let (source, destination) = (bridge.source.wait(), bridge.destination.wait());
    assert_eq!((source.code, destination.code), (Some(0), Some(0)), "{source:?}\n{destination:?}");
    assert!(!bridge.near.exists(), "the socket is removed");
    hosts.here.settle();
    assert_eq!(hosts.here.migration().status, "completed");
    // Without a return path the source is at its end before the destination has loaded everything.
    wait_for("the destination to run the VM", || there.runs().then_some(()));
    hosts.moved(there);
    let source: SourceBridgeReport = serde_json::from_str(&source.stdout).unwrap();
    let destination: DestinationBridgeReport = serde_json::from_str(&destination.stdout).unwrap();
    assert!(source.complete && destination.complete && source.verified == Some(true));
    // QEMU may close a channel of multifd before the last packet on it, which carries nothing, has been written into it.
    let slack = 4096 * u64::from(source.connections - 1);
    let range = source.stream_bytes - slack..=source.stream_bytes;
    assert!(range.contains(&destination.stream_bytes), "{} of {range:?}", destination.stream_bytes);
    assert!(source.wire_bytes < source.stream_bytes && source.pages > 0);
    (source, destination)
}

#[test]
fn a_migration_by_hand_passes_over_one_connection() {
    let (source, _) = migrates(&Wish::default(), true);
    assert_eq!(source.connections, 1);
}

#[test]
fn a_migration_by_hand_passes_over_multifd() {
    let (source, _) = migrates(&Wish { multifd: NonZeroU8::new(2), ..Wish::default() }, true);
    assert_eq!(source.connections, 3);
}

#[test]
fn a_migration_by_hand_passes_over_multifd_without_a_return_path() {
    let (source, _) = migrates(&Wish { multifd: NonZeroU8::new(2), ..Wish::default() }, false);
    assert_eq!(source.connections, 3);
}

#[test]
fn a_migration_by_hand_passes_without_a_return_path() {
    let (source, _) = migrates(&Wish::default(), false);
    assert_eq!(source.connections, 1);
}

/// The same processes serve one migration after another.
#[test]
fn a_bridge_outlives_a_cancelled_migration() {
    let mut hosts = Hosts::boot(256, BUSY, SLOW);
    let mut bridge = Bridge::start(&mut hosts, &["--json"]);
    for moment in [Moment::Early, Moment::Late] {
        let mut there = hosts.fresh();
        prepare(&mut hosts, &mut there, &endless());
        bridge.migrate(&mut hosts, &mut there);
        hosts.here.wait_moment(moment, &mut bridge.source);
        wait_begun(&mut there);
        hosts.here.watch.cancel().unwrap();
        assert_eq!(hosts.here.settle().unwrap().status, "running");
        wait_for("the destination to end", || there.qemu.has_ended().then_some(()));
        hosts.stayed(&mut there);
    }
    hosts.net.set_rate(Some(1_000_000_000));
    let mut there = hosts.fresh();
    prepare(&mut hosts, &mut there, &Wish::default());
    bridge.migrate(&mut hosts, &mut there);
    wait_for("the destination to run the VM", || there.runs().then_some(()));
    hosts.moved(there);
    wait_for("both reports", || {
        let both = [&bridge.source, &bridge.destination].map(|end| end.stdout().ends_with('\n'));
        (both == [true; 2]).then_some(())
    });
    let failures = |end: &Process| end.stderr().lines().filter(|line| line.contains("failed")).count();
    assert_eq!(
        (failures(&bridge.source), failures(&bridge.destination)),
        (2, 2),
        "{}",
        bridge.source.stderr()
    );
    for end in [bridge.source, bridge.destination] {
        assert_eq!(end.stdout().lines().count(), 1);
        end.signal(Signal::TERM);
        let ended = end.wait();
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    }
}

/// Ctrl-C in the middle of a migration: QEMU sees the connections end and keeps the VM.
#[test]
fn a_bridge_that_is_ended_leaves_the_vm_where_it_is() {
    let mut hosts = Hosts::boot(128, BUSY, SLOW);
    for which in 0..2 {
        let mut there = hosts.fresh();
        prepare(&mut hosts, &mut there, &endless());
        let mut bridge = Bridge::start(&mut hosts, &["--once", "--json"]);
        bridge.migrate(&mut hosts, &mut there);
        hosts.here.wait_moment(Moment::Late, &mut bridge.source);
        let (ended, other) = match which {
            0 => (bridge.source, bridge.destination),
            _ => (bridge.destination, bridge.source),
        };
        ended.signal(Signal::INT);
        let (ended, other) = (ended.wait(), other.wait());
        assert_eq!(ended.code, Some(Exit::Cancelled as i32), "{}", ended.stderr);
        assert!(matches!(other.code, Some(5 | 6)), "{:?} {}", other.code, other.stderr);
        other.error();
        wait_noticed(&mut hosts.here);
        hosts.stayed(&mut there);
    }
}

/// When the source bridge is killed the destination waits for it, unless its QEMU is gone as well: libvirt ends it at once.
#[test]
fn a_destination_without_its_qemu_does_not_wait_for_a_source() {
    let mut hosts = Hosts::boot(128, BUSY, SLOW);
    let mut there = hosts.fresh();
    prepare(&mut hosts, &mut there, &endless());
    let mut bridge = Bridge::with_patience(&mut hosts, &["--once"], "3000");
    bridge.migrate(&mut hosts, &mut there);
    hosts.here.wait_moment(Moment::Late, &mut bridge.source);
    bridge.source.signal(Signal::KILL);
    bridge.destination.wait_line("the loss", |line| line.contains(" lost ("));
    there.kill();
    let ended = bridge.destination.wait();
    assert!(matches!(ended.code, Some(5 | 6)), "{ended:?}");
    wait_noticed(&mut hosts.here);
    hosts.stayed(&mut there);
}

/// The source bridge dies at random moments around the switch-over, when the destination may have everything already. The destination is
/// told not to run the VM by itself, as `pagewarp qemu` and libvirt do, because QEMU's own hand-over cannot exclude that both run it.
#[test]
fn a_source_bridge_that_is_killed_at_the_switch_over_leaves_one_vm() {
    let seed = support::setting("PAGEWARP_SEED", 1);
    println!("seed {seed}: set PAGEWARP_SEED for another one");
    let mut rng = SplitMix64::new(seed);
    let mut hosts = Hosts::boot(64, STEADY, SLOW);
    for _ in 0..5 {
        let mut there = hosts.fresh();
        prepare(&mut hosts, &mut there, &Wish { downtime_ms: 2000, ..Wish::default() });
        there.watch.stop().unwrap();
        let mut bridge = Bridge::start(&mut hosts, &["--once"]);
        bridge.migrate(&mut hosts, &mut there);
        hosts.here.wait_moment(Moment::Switchover, &mut bridge.source);
        std::thread::sleep(Duration::from_micros(rng.below(700_000)));
        bridge.source.signal(Signal::KILL);
        drop(bridge.source);
        let state = hosts.here.settle().unwrap().status;
        let destination = bridge.destination.wait();
        println!("{state}, {:?}", destination.code);
        assert!(!there.runs(), "it runs the VM by itself");
        match state.as_str() {
            "running" => hosts.stayed(&mut there),
            "postmigrate" => {
                there.watch.cont().unwrap();
                hosts.moved(there);
            }
            other => panic!("the source is {other}"),
        }
    }
}
