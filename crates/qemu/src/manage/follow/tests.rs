use pagewarp_codec::CpuBackend;
use pagewarp_engine::transport::TcpConnector;
use serde_json::json;

use super::*;
use crate::bridge::{BridgeConfig, Endpoint};
use crate::manage::blame::Side;
use crate::manage::fake::{Reply, with_monitor};

/// A driver of a QEMU that replies as told.
fn with_driver(
    patience: Duration,
    reply: impl FnMut(&str) -> Reply + Send + 'static,
    test: impl FnOnce(&mut Driver<'_>),
) {
    let dir = tempfile::TempDir::new().unwrap();
    let connector = TcpConnector { address: ([127, 0, 0, 1], 1).into(), timeout: Duration::from_secs(1) };
    let config = BridgeConfig::new(std::sync::Arc::new(CpuBackend::default()));
    let bridge =
        SourceBridge::bind(Endpoint::Unix(dir.path().join("migration")), &connector, config).unwrap();
    let (_news, incoming) = Incoming::new();
    let control = MigrationControl::new();
    with_monitor(reply, |vm| {
        test(&mut Driver {
            vm,
            incoming: &incoming,
            control: &control,
            connector: &connector,
            bridge: Some(&bridge),
            bridge_progress: &control,
            started: Instant::now(),
            stopped: None,
            last: None,
            memory_bytes: 0,
            switchover: Switchover::new(300),
            told: 0,
            runs: true,
            signs: Signs::new(Side::Source),
            silent: None,
            patience,
        });
    });
}

fn nothing() -> Reply {
    Reply::Return(json!({}))
}

/// The answer of a migration under way, after this.
fn after(event: Value) -> Reply {
    Reply::After(event, json!({ "status": "active" }))
}

fn migration(status: &str) -> Value {
    json!({ "event": "MIGRATION", "data": { "status": status } })
}

#[test]
fn a_qemu_that_is_silent_for_a_while_is_waited_for() {
    let mut asked = 0;
    let answer = move |command: &str| {
        if command != "query-migrate" {
            return nothing();
        }
        asked += 1;
        match asked {
            1 => after(json!({ "event": "STOP" })),
            2 | 3 => Reply::Silence,
            _ => after(migration("completed")),
        }
    };
    with_driver(Duration::from_secs(60), answer, |driver| {
        driver.run().unwrap();
        assert!(!driver.signs.any());
        assert!(driver.stopped.is_some() && driver.runs);
    });
}

#[test]
fn a_qemu_that_stays_silent_is_given_up() {
    with_driver(
        Duration::from_millis(1),
        |_| Reply::Silence,
        |driver| {
            let error = driver.run().unwrap_err();
            assert!(matches!(error, ManageError::Qmp(QmpError::TimedOut { .. })), "{error}");
        },
    );
}

#[test]
fn a_migration_that_somebody_else_cancels_has_failed() {
    let answer = |command: &str| match command {
        "query-migrate" => after(migration("cancelled")),
        _ => nothing(),
    };
    with_driver(Duration::from_secs(60), answer, |driver| {
        driver.run().unwrap();
        assert_eq!(driver.signs.qemu.as_deref(), Some("somebody cancelled it in its monitor"));
    });
}

#[test]
fn a_vm_that_somebody_stops_is_not_to_run() {
    let mut events = [json!({ "event": "STOP" }), migration("completed")].into_iter();
    let answer = move |command: &str| match command {
        "query-migrate" => events.next().map_or_else(nothing, after),
        "query-status" => Reply::Return(json!({ "status": "paused", "running": false })),
        _ => nothing(),
    };
    with_driver(Duration::from_secs(60), answer, |driver| {
        driver.run().unwrap();
        assert!(!driver.runs && driver.stopped.is_none());
    });
}
