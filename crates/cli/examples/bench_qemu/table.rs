//! The runs as tables in Markdown: medians, with the least and the most.

use std::fmt::Write;

use crate::mode::Mode;
use crate::record::{Outcome, Record, Run};

/// The host, and a table for each workload and link.
pub(crate) fn markdown(record: &Record) -> String {
    let mut text = heading(record);
    for group in groups(&record.runs) {
        let first = group[0];
        let _ = write!(
            text,
            "\n### {}, {} writes/s, {}\n\n\
             | mode | total s | vs `none` | downtime ms | guest pause ms | wire MiB | CPU s (all but vCPUs) | result |\n\
             |---|---:|---:|---:|---:|---:|---:|---|\n",
            first.workload,
            first.pages_per_s,
            first.link_rate(),
        );
        let none = Spread::of(completed(&group, Mode::None), |run| run.total_ms);
        for mode in modes(&group) {
            text.push_str(&row(&group, mode, none.as_ref()));
        }
        text.push_str(&memory(&group, record));
    }
    text
}

fn heading(record: &Record) -> String {
    let (host, settings) = (&record.host.info, &record.settings);
    let mib = |bytes: u64| bytes >> 20;
    format!(
        "{date}, {cpu}, {cpus} CPUs, {memory} MiB, Linux {kernel}, QEMU {qemu}, pagewarp {version} ({simd}); load average at the start {load:.2}.\n\
         VM of {vm} MiB, downtime limit {downtime} ms, history {history}, compression {compression}, xbzrle cache {cache} MiB, {channels} multifd channels, given up after \
         {limit} s, {repeat} runs of each; vCPU threads at nice {nice}.\n\
         `{command}`\n",
        date = host.date,
        cpu = host.cpu,
        cpus = host.cpus,
        memory = mib(host.memory_bytes),
        kernel = host.kernel,
        qemu = record.qemu_version,
        version = host.version,
        simd = host.simd,
        load = record.host.load_average,
        vm = mib(settings.memory_bytes),
        downtime = settings.downtime_limit_ms,
        history = settings.history,
        compression = settings.compression,
        cache = mib(settings.xbzrle_cache_bytes),
        channels = settings.multifd_channels,
        limit = settings.limit_s,
        repeat = settings.repeat,
        nice = settings.vcpu_nice,
        command = record.command.join(" "),
    )
}

/// Runs of one workload over one link, in the order of their first.
fn groups(runs: &[Run]) -> Vec<Vec<&Run>> {
    let mut groups: Vec<Vec<&Run>> = Vec::new();
    let key = |run: &Run| (run.workload.clone(), run.pages_per_s, run.link_bits_per_s);
    for run in runs {
        match groups.iter_mut().find(|group| key(group[0]) == key(run)) {
            Some(group) => group.push(run),
            None => groups.push(vec![run]),
        }
    }
    groups
}

/// In the order of the first repetition, which is that of the command line.
fn modes(group: &[&Run]) -> Vec<Mode> {
    let mut modes = Vec::new();
    for run in group {
        if !modes.contains(&run.mode) {
            modes.push(run.mode);
        }
    }
    modes
}

fn completed<'a>(group: &[&'a Run], mode: Mode) -> Vec<&'a Run> {
    group.iter().copied().filter(|run| run.mode == mode && run.outcome == Outcome::Completed).collect()
}

fn row(group: &[&Run], mode: Mode, none: Option<&Spread>) -> String {
    let runs = completed(group, mode);
    let cell = |value: &dyn Fn(&Run) -> Option<f64>, digits: usize| {
        Spread::of(runs.clone(), value).map_or(String::new(), |spread| spread.text(digits))
    };
    let versus = Spread::of(runs.clone(), |run| run.total_ms)
        .zip(none)
        .map_or(String::new(), |(spread, none)| format!("{:.2}", spread.median / none.median));
    format!(
        "| `{mode}` | {} | {versus} | {} | {} | {} | {} | {} |\n",
        cell(&|run| run.total_ms.map(|ms| ms / 1000.0), 2),
        cell(&|run| run.downtime_ms, 0),
        cell(&|run| run.guest_pause_ms, 0),
        cell(&|run| run.wire_bytes.map(|bytes| bytes as f64 / f64::from(1 << 20)), 0),
        cell(&|run| run.cpu.map(|cpu| cpu.total_ms() / 1000.0), 2),
        result(group, mode),
    )
}

fn result(group: &[&Run], mode: Mode) -> String {
    let count = |outcome| group.iter().filter(|run| run.mode == mode && run.outcome == outcome).count();
    let all = group.iter().filter(|run| run.mode == mode).count();
    let named = [
        (count(Outcome::Completed), "completed"),
        (count(Outcome::DidNotConverge), "did not converge"),
        (count(Outcome::Failed), "**failed**"),
    ];
    let route =
        |run: &&&Run| run.pagewarp_migrate.as_ref()?.pointer("/route/route")?.as_str().map(str::to_owned);
    let of_mode = || group.iter().filter(|run| run.mode == mode);
    let direct = of_mode().filter(|run| route(run).as_deref() == Some("direct")).count();
    let named = named.into_iter().chain([(direct, "on the direct route")]);
    let parts: Vec<String> = named
        .filter(|(number, _)| *number > 0)
        .map(
            |(number, name)| {
                if number == all { name.to_owned() } else { format!("{number} of {all} {name}") }
            },
        )
        .collect();
    parts.join(", ")
}

/// How much memory pagewarp took, if it took part.
fn memory(group: &[&Run], record: &Record) -> String {
    let mib = |bytes: u64| bytes >> 20;
    let peaks = || group.iter().filter_map(|run| run.peak_rss_bytes);
    let in_use = group
        .iter()
        .filter_map(|run| run.pagewarp_migrate.as_ref()?.pointer("/bridge/history_bytes")?.as_u64());
    let (Some(source), Some(destination)) =
        (peaks().map(|peak| peak.source).max(), peaks().map(|peak| peak.destination).max())
    else {
        return String::new();
    };
    format!(
        "\nThe most memory a pagewarp process had: {} MiB on the source, {} MiB on the destination, with a history of {} ({} MiB in use at the end).\n",
        mib(source),
        mib(destination),
        record.settings.history,
        mib(in_use.max().unwrap_or(0)),
    )
}

/// Of several runs.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Spread {
    median: f64,
    least: f64,
    most: f64,
}

impl Spread {
    /// `None`: no run has the value.
    fn of(runs: Vec<&Run>, value: impl Fn(&Run) -> Option<f64>) -> Option<Spread> {
        Spread::of_values(runs.into_iter().filter_map(value).collect())
    }

    fn of_values(mut values: Vec<f64>) -> Option<Spread> {
        values.sort_by(f64::total_cmp);
        let (least, most) = (*values.first()?, *values.last()?);
        let median = (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0;
        Some(Spread { median, least, most })
    }

    fn text(&self, digits: usize) -> String {
        let Spread { median, least, most } = self;
        if least == most {
            return format!("{median:.digits$}");
        }
        format!("{median:.digits$} ({least:.digits$}–{most:.digits$})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_stand_in_the_middle() {
        let spread = |values: &[f64]| Spread::of_values(values.to_vec()).map(|spread| spread.text(1));
        assert_eq!(spread(&[]), None);
        assert_eq!(spread(&[2.0]).as_deref(), Some("2.0"));
        assert_eq!(spread(&[3.0, 1.0, 9.0]).as_deref(), Some("3.0 (1.0–9.0)"));
        assert_eq!(spread(&[3.0, 1.0]).as_deref(), Some("2.0 (1.0–3.0)"));
    }
}
