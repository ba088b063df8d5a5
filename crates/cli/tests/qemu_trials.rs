//! Trials between QEMU processes: a VM goes back and forth, and a migration is disturbed at a random moment, again and again. Takes root, because of
//! the network namespaces.
//!
//! After each trial exactly one QEMU runs the VM, and the guest has found nothing wrong. `PAGEWARP_QEMU_TRIALS` and `PAGEWARP_SEED` set their
//! number and the seed.

mod support;

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use pagewarp_testkit::rng::SplitMix64;
use rustix::process::Signal;

use support::qemu::{Hosts, Migration, Outcome};
use support::{Sent, setting};

/// What happens to a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Blow {
    None,
    Cancel,
    CancelReceive,
    KillMigrate,
    KillReceive,
    KillDestinationQemu,
    CutLink,
}

const BLOWS: [Blow; 7] = [
    Blow::None,
    Blow::Cancel,
    Blow::CancelReceive,
    Blow::KillMigrate,
    Blow::KillReceive,
    Blow::KillDestinationQemu,
    Blow::CutLink,
];
const CHANNELS: [&[&str]; 4] =
    [&[], &["--multifd", "1"], &["--multifd", "3"], &["--route", "direct", "--resume-timeout", "60"]];
/// How fast the link is: its pace decides what a moment hits.
const RATES: [u64; 3] = [2_000_000_000, 500_000_000, 200_000_000];
/// What the guest writes in a second, in pages.
const WRITES: u64 = 5_000;

#[test]
fn a_vm_survives_whatever_happens_to_its_migrations() {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let seed: u64 = setting("PAGEWARP_SEED", now);
    let count: u32 = setting("PAGEWARP_QEMU_TRIALS", 8);
    println!("seed {seed}: PAGEWARP_SEED={seed} repeats the choices, though not the scheduling");
    let mut rng = SplitMix64::new(seed);
    let mut hosts = Hosts::boot(96, WRITES, RATES[0]);
    let mut table = BTreeMap::<(Blow, Outcome), u32>::new();
    // Each blow in turn, in an order of its own each time.
    let mut blows = Vec::new();
    for number in 0..count {
        if blows.is_empty() {
            blows = BLOWS.to_vec();
        }
        let blow = blows.swap_remove(rng.index(blows.len()));
        let outcome = trial(&mut hosts, &mut rng, number, blow);
        *table.entry((blow, outcome)).or_default() += 1;
    }
    hosts.net.set_rate(None);
    hosts.hop(&[]);
    println!("\n{count} trials with seed {seed}:");
    for ((blow, outcome), times) in &table {
        println!("  {:<20} {:<10} {times:3}", format!("{blow:?}"), format!("{outcome:?}"));
    }
}

fn trial(hosts: &mut Hosts, rng: &mut SplitMix64, number: u32, blow: Blow) -> Outcome {
    let rate = RATES[rng.index(RATES.len())];
    let channels = CHANNELS[rng.index(CHANNELS.len())];
    // A long switch-over is one that can be hit.
    let downtime = ["300", "2000"][rng.index(2)];
    let options = [&["--json-events", "--peer-timeout", "3", "--downtime-ms", downtime], channels].concat();
    // Some 60 MB cross the wire.
    let expected = Duration::from_secs_f64(0.3 + 60e6 * 8.0 / rate as f64);
    let moment = expected.mul_f64(rng.unit());
    print!("trial {number:2}: {blow:?} after {moment:.1?} at {} Mbit/s, {channels:?}: ", rate / 1_000_000);
    hosts.net.set_rate(Some(rate));
    let mut migration = hosts.begin(&options);
    migration.sending.wait_progress();
    let until = Instant::now() + moment;
    while Instant::now() < until && !migration.sending.has_ended() {
        std::thread::sleep(Duration::from_millis(1));
    }
    match blow {
        Blow::None => {}
        Blow::Cancel => migration.sending.signal(Signal::INT),
        Blow::CancelReceive => migration.receiving.signal(Signal::INT),
        Blow::KillMigrate => migration.sending.signal(Signal::KILL),
        Blow::KillReceive => migration.receiving.signal(Signal::KILL),
        // Whose VM has moved may not be killed: that is no failure of a migration.
        Blow::KillDestinationQemu if migration.there.runs() => {}
        Blow::KillDestinationQemu => migration.there.kill(),
        Blow::CutLink => hosts.net.cut(),
    }
    let Migration { there, receiving, sending } = migration;
    let (sent, received) = (sending.wait(), receiving.wait());
    if blow == Blow::CutLink {
        hosts.net.heal();
    }
    let outcome = hosts.resolve(there);
    println!("{outcome:?}, {:?} and {:?}", sent.code, received.code);
    fits(blow, outcome, &sent, &received);
    outcome
}

/// What both sides say must be what has happened.
fn fits(blow: Blow, outcome: Outcome, sent: &Sent, received: &Sent) {
    let all = format!("{blow:?} {outcome:?}\nsource: {}\ndestination: {}", sent.stderr, received.stderr);
    // What source and destination end with where the VM has stayed.
    let stayed: [&[Option<i32>]; 2] = match blow {
        Blow::None => [&[], &[]],
        Blow::Cancel => [&[Some(3)], &[Some(5)]],
        // The source may not have come yet.
        Blow::CancelReceive => [&[Some(5), Some(6)], &[Some(3)]],
        Blow::KillMigrate => [&[None], &[Some(6)]],
        Blow::KillReceive => [&[Some(6)], &[None]],
        Blow::KillDestinationQemu => [&[Some(5)], &[Some(5)]],
        Blow::CutLink => [&[Some(6)], &[Some(6)]],
    };
    match (outcome, sent.code) {
        // In doubt: either.
        (Outcome::Moved | Outcome::Resumed, Some(7)) => assert_ne!(blow, Blow::None, "{all}"),
        (Outcome::Moved | Outcome::Resumed, None) => assert_eq!(blow, Blow::KillMigrate, "{all}"),
        (Outcome::Moved, Some(0)) => {}
        (Outcome::Stayed, code) => {
            assert!(stayed[0].contains(&code) && stayed[1].contains(&received.code), "{all}");
        }
        _ => panic!("{all}"),
    }
    match received.code {
        Some(0) => assert_eq!(outcome, Outcome::Moved, "{all}"),
        None => assert_eq!(blow, Blow::KillReceive, "{all}"),
        // What it was given, it may have lost.
        Some(7) => assert_ne!(outcome, Outcome::Stayed, "{all}"),
        Some(_) => assert_ne!(outcome, Outcome::Moved, "{all}"),
    }
}
