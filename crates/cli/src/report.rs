//! Reports for people.

mod qemu;

use std::collections::BTreeMap;
use std::fmt::Write;

use pagewarp_engine::report::{DestinationReport, EncodingReport, SourceReport, StageReport};
use pagewarp_engine::transport::Interruptions;

pub use qemu::{destination_bridge_report, qemu_receive_report, qemu_report, source_bridge_report};

use crate::table::Table;
use crate::units::{human_bytes, human_ms, human_rate, human_ratio};

/// The stages in the order of the data path.
pub const STAGES: [&str; 6] = ["copy", "serialize", "send", "receive", "deserialize", "restore"];

/// The stages of both hosts. What is no stage of the data path exists on both: those names get their host, as in `control-source`.
pub fn all_stages(report: &SourceReport) -> BTreeMap<String, StageReport> {
    let name = |name: &String, host: &str| {
        if STAGES.contains(&name.as_str()) { name.clone() } else { format!("{name}-{host}") }
    };
    let source = report.stages.iter().map(|(stage, figures)| (name(stage, "source"), *figures));
    let destination = report.destination.iter().flat_map(|report| &report.stages);
    source.chain(destination.map(|(stage, figures)| (name(stage, "destination"), *figures))).collect()
}

/// What a migration did, as the source tells it. `verify`: whether the digests were to be compared.
pub fn source_report(report: &SourceReport, verify: bool) -> String {
    let mut text = String::new();
    let epochs = report.epochs.len();
    let verified = match (report.verified, report.verify_ms) {
        (Some(true), Some(took)) => format!("yes, every page, in {} of the downtime", human_ms(took)),
        (Some(true), None) => "yes, every page".to_owned(),
        _ if verify => "NO: asked for, and not done".to_owned(),
        _ => "not asked for (--verify)".to_owned(),
    };
    let within = if report.downtime_ms <= report.downtime_limit_ms { "within" } else { "OVER" };
    let facts = [
        ("total", human_ms(report.total_ms)),
        (
            "downtime",
            format!(
                "{} ({within} the limit of {})",
                human_ms(report.downtime_ms),
                human_ms(report.downtime_limit_ms)
            ),
        ),
        ("epochs", epochs.to_string()),
        ("guest data", human_bytes(report.guest_bytes)),
        (
            "on the wire",
            format!(
                "{} ({} smaller, {} on average, {} connection{})",
                human_bytes(report.wire_bytes),
                human_ratio(report.guest_bytes, report.wire_bytes),
                human_rate(report.wire_bytes as f64 * 1000.0 / report.total_ms.max(0.001)),
                report.connections,
                if report.connections == 1 { "" } else { "s" },
            ),
        ),
        ("encoded by", report.backend.clone()),
        ("decoded by", report.destination.as_ref().map_or("unknown".to_owned(), |d| d.backend.clone())),
        ("CPU, source", human_ms(report.cpu_ms)),
        (
            "CPU, destination",
            report.destination.as_ref().map_or("unknown".to_owned(), |d| human_ms(d.cpu_ms)),
        ),
        ("history", human_bytes(report.history_bytes)),
        ("bounded by", bound_by(report)),
        ("verified", verified),
    ];
    let _ = writeln!(text, "`{}` was migrated", report.name);
    push_facts(&mut text, &facts);
    text.push_str(&help(
        "source",
        report.spilled_batches,
        report.fallback_batches,
        report.fallback.as_deref(),
    ));
    if let Some(report) = &report.destination {
        text.push_str(&destination_help(report));
    }
    if report.resent_pages > 0 {
        let _ = writeln!(
            text,
            "  {} arrived damaged and were sent again",
            count(report.resent_pages, "page", "pages")
        );
    }
    text.push_str(&mended(&report.interruptions));
    text.push('\n');
    text.push_str(&stage_table(&all_stages(report)).to_string());
    text.push('\n');
    text.push_str(&encoding_table(report.encodings.iter()).to_string());
    text
}

