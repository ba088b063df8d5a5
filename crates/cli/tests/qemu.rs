//! `pagewarp qemu`: a VM between two QEMU processes in network namespaces, with everything going well and with everything going wrong. Takes
//! root, because of the namespaces.

mod support;

use pagewarp_cli::exit::Exit;
use pagewarp_qemu::manage::{QemuReceiveReport, QemuReport, Route};
use pagewarp_testkit::qemu::Machine;
use rustix::process::Signal;

use support::qemu::{BUSY, ENDLESS, Hosts, Migration, Moment, Outcome, SLOW, bridge_of};
use support::{Sent, one_error};

/// What disturbed migrations are told: not to wait long for a peer that is gone, and to say what they are doing.
const DISTURBED: [&str; 3] = ["--json-events", "--peer-timeout", "3"];

/// From QEMU to QEMU, with a control connection that could outlast a loss of the network, as it is unless somebody says otherwise.
const DIRECT: [&str; 4] = ["--route", "direct", "--resume-timeout", "60"];
/// The same as [`SLOW`] where nothing is compressed.
const FAST: u64 = 1_000_000_000;
/// Guest pages that many epochs change.
const STEADY: u64 = 3_000;

fn check(report: &QemuReport, channels: u8) {
    assert_eq!(report.multifd_channels, channels);
    assert_eq!(bridge_of(report).connections, u32::from(channels) + 1);
    assert!(report.memory_bytes >= 256 << 20);
    assert!(bridge_of(report).complete && bridge_of(report).wire_bytes > 0);
    assert!(bridge_of(report).wire_bytes < report.memory_bytes, "{report:?}");
    assert!(bridge_of(report).wire_bytes < bridge_of(report).stream_bytes * 3 / 4, "{report:?}");
    assert!(report.epochs >= 2);
    assert!(report.total_ms > report.downtime_ms && report.downtime_ms > 0.0);
    // Between the events that the other number is measured by, the news travels.
    assert!(report.stop_to_resume_ms.expect("one clock") <= report.downtime_ms + 1.0);
    assert!(report.qemu_downtime_ms.is_some() && report.qemu_total_ms.is_some());
    assert!(report.qemu_cpu_ms.expect("its process is visible") > 0.0 && bridge_of(report).cpu_ms > 0.0);
    let there = report.destination.as_ref().expect("the destination's account");
    assert!(there.qemu_cpu_ms.expect("its process is visible") > 0.0);
    let bridge = there.bridge.as_ref().expect("its bridge's account");
    assert!(bridge.complete && bridge.cpu_ms > 0.0);
    assert_eq!(bridge.stream_bytes, bridge_of(report).stream_bytes);
    // The source counts the frames that end the connections.
    let difference = bridge_of(report).wire_bytes - bridge.wire_bytes;
    assert!(difference <= u64::from(bridge_of(report).connections) * 64, "{difference}");
}

/// Over one connection, then back over many.
fn goes_and_returns(machine: Machine, rate: u64, channels: [u8; 2]) {
    let mut hosts = Hosts::boot_machine(machine, 256, STEADY, rate);
    for channels in channels {
        let count = channels.to_string();
        // What `auto` chooses depends on how busy the machine is.
        let fixed = ["--compression", "lz4"];
        let options: &[&str] = if channels == 0 { &[] } else { &["--multifd", &count] };
        check(&hosts.hop(&[&fixed[..], options].concat()), channels);
    }
}

#[test]
fn a_vm_goes_over_one_connection_and_returns_over_four() {
    goes_and_returns(Machine::Microvm, 1_000_000_000, [0, 4]);
}

#[test]
fn a_vm_goes_over_one_channel_and_returns_over_two() {
    goes_and_returns(Machine::Q35, 2_000_000_000, [1, 2]);
}

#[test]
fn a_vm_goes_directly_and_returns_over_the_bridge() {
    let mut hosts = Hosts::boot(256, STEADY, 2_000_000_000);
    let report = hosts.hop(&DIRECT);
    assert_eq!(report.route.route, Route::Direct, "{report:?}");
    assert!(report.bridge.is_none(), "{report:?}");
    assert!(report.qemu_transferred_bytes > 0 && report.epochs >= 2, "{report:?}");
    assert!(report.stop_to_resume_ms.expect("one clock") <= report.downtime_ms + 1.0);
    let there = report.destination.as_ref().expect("the destination's account");
    assert!(there.bridge.is_none() && there.qemu_cpu_ms.is_some(), "{there:?}");
    check(&hosts.hop(&["--compression", "lz4"]), 0);
    hosts.hop(&["--route", "direct", "--resume-timeout", "0"]);
}

