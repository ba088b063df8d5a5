//! What a demo found: the JSON that it writes and the table that it prints. Units are in the names.

use std::collections::BTreeMap;
use std::fmt::Write;

use pagewarp_engine::report::{EncodingReport, EpochReport, SourceReport, StageReport};
use serde::{Deserialize, Serialize};

use super::Mode;
use super::host::HostInfo;
use crate::exit::{Exit, exit_of, one_line};
use crate::report::{STAGES, all_stages, busiest, help, working_ms};
use crate::table::Table;
use crate::units::{human_bytes, human_ms, human_ratio};

/// All of a demo.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DemoReport {
    /// What it ran on.
    pub host: HostInfo,
    /// `builtin`: the built-in guest under KVM. `synthetic`: threads that write memory, because there is no KVM.
    pub guest: String,
    /// What was asked for.
    pub settings: Settings,
    /// One entry per migration.
    pub runs: Vec<Run>,
    /// Total time of `sequential` over that of `pipelined-compressed` (medians); absent if either did not finish.
    pub speedup: Option<f64>,
}

/// What was asked for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Settings {
    /// Guest memory.
    pub memory_bytes: u64,
    /// Rate of the link; absent: not shaped.
    pub link_bytes_per_s: Option<u64>,
    /// What the guest did.
    pub workload: String,
    /// The command line of the built-in guest.
    pub guest_cmdline: Option<String>,
    /// The downtime limit.
    pub downtime_limit_ms: u64,
    /// Data connections.
    pub connections: u32,
    /// Whether the memory of both sides was compared before the hand-over.
    #[serde(default)]
    pub verify: bool,
    /// The history budget.
    pub history_bytes: u64,
    /// Whether the GPU of the mode that needs one was a device in software.
    pub gpu_in_software: bool,
}

/// The same of both hosts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Both<T> {
    /// Of the source.
    pub source: T,
    /// Of the destination.
    pub destination: T,
}

/// One migration.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Run {
    /// The mode's name.
    pub mode: String,
    /// Which repetition, from 1.
    pub run: u32,
    /// Whether the VM moved. If not, the figures are missing and `error` tells why.
    pub converged: bool,
    /// Whether it was the time limit that kept the VM from moving, and nothing worse.
    pub gave_up: bool,
    /// Why it did not move, or why it is not verified.
    pub error: Option<String>,
    /// From the first connection to the VM running on the destination.
    pub total_ms: Option<f64>,
    /// From the pause of the VM to the news that it runs on the destination.
    pub downtime_ms: Option<f64>,
    /// The longest pause that the guest itself saw around the hand-over.
    pub guest_pause_ms: Option<f64>,
    /// Epochs, counting the last one.
    pub epochs: u32,
    /// Plain bytes of all pages sent.
    pub guest_bytes: u64,
    /// Bytes on all connections.
    pub wire_bytes: u64,
    /// Who encoded and who decoded.
    pub backend: Both<String>,
    /// Why the CPU had to take over from them, if it had to.
    pub fallback: Both<Option<String>>,
    /// Batches that they left or rejected and the CPU did again.
    pub fallback_batches: Both<u64>,
    /// Batches that the CPU did because the device was busy.
    pub spilled_batches: Both<u64>,
    /// Pages that arrived damaged and were sent again.
    pub resent_pages: u64,
    /// CPU time of the migration threads.
    pub cpu_ms: Both<f64>,
    /// The six stages and the `link`; besides, what is none of them and only counts CPU time.
    pub stages: BTreeMap<String, StageReport>,
    /// Use of each encoding.
    pub encodings: BTreeMap<String, EncodingReport>,
    /// The guest goes on at the destination and finds its memory intact; and the digests agree, if they were asked for.
    pub verified: bool,
    /// Whether every page digest agreed; absent if they were not asked for.
    pub digests_agree: Option<bool>,
    /// The part of the downtime that this took.
    pub verify_ms: Option<f64>,
    /// Whether the guest found its memory intact, on both sides.
    pub guest_clean: bool,
    /// Whether the guest made progress at the destination.
    pub guest_alive: bool,
    /// The busiest stage, counting the link.
    pub bound_by: String,
    /// Total time over that of the busiest stage: 1.0 is a perfect pipeline.
    pub total_over_busiest: Option<f64>,
    /// Anonymous memory of the two processes at its highest.
    pub peak_anonymous_bytes: Both<u64>,
    /// Each epoch.
    pub epoch_list: Vec<EpochReport>,
}

