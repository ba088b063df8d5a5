//! Trials: a migration is disturbed at a random moment, again and again, on one VM that must survive all of it.
//!
//! After each trial exactly one process runs the VM, the guest has found nothing wrong, and it can migrate again.
//! `PAGEWARP_TRIALS` and `PAGEWARP_SEED` set their number and the seed.

mod support;

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pagewarp_cli::demo::machine::Machine;
use pagewarp_cli::exit::Exit;
use pagewarp_cli::units::ByteSize;
use pagewarp_engine::report::Phase;
use pagewarp_kvm::control::{Status, VmState};
use pagewarp_testkit::rng::SplitMix64;
use pagewarp_wire::Kind;
use rustix::process::Signal;

use support::process::signal;
use support::proxy::{Harm, Plan, Proxy};
use support::{Rig, Sending, console_bytes, have_kvm, one_error, setting, wait_for};

/// How long the source waits for a destination that is silent on purpose. It pings once a second, so it must be more than that.
const PEER_TIMEOUT: &str = "1500ms";
/// A destination that was stopped has nothing left to do for the source after this.
const SETTLE: Duration = Duration::from_millis(100);
/// How fast the disturbed migrations may send: their pace decides what a moment hits.
const BANDWIDTHS: [Option<&str>; 4] = [None, Some("1Gbit"), Some("400Mbit"), Some("150Mbit")];

/// What happens to a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Blow {
    /// `pagewarp cancel`.
    Cancel,
    /// Ctrl-C to `pagewarp send`.
    Interrupt,
    /// The destination is killed while the guest still runs on the source.
    KillDestination,
    /// The destination is killed around the switch-over, unless the VM has just moved there.
    KillAtSwitchover,
    /// `pagewarp send` is killed. The migration goes on: the VM's process does the work, and `send` only watches.
    KillClient,
    /// The destination is stopped for longer than the source waits.
    Freeze,
    /// The link breaks when *Commit* is under way: the destination never gets it.
    LoseCommit,
    /// The link breaks when *Commit* has arrived: the source never hears that the VM runs.
    LoseRunning,
}

/// Trial by trial: cancels and killed destinations, which are the likeliest in practice, more often than the others.
const ROTATION: [Blow; 10] = [
    Blow::Cancel,
    Blow::KillDestination,
    Blow::Interrupt,
    Blow::KillAtSwitchover,
    Blow::Freeze,
    Blow::Cancel,
    Blow::KillDestination,
    Blow::KillClient,
    Blow::LoseCommit,
    Blow::LoseRunning,
];

/// Where the VM is after a trial.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Outcome {
    /// It never left.
    Stayed,
    /// It has moved: the blow came too late, or was none to the migration.
    Moved,
    /// The hand-over was in doubt, the VM did not run on the destination, and `resolve --resume` let it go on here.
    InDoubtResumed,
    /// The hand-over was in doubt, the VM ran on the destination, and `resolve --discard` ended it here.
    InDoubtDiscarded,
}

struct Trials {
    rig: Rig,
    rng: SplitMix64,
    /// What a whole migration takes at each bandwidth, roughly.
    expected: Duration,
}

