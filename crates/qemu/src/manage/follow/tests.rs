use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use pagewarp_codec::CpuBackend;
use pagewarp_engine::transport::TcpConnector;
use serde_json::json;

use super::*;
use crate::bridge::{BridgeConfig, Endpoint};
use crate::manage::blame::Side;

/// A QEMU that answers as told: `answer` gets the name of a command, and says what is sent before its answer, or that there is none.
fn with_driver(
    patience: Duration,
    mut answer: impl FnMut(&str) -> Option<Value> + Send + 'static,
    test: impl FnOnce(&mut Driver<'_>),
) {
    let dir = tempfile::TempDir::new().unwrap();
    let listener = UnixListener::bind(dir.path().join("qmp")).unwrap();
    let served = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let say = |mut stream: &UnixStream, line: &Value| {
            // The client may have had enough.
            let _ = stream.write_all(format!("{line}\n").as_bytes());
        };
        say(&stream, &json!({ "QMP": { "version": { "qemu": { "major": 7, "minor": 2, "micro": 22 } } } }));
        for line in BufReader::new(&stream).lines().map_while(Result::ok) {
            let command: Value = serde_json::from_str(&line).unwrap();
            let name = command["execute"].as_str().unwrap();
            if name == "qmp_capabilities" {
                say(&stream, &json!({ "return": {}, "id": command["id"] }));
            } else if let Some(event) = answer(name) {
                if !event.is_null() {
                    say(&stream, &event);
                }
                say(&stream, &json!({ "return": { "status": "active" }, "id": command["id"] }));
            }
        }
    });
    let connector = TcpConnector { address: ([127, 0, 0, 1], 1).into(), timeout: Duration::from_secs(1) };
    let config = BridgeConfig::new(std::sync::Arc::new(CpuBackend::default()));
    let bridge =
        SourceBridge::bind(Endpoint::Unix(dir.path().join("migration")), &connector, config).unwrap();
    let (_news, incoming) = Incoming::new();
    let control = MigrationControl::new();
    let mut vm = Vm::connect(dir.path().join("qmp"), Duration::from_secs(60)).unwrap();
    test(&mut Driver {
        vm: &mut vm,
        incoming: &incoming,
        control: &control,
        bridge: &bridge,
        bridge_progress: &control,
        started: Instant::now(),
        stopped: None,
        last: None,
        memory_bytes: 0,
        switchover: Switchover::new(300),
        told: 0,
        runs: true,
        postcopy: false,
        signs: Signs::new(Side::Source),
        silent: None,
        patience,
    });
    drop(vm);
    served.join().unwrap();
}

fn migration(status: &str) -> Value {
    json!({ "event": "MIGRATION", "data": { "status": status } })
}

#[test]
fn a_qemu_that_is_silent_for_a_while_is_waited_for() {
    let mut asked = 0;
    let answer = move |command: &str| {
        if command != "query-migrate" {
            return Some(Value::Null);
        }
        asked += 1;
        match asked {
            1 => Some(json!({ "event": "STOP" })),
            2 | 3 => None,
            _ => Some(migration("completed")),
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
        |_| None,
        |driver| {
            let error = driver.run().unwrap_err();
            assert!(matches!(error, ManageError::Qmp(QmpError::TimedOut { .. })), "{error}");
        },
    );
}

#[test]
fn a_migration_that_somebody_else_cancels_has_failed() {
    let answer = |command: &str| match command {
        "query-migrate" => Some(migration("cancelled")),
        _ => Some(Value::Null),
    };
    with_driver(Duration::from_secs(60), answer, |driver| {
        driver.run().unwrap();
        assert_eq!(driver.signs.qemu.as_deref(), Some("somebody cancelled it in its monitor"));
    });
}

#[test]
fn post_copy_is_noticed() {
    let mut events = ["postcopy-active", "failed"].into_iter();
    let answer = move |command: &str| match command {
        "query-migrate" => Some(events.next().map_or(Value::Null, migration)),
        _ => Some(Value::Null),
    };
    with_driver(Duration::from_secs(60), answer, |driver| {
        driver.run().unwrap();
        assert!(driver.postcopy && driver.signs.qemu.is_some());
    });
}
