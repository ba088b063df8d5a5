//! A monitor for tests.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::qmp::Vm;

/// What becomes of a command.
pub(super) enum Reply {
    /// It returns this.
    Return(Value),
    /// It returns this, after an event.
    After(Value, Value),
    Refused,
    /// Nothing comes.
    Silence,
}

/// Runs `test` on a monitor that answers as told: `reply` gets the names of commands. QEMU is of version 7.2, and ends when the test does.
pub(super) fn with_monitor(
    mut reply: impl FnMut(&str) -> Reply + Send + 'static,
    test: impl FnOnce(&mut Vm),
) {
    let dir = TempDir::new().unwrap();
    let listener = UnixListener::bind(dir.path().join("qmp")).unwrap();
    let served: JoinHandle<()> = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let say = |line: &Value| {
            // The client may have had enough.
            let mut stream: &UnixStream = &stream;
            let _ = stream.write_all(format!("{line}\n").as_bytes());
        };
        say(&json!({ "QMP": { "version": { "qemu": { "major": 7, "minor": 2, "micro": 22 } } } }));
        for line in BufReader::new(&stream).lines().map_while(Result::ok) {
            let command: Value = serde_json::from_str(&line).unwrap();
            let id = &command["id"];
            let reply = match command["execute"].as_str().unwrap() {
                "qmp_capabilities" => Reply::Return(json!({})),
                name => reply(name),
            };
            match reply {
                Reply::Return(value) => say(&json!({ "return": value, "id": id })),
                Reply::After(event, value) => {
                    say(&event);
                    say(&json!({ "return": value, "id": id }));
                }
                Reply::Refused => {
                    say(&json!({ "error": { "class": "GenericError", "desc": "no" }, "id": id }));
                }
                Reply::Silence => {}
            }
        }
    });
    let mut vm = Vm::connect(dir.path().join("qmp"), Duration::from_secs(60)).unwrap();
    test(&mut vm);
    drop(vm);
    served.join().unwrap();
}