/// The slower the link, the more is the bridge worth.
#[test]
fn the_route_is_the_faster_one() {
    let mut hosts = Hosts::boot_filled(640, STEADY, 100, 500_000_000);
    let auto = ["--route", "auto"];
    let report = hosts.hop(&auto);
    assert_eq!(report.route.route, Route::Bridge, "{report:?}");
    let link = report.route.link_bytes_per_s.expect("it was measured");
    assert!((30e6..90e6).contains(&link), "{link} bytes/s");
    assert!(report.route.bridge_bytes_per_s.is_some_and(|rate| rate > link), "{report:?}");
    // Which one that is depends on the machine; it is said, and the VM moves.
    hosts.net.set_rate(None);
    let report = hosts.hop(&auto);
    assert_eq!(report.bridge.is_none(), report.route.route == Route::Direct, "{report:?}");
    assert!(report.route.link_bytes_per_s.is_some_and(|rate| rate > link), "{report:?}");
    // What only the bridge can do needs no measurement.
    let report = hosts.hop(&["--route", "auto", "--multifd", "2"]);
    assert_eq!((report.route.route, report.route.link_bytes_per_s), (Route::Bridge, None), "{report:?}");
    assert!(report.route.reason.contains("--multifd"), "{report:?}");
}

#[test]
fn a_small_vm_is_bridged_and_what_contradicts_itself_is_refused() {
    let mut hosts = Hosts::boot(64, STEADY, 1_000_000_000);
    let report = hosts.hop(&["--route", "auto"]);
    assert_eq!((report.route.route, report.route.link_bytes_per_s), (Route::Bridge, None), "{report:?}");
    assert!(report.route.reason.contains("little memory"), "{report:?}");
    let mut there = hosts.fresh();
    let (receiving, to) = hosts.receive(&there, &[]);
    for options in [&["--verify"][..], &["--multifd", "2"], &["--compression", "fast"]] {
        let sent = hosts.migrate(&to, &[&DIRECT[..], options].concat()).wait();
        assert_eq!(sent.code, Some(Exit::Usage as i32), "{}", sent.stderr);
        let error = sent.error();
        assert!(error.contains("--route direct") && error.contains(options[0]), "{error}");
    }
    // Nobody has come to the destination, which waits.
    hosts.stayed(&mut there);
    let sent = hosts.migrate(&to, &DIRECT).wait();
    assert_eq!((sent.code, receiving.wait().code), (Some(0), Some(0)), "{}", sent.stderr);
    hosts.moved(there);
}

#[test]
fn both_sides_report_and_the_source_can_be_ended() {
    let mut hosts = Hosts::boot(256, STEADY, 1_000_000_000);
    let there = hosts.fresh();
    let (receiving, to) = hosts.receive(&there, &["--json"]);
    let sent = hosts.migrate(&to, &["--quit-source"]).wait();
    assert_eq!(sent.code, Some(0), "{}", sent.stderr);
    assert!(sent.stdout.contains("downtime"), "{}", sent.stdout);
    let received = receiving.wait();
    assert_eq!(received.code, Some(0), "{}", received.stderr);
    let report: QemuReceiveReport = serde_json::from_str(&received.stdout).unwrap();
    assert_eq!(report.name, "pagewarp-test");
    assert!(report.total_ms > 0.0 && report.qemu_cpu_ms.is_some() && report.bridge.is_some());
    support::wait_for("the source to end", || hosts.here.qemu.has_ended().then_some(()));
    hosts.moved(there);
}

#[test]
fn a_paused_vm_stays_paused_where_it_cannot_go() {
    let mut hosts = Hosts::boot(128, STEADY, SLOW);
    hosts.here.watch.stop().unwrap();
    let Migration { mut there, receiving, sending } = hosts.begin(&DISTURBED);
    receiving.signal(Signal::KILL);
    let sent = sending.wait();
    assert_eq!(sent.code, Some(Exit::Link as i32), "{}", sent.stderr);
    assert_eq!(hosts.here.settle().unwrap().status, "paused");
    there.kill();
    hosts.here.watch.cont().unwrap();
    hosts.stayed(&mut there);
}

