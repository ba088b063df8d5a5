//! Trials of `pagewarp qemu migrate` and `pagewarp qemu receive`, each at its end of a link between two network namespaces.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::Tls;
use super::draw::{Fault, Plan, Strike};
use super::outcome::{NEVER, Outcome, Seen, was_dealt};
use super::relay::Relay;
use super::strikes::{Victim, deal, signal};
use crate::support::qemu::{Host, Hosts, Process, address, text, well};
use crate::support::{GPU_FAULTS, Sent, software_gpu, wait_for};

const MEMORY_MIB: u64 = 96;
const PAGES_PER_S: u64 = 5_000;
/// What crosses the wire, roughly.
const WIRE_BITS: f64 = 30e6 * 8.0;
/// What a slow host may take on top of all limits.
const ALLOWANCE: Duration = Duration::from_secs(30);
/// Becomes the program, with a full disk as its standard output; at the source also for what it says. That of the destination says where it listens.
const TO_FULL_DISK: [[&str; 4]; 2] =
    [["sh", "-c", "exec \"$@\" >/dev/full", "sh"], ["sh", "-c", "exec \"$@\" >/dev/full 2>/dev/full", "sh"]];

/// A VM that goes from QEMU to QEMU.
pub(crate) struct Bridge {
    hosts: Hosts,
}

/// A migration under way.
struct Migration<'a> {
    hosts: &'a mut Hosts,
    there: Host,
    receiving: Process,
    sending: Process,
    relay: Relay,
    sender_is_dead: bool,
}

impl Bridge {
    pub(crate) fn boot() -> Bridge {
        Bridge { hosts: Hosts::boot(MEMORY_MIB, PAGES_PER_S, 600_000_000) }
    }

    pub(crate) fn dir(&self) -> PathBuf {
        self.hosts.path("")
    }

    pub(crate) fn trial(&mut self, plan: &Plan, tls: &Tls) -> Seen {
        let hosts = &mut self.hosts;
        hosts.net.set_rate(Some(plan.rate_bits_per_s));
        let mut there = hosts.fresh();
        hosts.here.forget_events();
        let (mut receiving, to) = receive(hosts, &there, plan, tls);
        let Some(to) = to else {
            // It has too little memory to begin with.
            assert!(plan.has(Fault::MemoryLimit).is_some(), "{}", receiving.stderr());
            wait_for("receive to end", || receiving.has_ended().then_some(()));
            hosts.stayed(&mut there);
            return Seen {
                outcome: Outcome::Stayed,
                dealt: vec![],
                source_exit: None,
                destination_exit: None,
                breaks: None,
            };
        };
        let relay = hosts.net.run_at(hosts.here.end, || Relay::start(&to));
        let sending = migrate(hosts, &relay.address.to_string(), plan, tls);
        let mut migration = Migration { hosts, there, receiving, sending, relay, sender_is_dead: false };
        let expected = Duration::from_secs_f64(0.4 + WIRE_BITS / plan.rate_bits_per_s as f64);
        let dealt = deal(&mut migration, plan, expected);
        let Migration { mut there, receiving, sending, relay, .. } = migration;
        let sent = sending.wait();
        let received = received(plan, &mut there, receiving);
        drop(relay);
        let outcome = self.judge(there, &sent, &received, &dealt);
        fits(plan, outcome, &sent, &received, &dealt);
        let report: Option<serde_json::Value> = serde_json::from_str(&sent.stdout).ok();
        let breaks = report.and_then(|report| report["bridge"]["interruptions"]["breaks"].as_u64());
        Seen { outcome, dealt, source_exit: sent.code, destination_exit: received.code, breaks }
    }

    /// Finds out where the VM is, does what the documentation says, and looks whether it is well.
    fn judge(&mut self, mut there: Host, sent: &Sent, received: &Sent, dealt: &[Strike]) -> Outcome {
        let hosts = &mut self.hosts;
        let told = || {
            format!(
                "source {:?}: {}\ndestination {:?}: {}",
                sent.code, sent.stderr, received.code, received.stderr
            )
        };
        let killed_here = was_dealt(dealt, Fault::KillSource);
        let killed_there = was_dealt(dealt, Fault::KillDestination);
        let here = hosts.here.settle();
        // A QEMU that nobody commands any more may still carry out what it was told last; after this it has.
        let mut state = if received.code.is_none() { there.settle_alone() } else { there.settle() };
        let committed = matches!(sent.code, Some(0 | 7)) || matches!(received.code, Some(0 | 7));
        if here.is_none() && committed && state.as_ref().is_some_and(|state| state.status == "paused") {
            there.watch.cont().unwrap();
            state = there.state();
        }
        if state.is_some_and(|state| state.running) {
            let in_doubt = here.is_some() && sent.code != Some(0);
            if in_doubt {
                resolve(hosts, "--discard");
                wait_for("the source to be ended", || hosts.here.qemu.has_ended().then_some(()));
            }
            hosts.moved(there);
            return if in_doubt { Outcome::Discarded } else { Outcome::Moved };
        }
        let Some(here) = here else {
            assert!(killed_here, "the source QEMU is gone, and nobody runs the VM\n{}", told());
            there.kill();
            return Outcome::Killed;
        };
        // It must not run the VM any more.
        there.kill();
        let outcome = match here.status.as_str() {
            "running" => Outcome::Stayed,
            "postmigrate" => {
                let may_be = sent.code != Some(0) || killed_there;
                assert!(may_be, "the VM was said to run there, and does not\n{}", told());
                resolve(hosts, "--resume");
                Outcome::Resumed
            }
            other => panic!("the source is {other}\n{}", told()),
        };
        if killed_there && outcome == Outcome::Resumed {
            // It may have run there, and died. What is here is the VM of the moment of the hand-over.
            well(&mut hosts.here, None);
        } else {
            hosts.stayed(&mut there);
        }
        outcome
    }
}

