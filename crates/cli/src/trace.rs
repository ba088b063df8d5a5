//! Traces of migrations as files: who worked on which batch, and when, in the JSON that Perfetto and Chrome read.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use pagewarp_codec::{Span, Trace};
use serde::{Deserialize, Serialize};

use crate::exit::{Exit, Failure};
use crate::output::Output;

/// Numbers of tracks of one host. They must not be those of the other one, because some readers take them to be the threads of one system.
const TRACKS_OF_A_HOST: u32 = 1000;

/// Which end of a migration a trace is of: a process in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// The source.
    Source,
    /// The destination.
    Destination,
}

impl Host {
    fn name(self) -> &'static str {
        match self {
            Host::Source => "source",
            Host::Destination => "destination",
        }
    }

    fn number(self) -> u32 {
        match self {
            Host::Source => 1,
            Host::Destination => 2,
        }
    }
}

/// The content of a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TraceFile {
    #[serde(rename = "traceEvents")]
    events: Vec<Event>,
    #[serde(rename = "otherData")]
    about: About,
}

/// What is said of the whole trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct About {
    /// When the trace began, the 0 of its times, by the clock of its host: with it, the traces of two hosts can be laid on one another.
    began_unix_us: u64,
    /// Spans that are missing because there were too many.
    dropped_spans: u64,
}

