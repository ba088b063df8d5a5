//! The command line as the host writes it and as the guest reads it.

#![allow(
    missing_docs,
    unreachable_pub,
    dead_code,
    reason = "a module of a program, the image, not of a library"
)]

#[path = "../image/params.rs"]
pub mod params;

use pagewarp_guest::{GuestConfig, Workload, WriteRate};
use params::{BadParam, Kind, Params};

fn parse(line: &str) -> Result<Params, BadParam<'_>> {
    Params::parse(line, |word| panic!("unknown parameter {word}"))
}

#[test]
fn the_guest_reads_what_the_host_writes() {
    assert_eq!(parse(&GuestConfig::default().cmdline()), Ok(Params::default()));
    let config = GuestConfig {
        workload: Workload::Graph,
        memory_mib: Some(100),
        working_set_mib: Some(50),
        write_rate: WriteRate::MibPerS(20),
        seed: u64::MAX,
        report_ms: 10,
        fill_percent: Some(100),
        verify_mib_s: Some(64),
        tsc_khz: Some(2_600_000),
        exit_after_ms: Some(u32::MAX),
    };
    let expected = Params {
        workload: Kind::Graph,
        mem_mib: Some(100),
        ws_mib: Some(50),
        rate: 20 * 256,
        seed: u64::MAX,
        report_ms: 10,
        fill_percent: Some(100),
        verify_mib_s: 64,
        tsc_khz: 2_600_000,
        exit_after_ms: u64::from(u32::MAX),
    };
    assert_eq!(parse(&config.cmdline()), Ok(expected));
    let unlimited = GuestConfig { write_rate: WriteRate::Unlimited, ..GuestConfig::default() };
    assert_eq!(parse(&unlimited.cmdline()).map(|p| p.rate), Ok(0));
    // Zero pages a second are not "no limit".
    let slow = GuestConfig { write_rate: WriteRate::PagesPerS(0), ..GuestConfig::default() };
    assert_eq!(parse(&slow.cmdline()).map(|p| p.rate), Ok(1));
}

#[test]
fn workload_names_agree() {
    for workload in Workload::ALL {
        let line = format!("workload={workload}");
        assert_eq!(parse(&line).map(|p| p.workload.name()), Ok(workload.name()));
        assert_eq!(workload.name().parse(), Ok(workload));
    }
    let error = "redis".parse::<Workload>().unwrap_err().to_string();
    assert!(error.contains("\"redis\"") && error.contains("kv"), "{error}");
}

#[test]
fn unusable_values_are_refused_by_name() {
    for word in [
        "workload=redis",
        "mem=0",
        "mem=-1",
        "mem=",
        "ws=lots",
        "rate=10k",
        "rate=m",
        "rate=1000000001",
        "rate=99999999999999999999m",
        "seed=x",
        "report_ms=9",
        "fill=101",
        "verify=0",
        "tsc_khz=1e6",
        "exit_after_ms=4294967296",
    ] {
        let line = format!("seed=2 {word} report_ms=100");
        let bad = parse(&line).unwrap_err();
        assert_eq!(bad.word, word);
        assert!(!bad.expected.is_empty());
    }
}

#[test]
fn words_of_others_are_passed_over() {
    let mut unknown = Vec::new();
    let p = Params::parse("console=ttyS0 workload=idle  quiet mem=all", |word| unknown.push(word.to_owned()))
        .unwrap();
    assert_eq!(p, Params { workload: Kind::Idle, ..Params::default() });
    assert_eq!(unknown, ["console=ttyS0", "quiet"]);
}

#[test]
fn the_help_names_every_parameter() {
    for key in
        ["workload", "mem", "ws", "rate", "seed", "fill", "verify", "report_ms", "tsc_khz", "exit_after_ms"]
    {
        assert!(params::HELP.lines().any(|line| line.starts_with(&format!("{key}="))), "{key}");
    }
}