/// Cancels at a moment; whatever came of it, the VM runs on one side and can migrate again.
fn cancelled(hosts: &mut Hosts, moment: Option<Moment>, route: &[&str]) -> Outcome {
    let options = match moment {
        Some(Moment::Switchover) => &["--downtime-ms", "2000"],
        _ => &ENDLESS,
    };
    let mut migration = hosts.begin(&[&DISTURBED[..], options, route].concat());
    migration.sending.wait_progress();
    if let Some(moment) = moment {
        hosts.here.wait_moment(moment, &mut migration.sending);
    }
    migration.sending.signal(Signal::INT);
    let Migration { mut there, receiving, sending } = migration;
    let sent = sending.wait();
    if moment.is_none() {
        // The source may have gone before it said what it wants: then this one waits for another.
        receiving.signal(Signal::INT);
    }
    let received = receiving.wait();
    if sent.code == Some(0) {
        assert_eq!(moment, Some(Moment::Switchover), "{}", sent.stderr);
        assert_eq!(received.code, Some(0), "{}", received.stderr);
        hosts.moved(there);
        return Outcome::Moved;
    }
    assert_eq!(sent.code, Some(Exit::Cancelled as i32), "{moment:?}: {}", sent.stderr);
    assert!(sent.stderr.contains("cancel"), "{}", sent.stderr);
    if moment.is_none() && received.code == Some(Exit::Cancelled as i32) {
        hosts.stayed(&mut there);
        return Outcome::Stayed;
    }
    assert_eq!(received.code, Some(Exit::Peer as i32), "{moment:?}: {}", received.stderr);
    let error = one_error(&received.stderr);
    assert!(error.contains("the source gave up") && error.contains("cancelled"), "{error}");
    hosts.stayed(&mut there);
    support::wait_for("the destination to be ended", || there.qemu.has_ended().then_some(()));
    Outcome::Stayed
}

#[test]
fn a_migration_can_be_cancelled_at_any_moment() {
    let mut hosts = Hosts::boot(256, BUSY, SLOW);
    for moment in [None, Some(Moment::Early), Some(Moment::Late), Some(Moment::Switchover)] {
        let outcome = cancelled(&mut hosts, moment, &[]);
        println!("{moment:?}: {outcome:?}");
    }
    hosts.net.set_rate(Some(1_000_000_000));
    hosts.hop(&[]);
}

#[test]
fn a_direct_migration_can_be_cancelled_at_any_moment() {
    let mut hosts = Hosts::boot(128, BUSY, FAST);
    for moment in [None, Some(Moment::Early), Some(Moment::Late), Some(Moment::Switchover)] {
        let outcome = cancelled(&mut hosts, moment, &DIRECT);
        println!("{moment:?}: {outcome:?}");
    }
    hosts.hop(&[]);
}

#[test]
fn a_destination_that_is_cancelled_waits_no_longer() {
    let mut hosts = Hosts::boot(128, BUSY, SLOW);
    // Nobody has come yet: its QEMU is as it was.
    let there = hosts.fresh();
    let (receiving, _) = hosts.receive(&there, &[]);
    receiving.signal(Signal::INT);
    let received = receiving.wait();
    assert_eq!(received.code, Some(Exit::Cancelled as i32), "{}", received.stderr);
    let (receiving, to) = hosts.receive(&there, &[]);
    let mut sending = hosts.migrate(&to, &[&DISTURBED[..], &ENDLESS].concat());
    hosts.here.wait_moment(Moment::Late, &mut sending);
    receiving.signal(Signal::INT);
    let (sent, received) = (sending.wait(), receiving.wait());
    assert_eq!(received.code, Some(Exit::Cancelled as i32), "{}", received.stderr);
    assert_eq!(sent.code, Some(Exit::Peer as i32), "{}", sent.stderr);
    assert!(one_error(&sent.stderr).contains("cancelled"), "{}", sent.stderr);
    let mut there = there;
    hosts.stayed(&mut there);
}

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Migrate,
    Receive,
    DestinationQemu,
}

fn killed(hosts: &mut Hosts, victim: Victim, moment: Moment, route: &[&str]) {
    let mut migration = hosts.begin(&[&DISTURBED[..], &ENDLESS, route].concat());
    hosts.here.wait_moment(moment, &mut migration.sending);
    match victim {
        Victim::Migrate => migration.sending.signal(Signal::KILL),
        Victim::Receive => migration.receiving.signal(Signal::KILL),
        Victim::DestinationQemu => migration.there.kill(),
    }
    let Migration { mut there, receiving, sending } = migration;
    let (sent, received) = (sending.wait(), receiving.wait());
    println!("{victim:?} {moment:?}:\n  {}\n  {}", last(&sent.stderr), last(&received.stderr));
    let survivor = |end: &Sent, exit: Exit, words: &[&str]| {
        assert_eq!(end.code, Some(exit as i32), "{victim:?} {moment:?}: {}", end.stderr);
        let error = one_error(&end.stderr);
        for word in words {
            assert!(error.contains(word), "{victim:?} {moment:?}: no `{word}` in: {error}");
        }
    };
    match victim {
        Victim::Migrate => {
            assert_eq!(sent.code, None);
            survivor(&received, Exit::Link, &["connection"]);
        }
        Victim::Receive => {
            assert_eq!(received.code, None);
            survivor(&sent, Exit::Link, &["connection"]);
            // Nobody is left to end it, and it does not run the VM by itself.
            assert!(!there.runs());
            there.kill();
        }
        Victim::DestinationQemu => {
            // Both say who it was, and where to look.
            for end in [&sent, &received] {
                survivor(end, Exit::Peer, &["the destination QEMU", "standard error"]);
            }
        }
    }
    hosts.stayed(&mut there);
    support::wait_for("the destination to end", || there.qemu.has_ended().then_some(()));
}

