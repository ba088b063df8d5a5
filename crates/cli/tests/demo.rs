//! The demo command, small: with KVM, and with the guest that needs none.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

fn demo(args: &[&str]) -> Value {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("report.json");
    let done = Command::new(env!("CARGO_BIN_EXE_pagewarp"))
        .args(["demo", "--json", "--link", "none", "--downtime-ms", "5000", "--output"])
        .arg(Path::new(&output))
        .args(args)
        .output()
        .unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    assert_eq!(std::fs::read(&output).unwrap(), done.stdout, "the file and standard output are the same");
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
    let report = demo(&["--memory", "64M", "--rate", "1000", "--modes", &modes.join(",")]);
    check(&report, "builtin", &modes);
    assert!(report["speedup"].is_number());
    let runs = report["runs"].as_array().unwrap();
    assert!(
        runs[0]["encodings"]["lz4"].is_null() || runs[0]["encodings"]["lz4"]["pages"] == 0,
        "{:#}",
        runs[0]
    );
    assert!(runs[1]["encodings"]["lz4"]["pages"].as_u64() > Some(0), "{:#}", runs[1]);
}

#[test]
fn the_synthetic_guest_stands_in_and_the_report_says_so() {
    let report =
        demo(&["--synthetic", "--memory", "32M", "--rate", "500", "--modes", "pipelined-compressed"]);
    check(&report, "synthetic", &["pipelined-compressed"]);
    assert!(report["speedup"].is_null());
}
