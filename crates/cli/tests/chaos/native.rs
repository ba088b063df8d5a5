//! Trials of `pagewarp send` and `pagewarp receive`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pagewarp_cli::demo::machine::{Extras, Machine};
use pagewarp_cli::units::ByteSize;
use pagewarp_engine::report::Phase;
use pagewarp_kvm::control::VmState;
use rustix::process::Signal;

use super::Tls;
use super::draw::{Fault, Plan, Strike};
use super::outcome::{NEVER, Outcome, Seen, was_dealt};
use super::relay::Relay;
use super::strikes::{Victim, deal, signal};
use crate::support::{GPU_FAULTS, PROGRAM, Rig, Sending, Sent, console_bytes, software_gpu, wait_for};

const MEMORY: ByteSize = ByteSize(64 << 20);
const PAGES_PER_S: u64 = 5_000;
/// What crosses the wire, roughly.
const WIRE_BITS: f64 = 25e6 * 8.0;

/// A VM that goes from process to process.
pub(crate) struct Native {
    rig: Rig,
}

/// A migration under way.
struct Migration<'a> {
    rig: &'a mut Rig,
    there: Machine,
    relay: Relay,
    sending: Sending,
    source: u32,
    destination: u32,
    sender_is_dead: bool,
    /// Whether the source may be asked how it is: a process that is stopped does not answer.
    may_ask: bool,
    /// Whether the migration had begun when the first fault came.
    has_begun: bool,
}

impl Native {
    pub(crate) fn boot() -> Native {
        Native { rig: Rig::boot(MEMORY, PAGES_PER_S) }
    }

    pub(crate) fn dir(&self) -> &Path {
        self.rig.dir()
    }

    pub(crate) fn trial(&mut self, plan: &Plan, tls: &Tls) -> Seen {
        let rig = &mut self.rig;
        let program = program(rig.dir(), plan);
        // Whose source never comes does not wait for ever.
        let (there, to) = match rig.receiver_by(&program, &receiver(plan, tls)) {
            Ok(found) => found,
            Err(error) => {
                // It has too little memory to begin with.
                assert!(plan.has(Fault::MemoryLimit).is_some(), "{error:#}");
                rig.goes_on();
                return Seen {
                    outcome: Outcome::Stayed,
                    dealt: vec![],
                    source_exit: None,
                    destination_exit: None,
                    breaks: None,
                };
            }
        };
        let relay = Relay::start(&to);
        let options = sender(plan, tls);
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let source = rig.here.status().unwrap().pid;
        let destination = there.status().unwrap().pid;
        let sending = rig.send(&relay.address.to_string(), &options);
        let mut migration = Migration {
            rig,
            there,
            relay,
            sending,
            source,
            destination,
            sender_is_dead: false,
            may_ask: plan.has(Fault::StopSource).is_none(),
            has_begun: true,
        };
        let expected = Duration::from_secs_f64(0.4 + WIRE_BITS / plan.rate_bits_per_s as f64);
        let dealt = deal(&mut migration, plan, expected);
        let Migration { there, relay, sending, has_begun, .. } = migration;
        let sent = sending.wait();
        let outcome = self.judge(there, &sent, &dealt);
        drop(relay);
        self.fits(plan, outcome, &sent, &dealt, has_begun);
        let report: Option<serde_json::Value> = serde_json::from_str(&sent.stdout).ok();
        if plan.has(Fault::MemoryLimit).is_some()
            && let Ok(status) = self.rig.here.status()
        {
            // The next migration is not one of a process that has too little memory.
            let lifted = ["--pid", &status.pid.to_string(), "--as=unlimited:unlimited"];
            assert!(Command::new("prlimit").args(lifted).status().unwrap().success());
        }
        let breaks = report.and_then(|report| report["interruptions"]["breaks"].as_u64());
        Seen { outcome, dealt, source_exit: sent.code, destination_exit: None, breaks }
    }

