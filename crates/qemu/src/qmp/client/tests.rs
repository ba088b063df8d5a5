use std::io::BufRead;
use std::io::{BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;

use super::*;

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "x"}, "capabilities": ["oob"]}}"#;
/// Longer than anything takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A monitor that does as told.
struct Fake {
    dir: tempfile::TempDir,
    served: JoinHandle<()>,
}

impl Fake {
    /// `serve` gets the connection after the greeting and the negotiation.
    fn negotiated(serve: impl FnOnce(&mut Peer) + Send + 'static) -> Fake {
        Fake::raw(|peer| {
            peer.say(GREETING);
            let id = peer.hear("qmp_capabilities");
            peer.say(&format!("{{\"return\": {{}}, \"id\": {id}}}"));
            serve(peer);
        })
    }

    fn raw(serve: impl FnOnce(&mut Peer) + Send + 'static) -> Fake {
        let dir = tempfile::TempDir::new().unwrap();
        let listener = UnixListener::bind(dir.path().join("qmp")).unwrap();
        let served = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            serve(&mut Peer(BufReader::new(stream)));
        });
        Fake { dir, served }
    }

    fn connect(&self, timeout: Duration) -> Result<Qmp, QmpError> {
        Qmp::connect(self.dir.path().join("qmp"), timeout)
    }

    /// Connects, runs `test` and sees that the monitor got through.
    fn with(self, test: impl FnOnce(&mut Qmp)) {
        let mut qmp = self.connect(PATIENCE).unwrap();
        test(&mut qmp);
        drop(qmp);
        self.served.join().unwrap();
    }
}

struct Peer(BufReader<UnixStream>);

impl Peer {
    fn say(&mut self, line: &str) {
        self.bytes(format!("{line}\r\n").as_bytes());
    }

    fn bytes(&mut self, bytes: &[u8]) {
        // The client may have had enough.
        let _ = self.0.get_mut().write_all(bytes);
    }

    /// The id of the next command, which must be `command`.
    fn hear(&mut self, command: &str) -> u64 {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        let line: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(line["execute"], command);
        line["id"].as_u64().unwrap()
    }

    fn wait_for_end(&mut self) {
        let _ = std::io::copy(&mut self.0, &mut std::io::sink());
    }
}

#[test]
fn a_qemu_that_never_stops_talking_does_not_keep_a_command_waiting() {
    let fake = Fake::negotiated(|peer| {
        peer.hear("query-status");
        let events = "{\"event\": \"NOTHING_NEW\"}\r\n".repeat(1000);
        while peer.0.get_mut().write_all(events.as_bytes()).is_ok() {}
    });
    fake.with(|qmp| {
        qmp.set_timeout(Duration::from_millis(50));
        let answer = qmp.execute("query-status", Value::Null);
        assert!(matches!(answer, Err(QmpError::TimedOut { .. })), "{answer:?}");
        assert!(qmp.events.len() <= MAX_EVENTS);
    });
}