impl Run {
    /// A migration that succeeded, as the engine tells it. The guest's part is filled in by the caller.
    pub fn from_source(mode: Mode, run: u32, report: &SourceReport, link: Option<StageReport>) -> Run {
        let destination = report.destination.clone().unwrap_or_default();
        let mut stages = all_stages(report);
        stages.extend(link.map(|link| ("link".to_owned(), link)));
        let busiest = busiest(&stages).map(|(name, busy_ms)| (name.to_owned(), busy_ms));
        Run {
            mode: mode.name().to_owned(),
            run,
            converged: true,
            total_ms: Some(report.total_ms),
            downtime_ms: Some(report.downtime_ms),
            epochs: report.epochs.len() as u32,
            guest_bytes: report.guest_bytes,
            wire_bytes: report.wire_bytes,
            backend: Both { source: report.backend.clone(), destination: destination.backend },
            fallback: Both { source: report.fallback.clone(), destination: destination.fallback },
            fallback_batches: Both {
                source: report.fallback_batches,
                destination: destination.fallback_batches,
            },
            spilled_batches: Both {
                source: report.spilled_batches,
                destination: destination.spilled_batches,
            },
            resent_pages: report.resent_pages,
            cpu_ms: Both { source: report.cpu_ms, destination: destination.cpu_ms },
            encodings: report.encodings.clone(),
            digests_agree: report.verified,
            verify_ms: report.verify_ms,
            total_over_busiest: busiest.as_ref().filter(|b| b.1 > 0.0).map(|b| report.total_ms / b.1),
            bound_by: busiest.map_or_else(String::new, |b| b.0),
            peak_anonymous_bytes: Both {
                source: report.peak_anonymous_bytes,
                destination: destination.peak_anonymous_bytes,
            },
            epoch_list: report.epochs.clone(),
            stages,
            ..Run::default()
        }
    }

    /// A migration that did not move the VM.
    pub fn not_moved(mode: Mode, run: u32, why: &anyhow::Error) -> Run {
        Run {
            mode: mode.name().to_owned(),
            run,
            gave_up: exit_of(why) == Exit::NotConverged,
            error: Some(one_line(why)),
            ..Run::default()
        }
    }
}

/// The median total time of a mode's migrations that moved the VM.
fn median_total(runs: &[Run], mode: Mode) -> Option<f64> {
    let mut totals: Vec<f64> =
        runs.iter().filter(|run| run.mode == mode.name()).filter_map(|run| run.total_ms).collect();
    totals.sort_by(f64::total_cmp);
    let middle = totals.len() / 2;
    match totals.len() {
        0 => None,
        n if n % 2 == 1 => Some(totals[middle]),
        _ => Some((totals[middle - 1] + totals[middle]) / 2.0),
    }
}

/// How many times less total time `pipelined-compressed` takes than `sequential`.
pub fn speedup(runs: &[Run]) -> Option<f64> {
    Some(median_total(runs, Mode::Sequential)? / median_total(runs, Mode::PipelinedCompressed)?)
}

/// The report for people.
pub fn table(report: &DemoReport) -> String {
    let mut text = String::new();
    let mut table = Table::new([
        "mode",
        "total",
        "downtime",
        "guest pause",
        "epochs",
        "guest data",
        "on the wire",
        "ratio",
        "CPU source",
        "CPU dest.",
        "bounded by",
        "verified",
    ]);
    for run in &report.runs {
        if !run.converged {
            table.row([run.mode.as_str(), if run.gave_up { "did not converge" } else { "FAILED" }]);
            continue;
        }
        let ms = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), human_ms);
        table.row([
            run.mode.clone(),
            ms(run.total_ms),
            match run.verify_ms {
                None => ms(run.downtime_ms),
                Some(verify) => format!("{} ({} to verify)", ms(run.downtime_ms), human_ms(verify)),
            },
            ms(run.guest_pause_ms),
            run.epochs.to_string(),
            human_bytes(run.guest_bytes),
            human_bytes(run.wire_bytes),
            human_ratio(run.guest_bytes, run.wire_bytes),
            human_ms(run.cpu_ms.source),
            human_ms(run.cpu_ms.destination),
            run.bound_by.clone(),
            if run.verified { "yes" } else { "NO" }.to_owned(),
        ]);
    }
    text.push_str(&table.to_string());
    text.push('\n');
    text.push_str(&busy_table(&report.runs).to_string());
    for run in &report.runs {
        text.push_str(&gpu_lines(run));
        if let Some(error) = &run.error {
            let _ = writeln!(text, "\n{} (run {}): {error}", run.mode, run.run);
        }
    }
    if let Some(speedup) = report.speedup {
        let _ = writeln!(
            text,
            "\nspeedup: {speedup:.2} (total time of `sequential` over that of `pipelined-compressed`)"
        );
    }
    if report.settings.gpu_in_software {
        let _ = writeln!(text, "\n{}", super::SOFTWARE_NOTE);
    }
    if report.guest == "synthetic" {
        let _ = writeln!(text, "\n{}", super::SYNTHETIC_NOTE);
    }
    text
}

