//! What is kept of a campaign: a line for each trial, the logs of those that failed, and a table.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;

use super::draw::{Fault, Plan, Strike};
use super::outcome::{Outcome, Seen};
use crate::support::target_dir;

/// How much of one file is kept.
const MOST: usize = 1 << 20;

pub(crate) struct Record {
    seed: u64,
    dir: PathBuf,
    lines: File,
    table: BTreeMap<(Fault, &'static str), BTreeMap<Outcome, u32>>,
    failed: Vec<u32>,
    trials: u32,
}

impl Record {
    pub(crate) fn new(seed: u64) -> Record {
        let dir = target_dir().join("chaos");
        fs::create_dir_all(&dir).unwrap();
        let lines = dir.join(format!("{seed}.jsonl"));
        let lines = OpenOptions::new().create(true).append(true).open(lines).unwrap();
        Record { seed, dir, lines, table: BTreeMap::new(), failed: Vec::new(), trials: 0 }
    }

    /// Notes how a trial ended.
    pub(crate) fn add(&mut self, number: u32, plan: &Plan, result: &Result<Seen, String>, took: Duration) {
        self.trials += 1;
        let nothing = Vec::new();
        let (outcome, dealt) = match result {
            Ok(seen) => (seen.outcome, &seen.dealt),
            Err(_) => (Outcome::Failed, &nothing),
        };
        let was_dealt = |strike: &Strike| {
            strike.fault.is_condition() || dealt.iter().any(|other| other.fault == strike.fault)
        };
        let faults: Vec<_> = plan
            .strikes
            .iter()
            .map(|strike| {
                json!({
                    "fault": format!("{:?}", strike.fault),
                    "at": strike.at,
                    "lasts_ms": strike.lasts.as_millis() as u64,
                    "came_in_time": was_dealt(strike),
                })
            })
            .collect();
        let line = json!({
            "seed": self.seed,
            "trial": number,
            "kind": format!("{:?}", plan.kind),
            "tls": plan.tls,
            "direct": plan.direct,
            "connections": plan.connections,
            "rate_bits_per_s": plan.rate_bits_per_s,
            "resume_timeout_s": plan.resume_s,
            "peer_timeout_s": plan.peer_s,
            "downtime_limit_ms": plan.downtime_ms,
            "faults": faults,
            "outcome": format!("{outcome:?}"),
            "source_exit": result.as_ref().ok().and_then(|seen| seen.source_exit),
            "destination_exit": result.as_ref().ok().and_then(|seen| seen.destination_exit),
            "breaks": result.as_ref().ok().and_then(|seen| seen.breaks),
            "error": result.as_ref().err(),
            "took_ms": took.as_millis() as u64,
        });
        writeln!(self.lines, "{line}").unwrap();
        for strike in &plan.strikes {
            let when = match was_dealt(strike) {
                true if strike.fault == Fault::Corrupt && plan.tls => "over TLS",
                true => "",
                false => "too late",
            };
            *self.table.entry((strike.fault, when)).or_default().entry(outcome).or_default() += 1;
        }
        let faults = plan.strikes.iter().map(|strike| {
            let lasts =
                if strike.lasts.is_zero() { String::new() } else { format!(" for {:.1?}", strike.lasts) };
            let late = if was_dealt(strike) { "" } else { " (too late)" };
            format!("{:?} at {:.0} %{lasts}{late}", strike.fault, strike.at * 100.0)
        });
        let faults: Vec<_> = faults.collect();
        println!(
            "trial {number:3}: {:?}{}, {} connections, {} Mbit/s, resume {} s, {}: {outcome:?} in {took:.1?}",
            plan.kind,
            if plan.tls {
                " over TLS"
            } else if plan.direct {
                ", direct"
            } else {
                ""
            },
            plan.connections,
            plan.rate_bits_per_s / 1_000_000,
            plan.resume_s,
            faults.join(" and "),
        );
        if let Err(error) = result {
            self.failed.push(number);
            println!(
                "*** trial {number} FAILED: {error}\n*** {plan:?}\n*** repeat it with {}",
                self.again(number)
            );
        }
    }

    fn again(&self, number: u32) -> String {
        format!(
            "PAGEWARP_SEED={} PAGEWARP_CHAOS_TRIAL={number} cargo test -p pagewarp --test chaos -- --nocapture",
            self.seed
        )
    }

    /// Keeps the files of a trial that failed.
    pub(crate) fn keep(&self, number: u32, from: &Path) {
        let to = self.dir.join(format!("{}-{number}", self.seed));
        fs::create_dir_all(&to).unwrap();
        for entry in fs::read_dir(from).into_iter().flatten().flatten() {
            // Sockets and directories are left out.
            if entry.file_type().is_ok_and(|kind| kind.is_file())
                && let Ok(bytes) = fs::read(entry.path())
            {
                let end = &bytes[bytes.len().saturating_sub(MOST)..];
                fs::write(to.join(entry.file_name()), end).unwrap();
            }
        }
        println!("*** logs: {}", to.display());
    }

    pub(crate) fn failures(&self) -> usize {
        self.failed.len()
    }

    /// Prints the table, and fails if a trial has.
    pub(crate) fn finish(&self) {
        println!(
            "\n{} trials with seed {}; a trial with two faults counts in two lines:",
            self.trials, self.seed
        );
        print!("  {:<16} {:<9}", "fault", "");
        for outcome in Outcome::ALL {
            print!(" {:>10}", format!("{outcome:?}"));
        }
        println!();
        for ((fault, when), outcomes) in &self.table {
            print!("  {:<16} {when:<9}", format!("{fault:?}"));
            for outcome in Outcome::ALL {
                print!(" {:>10}", outcomes.get(&outcome).copied().unwrap_or(0));
            }
            println!();
        }
        println!("  each trial: {}", self.dir.join(format!("{}.jsonl", self.seed)).display());
        let again: Vec<_> = self.failed.iter().map(|&number| self.again(number)).collect();
        assert!(self.failed.is_empty(), "{} trials failed:\n{}", self.failed.len(), again.join("\n"));
    }
}
