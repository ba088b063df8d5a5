use std::net::{TcpListener, TcpStream};

use serde_json::json;

use super::*;
use crate::bridge::link::{Receiving, Sending};
use crate::manage::fake::{Reply, with_monitor};
use crate::manage::link::News;

/// A source whose QEMU has completed the migration.
fn completed() -> SourceState {
    let mut state = SourceState::new(false);
    state.on_send(&Message::Prepare(Default::default())).unwrap();
    assert_eq!(state.on_receive(&Message::Prepared), Heard::Due);
    state.on_completed();
    state
}

/// Commits with this news before it and after it. Returns what came of it, and whether the destination got it.
fn committed(
    cancelled: bool,
    before: Option<News>,
    after: Option<News>,
) -> (Result<Running, ManageError>, bool) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (there, _) = listener.accept().unwrap();
    let control = MigrationControl::new();
    if cancelled {
        control.cancel();
    }
    let (news, incoming) = Incoming::new();
    before.into_iter().for_each(|before| news.send(before).unwrap());
    let told = std::thread::spawn(move || {
        let mut body = Vec::new();
        let header = Receiving::new(Box::new(there), "the source".into()).receive(&mut body).unwrap();
        let told = header.map(|_| Message::decode(&body).unwrap());
        after.into_iter().for_each(|after| news.send(after).unwrap());
        // Without this it would hang up.
        (told == Some(Message::Commit { run: false }), news)
    });
    let mut outgoing = Outgoing::new(Sending::new(Box::new(stream), "the destination".into()));
    let qmp = Path::new("/run/vm/qmp");
    let mut state = completed();
    let result =
        commit(&mut state, &mut outgoing, &incoming, false, qmp, &control, Duration::from_millis(500));
    let duty = match &result {
        Ok(_) => SourceDuty::Release,
        Err(ManageError::InDoubt { .. }) => SourceDuty::KeepPaused,
        Err(_) => SourceDuty::Resume,
    };
    assert_eq!(state.give_up(), duty);
    drop(outgoing);
    (result, told.join().unwrap().0)
}

fn failed(reason: &str) -> Option<News> {
    Some(Ok(Message::Failed { reason: reason.into() }))
}

fn cut() -> Option<News> {
    let source = std::io::ErrorKind::ConnectionReset.into();
    Some(Err(MigrationError::Link { peer: "x".into(), doing: "y".into(), source }))
}

#[test]
fn nothing_is_given_away_after_a_cancel_or_bad_news() {
    for (cancelled, before) in [(true, None), (false, failed("no")), (false, cut())] {
        let (result, told) = committed(cancelled, before, None);
        assert!(matches!(result, Err(ManageError::Migration(_))), "{result:?}");
        assert!(!told, "the destination may run it");
    }
}

#[test]
fn whatever_comes_after_the_commit_but_a_confirmation_is_a_doubt() {
    for after in [failed("no"), cut(), Some(Ok(Message::Prepared)), None] {
        let (result, told) = committed(false, None, after);
        assert!(matches!(result, Err(ManageError::InDoubt { .. })), "{result:?}");
        assert!(told);
    }
    let running = Running { resumed_at_us: Some(7) };
    let (result, told) = committed(false, None, Some(Ok(Message::Running(running))));
    assert_eq!(result.unwrap(), running);
    assert!(told);
}

/// Resumes a VM in this state, where `cont` is refused so often; the state it is in then.
fn resumed(state: &'static str, mut refusals: u32) -> (Result<(), QmpError>, String) {
    let (to, names) = std::sync::mpsc::channel();
    let mut now = state;
    let reply = move |command: &str| match command {
        "query-status" => Reply::Return(json!({ "status": now, "running": now == "running" })),
        "cont" if refusals > 0 => {
            refusals -= 1;
            Reply::Refused
        }
        _ => {
            now = "running";
            to.send(now).unwrap();
            Reply::Return(json!({}))
        }
    };
    let mut result = Ok(());
    with_monitor(reply, |vm| result = resume(vm, Duration::from_millis(700)));
    (result, names.try_iter().last().unwrap_or(state).to_owned())
}

#[test]
fn what_the_migration_paused_goes_on_though_not_at_once() {
    for state in ["postmigrate", "finish-migrate"] {
        let (result, now) = resumed(state, 2);
        assert!(result.is_ok() && now == "running", "{state}: {result:?}, {now}");
        let (result, now) = resumed(state, u32::MAX);
        assert!(
            matches!(result, Err(QmpError::Refused { .. })) && now == state,
            "{state}: {result:?}, {now}"
        );
    }
}

#[test]
fn what_somebody_else_did_is_left_as_it_is() {
    for state in ["running", "paused", "shutdown", "guest-panicked"] {
        let (result, now) = resumed(state, 0);
        assert!(result.is_ok() && now == state, "{state}: {result:?}, {now}");
    }
}

#[test]
fn a_vm_that_was_paused_or_is_in_doubt_is_not_touched() {
    with_monitor(
        |command| match command {
            "query-status" => Reply::Return(json!({ "status": "paused", "running": false })),
            _ => panic!("asked to {command}"),
        },
        |vm| {
            let error =
                keep_running(vm, SourceDuty::Resume, false, Path::new("x"), MigrationError::Cancelled.into());
            assert!(matches!(error, ManageError::Migration(MigrationError::Cancelled)));
            let error = ManageError::InDoubt { reason: "x".into(), qmp: "y".into() };
            let error = keep_running(vm, SourceDuty::KeepPaused, true, Path::new("x"), error);
            assert!(matches!(error, ManageError::InDoubt { .. }));
        },
    );
}