    /// Finds out where the VM is, does what the documentation says, and looks whether it is well.
    fn judge(&mut self, there: Machine, sent: &Sent, dealt: &[Strike]) -> Outcome {
        let rig = &mut self.rig;
        let runs_there = wait_for("the destination to decide", || match there.status() {
            Ok(status) => (status.state == VmState::Running).then_some(true),
            Err(_) => Some(false),
        });
        let here = wait_for("the source to decide", || match rig.here.status() {
            Ok(status) => {
                let is_passing = matches!(status.state, VmState::Migrating | VmState::Migrated);
                (!is_passing).then_some(Some(status.state))
            }
            Err(_) => Some(None),
        });
        let told = |what: &str, rig: &Rig| {
            format!(
                "{what}\nsend: {}\nsource: {}\ndestination: {}",
                sent.stderr,
                Rig::log(&rig.here),
                Rig::log(&there)
            )
        };
        let killed_there = was_dealt(dealt, Fault::KillDestination);
        match (here, runs_there) {
            (None, true) => {
                rig.moved(there);
                Outcome::Moved
            }
            (None, false) => {
                let by_trial = was_dealt(dealt, Fault::KillSource)
                    || killed_there && sent.code.is_none_or(|code| code == 0);
                assert!(by_trial, "{}", told("the VM is lost", rig));
                Outcome::Killed
            }
            (Some(VmState::Running), false) => {
                assert_eq!(
                    console_bytes(&there),
                    0,
                    "{}",
                    told("the VM ran at the destination as well", rig)
                );
                rig.goes_on();
                Outcome::Stayed
            }
            (Some(VmState::InDoubt), true) => {
                let paused = console_bytes(&rig.here);
                wait_for("the guest to say something there", || (console_bytes(&there) > 0).then_some(()));
                assert_eq!(console_bytes(&rig.here), paused, "{}", told("the VM ran on both", rig));
                rig.command(&["resolve", Machine::NAME, "--discard"]).unwrap();
                rig.moved(there);
                Outcome::Discarded
            }
            (Some(VmState::InDoubt | VmState::Paused), false) => {
                let has_run = console_bytes(&there) > 0;
                assert!(killed_there || !has_run, "{}", told("the VM ran at the destination", rig));
                rig.command(&["resolve", Machine::NAME, "--resume"]).unwrap();
                rig.goes_on();
                Outcome::Resumed
            }
            other => panic!("{}", told(&format!("source and destination: {other:?}"), rig)),
        }
    }

    /// What `send` says must be what has happened.
    fn fits(&self, plan: &Plan, outcome: Outcome, sent: &Sent, dealt: &[Strike], has_begun: bool) {
        let all = || format!("{outcome:?}, exit code {:?}: {}\n{dealt:?}", sent.code, sent.stderr);
        let Some(code) = sent.code else {
            assert!(was_dealt(dealt, Fault::KillSender), "{}", all());
            return;
        };
        // The VM's process went away under the eyes of `send`.
        let lost_it = was_dealt(dealt, Fault::KillSource);
        assert!(lost_it || !NEVER.contains(&code), "{}", all());
        match outcome {
            Outcome::Moved => assert!(code == 0 || lost_it, "{}", all()),
            Outcome::Stayed => assert!([4, 5, 6, 9].contains(&code), "{}", all()),
            Outcome::Resumed | Outcome::Discarded => assert_eq!(code, 7, "{}", all()),
            Outcome::Killed | Outcome::Failed => {}
        }
        if plan.has(Fault::FullDisk).is_some() && code == 0 {
            assert!(sent.stderr.contains("cannot write the trace"), "{}", all());
        }
        // Where only the network fails, and not for as long as is waited for, nothing is lost at all.
        let passes = |strike: &Strike| match strike.fault {
            Fault::Reset | Fault::FullDisk | Fault::TinyHistory | Fault::Clock | Fault::KillSender => true,
            Fault::Corrupt => plan.tls,
            Fault::Refuse | Fault::Blackhole | Fault::Stall => strike.lasts < Duration::from_secs(4),
            _ => false,
        };
        // While the VM stands still nobody waits for long.
        let is_early = |strike: &Strike| strike.at < 0.4;
        if has_begun
            && plan.resume_s >= 20
            && plan.peer_s >= 10
            && plan.strikes.iter().all(|strike| passes(strike) && is_early(strike))
        {
            assert_eq!(outcome, Outcome::Moved, "{}", all());
        }
    }
}

