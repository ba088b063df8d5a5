//! Reports of migrations of QEMU's VMs, for people.

use std::collections::BTreeMap;
use std::fmt::Write;

use pagewarp_engine::report::StageReport;
use pagewarp_qemu::bridge::{DestinationBridgeReport, LevelReport, SourceBridgeReport};
use pagewarp_qemu::manage::{QemuReceiveReport, QemuReport, Route, RouteReport};

use super::{busiest, encoding_table, help, mended, push_facts, stage_table};
use crate::table::Table;
use crate::units::{human_bytes, human_ms, human_rate, human_ratio};

/// What a migration of a QEMU did, as the source tells it.
pub fn qemu_report(report: &QemuReport) -> String {
    let paused = if report.runs { "" } else { " and is paused there, as it was here" };
    let mut text = format!("`{}` was migrated{paused} (QEMU {})\n", report.name, report.qemu_version);
    let within = if report.downtime_ms <= report.downtime_limit_ms { "within" } else { "OVER" };
    let by_events =
        report.stop_to_resume_ms.map_or(String::new(), |ms| format!("; STOP to RESUME {}", human_ms(ms)));
    let mut facts = vec![
        ("total", format!("{} (QEMU says {})", human_ms(report.total_ms), of_qemu(report.qemu_total_ms))),
        (
            "downtime",
            format!(
                "{} ({within} the limit of {}{by_events}; QEMU says {})",
                human_ms(report.downtime_ms),
                human_ms(report.downtime_limit_ms),
                of_qemu(report.qemu_downtime_ms),
            ),
        ),
        ("epochs", report.epochs.to_string()),
        ("route", route(&report.route)),
    ];
    match &report.bridge {
        Some(bridge) => with_bridge(&mut text, facts, report, bridge),
        None => {
            facts.push(("guest data", guest_data(report, report.qemu_transferred_bytes)));
            facts.push(("on the wire", "the same".to_owned()));
            facts.extend(cpu_of_both(report, None));
            push_facts(&mut text, &facts);
        }
    }
    text
}

fn with_bridge(
    text: &mut String,
    mut facts: Vec<(&'static str, String)>,
    report: &QemuReport,
    bridge: &SourceBridgeReport,
) {
    let theirs = report.destination.as_ref().and_then(|side| side.bridge.as_ref());
    let mut stages = bridge.stages.clone();
    stages.extend(
        theirs.iter().flat_map(|bridge| bridge.stages.iter().map(|(name, stage)| (name.clone(), *stage))),
    );
    facts.extend([
        ("guest data", guest_data(report, bridge.stream_bytes)),
        ("on the wire", on_the_wire(bridge)),
        ("link", link(bridge)),
        ("encoded by", bridge.backend.clone()),
        ("decoded by", theirs.map_or_else(unknown, |bridge| bridge.backend.clone())),
    ]);
    facts.extend(cpu_of_both(report, Some([Some(bridge.cpu_ms), theirs.map(|b| b.cpu_ms)])));
    facts.extend([
        ("history", human_bytes(bridge.history_bytes)),
        ("bounded by", bound_by(&stages)),
        ("verified", verified(report.verified, report.verify_ms)),
    ]);
    push_facts(text, &facts);
    text.push_str(&notes(bridge));
    text.push_str(&theirs.map(destination_help).unwrap_or_default());
    tables(text, bridge, &stages);
}

fn unknown() -> String {
    "unknown".to_owned()
}

/// The route, and why it was taken.
fn route(report: &RouteReport) -> String {
    let measured = match (report.link_bytes_per_s, report.bridge_bytes_per_s) {
        (Some(link), Some(bridge)) => {
            format!(" (link {}, bridge up to {})", human_rate(link), human_rate(bridge))
        }
        _ => String::new(),
    };
    format!("{}: {}{measured}", route_name(report.route), report.reason)
}

fn route_name(route: Route) -> &'static str {
    match route {
        Route::Bridge => "bridge",
        Route::Direct => "direct, from QEMU to QEMU",
    }
}

fn guest_data(report: &QemuReport, bytes: u64) -> String {
    format!(
        "{} ({} pages, {} of zeros; memory {})",
        human_bytes(bytes),
        report.qemu_normal_pages,
        report.qemu_zero_pages,
        human_bytes(report.memory_bytes),
    )
}

