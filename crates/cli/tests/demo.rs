//! The demo command, small: with KVM, and with the guest that needs none.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn pagewarp_demo(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pagewarp"))
        .current_dir(dir)
        .args(["demo", "--link", "none", "--downtime-ms", "5000"])
        .args(args)
        .output()
        .unwrap()
}

fn demo(args: &[&str]) -> Value {
    let dir = tempfile::tempdir().unwrap();
    let done = pagewarp_demo(dir.path(), &[&["--json", "--output", "report.json"], args].concat());
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let written = std::fs::read(dir.path().join("report.json")).unwrap();
    assert_eq!(written, done.stdout, "the file and standard output are the same");
    serde_json::from_slice(&done.stdout).unwrap()
}

fn check(report: &Value, guest: &str, modes: &[&str]) {
    assert_eq!(report["guest"], guest);
    let runs = report["runs"].as_array().unwrap();
    assert_eq!(runs.iter().map(|run| run["mode"].as_str().unwrap()).collect::<Vec<_>>(), modes);
    for run in runs {
        assert_eq!(run["verified"], true, "{run:#}");
        assert!(run["guest_pause_ms"].is_number(), "{run:#}");
        for stage in ["copy", "serialize", "send", "receive", "deserialize", "restore"] {
            for figure in ["busy_ms", "blocked_in_ms", "blocked_out_ms", "cpu_ms"] {
                assert!(run["stages"][stage][figure].is_number(), "{stage} {figure} in {run:#}");
            }
        }
    }
}

#[test]
fn the_builtin_guest_moves_in_a_baseline_and_in_the_best_mode() {
    let modes = ["sequential", "pipelined-compressed"];
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("trace.json");
    let options = ["--memory", "64M", "--rate", "1000", "--verify", "--modes", &modes.join(",")];
    let report = demo(&[&options[..], &["--trace", trace.to_str().unwrap()]].concat());
    check(&report, "builtin", &modes);
    assert!(report["speedup"].is_number());
    let runs = report["runs"].as_array().unwrap();
    assert!(runs.iter().all(|run| run["digests_agree"] == true && run["verify_ms"].is_number()), "{runs:#?}");
    assert!(
        runs[0]["encodings"]["lz4"].is_null() || runs[0]["encodings"]["lz4"]["pages"] == 0,
        "{:#}",
        runs[0]
    );
    assert!(runs[1]["encodings"]["lz4"]["pages"].as_u64() > Some(0), "{:#}", runs[1]);
    assert!(runs.iter().all(|run| run["backend"]["source"].as_str().unwrap().starts_with("cpu")));
    let trace: Value = serde_json::from_slice(&std::fs::read(trace).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    for (pid, span) in [(1, "copy"), (1, "send"), (2, "receive"), (2, "restore")] {
        assert!(events.iter().any(|event| event["pid"] == pid && event["name"] == span), "{span} of {pid}");
    }
    let restored: Vec<_> = events.iter().filter(|event| event["name"] == "restore").collect();
    let copied: Vec<_> = events.iter().filter(|event| event["name"] == "copy").collect();
    let begin = |event: &Value| event["ts"].as_f64().unwrap();
    assert!(begin(copied[0]) < begin(restored[0]), "both processes are on one clock");
}

#[test]
fn the_synthetic_guest_stands_in_and_the_report_says_so() {
    let report =
        demo(&["--synthetic", "--memory", "32M", "--rate", "500", "--modes", "pipelined-compressed"]);
    check(&report, "synthetic", &["pipelined-compressed"]);
    assert!(report["speedup"].is_null());
}

#[test]
fn results_are_printed_whether_they_can_be_written_or_not() {
    let small = ["--synthetic", "--memory", "16M", "--rate", "500", "--modes", "pipelined"];
    let dir = tempfile::tempdir().unwrap();
    let done = pagewarp_demo(dir.path(), &[&small[..], &["--output", "no/such/dir.json"]].concat());
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(9), "{said}");
    assert!(said.contains("no/such/dir.json"), "{said}");
    assert!(String::from_utf8_lossy(&done.stdout).contains("bounded by"), "the table is there");

    let done = pagewarp_demo(dir.path(), &[&small[..], &["--json"]].concat());
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    check(&serde_json::from_slice(&done.stdout).unwrap(), "synthetic", &["pipelined"]);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "no file that nobody asked for");
}