#[test]
fn a_vm_survives_whatever_happens_to_its_migrations() {
    if !have_kvm("trials") {
        return;
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let seed: u64 = setting("PAGEWARP_SEED", now);
    let count: u32 = setting("PAGEWARP_TRIALS", 25);
    println!("seed {seed}: PAGEWARP_SEED={seed} repeats the choices, though not the scheduling");
    let rig = Rig::boot(ByteSize(64 << 20), 5_000);
    let mut trials = Trials { rig, rng: SplitMix64::new(seed), expected: Duration::ZERO };
    let mut table = BTreeMap::<(Blow, Outcome), u32>::new();
    let mut following = 0;
    for number in 0..count {
        let blow = ROTATION[number as usize % ROTATION.len()];
        let outcome = trials.one(number, blow);
        *table.entry((blow, outcome)).or_default() += 1;
        // A VM that moved has already shown that it can. Others show it at once.
        if outcome != Outcome::Moved {
            trials.rig.hop(&[]);
            following += 1;
        }
    }
    trials.rig.hop(&[]);
    let last = trials.rig.goes_on();
    println!("\n{count} trials with seed {seed}:");
    for ((blow, outcome), times) in &table {
        println!("  {:<18} {:<18} {times:3}", format!("{blow:?}"), format!("{outcome:?}"));
    }
    println!(
        "{} following migrations succeeded; {} sweeps, {} errors",
        following + 1,
        last.sweeps,
        last.errors
    );
    trials.rig.here.stop();
}

impl Trials {
    fn one(&mut self, number: u32, blow: Blow) -> Outcome {
        let bandwidth = BANDWIDTHS[self.rng.index(BANDWIDTHS.len())];
        // A long switch-over is one that can be hit.
        let mut options = vec!["--peer-timeout", PEER_TIMEOUT, "--downtime-ms", "2000"];
        options.extend(bandwidth.into_iter().flat_map(|rate| ["--bandwidth", rate]));
        let (there, address) = self.rig.receiver();
        // Some 25 MB cross the wire.
        self.expected = match bandwidth {
            None => Duration::from_millis(250),
            Some("1Gbit") => Duration::from_millis(400),
            Some("400Mbit") => Duration::from_millis(600),
            Some(_) => Duration::from_millis(1200),
        };
        print!("trial {number:2}: {blow:?} at {}: ", bandwidth.unwrap_or("full speed"));
        let outcome = match blow {
            Blow::Cancel | Blow::Interrupt => self.cancel(there, &address, &options, blow),
            Blow::KillDestination => self.kill_destination(there, &address, &options),
            Blow::KillAtSwitchover => self.kill_at_switchover(there, &address, &options),
            Blow::KillClient => self.kill_client(there, &address, &options),
            Blow::Freeze => self.freeze(there, &address, &options),
            Blow::LoseCommit => self.lose(there, &address, &options, Harm::CutBefore(Kind::Commit)),
            Blow::LoseRunning => self.lose(there, &address, &options, Harm::CutAfter(Kind::Commit)),
        };
        println!("{outcome:?}");
        outcome
    }

    /// Waits for a random part of what the migration is expected to take, and tells where that is.
    fn random_moment(&mut self) {
        std::thread::sleep(self.expected.mul_f64(self.rng.unit()));
        if let Ok(Status { progress: Some(progress), .. }) = self.rig.here.status() {
            print!("{:?}, epoch {}, ", progress.phase, progress.epoch);
        }
    }

    fn cancel(&mut self, there: Machine, address: &str, options: &[&str], blow: Blow) -> Outcome {
        let mut sending = self.rig.send(address, options);
        self.wait_migrating(&mut sending);
        self.random_moment();
        if !sending.has_ended() {
            match blow {
                Blow::Interrupt => signal(sending.pid(), Signal::INT),
                // Refused if it has just ended, or just moved.
                _ => drop(self.rig.command(&["cancel", Machine::NAME])),
            }
        }
        let sent = sending.wait();
        if sent.code == Some(0) {
            self.rig.moved(there);
            return Outcome::Moved;
        }
        assert_eq!(sent.code, Some(Exit::Cancelled as i32), "{}", sent.stderr);
        assert!(sent.error().contains("cancelled"), "{}", sent.stderr);
        self.rig.stayed(&there);
        let told = ended(there);
        assert!(one_error(&told).contains("the source keeps the VM"), "{told}");
        Outcome::Stayed
    }

    fn kill_destination(&mut self, mut there: Machine, address: &str, options: &[&str]) -> Outcome {
        let mut sending = self.rig.send(address, options);
        self.wait_migrating(&mut sending);
        self.random_moment();
        // Later ones are those of `kill_at_switchover`: here the host of a VM that has just moved would be killed.
        let status = self.rig.here.status().ok();
        let precopy = status.and_then(|status| status.progress).is_some_and(|progress| {
            matches!(progress.phase, Phase::Connecting | Phase::Precopy)
                && progress.estimated_downtime_ms.is_none()
        });
        if !precopy {
            return self.stop_then_kill(there, sending);
        }
        there.kill();
        let sent = sending.wait();
        assert_eq!(sent.code, Some(Exit::Link as i32), "{}", sent.stderr);
        sent.error();
        self.rig.stayed(&there);
        Outcome::Stayed
    }

    fn kill_at_switchover(&mut self, there: Machine, address: &str, options: &[&str]) -> Outcome {
        let sending = self.rig.send(address, options);
        let here = &self.rig.here;
        wait_for("the switch-over", || match here.status() {
            Ok(status) => {
                let phase = status.progress.map_or(Phase::Connecting, |progress| progress.phase);
                (!matches!(phase, Phase::Connecting | Phase::Precopy)).then_some(())
            }
            // The process has ended: the VM has moved.
            Err(_) => Some(()),
        });
        std::thread::sleep(Duration::from_millis(self.rng.below(80)));
        self.stop_then_kill(there, sending)
    }

    /// Stops the destination, looks whether the VM has moved there, and kills it if not.
    ///
    /// Once stopped it says nothing more, so what the source makes of all it heard is final; and no VM is killed that has just moved.
    fn stop_then_kill(&mut self, mut there: Machine, mut sending: Sending) -> Outcome {
        let Ok(status) = there.status() else { panic!("the destination died: {}", Rig::log(&there)) };
        signal(status.pid, Signal::STOP);
        std::thread::sleep(SETTLE);
        if sending.has_ended() || self.rig.here.status().is_err() {
            signal(status.pid, Signal::CONT);
            let sent = sending.wait();
            assert_eq!(sent.code, Some(0), "{}", sent.stderr);
            self.rig.moved(there);
            return Outcome::Moved;
        }
        there.kill();
        let sent = sending.wait();
        if sent.code == Some(Exit::InDoubt as i32) {
            return self.resolve(there);
        }
        assert_eq!(sent.code, Some(Exit::Link as i32), "{}", sent.stderr);
        sent.error();
        self.rig.stayed(&there);
        Outcome::Stayed
    }

    fn kill_client(&mut self, there: Machine, address: &str, options: &[&str]) -> Outcome {
        let mut sending = self.rig.send(address, options);
        self.wait_migrating(&mut sending);
        self.random_moment();
        if !sending.has_ended() {
            signal(sending.pid(), Signal::KILL);
        }
        sending.wait();
        let here = &self.rig.here;
        wait_for("the VM to move without its client", || here.status().is_err().then_some(()));
        self.rig.moved(there);
        Outcome::Moved
    }

    fn freeze(&mut self, there: Machine, address: &str, options: &[&str]) -> Outcome {
        let mut sending = self.rig.send(address, options);
        self.wait_migrating(&mut sending);
        self.random_moment();
        let Ok(status) = there.status() else { panic!("the destination died: {}", Rig::log(&there)) };
        signal(status.pid, Signal::STOP);
        // Ends because the destination is silent, unless the VM had moved before.
        let sent = sending.wait();
        signal(status.pid, Signal::CONT);
        match sent.code {
            Some(0) => {
                self.rig.moved(there);
                Outcome::Moved
            }
            code if code == Some(Exit::InDoubt as i32) => self.resolve(there),
            code => {
                assert_eq!(code, Some(Exit::Link as i32), "{}", sent.stderr);
                sent.error();
                self.rig.stayed(&there);
                one_error(&ended(there));
                Outcome::Stayed
            }
        }
    }

    fn lose(&mut self, there: Machine, address: &str, options: &[&str], harm: Harm) -> Outcome {
        let runs_there = harm == Harm::CutAfter(Kind::Commit);
        let proxy = Proxy::start(address, Plan { connection: 0, back: false, harm });
        let sent = self.rig.send(&proxy.address.to_string(), options).wait();
        assert!(proxy.done());
        assert_eq!(sent.code, Some(Exit::InDoubt as i32), "{}", sent.stderr);
        assert!(sent.error().contains("pagewarp resolve"), "{}", sent.stderr);
        let outcome = self.resolve(there);
        assert_eq!(outcome == Outcome::InDoubtDiscarded, runs_there);
        outcome
    }

    /// Does what an operator should do about a hand-over in doubt: looks at the destination, then decides here.
    fn resolve(&mut self, there: Machine) -> Outcome {
        assert_eq!(self.rig.state(), VmState::InDoubt);
        let paused = console_bytes(&self.rig.here);
        // The destination either runs the VM or ends.
        let runs_there = wait_for("the destination to decide", || match there.status() {
            Ok(status) if status.state == VmState::Running => Some(true),
            Ok(_) => None,
            Err(_) => Some(false),
        });
        let refused = self.rig.command(&["cancel", Machine::NAME]).unwrap_err();
        assert!(refused.contains("no migration under way"), "{refused}");
        let decide = |decision: &str| self.rig.command(&["resolve", Machine::NAME, decision]).unwrap();
        if runs_there {
            wait_for("the guest to say something there", || (console_bytes(&there) > 0).then_some(()));
            assert_eq!(console_bytes(&self.rig.here), paused, "the guest ran on both hosts");
            decide("--discard");
            self.rig.moved(there);
            Outcome::InDoubtDiscarded
        } else {
            assert_eq!(console_bytes(&self.rig.here), paused, "the guest ran while it was in doubt");
            decide("--resume");
            self.rig.stayed(&there);
            Outcome::InDoubtResumed
        }
    }

    /// Waits until the migration has begun.
    fn wait_migrating(&self, sending: &mut Sending) {
        let here = &self.rig.here;
        wait_for("the migration to begin", || {
            let begun = here.status().map_or(true, |status| status.state != VmState::Running);
            (begun || sending.has_ended()).then_some(())
        });
    }
}

/// Waits for a destination that got no VM to end, and returns what it said.
fn ended(there: Machine) -> String {
    wait_for("the destination to end", || there.status().is_err().then_some(()));
    let mut there = there;
    there.wait_for_end();
    Rig::log(&there)
}