/// What a migration did, as the destination tells it.
pub fn destination_report(report: &DestinationReport) -> String {
    let mut text = String::new();
    let facts = [
        ("total", human_ms(report.total_ms)),
        ("guest data", human_bytes(report.guest_bytes)),
        (
            "on the wire",
            format!(
                "{} ({} smaller)",
                human_bytes(report.wire_bytes),
                human_ratio(report.guest_bytes, report.wire_bytes)
            ),
        ),
        ("decoded by", report.backend.clone()),
        ("CPU", human_ms(report.cpu_ms)),
        ("bounded by", report.bound_by.clone()),
    ];
    let _ = writeln!(text, "`{}` was received and runs here", report.name);
    push_facts(&mut text, &facts);
    text.push_str(&destination_help(report));
    text.push('\n');
    text.push_str(&stage_table(&report.stages).to_string());
    text
}

fn destination_help(report: &DestinationReport) -> String {
    help("destination", report.spilled_batches, report.fallback_batches, report.fallback.as_deref())
}

/// What became of connections that broke; nothing if none did.
pub fn mended(seen: &Interruptions) -> String {
    if seen.breaks == 0 {
        return String::new();
    }
    format!(
        "  {} of connections mended, {} in all; {} sent again\n",
        count(seen.breaks.into(), "break", "breaks"),
        human_ms(seen.outage_ms as f64),
        human_bytes(seen.sent_again_bytes)
    )
}

/// What the CPU did for the backend of a host: nothing said if nothing.
pub fn help(host: &str, spilled_batches: u64, fallback_batches: u64, fallback: Option<&str>) -> String {
    let mut text = String::new();
    let batches = |number| count(number, "batch", "batches");
    if spilled_batches > 0 {
        let _ = writeln!(text, "  {host}: the device was busy, so the CPU did {}", batches(spilled_batches));
    }
    if let Some(reason) = fallback {
        // What drivers say may have several lines.
        let reason: Vec<_> = reason.split_whitespace().collect();
        let _ = writeln!(text, "  {host}: the CPU took over: {}", reason.join(" "));
    }
    if fallback_batches > 0 {
        let _ = writeln!(text, "  {host}: the CPU did {} again", batches(fallback_batches));
    }
    text
}

fn count(number: u64, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}

/// Time that a stage spent on work, that of a device included, summed over its threads.
pub fn working_ms(stage: &StageReport) -> f64 {
    stage.busy_ms + stage.device_wait_ms
}

/// The stage that bounded the migration, over both hosts: the busiest per thread.
pub fn bound_by(report: &SourceReport) -> String {
    match busiest(&all_stages(report)) {
        Some((name, busy_ms)) => format!("{name} ({})", human_ms(busy_ms)),
        None => report.bound_by.clone(),
    }
}

/// The stage with the most time on work per thread, that of a device included, and that time in milliseconds.
pub fn busiest(stages: &BTreeMap<String, StageReport>) -> Option<(&str, f64)> {
    stages
        .iter()
        .map(|(name, stage)| (name.as_str(), working_ms(stage) / f64::from(stage.threads.max(1))))
        .max_by(|a, b| a.1.total_cmp(&b.1))
}

fn push_facts(text: &mut String, facts: &[(&str, String)]) {
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (name, value) in facts {
        let _ = writeln!(text, "  {name:<width$}  {value}");
    }
}

fn stage_table(stages: &BTreeMap<String, StageReport>) -> Table {
    let known = STAGES.iter().filter_map(|&name| stages.get_key_value(name));
    let others = stages.iter().filter(|(name, _)| !STAGES.contains(&name.as_str()));
    // A column of zeros tells nothing.
    let device = stages.values().any(|stage| stage.device_wait_ms > 0.0);
    let titles = ["stage", "threads", "busy"]
        .into_iter()
        .chain(device.then_some("waiting for the GPU"))
        .chain(["waiting for input", "for output", "CPU", "in", "out"]);
    let mut table = Table::new(titles);
    for (name, stage) in known.chain(others) {
        let row = [name.clone(), stage.threads.to_string(), human_ms(stage.busy_ms)]
            .into_iter()
            .chain(device.then(|| human_ms(stage.device_wait_ms)))
            .chain([
                human_ms(stage.blocked_in_ms),
                human_ms(stage.blocked_out_ms),
                human_ms(stage.cpu_ms),
                human_bytes(stage.bytes_in),
                human_bytes(stage.bytes_out),
            ]);
        table.row(row);
    }
    table
}