/// What both sides say must be what has happened.
fn fits(plan: &Plan, outcome: Outcome, sent: &Sent, received: &Sent, dealt: &[Strike]) {
    let all = || {
        format!(
            "{outcome:?} {dealt:?}\nsource {:?}: {}\ndestination {:?}: {}",
            sent.code, sent.stderr, received.code, received.stderr
        )
    };
    let dealt = |fault| was_dealt(dealt, fault);
    // A QEMU that does not answer is one that nobody can help.
    let helpless = dealt(Fault::StopSource) || dealt(Fault::KillSource);
    // What the system says when there is no memory is no kind of failure of its own.
    let is_starved =
        |is_source| plan.has(Fault::MemoryLimit).is_some() && is_source_limited(plan) == is_source;
    for (code, is_source) in [(sent.code, true), (received.code, false)] {
        let Some(code) = code else { continue };
        let may_be = helpless || code == 1 && is_starved(is_source);
        assert!(may_be || !NEVER.contains(&code), "{}", all());
    }
    match sent.code {
        None => assert!(dealt(Fault::KillSender) || is_starved(true), "{}", all()),
        Some(_) if helpless => {}
        Some(0) => assert!(outcome == Outcome::Moved || dealt(Fault::KillDestination), "{}", all()),
        Some(7) => assert!(matches!(outcome, Outcome::Discarded | Outcome::Resumed), "{}", all()),
        Some(_) => assert_eq!(outcome, Outcome::Stayed, "{}", all()),
    }
    match received.code {
        None => assert!(dealt(Fault::KillReceiver) || is_starved(false), "{}", all()),
        Some(0) => {
            let is_there = matches!(outcome, Outcome::Moved | Outcome::Discarded);
            assert!(is_there || dealt(Fault::KillDestination), "{}", all());
        }
        // What it was given, it may have lost.
        Some(7) => assert!(outcome != Outcome::Stayed, "{}", all()),
        Some(_) => {
            let is_there = matches!(outcome, Outcome::Moved | Outcome::Discarded);
            assert!(!is_there, "{}", all());
        }
    }
}

/// Waits for `receive` to end. One that no source has reached is told to.
fn received(plan: &Plan, there: &mut Host, mut receiving: Process) -> Sent {
    let patience = ALLOWANCE + Duration::from_secs(plan.resume_s + plan.peer_s);
    let start = Instant::now();
    // The QEMU of a destination that a source has come to waits for a migration.
    while !receiving.has_ended() && start.elapsed() < patience {
        let is_idle = |there: &mut Host| {
            let migration = there.migration();
            migration.status == "none" && !migration.is_listening && !there.qemu.has_ended()
        };
        // One that a source has come to waits for its connections to be mended.
        let has_met = receiving.stderr().contains("with the source lost");
        if start.elapsed() > Duration::from_secs(5) && !has_met && is_idle(there) {
            receiving.signal(Signal::INT);
            let received = receiving.wait();
            // Unless a source has given up at that very moment: then its QEMU is ended.
            let gave_up = matches!(received.code, Some(5 | 6)) && there.qemu.has_ended();
            assert!(received.code == Some(3) || gave_up, "{received:?}");
            return received;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(receiving.has_ended(), "`receive` does not end: {}", receiving.stderr());
    receiving.wait()
}

/// Carries a decision out on the source.
fn resolve(hosts: &mut Hosts, decision: &str) {
    let qmp = hosts.here.qemu.qmp();
    let done = hosts.run(hosts.here.end, &["qemu", "resolve", "--qmp", text(&qmp), decision]).wait();
    assert_eq!(done.code, Some(0), "{decision}: {}", done.stderr);
}

impl Victim for Migration<'_> {
    fn strike(&mut self, strike: &Strike) {
        match strike.fault {
            Fault::KillSource => self.hosts.here.kill(),
            Fault::KillDestination => self.there.kill(),
            Fault::KillSender => {
                self.sending.signal(Signal::KILL);
                self.sender_is_dead = true;
            }
            Fault::KillReceiver => self.receiving.signal(Signal::KILL),
            Fault::Reset => self.relay.reset(strike.number),
            Fault::Refuse => self.relay.refuse(true),
            Fault::Blackhole => self.relay.hold(true),
            Fault::Stall => self.relay.stall(Some(strike.number)),
            Fault::Corrupt => self.relay.corrupt(strike.number),
            Fault::LinkDown => self.hosts.net.cut(),
            _ => self.stop(strike.fault, Signal::STOP),
        }
    }

    fn heal(&mut self, strike: &Strike) {
        match strike.fault {
            Fault::Refuse => self.relay.refuse(false),
            Fault::Blackhole => self.relay.hold(false),
            Fault::Stall => self.relay.stall(None),
            Fault::LinkDown => self.hosts.net.heal(),
            _ => self.stop(strike.fault, Signal::CONT),
        }
    }

    fn is_over(&mut self) -> bool {
        !self.sender_is_dead && self.sending.has_ended()
    }
}

impl Migration<'_> {
    fn stop(&mut self, fault: Fault, what: Signal) {
        match fault {
            Fault::StopSource => signal(self.hosts.here.qemu.pid(), what),
            Fault::StopDestination => signal(self.there.qemu.pid(), what),
            Fault::StopSender => self.sending.signal(what),
            Fault::StopReceiver => self.receiving.signal(what),
            other => unreachable!("{other:?} does not happen here"),
        }
    }
}