/// CPU time on both sides, also that of both bridges if there are any.
fn cpu_of_both(report: &QemuReport, bridges: Option<[Option<f64>; 2]>) -> [(&'static str, String); 2] {
    let known = |ms: Option<f64>| ms.map_or_else(unknown, human_ms);
    let cpu = |at: usize, qemu: Option<f64>| {
        let bridge = bridges.map_or_else(String::new, |ms| format!("bridge {}, ", known(ms[at])));
        format!("{bridge}QEMU {} (vCPUs aside)", known(qemu))
    };
    let destination = report.destination.as_ref();
    [
        ("CPU, source", cpu(0, report.qemu_cpu_ms)),
        ("CPU, destination", cpu(1, destination.and_then(|side| side.qemu_cpu_ms))),
    ]
}

/// Whether what was written into the destination QEMU was compared, and how long the hand-over waited for it.
fn verified(verified: Option<bool>, took: Option<f64>) -> String {
    match (verified, took) {
        (Some(true), Some(took)) => format!("yes, all that QEMU sent, in {} of the downtime", human_ms(took)),
        (Some(true), None) => "yes, all that QEMU sent".to_owned(),
        _ => "not asked for (--verify)".to_owned(),
    }
}

/// What the destination tells.
pub fn qemu_receive_report(report: &QemuReceiveReport) -> String {
    let state = if report.runs { "runs" } else { "is paused" };
    let mut text =
        format!("`{}` was received and {state} here (QEMU {})\n", report.name, report.qemu_version);
    let mut facts =
        vec![("total", human_ms(report.total_ms)), ("route", route_name(report.route).to_owned())];
    if let Some(bridge) = &report.bridge {
        facts.extend(destination_facts(bridge));
    }
    push_facts(&mut text, &facts);
    if let Some(bridge) = &report.bridge {
        text.push_str(&destination_help(bridge));
        let _ = write!(text, "\n{}", stage_table(&bridge.stages));
    }
    text
}

/// What a source bridge did.
pub fn source_bridge_report(report: &SourceBridgeReport) -> String {
    let mut text = "QEMU's migration went through the bridge\n".to_owned();
    let facts = [
        ("total", human_ms(report.total_ms)),
        (
            "from QEMU",
            format!(
                "{} ({} pages, {} zero records)",
                human_bytes(report.stream_bytes),
                report.pages,
                report.zero_records
            ),
        ),
        ("on the wire", on_the_wire(report)),
        ("link", link(report)),
        ("encoded by", report.backend.clone()),
        ("CPU", human_ms(report.cpu_ms)),
        ("history", human_bytes(report.history_bytes)),
        ("bounded by", bound_by(&report.stages)),
        ("verified", verified(report.verified, None)),
    ];
    push_facts(&mut text, &facts);
    if !report.complete {
        text.push_str(
            "\nEverything that QEMU sent was delivered. Whether that was all of the VM, only QEMU can tell (`query-migrate`): its stream could not be read.\n",
        );
    }
    text.push_str(&notes(report));
    tables(&mut text, report, &report.stages);
    text
}

/// What a destination bridge did.
pub fn destination_bridge_report(report: &DestinationBridgeReport) -> String {
    let mut text = "a migration went through the bridge into QEMU\n".to_owned();
    let mut facts = vec![("total", human_ms(report.total_ms))];
    facts.extend(destination_facts(report));
    push_facts(&mut text, &facts);
    text.push_str(&destination_help(report));
    let _ = write!(text, "\n{}", stage_table(&report.stages));
    text
}

fn destination_facts(bridge: &DestinationBridgeReport) -> [(&'static str, String); 5] {
    [
        ("into QEMU", human_bytes(bridge.stream_bytes)),
        (
            "on the wire",
            format!(
                "{} ({} smaller)",
                human_bytes(bridge.wire_bytes),
                human_ratio(bridge.stream_bytes, bridge.wire_bytes)
            ),
        ),
        ("decoded by", bridge.backend.clone()),
        ("CPU", human_ms(bridge.cpu_ms)),
        ("bounded by", bound_by(&bridge.stages)),
    ]
}

fn of_qemu(ms: Option<u64>) -> String {
    ms.map_or_else(|| "nothing".to_owned(), |ms| human_ms(ms as f64))
}

fn on_the_wire(bridge: &SourceBridgeReport) -> String {
    format!(
        "{} ({} smaller, {} on average, {} connection{})",
        human_bytes(bridge.wire_bytes),
        human_ratio(bridge.stream_bytes, bridge.wire_bytes),
        human_rate(bridge.wire_bytes as f64 * 1000.0 / bridge.total_ms.max(0.001)),
        bridge.connections,
        if bridge.connections == 1 { "" } else { "s" },
    )
}

fn link(bridge: &SourceBridgeReport) -> String {
    bridge
        .link_bytes_per_s
        .map_or_else(|| "never full".to_owned(), |rate| format!("{} when full", human_rate(rate)))
}

fn bound_by(stages: &BTreeMap<String, StageReport>) -> String {
    busiest(stages).map_or_else(|| "nothing".to_owned(), |(name, ms)| format!("{name} ({})", human_ms(ms)))
}

fn notes(bridge: &SourceBridgeReport) -> String {
    let mut text = help("source", bridge.spilled_batches, 0, bridge.fallback.as_deref());
    for (number, why) in &bridge.passed_raw {
        let _ = writeln!(text, "  connection {number} was passed as it is from some point on: {why}");
    }
    text.push_str(&mended(&bridge.interruptions));
    text
}

fn destination_help(bridge: &DestinationBridgeReport) -> String {
    help("destination", bridge.spilled_batches, 0, bridge.fallback.as_deref())
}

fn tables(text: &mut String, bridge: &SourceBridgeReport, stages: &BTreeMap<String, StageReport>) {
    let _ = write!(
        text,
        "\n{}\n{}\n{}",
        stage_table(stages),
        level_table(&bridge.levels),
        encoding_table(bridge.encodings.iter())
    );
}

fn level_table(levels: &BTreeMap<String, LevelReport>) -> Table {
    let mut table = Table::new(["compression", "pages", "bytes", "bytes/page"]);
    for (name, used) in levels.iter().filter(|(_, used)| used.pages > 0) {
        table.row([
            name.clone(),
            used.pages.to_string(),
            human_bytes(used.wire_bytes),
            format!("{:.0}", used.wire_bytes as f64 / used.pages as f64),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_says_what_matters_and_what_is_not_known() {
        let level = LevelReport { segments: 2, pages: 10, wire_bytes: 1000 };
        let report = QemuReport {
            name: "db1".into(),
            qemu_version: "7.2.22".into(),
            runs: true,
            total_ms: 4200.0,
            downtime_ms: 310.0,
            downtime_limit_ms: 300.0,
            qemu_downtime_ms: Some(305),
            epochs: 7,
            bridge: Some(SourceBridgeReport {
                levels: [("zstd".to_owned(), level)].into(),
                passed_raw: [(2, "an unknown flag".to_owned())].into(),
                spilled_batches: 3,
                ..SourceBridgeReport::default()
            }),
            ..QemuReport::default()
        };
        let text = qemu_report(&report);
        for part in [
            "`db1` was migrated (QEMU 7.2.22)",
            "OVER the limit",
            "QEMU says 305.0 ms",
            "zstd",
            "connection 2 was passed",
            "source: the device was busy, so the CPU did 3 batches",
        ] {
            assert!(text.contains(part), "no {part:?} in:\n{text}");
        }
        assert!(text.contains("decoded by        unknown"), "{text}");
        let paused_report = QemuReport { runs: false, ..report };
        let paused = qemu_report(&paused_report);
        assert!(
            paused.contains("`db1` was migrated and is paused there, as it was here (QEMU 7.2.22)"),
            "{paused}"
        );
        let direct = QemuReport {
            bridge: None,
            route: RouteReport {
                route: Route::Direct,
                reason: "it is faster".into(),
                link_bytes_per_s: Some(1.25e9),
                bridge_bytes_per_s: Some(0.5e9),
                ..RouteReport::default()
            },
            qemu_cpu_ms: Some(500.0),
            ..paused_report
        };
        let text = qemu_report(&direct);
        for part in ["direct, from QEMU to QEMU: it is faster (link ", "bridge up to ", "QEMU 500.0 ms"] {
            assert!(text.contains(part), "no {part:?} in:\n{text}");
        }
        assert!(!text.contains("encoded by") && !text.contains("compression"), "{text}");
        let received = QemuReceiveReport { name: "db1".into(), runs: true, ..QemuReceiveReport::default() };
        assert!(qemu_receive_report(&received).contains("received and runs here"));
        let paused = QemuReceiveReport { runs: false, ..received };
        assert!(qemu_receive_report(&paused).contains("received and is paused here"));
    }
}