fn last(stderr: &str) -> &str {
    stderr.lines().last().unwrap_or_default()
}

fn killed_at_both_moments(victim: Victim) {
    let mut hosts = Hosts::boot(128, BUSY, SLOW);
    for moment in [Moment::Early, Moment::Late] {
        killed(&mut hosts, victim, moment, &[]);
    }
    hosts.net.set_rate(Some(1_000_000_000));
    hosts.hop(&[]);
}

/// Though the QEMU processes could go on by themselves.
#[test]
fn the_vm_survives_whoever_is_killed_beside_a_direct_migration() {
    let mut hosts = Hosts::boot(128, BUSY, FAST);
    for victim in [Victim::Migrate, Victim::Receive, Victim::DestinationQemu] {
        for moment in [Moment::Early, Moment::Late] {
            killed(&mut hosts, victim, moment, &DIRECT);
        }
    }
    hosts.hop(&DIRECT);
}

#[test]
fn the_vm_survives_a_killed_migrate() {
    killed_at_both_moments(Victim::Migrate);
}

#[test]
fn the_vm_survives_a_killed_receive() {
    killed_at_both_moments(Victim::Receive);
}

#[test]
fn the_vm_survives_a_killed_destination_qemu() {
    killed_at_both_moments(Victim::DestinationQemu);
}

/// Around the switch-over everything is possible but two VMs, or none.
#[test]
fn whoever_is_killed_at_the_switch_over_one_side_runs_the_vm() {
    let mut hosts = Hosts::boot(128, STEADY, SLOW);
    let victims = [Victim::Migrate, Victim::Receive, Victim::DestinationQemu];
    let all = victims.map(|victim| [(victim, &[][..]), (victim, &DIRECT)]);
    for (victim, route) in all.into_iter().flatten() {
        let mut migration = hosts.begin(&[&DISTURBED[..], &["--downtime-ms", "2000"], route].concat());
        hosts.here.wait_moment(Moment::Switchover, &mut migration.sending);
        match victim {
            Victim::Migrate => migration.sending.signal(Signal::KILL),
            Victim::Receive => migration.receiving.signal(Signal::KILL),
            Victim::DestinationQemu => migration.there.kill(),
        }
        let Migration { there, receiving, sending } = migration;
        let (sent, received) = (sending.wait(), receiving.wait());
        println!("{victim:?} {route:?}:\n  {}\n  {}", last(&sent.stderr), last(&received.stderr));
        if victim == Victim::DestinationQemu {
            assert_ne!(sent.code, Some(0), "{}", sent.stderr);
        }
        println!("  {:?}", hosts.resolve(there));
    }
    hosts.hop(&[]);
}

#[test]
fn both_sides_notice_a_link_that_is_cut() {
    let mut hosts = Hosts::boot(128, BUSY, SLOW);
    notice_a_cut(&mut hosts, &[]);
    hosts.net.set_rate(Some(1_000_000_000));
    hosts.hop(&[]);
}

#[test]
fn both_sides_of_a_direct_migration_notice_a_link_that_is_cut() {
    let mut hosts = Hosts::boot(128, BUSY, FAST);
    notice_a_cut(&mut hosts, &DIRECT);
    hosts.hop(&DIRECT);
}

fn notice_a_cut(hosts: &mut Hosts, route: &[&str]) {
    let there = hosts.fresh();
    let (receiving, to) = hosts.receive(&there, &["--peer-timeout", "3"]);
    let mut sending = hosts.migrate(&to, &[&DISTURBED[..], &ENDLESS, route].concat());
    hosts.here.wait_moment(Moment::Late, &mut sending);
    hosts.net.cut();
    let (sent, received) = (sending.wait(), receiving.wait());
    println!("{}\n{}", last(&sent.stderr), last(&received.stderr));
    for end in [&sent, &received] {
        assert_eq!(end.code, Some(Exit::Link as i32), "{}", end.stderr);
        end.error();
    }
    let mut there = there;
    hosts.stayed(&mut there);
    support::wait_for("the destination to be ended", || there.qemu.has_ended().then_some(()));
    hosts.net.heal();
}