/// An event; `ph` is its kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "ph")]
enum Event {
    /// A piece of work, with its beginning and its length in microseconds.
    #[serde(rename = "X")]
    Complete { name: Cow<'static, str>, pid: u32, tid: u32, ts: f64, dur: f64, args: Work },
    /// The name of a process or of a track.
    #[serde(rename = "M")]
    Metadata { name: Cow<'static, str>, pid: u32, tid: u32, args: Name },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Work {
    batch: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Name {
    name: String,
}

impl TraceFile {
    /// What is in this trace so far.
    pub fn of(host: Host, trace: &Trace) -> TraceFile {
        let (spans, dropped_spans) = trace.spans();
        let began = SystemTime::now() - trace.epoch().elapsed();
        let began = began.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let about = About { began_unix_us: began.as_micros() as u64, dropped_spans };
        TraceFile::from_spans(host, &spans, trace.epoch(), about)
    }

    fn from_spans(host: Host, spans: &[Span], epoch: Instant, about: About) -> TraceFile {
        let pid = host.number();
        let named = |what: &'static str, tid, name: &str| Event::Metadata {
            name: what.into(),
            pid,
            tid,
            args: Name { name: name.to_owned() },
        };
        let first = pid * TRACKS_OF_A_HOST;
        let mut events = vec![named("process_name", first, host.name())];
        let mut tracks: HashMap<&str, u32> = HashMap::new();
        for span in spans {
            let next = first + tracks.len() as u32;
            let tid = *tracks.entry(&*span.track).or_insert_with(|| {
                events.push(named("thread_name", next, &span.track));
                next
            });
            events.push(Event::Complete {
                name: span.name.into(),
                pid,
                tid,
                ts: micros(span.start.saturating_duration_since(epoch)),
                dur: micros(span.end.saturating_duration_since(span.start)),
                args: Work { batch: span.batch },
            });
        }
        TraceFile { events, about }
    }

    /// Both ends of a migration in one, by the clocks of their hosts.
    pub fn merged(mut self, mut other: TraceFile) -> TraceFile {
        let began = self.about.began_unix_us.min(other.about.began_unix_us);
        for part in [&mut self, &mut other] {
            let later = (part.about.began_unix_us - began) as f64;
            for event in &mut part.events {
                if let Event::Complete { ts, .. } = event {
                    *ts += later;
                }
            }
        }
        self.events.append(&mut other.events);
        self.about.began_unix_us = began;
        self.about.dropped_spans += other.about.dropped_spans;
        self
    }

    /// Reads a file that [`write`](Self::write) has written.
    pub fn read(path: &Path) -> Result<TraceFile> {
        let text =
            std::fs::read(path).with_context(|| format!("cannot read the trace `{}`", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("`{}` is no trace of ours", path.display()))
    }

    /// Writes it. A file that is made here is readable by its owner alone, and takes its place when it is complete.
    pub fn write(&self, path: &Path) -> Result<()> {
        self.try_write(path).with_context(|| {
            Failure::new(Exit::Environment, format!("cannot write the trace to `{}`", path.display()))
        })
    }

    fn try_write(&self, path: &Path) -> Result<()> {
        let mut output = Output::create(path)?;
        self.write_to(output.writer())?;
        output.finish()
    }

    fn write_to(&self, file: &mut File) -> Result<()> {
        let mut writer = BufWriter::new(file);
        serde_json::to_writer(&mut writer, self)?;
        writer.write_all(b"\n")?;
        Ok(writer.flush()?)
    }
}

/// Microseconds, to the nanosecond.
fn micros(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use serde_json::{Value, json};

    use super::*;
    use crate::exit::exit_of;

    fn sample(host: Host, began_unix_us: u64) -> TraceFile {
        let epoch = Instant::now();
        let span = |track: &str, name, batch, start, end| Span {
            track: track.into(),
            name,
            batch,
            start: epoch + Duration::from_nanos(start),
            end: epoch + Duration::from_nanos(end),
        };
        let spans = [
            span("copy", "copy", 0, 1_500, 3_000),
            span("gpu kernels", "kernel", 0, 4_000, 5_001),
            span("copy", "copy", 1, 6_000, 7_000),
        ];
        TraceFile::from_spans(host, &spans, epoch, About { began_unix_us, dropped_spans: 1 })
    }

    #[test]
    fn the_json_is_what_perfetto_reads() {
        let named =
            |what, tid, name| json!({"ph": "M", "name": what, "pid": 1, "tid": tid, "args": {"name": name}});
        let work = |name, tid, ts, dur, batch| json!({"ph": "X", "name": name, "pid": 1, "tid": tid, "ts": ts, "dur": dur, "args": {"batch": batch}});
        let expected = json!({
            "traceEvents": [
                named("process_name", 1000, "source"),
                named("thread_name", 1000, "copy"),
                work("copy", 1000, 1.5, 1.5, 0),
                named("thread_name", 1001, "gpu kernels"),
                work("kernel", 1001, 4.0, 1.001, 0),
                work("copy", 1000, 6.0, 1.0, 1),
            ],
            "otherData": {"began_unix_us": 5, "dropped_spans": 1},
        });
        assert_eq!(serde_json::to_value(sample(Host::Source, 5)).unwrap(), expected);
    }

    #[test]
    fn two_hosts_in_one_file_are_two_processes_on_one_clock() {
        let merged = sample(Host::Source, 1_000).merged(sample(Host::Destination, 1_250));
        let json = serde_json::to_value(&merged).unwrap();
        assert_eq!(json["otherData"], json!({"began_unix_us": 1_000, "dropped_spans": 2}));
        let events = json["traceEvents"].as_array().unwrap();
        let begins = |pid: u64| -> Vec<f64> {
            let of_host = events.iter().filter(|event| event["pid"] == pid && event["ph"] == "X");
            of_host.map(|event| event["ts"].as_f64().unwrap()).collect()
        };
        assert_eq!((begins(1), begins(2)), (vec![1.5, 4.0, 6.0], vec![251.5, 254.0, 256.0]));
        let tids = |pid: u64| -> Vec<&Value> {
            events.iter().filter(|event| event["pid"] == pid).map(|event| &event["tid"]).collect()
        };
        assert!(tids(1).iter().all(|tid| !tids(2).contains(tid)));
        assert_eq!(sample(Host::Destination, 1_250).merged(sample(Host::Source, 1_000)).about, merged.about);
    }

    #[test]
    fn a_file_is_private_and_comes_back_equal() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace.json");
        let trace = sample(Host::Source, 5);
        for _ in 0..2 {
            trace.write(&path).unwrap();
            assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
            assert_eq!(TraceFile::read(&path).unwrap(), trace);
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn a_place_that_is_not_there_is_named() {
        let error = sample(Host::Source, 5).write(Path::new("/nonexistent/trace.json")).unwrap_err();
        assert_eq!(exit_of(&error), Exit::Environment);
        assert!(error.to_string().contains("/nonexistent/trace.json"), "{error}");
        sample(Host::Source, 5).write(Path::new("/dev/null")).unwrap();
    }

    #[test]
    fn a_trace_knows_when_it_began() {
        let trace = Trace::new();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_micros() as u64;
        let began = TraceFile::of(Host::Source, &trace).about.began_unix_us;
        assert!(began.abs_diff(now) < 10_000_000, "{began} and {now}");
    }
}