impl Victim for Migration<'_> {
    fn strike(&mut self, strike: &Strike) {
        if self.may_ask && self.has_begun {
            let progress = self.rig.here.status().ok().and_then(|status| status.progress);
            self.has_begun = progress.is_some_and(|progress| progress.phase != Phase::Connecting);
        }
        match strike.fault {
            Fault::KillSource => self.rig.here.kill(),
            Fault::KillDestination => self.there.kill(),
            Fault::KillSender => {
                signal(self.sending.pid(), Signal::KILL);
                self.sender_is_dead = true;
            }
            Fault::StopSource => signal(self.source, Signal::STOP),
            Fault::StopDestination => signal(self.destination, Signal::STOP),
            Fault::StopSender => signal(self.sending.pid(), Signal::STOP),
            Fault::Reset => self.relay.reset(strike.number),
            Fault::Refuse => self.relay.refuse(true),
            Fault::Blackhole => self.relay.hold(true),
            Fault::Stall => self.relay.stall(Some(strike.number)),
            Fault::Corrupt => self.relay.corrupt(strike.number),
            other => unreachable!("{other:?} does not happen here"),
        }
    }

    fn heal(&mut self, strike: &Strike) {
        match strike.fault {
            Fault::StopSource => signal(self.source, Signal::CONT),
            Fault::StopDestination => signal(self.destination, Signal::CONT),
            Fault::StopSender => signal(self.sending.pid(), Signal::CONT),
            Fault::Refuse => self.relay.refuse(false),
            Fault::Blackhole => self.relay.hold(false),
            Fault::Stall => self.relay.stall(None),
            other => unreachable!("{other:?} does not pass"),
        }
    }

    fn is_over(&mut self) -> bool {
        !self.sender_is_dead && self.sending.has_ended()
    }
}

/// What starts the destination: something that becomes the program, under the conditions of the plan.
fn program(dir: &Path, plan: &Plan) -> PathBuf {
    let by = super::conditions(plan).join(" ");
    // Nor can it say what it does.
    let full = if plan.has(Fault::FullDisk).is_some() { "2>/dev/full" } else { "" };
    if by.is_empty() && full.is_empty() {
        return PROGRAM.into();
    }
    let path = dir.join("program");
    // A new file: the one of the trial before may be the text of a process yet.
    let _ = fs::remove_file(&path);
    fs::write(&path, format!("#!/bin/sh\nexec {by} {PROGRAM} \"$@\" {full}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn receiver(plan: &Plan, tls: &Tls) -> Extras {
    let (resume, peer) = (plan.resume_s.to_string(), plan.peer_s.to_string());
    let mut args = vec!["--resume-timeout", &resume, "--peer-timeout", &peer, "--accept-timeout", "15"];
    if plan.tls {
        args.extend(["--tls-dir", tls.dir()]);
    }
    if plan.has(Fault::FullDisk).is_some() {
        args.extend(["--trace", "/dev/full"]);
    }
    if plan.has(Fault::TinyHistory).is_some() {
        args.extend(["--history", "16K"]);
    }
    let gpu = plan.has(Fault::LoseGpu).map(|strike| (strike, software_gpu()));
    match &gpu {
        None => args.extend(["--backend", "cpu"]),
        Some((_, name)) => args.extend(["--backend", name]),
    }
    let extras = Extras::args(args);
    match gpu {
        None => extras,
        Some((strike, _)) => extras.with_env(GPU_FAULTS, &super::gpu_faults(strike.number)),
    }
}

fn sender(plan: &Plan, tls: &Tls) -> Vec<String> {
    let rate = format!("{}Mbit", plan.rate_bits_per_s / 1_000_000);
    let mut options: Vec<String> = [
        "--json",
        "--verify",
        "--backend",
        "cpu",
        "--bandwidth",
        &rate,
        "--connections",
        &plan.connections.to_string(),
        "--resume-timeout",
        &plan.resume_s.to_string(),
        "--peer-timeout",
        &plan.peer_s.to_string(),
        "--downtime-ms",
        &plan.downtime_ms.to_string(),
        // It ends, however slow the host is.
        "--max-time",
        "60",
        "--on-limit",
        "stop-anyway",
    ]
    .map(str::to_owned)
    .into();
    if plan.tls {
        options.extend(["--tls-dir", tls.dir()].map(str::to_owned));
    }
    if plan.has(Fault::FullDisk).is_some() {
        options.extend(["--trace", "/dev/full"].map(str::to_owned));
    }
    if let Some(strike) = plan.has(Fault::TinyHistory) {
        options.extend(["--history", ["0", "1M", "2M"][strike.number as usize % 3]].map(str::to_owned));
    }
    options
}
