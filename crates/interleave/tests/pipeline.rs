//! The source's pipeline in many orders of its threads.

use pagewarp_interleave::check::{orders, some_order_fails};
use pagewarp_interleave::control::MigrationControl;
use pagewarp_interleave::error::MigrationError;
use pagewarp_interleave::flow::{Flow, Stopped};
use pagewarp_interleave::source::{Pipeline, Script, Seen};
use pagewarp_interleave::sync::thread::scope;
use pagewarp_interleave::sync::{Arc, Clock, Defect, any, chance};

/// Orders of each test and scheduler.
const ORDERS: usize = 2000;
const SERIALIZERS: usize = 2;
const CONNECTIONS: usize = 2;
/// Batches in each epoch: more than a queue holds.
const BATCHES: u64 = 7;
const EPOCHS: u32 = 2;

/// Sends all epochs.
fn copy(script: &Arc<Script>, flow: &Flow, wait: bool, beside: impl FnOnce() + Send) -> Result<(), Stopped> {
    let pipeline = Pipeline::new(script.clone(), SERIALIZERS, CONNECTIONS);
    scope(|scope| {
        scope.spawn(beside);
        let mut copy = pipeline.start(scope, flow);
        for epoch in 0..EPOCHS {
            for number in 0..BATCHES {
                copy.batch(epoch, u64::from(epoch) * BATCHES + number)?;
            }
            copy.end_epoch()?;
        }
        if wait { copy.wait_for(pipeline.pool()) } else { Ok(()) }
    })
}

fn everything_arrives() {
    let script = Script::new(None, None);
    let flow = Flow::new(MigrationControl::new());
    assert_eq!(copy(&script, &flow, true, || ()), Ok(()));
    assert_eq!(flow.check(), Ok(()));
    let seen = script.seen();
    // Each batch once, each barrier once on each connection, and behind it nothing of its epoch on that connection.
    let mut sent: Vec<_> = seen
        .iter()
        .filter_map(|seen| if let Seen::Sent { number, .. } = seen { Some(*number) } else { None })
        .collect();
    sent.sort_unstable();
    assert_eq!(sent, (0..u64::from(EPOCHS) * BATCHES).collect::<Vec<_>>());
    for connection in 0..CONNECTIONS {
        let mut epoch = 0;
        for seen in &seen {
            match *seen {
                Seen::Barrier { connection: at, epoch: of } if at == connection => {
                    assert_eq!(of, epoch);
                    epoch += 1;
                }
                Seen::Sent { connection: at, epoch: of, .. } if at == connection => assert_eq!(of, epoch),
                _ => {}
            }
        }
        assert_eq!(epoch, EPOCHS);
    }
}

#[test]
fn no_batch_is_lost_and_barriers_hold() {
    orders(ORDERS, Clock::Stands, everything_arrives);
    orders(ORDERS, Clock::Runs, everything_arrives);
}

#[test]
fn it_is_noticed_when_a_queue_does_not_say_that_it_has_ended() {
    assert!(some_order_fails(Defect::SilentEnd, Clock::Stands, everything_arrives));
}

#[test]
fn a_failure_of_any_stage_ends_all_of_them_and_the_first_is_told() {
    orders(ORDERS, Clock::Runs, || {
        let all = u64::from(EPOCHS) * BATCHES;
        let bad = |likely| (!chance(likely)).then(|| any(all as usize) as u64);
        let script = Script::new(bad(3), bad(3));
        let flow = Flow::new(MigrationControl::new());
        let by_peer = chance(3);
        let told = copy(&script, &flow, false, || {
            if by_peer {
                script.note(Seen::Failed("gone".into()));
                flow.fail(MigrationError::Internal("gone".into()));
            }
        });
        let failed: Vec<_> = script
            .seen()
            .into_iter()
            .filter_map(|seen| if let Seen::Failed(why) = seen { Some(why) } else { None })
            .collect();
        if failed.is_empty() {
            assert_eq!((told, flow.check()), (Ok(()), Ok(())));
            return;
        }
        // A connection that breaks waits for the peer's own word, and so may come after others.
        assert_eq!(flow.check(), Err(Stopped));
        let Some(why) = flow.look_at_reason(ToString::to_string) else { panic!("no reason") };
        assert!(failed.iter().any(|failed| why.contains(failed)), "{why} of {failed:?}");
        let later = flow.fail(MigrationError::Internal("later".into()));
        assert_eq!(later, Stopped);
        assert_eq!(flow.take_reason().to_string(), why, "a later failure changes nothing");
    });
}

#[test]
fn after_a_cancel_each_thread_ends_with_what_it_has_in_hand() {
    orders(ORDERS, Clock::Runs, || {
        let script = Script::new(None, None);
        let control = MigrationControl::new();
        let flow = Flow::new(control.clone());
        let told = copy(&script, &flow, true, || {
            control.cancel();
            script.note(Seen::Cancelled);
        });
        let seen = script.seen();
        let at = seen.iter().position(|seen| *seen == Seen::Cancelled).expect("it was cancelled");
        for connection in 0..CONNECTIONS {
            let late = seen[at..]
                .iter()
                .filter(|seen| {
                    matches!(seen, Seen::Sent { connection: at, .. } | Seen::Barrier { connection: at, .. } if *at == connection)
                })
                .count();
            assert!(late <= 1, "{late} things sent after the cancel: {seen:?}");
        }
        // It may have come when everything was done.
        if told.is_err() {
            assert!(matches!(flow.take_reason(), MigrationError::Cancelled));
        } else {
            assert_eq!(flow.check(), Err(Stopped));
        }
    });
}