/// Pages, bytes and ratio per encoding; encodings that were not used are left out.
pub fn encoding_table<'a>(encodings: impl Iterator<Item = (&'a String, &'a EncodingReport)>) -> Table {
    let mut table = Table::new(["encoding", "pages", "bytes", "bytes/page", "ratio"]);
    for (name, used) in encodings.filter(|(_, used)| used.pages > 0) {
        table.row([
            name.clone(),
            used.pages.to_string(),
            human_bytes(used.bytes),
            format!("{:.0}", used.bytes as f64 / used.pages as f64),
            human_ratio(used.pages * pagewarp_codec::PAGE_SIZE as u64, used.bytes),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> SourceReport {
        let stage = |busy_ms| StageReport { threads: 1, busy_ms, cpu_ms: busy_ms, ..StageReport::default() };
        SourceReport {
            name: "db1".into(),
            total_ms: 4200.0,
            downtime_ms: 320.0,
            downtime_limit_ms: 300.0,
            guest_bytes: 1 << 30,
            wire_bytes: 1 << 28,
            connections: 1,
            stages: BTreeMap::from([
                ("send".into(), stage(4100.0)),
                ("copy".into(), stage(200.0)),
                ("control".into(), stage(1.0)),
            ]),
            encodings: BTreeMap::from([
                ("zero".into(), EncodingReport { pages: 10, bytes: 0 }),
                ("lz4".into(), EncodingReport { pages: 2, bytes: 4096 }),
                ("same".into(), EncodingReport::default()),
            ]),
            destination: Some(DestinationReport {
                cpu_ms: 700.0,
                stages: BTreeMap::from([
                    ("deserialize".into(), stage(4150.0)),
                    ("control".into(), stage(2.0)),
                ]),
                ..DestinationReport::default()
            }),
            verified: Some(true),
            verify_ms: Some(31.0),
            ..SourceReport::default()
        }
    }

    #[test]
    fn the_report_tells_what_counts() {
        let text = source_report(&sample(), false);
        for part in [
            "`db1` was migrated",
            "total             4.20 s",
            "320.0 ms (OVER the limit of 300.0 ms)",
            "4.00x smaller",
            "CPU, destination  700.0 ms",
            "bounded by        deserialize (4.15 s)",
            "yes, every page, in 31.0 ms of the downtime",
            "\ncontrol-source ",
            "\ncontrol-destination ",
        ] {
            assert!(text.contains(part), "missing `{part}` in:\n{text}");
        }
        let order: Vec<_> =
            ["\ncopy", "\nsend", "\ndeserialize"].map(|stage| text.find(stage).expect(stage)).into();
        assert!(order.is_sorted(), "stages in data-path order:\n{text}");
        assert!(!text.contains("\nsame"), "an encoding that was not used:\n{text}");
        for part in ["waiting for the GPU", "the CPU", "damaged"] {
            assert!(!text.contains(part), "nothing of the kind happened:\n{text}");
        }
    }

    #[test]
    fn the_report_tells_what_a_gpu_did_and_what_it_left_to_the_cpu() {
        let mut report = SourceReport {
            backend: "gpu (test)".into(),
            fallback: Some("the gpu backend was lost:\n\nunplugged".into()),
            fallback_batches: 2,
            spilled_batches: 1,
            resent_pages: 256,
            ..sample()
        };
        let waits =
            StageReport { threads: 2, busy_ms: 10.0, device_wait_ms: 9000.0, ..StageReport::default() };
        report.stages.insert("serialize".into(), waits);
        let destination = report.destination.as_mut().unwrap();
        (destination.backend, destination.spilled_batches) = ("cpu (test)".into(), 30);
        let text = source_report(&report, true);
        for part in [
            "encoded by        gpu (test)",
            "decoded by        cpu (test)",
            "bounded by        serialize (4.50 s)",
            "source: the device was busy, so the CPU did 1 batch\n",
            "source: the CPU took over: the gpu backend was lost: unplugged\n",
            "source: the CPU did 2 batches again\n",
            "destination: the device was busy, so the CPU did 30 batches\n",
            "256 pages arrived damaged and were sent again\n",
            "waiting for the GPU",
        ] {
            assert!(text.contains(part), "missing `{part}` in:\n{text}");
        }
    }

    #[test]
    fn a_verification_that_is_missing_is_loud() {
        let text = |verify| source_report(&SourceReport { verified: None, ..sample() }, verify);
        assert!(text(true).contains("NO: asked for, and not done"));
        assert!(text(false).contains("not asked for (--verify)"));
    }
}