#[test]
fn answers_are_matched_and_events_kept() {
    let fake = Fake::negotiated(|peer| {
        let id = peer.hear("query-status");
        peer.say(r#"{"timestamp": {"seconds": 1795665993, "microseconds": 229674}, "event": "STOP"}"#);
        peer.say(r#"{"return": "of another", "id": 77}"#);
        peer.say(r#"{"error": {"class": "GenericError", "desc": "of another"}, "id": 77}"#);
        peer.say("");
        peer.say(r#"{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "MIGRATION", "data": {"status": "active"}}"#);
        peer.say(&format!("{{\"return\": {{\"running\": true}}, \"id\": {id}}}"));
        peer.say(r#"{"event": "RESUME"}"#);
        let id = peer.hear("migrate");
        peer.say(&format!("{{\"error\": {{\"class\": \"GenericError\", \"desc\": \"no\"}}, \"id\": {id}}}"));
        peer.hear("stop");
        // As QEMU does where it could not read the command.
        peer.say(r#"{"error": {"class": "GenericError", "desc": "JSON parse error"}}"#);
    });
    fake.with(|qmp| {
        assert_eq!(qmp.version(), Version { major: 7, minor: 2, micro: 22 });
        assert_eq!(qmp.execute("query-status", Value::Null).unwrap()["running"], true);
        let stop = qmp.next_event(Duration::ZERO).unwrap().unwrap();
        assert_eq!(stop.name, "STOP");
        let since = stop.at.unwrap().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(since, Duration::new(1_795_665_993, 229_674_000));
        let active = qmp.next_event(Duration::ZERO).unwrap().unwrap();
        assert_eq!((active.migration_status(), active.at), (Some("active"), None));
        assert_eq!(qmp.next_event(PATIENCE).unwrap().unwrap().name, "RESUME");
        let refused = qmp.execute("migrate", json!({ "uri": "unix:/x" })).unwrap_err();
        assert_eq!(refused.to_string(), "QEMU refused `migrate`: no (GenericError)");
        assert!(matches!(qmp.execute("stop", Value::Null), Err(QmpError::Refused { desc, .. }) if desc == "JSON parse error"));
        assert!(matches!(qmp.next_event(PATIENCE), Err(QmpError::Gone { .. })));
    });
}

#[test]
fn a_late_answer_is_of_no_other_command() {
    let fake = Fake::negotiated(|peer| {
        let late = peer.hear("one");
        let id = peer.hear("two");
        peer.say(&format!("{{\"return\": 1, \"id\": {late}}}"));
        peer.say(&format!("{{\"return\": 2, \"id\": {id}}}"));
    });
    fake.with(|qmp| {
        qmp.set_timeout(Duration::from_millis(5));
        assert!(matches!(qmp.execute("one", Value::Null), Err(QmpError::TimedOut { .. })));
        assert_eq!(qmp.next_event(Duration::from_millis(1)).unwrap(), None);
        qmp.set_timeout(PATIENCE);
        assert_eq!(qmp.execute("two", Value::Null).unwrap(), 2);
    });
}

#[test]
fn no_socket_and_no_greeting_are_told_apart() {
    let dir = tempfile::TempDir::new().unwrap();
    let path = dir.path().join("qmp");
    assert!(matches!(Qmp::connect(&path, PATIENCE), Err(QmpError::Connect { .. })));
    assert!(matches!(Qmp::connect("x".repeat(4096), PATIENCE), Err(QmpError::Connect { .. })));

    // A listener that accepts nobody: the first clients wait for the greeting, later ones for room in the queue.
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&socket, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    rustix::net::listen(&socket, 1).unwrap();
    let _waiting: Vec<UnixStream> = (0..2).map(|_| UnixStream::connect(&path).unwrap()).collect();
    let busy = Qmp::connect(&path, Duration::from_millis(30)).unwrap_err();
    assert!(matches!(busy, QmpError::Busy { .. }), "{busy}");
    drop(socket);
    assert!(matches!(Qmp::connect(&path, PATIENCE), Err(QmpError::Connect { .. })));

    let silent = Fake::raw(Peer::wait_for_end);
    let busy = silent.connect(Duration::from_millis(30)).unwrap_err();
    assert!(busy.to_string().contains("one client at a time"), "{busy}");
}

#[test]
fn what_is_no_monitor_is_told_apart() {
    for greeting in
        ["QEMU 7.2.22 monitor - type 'help' for more information", "{\"return\": {}}", "[1]", "\u{0}"]
    {
        let fake = Fake::raw(move |peer| {
            peer.say(greeting);
            peer.wait_for_end();
        });
        let error = fake.connect(PATIENCE).unwrap_err();
        assert!(matches!(error, QmpError::NotQmp { .. }), "{error}");
    }
}

#[test]
fn malformed_answers_are_errors() {
    let cases: [&[u8]; 6] = [
        b"\xff\xfe\n",
        b"{\"return\": {}, \"id\"\n",
        b"{} {}\n",
        &[b'['; 100_000],
        b"{\"return\": \"\xc3\x28\"}\n",
        b"nonsense\n",
    ];
    for bytes in cases {
        let fake = Fake::negotiated(move |peer| {
            peer.hear("query-status");
            peer.bytes(bytes);
            peer.bytes(b"\n");
        });
        fake.with(|qmp| {
            let error = qmp.execute("query-status", Value::Null).unwrap_err();
            assert!(matches!(error, QmpError::BadJson { .. }), "{error}");
        });
    }
}

#[test]
fn a_line_without_end_is_given_up() {
    let fake = Fake::negotiated(|peer| {
        peer.hear("query-status");
        for _ in 0..=MAX_LINE >> 20 {
            peer.bytes(&vec![b' '; 1 << 20]);
        }
    });
    fake.with(|qmp| {
        assert!(matches!(qmp.execute("query-status", Value::Null), Err(QmpError::LineTooLong)));
    });
}

#[test]
fn an_end_amid_a_line_is_an_end() {
    let fake = Fake::negotiated(|peer| {
        peer.hear("query-status");
        peer.bytes(b"{\"return\": {}, ");
    });
    fake.with(|qmp| {
        assert!(matches!(qmp.execute("query-status", Value::Null), Err(QmpError::Gone { .. })));
        assert!(matches!(qmp.execute("stop", Value::Null), Err(QmpError::Gone { .. })));
    });
}

#[test]
fn what_came_is_read_without_waiting() {
    let fake = Fake::negotiated(|peer| {
        peer.say(r#"{"event": "STOP"}"#);
        peer.wait_for_end();
    });
    fake.with(|qmp| {
        let deadline = Instant::now() + PATIENCE;
        let event = loop {
            if let Some(event) = qmp.next_event(Duration::ZERO).unwrap() {
                break event;
            }
            assert!(Instant::now() < deadline, "the event is never seen");
            thread::yield_now();
        };
        assert_eq!(event.name, "STOP");
        assert_eq!(qmp.next_event(Duration::ZERO).unwrap(), None);
    });
}

#[test]
fn a_descriptor_comes_with_its_command_and_with_no_other() {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let fake = Fake::negotiated(move |peer| {
        let mut received = Vec::new();
        for command in ["getfd", "query-status"] {
            let mut bytes = [0; 4096];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut ancillary = rustix::net::RecvAncillaryBuffer::new(&mut space);
            let mut pieces = [io::IoSliceMut::new(&mut bytes)];
            let stream = peer.0.get_ref();
            let got =
                rustix::net::recvmsg(stream, &mut pieces, &mut ancillary, RecvFlags::CMSG_CLOEXEC).unwrap();
            let line: Value = serde_json::from_slice(&bytes[..got.bytes]).unwrap();
            assert_eq!(line["execute"], command);
            for message in ancillary.drain() {
                if let rustix::net::RecvAncillaryMessage::ScmRights(descriptors) = message {
                    received.extend(descriptors);
                }
            }
            assert_eq!(received.len(), 1, "after `{command}`");
            peer.say(&format!("{{\"return\": {{}}, \"id\": {}}}", line["id"]));
        }
        UnixStream::from(received.pop().unwrap()).write_all(b"x").unwrap();
    });
    fake.with(|qmp| {
        qmp.execute_with("getfd", json!({ "fdname": "pagewarp" }), theirs.as_fd()).unwrap();
        qmp.execute("query-status", Value::Null).unwrap();
    });
    drop(theirs);
    let mut said = Vec::new();
    ours.read_to_end(&mut said).unwrap();
    assert_eq!(said, b"x");
}