/// Words that both ends have.
fn common(plan: &Plan, tls: &Tls) -> Vec<String> {
    let mut words = [
        "--json",
        "--resume-timeout",
        &plan.resume_s.to_string(),
        "--peer-timeout",
        &plan.peer_s.to_string(),
    ]
    .map(str::to_owned)
    .to_vec();
    match plan.tls {
        true => words.extend(["--tls-dir", tls.dir()].map(str::to_owned)),
        false => words.push("--plaintext".to_owned()),
    }
    if let Some(strike) = plan.has(Fault::TinyHistory) {
        words.extend(["--history", ["0", "1M"][strike.number as usize % 2]].map(str::to_owned));
    }
    words
}

/// Whether a condition that concerns one of the bridges concerns the source's.
fn is_of_source(strike: Strike) -> bool {
    strike.number >> 32 & 1 == 1
}

/// Whether it is the source's process that has the clock and the memory that the plan gives.
fn is_source_limited(plan: &Plan) -> bool {
    plan.has(Fault::Clock).is_some_and(is_of_source)
}

/// A process of `pagewarp` under the conditions of the plan.
fn run(hosts: &mut Hosts, plan: &Plan, is_source: bool, words: &[&str], tls: &Tls) -> Process {
    let mut words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
    words.extend(common(plan, tls));
    let is_ours = |strike: &Strike| is_of_source(*strike) == is_source;
    let gpu = plan.has(Fault::LoseGpu).filter(is_ours);
    let backend = gpu.map_or_else(|| "cpu".to_owned(), |_| software_gpu());
    words.extend(["--backend".to_owned(), backend]);
    let faults = gpu.map(|strike| super::gpu_faults(strike.number));
    let mut by: Vec<String> = Vec::new();
    if plan.has(Fault::FullDisk).filter(is_ours).is_some() {
        by.extend(TO_FULL_DISK[usize::from(is_source)].map(str::to_owned));
    }
    if is_source_limited(plan) == is_source {
        by.extend(super::conditions(plan));
    }
    let end = if is_source { hosts.here.end } else { hosts.there() };
    let variable = faults.as_deref().map(|faults| (GPU_FAULTS, faults));
    let (by, words): (Vec<&str>, Vec<&str>) =
        (by.iter().map(String::as_str).collect(), words.iter().map(String::as_str).collect());
    hosts.run_by(end, &by, &words, variable)
}

/// Starts `receive`. Returns where it listens; `None`: it ended before.
fn receive(hosts: &mut Hosts, there: &Host, plan: &Plan, tls: &Tls) -> (Process, Option<String>) {
    let (qmp, listen) = (there.qemu.qmp(), format!("{}:0", address(there.end)));
    let words = ["qemu", "receive", "--qmp", text(&qmp), "--listen", &listen];
    let mut receiving = run(hosts, plan, false, &words, tls);
    let to = wait_for("where it listens", || {
        let ended = receiving.has_ended();
        let said = receiving.stderr();
        let whole = said.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
        let line = whole.map(str::to_owned).find(|line| line.starts_with("waiting for a VM on "));
        match line {
            Some(line) => Some(line.split_whitespace().nth(5).map(str::to_owned)),
            None => ended.then_some(None),
        }
    });
    (receiving, to)
}

fn migrate(hosts: &mut Hosts, to: &str, plan: &Plan, tls: &Tls) -> Process {
    let qmp = hosts.here.qemu.qmp();
    let (downtime, channels) = (plan.downtime_ms.to_string(), plan.connections.to_string());
    let mut words = vec!["qemu", "migrate", "--qmp", text(&qmp), "--to", to, "--downtime-ms", &downtime];
    if plan.connections > 0 {
        words.extend(["--multifd", &channels]);
    }
    // What `auto` chooses depends on how fast the machine is.
    words.extend(["--route", if plan.direct { "direct" } else { "bridge" }]);
    run(hosts, plan, true, &words, tls)
}