/// Which devices a run used, and what they left to the CPU; nothing if it used none.
fn gpu_lines(run: &Run) -> String {
    if !run.converged || !Mode::ALL.iter().any(|mode| mode.on_gpu() && mode.name() == run.mode) {
        return String::new();
    }
    let Run { mode, run: number, backend, spilled_batches, fallback_batches, fallback, .. } = run;
    let mut text = format!(
        "\n{mode} (run {number}): encoded by {}, decoded by {}\n",
        backend.source, backend.destination
    );
    for (host, spilled, done_again, why) in [
        ("source", spilled_batches.source, fallback_batches.source, &fallback.source),
        ("destination", spilled_batches.destination, fallback_batches.destination, &fallback.destination),
    ] {
        text.push_str(&help(host, spilled, done_again, why.as_deref()));
    }
    text
}

/// Time that each stage spent on work, a device's included, and how close the total is to the busiest one.
fn busy_table(runs: &[Run]) -> Table {
    let columns: Vec<&str> = STAGES.into_iter().chain(["link"]).collect();
    let mut table = Table::new(
        ["busy".to_owned()]
            .into_iter()
            .chain(columns.iter().map(|&c| c.to_owned()))
            .chain(["total/busiest".to_owned()]),
    );
    for run in runs.iter().filter(|run| run.converged) {
        let cell = |name: &str| {
            run.stages.get(name).map_or_else(|| "-".to_owned(), |stage| human_ms(working_ms(stage)))
        };
        let factor = run.total_over_busiest.map_or_else(|| "-".to_owned(), |factor| format!("{factor:.2}"));
        table.row([run.mode.clone()].into_iter().chain(columns.iter().map(|c| cell(c))).chain([factor]));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(mode: Mode, total_ms: f64) -> Run {
        Run { mode: mode.name().to_owned(), converged: true, total_ms: Some(total_ms), ..Run::default() }
    }

    #[test]
    fn the_speedup_is_that_of_the_medians() {
        let mut runs = vec![
            run(Mode::Sequential, 9000.0),
            run(Mode::Sequential, 10_000.0),
            run(Mode::Sequential, 50_000.0),
            run(Mode::PipelinedCompressed, 4000.0),
            run(Mode::PipelinedCompressed, 6000.0),
            run(Mode::Pipelined, 1.0),
        ];
        assert_eq!(speedup(&runs), Some(2.0));
        runs.retain(|run| run.mode != Mode::Sequential.name());
        assert_eq!(speedup(&runs), None);
    }

    #[test]
    fn the_link_counts_as_a_stage() {
        let stage = |busy_ms| StageReport { threads: 1, busy_ms, ..StageReport::default() };
        let report = SourceReport {
            total_ms: 1100.0,
            stages: BTreeMap::from([("copy".into(), stage(400.0)), ("send".into(), stage(990.0))]),
            ..SourceReport::default()
        };
        let run = Run::from_source(Mode::Pipelined, 1, &report, Some(stage(1000.0)));
        assert_eq!(run.bound_by, "link");
        assert_eq!(run.total_over_busiest, Some(1.1));
        assert!(run.stages.contains_key("link"));
    }

    #[test]
    fn the_json_has_the_published_names() {
        let report = SourceReport { total_ms: 10.0, ..SourceReport::default() };
        let run = Run::from_source(Mode::SequentialRaw, 1, &report, None);
        let json = serde_json::to_value(&run).unwrap();
        for name in [
            "mode",
            "total_ms",
            "downtime_ms",
            "guest_pause_ms",
            "epochs",
            "guest_bytes",
            "wire_bytes",
            "backend",
            "fallback",
            "spilled_batches",
            "cpu_ms",
            "stages",
            "encodings",
            "verified",
            "verify_ms",
        ] {
            assert!(json.get(name).is_some(), "{name} is missing in {json}");
        }
        assert_eq!(json["mode"], "sequential-raw");
        assert!(json["cpu_ms"].get("source").is_some() && json["cpu_ms"].get("destination").is_some());
    }

    #[test]
    fn the_table_names_the_devices_of_the_mode_that_has_some() {
        let report =
            SourceReport { backend: "gpu (test)".into(), spilled_batches: 4, ..SourceReport::default() };
        let lines = |mode| gpu_lines(&Run::from_source(mode, 2, &report, None));
        let text = lines(Mode::PipelinedGpu);
        assert!(text.contains("pipelined-gpu (run 2): encoded by gpu (test)"), "{text}");
        assert!(text.contains("source: the device was busy, so the CPU did 4 batches"), "{text}");
        assert_eq!(lines(Mode::PipelinedCompressed), "");
    }
}
