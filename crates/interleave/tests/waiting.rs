//! The pieces that stages wait with, one by one, in many orders of threads.

use std::io::{self, Read, Write};
use std::time::Duration;

use pagewarp_interleave::bridge::{Memory, Order, Outbox};
use pagewarp_interleave::check::{orders, some_order_fails};
use pagewarp_interleave::control::MigrationControl;
use pagewarp_interleave::destination::Gate;
use pagewarp_interleave::error::MigrationError;
use pagewarp_interleave::flow::{Flow, MeetingPoint, Outstanding, Stopped, lock};
use pagewarp_interleave::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use pagewarp_interleave::sync::thread::scope;
use pagewarp_interleave::sync::{Arc, Clock, Condvar, Defect, Mutex, any, chance};
use pagewarp_interleave::transport::Stream;

const ORDERS: usize = 3000;

fn flow() -> Flow {
    Flow::new(MigrationControl::new())
}

fn three_meet_twice() {
    let (flow, point, rounds) = (flow(), MeetingPoint::new(3), AtomicU64::new(0));
    scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for round in 0..2 {
                    let before = rounds.fetch_add(1, SeqCst);
                    assert!((3 * round..3 * round + 3).contains(&before), "one is a round ahead");
                    point.meet(&flow).expect("nobody stops it");
                }
            });
        }
    });
}

#[test]
fn threads_meet_and_nobody_gets_ahead() {
    orders(ORDERS, Clock::Stands, three_meet_twice);
    orders(ORDERS, Clock::Runs, three_meet_twice);
}

#[test]
fn it_is_noticed_when_one_is_woken_instead_of_all() {
    assert!(some_order_fails(Defect::WakesOne, Clock::Stands, three_meet_twice));
}

/// A meeting point as one would write it at first: without the number of the round.
struct Careless {
    here: Mutex<usize>,
    met: Condvar,
}

impl Careless {
    fn meet(&self, flow: &Flow) -> Result<(), Stopped> {
        {
            let mut here = lock(&self.here);
            *here += 1;
            if *here == 2 {
                *here = 0;
                self.met.notify_all();
                return Ok(());
            }
        }
        flow.wait(&self.here, &self.met, |here| *here == 0).map(drop)
    }
}

#[test]
fn it_is_noticed_when_a_meeting_point_does_not_count_rounds() {
    assert!(some_order_fails(Defect::None, Clock::Stands, || {
        let (flow, point) = (flow(), Careless { here: Mutex::new(0), met: Condvar::new() });
        scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| (0..2).try_for_each(|_| point.meet(&flow)));
            }
        });
    }));
}

#[test]
fn work_that_is_under_way_is_waited_for() {
    orders(ORDERS, Clock::Stands, || {
        let (flow, outstanding, done) = (flow(), Outstanding::default(), AtomicU64::new(0));
        scope(|scope| {
            for _ in 0..3 {
                outstanding.add();
                scope.spawn(|| {
                    done.fetch_add(1, SeqCst);
                    outstanding.done();
                });
            }
            outstanding.wait_for_none(&flow).expect("nobody stops it");
            assert_eq!(done.load(SeqCst), 3);
        });
    });
}

/// Two connections, whose batches two threads restore, and two epochs.
fn epochs_stay_apart() {
    let (flow, gate) = (flow(), Gate::new(2, 8));
    let (restored, arrived) = (AtomicU64::new(0), AtomicU64::new(0));
    scope(|scope| {
        for connection in 0..2 {
            let (flow, gate, restored, arrived) = (&flow, &gate, &restored, &arrived);
            scope.spawn(move || {
                for epoch in 0..2 {
                    for batch in 0..2 {
                        gate.wait_announced(flow).expect("nobody stops it");
                        // Whoever comes first into an epoch finds all of the one before in memory.
                        assert!(
                            restored.load(SeqCst) >= 4 * epoch,
                            "a batch of the next epoch is let in too early"
                        );
                        gate.enter(2 * connection + batch).expect("each page once in an epoch");
                        arrived.fetch_add(1, SeqCst);
                        scope.spawn(move || {
                            restored.fetch_add(1, SeqCst);
                            gate.restored();
                        });
                    }
                    gate.wait_announced(flow).expect("nobody stops it");
                    if gate.pass(flow).expect("nobody stops it") {
                        assert_eq!(restored.load(SeqCst), 4 * (epoch + 1));
                        gate.open();
                    }
                }
            });
        }
        gate.announce(0);
        gate.announce(1);
        assert_eq!(gate.close(1, &flow), Ok(true));
        assert_eq!((arrived.load(SeqCst), restored.load(SeqCst)), (8, 8));
    });
}

#[test]
fn the_gate_keeps_epochs_apart() {
    orders(ORDERS, Clock::Stands, epochs_stay_apart);
}

#[test]
fn it_is_noticed_when_the_gate_wakes_one_instead_of_all() {
    assert!(some_order_fails(Defect::WakesOne, Clock::Stands, epochs_stay_apart));
}

#[test]
fn it_is_either_committed_or_cancelled() {
    orders(ORDERS, Clock::Runs, || {
        let control = MigrationControl::new();
        let (flow, committed, failed) =
            (Flow::new(control.clone()), AtomicBool::new(false), AtomicBool::new(false));
        scope(|scope| {
            scope.spawn(|| control.cancel());
            scope.spawn(|| committed.store(flow.commit().is_ok(), SeqCst));
            scope.spawn(|| failed.store(flow.check().is_err(), SeqCst));
        });
        if committed.load(SeqCst) {
            assert!(!failed.load(SeqCst), "stopped, and committed");
            assert_eq!(flow.check(), Ok(()));
        } else {
            assert_eq!(flow.check(), Err(Stopped));
            assert!(matches!(flow.take_reason(), MigrationError::Cancelled));
        }
    });
}

#[test]
fn of_two_failures_one_is_told_and_later_ones_are_not() {
    orders(ORDERS, Clock::Runs, || {
        let flow = flow();
        let is_first = AtomicBool::new(false);
        scope(|scope| {
            scope.spawn(|| {
                flow.fail(MigrationError::Internal("one".into()));
                is_first
                    .store(flow.look_at_reason(|why| why.to_string().contains("one")) == Some(true), SeqCst);
            });
            scope.spawn(|| flow.stop_threads(MigrationError::Internal("two".into())));
        });
        flow.fail(MigrationError::Internal("three".into()));
        let why = flow.take_reason().to_string();
        assert_eq!(why.contains("one"), is_first.load(SeqCst), "{why}");
        assert!(!why.contains("three"));
    });
}

/// A connection that notes that it was shut down.
struct Line(Arc<AtomicBool>);

impl Read for Line {
    fn read(&mut self, _bytes: &mut [u8]) -> io::Result<usize> {
        Ok(0)
    }
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for Line {
    fn try_clone_stream(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(Line(self.0.clone())))
    }

    fn shutdown(&self) -> io::Result<()> {
        self.0.store(true, SeqCst);
        Ok(())
    }

    fn set_timeouts(&self, _read: Option<Duration>, _write: Option<Duration>) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn no_connection_is_left_open_by_a_failure() {
    orders(ORDERS, Clock::Runs, || {
        let flow = flow();
        let lines: Vec<_> = (0..3).map(|_| Arc::new(AtomicBool::new(false))).collect();
        scope(|scope| {
            for line in &lines {
                scope.spawn(|| flow.register(Box::new(Line(line.clone()))));
            }
            scope.spawn(|| flow.fail(MigrationError::Internal("gone".into())));
        });
        assert!(lines.iter().all(|line| line.load(SeqCst)));
    });
}

#[test]
fn the_outbox_gives_everything_in_order() {
    orders(ORDERS, Clock::Stands, || {
        let (flow, outbox) = (flow(), Outbox::default());
        scope(|scope| {
            for thread in 0..2 {
                let outbox = &outbox;
                scope.spawn(move || {
                    for number in [4, 2, 0] {
                        outbox.put(number + thread, 10 + number + thread);
                    }
                });
            }
            scope.spawn(|| outbox.end(6));
            let mut taken = Vec::new();
            while let Some(item) = outbox.take(&flow).expect("nobody stops it") {
                taken.push(item);
            }
            assert_eq!(taken, (10..16).collect::<Vec<_>>());
        });
    });
}

#[test]
fn nobody_waits_for_an_outbox_that_is_stopped() {
    orders(ORDERS, Clock::Runs, || {
        let (flow, outbox) = (flow(), Outbox::default());
        scope(|scope| {
            scope.spawn(|| outbox.put(0, 7));
            scope.spawn(|| flow.fail(MigrationError::Internal("gone".into())));
            // What is there may still be taken, once.
            let taken: Vec<_> = (0..3).map(|_| outbox.take(&flow)).collect();
            assert!(taken.iter().all(|taken| matches!(taken, Ok(Some(7)) | Err(Stopped))));
            assert!(taken.iter().filter(|taken| taken.is_ok()).count() <= 1, "{taken:?}");
        });
    });
}

#[test]
fn segments_wait_for_those_before_them_and_for_nothing_else() {
    orders(ORDERS, Clock::Stands, || {
        let (flow, order, done) = (flow(), Order::default(), AtomicU64::new(0));
        scope(|scope| {
            // Finished in any order.
            for segment in 0..3 {
                let (order, done) = (&order, &done);
                scope.spawn(move || {
                    done.fetch_add(1, SeqCst);
                    order.done(1, segment);
                });
            }
            // Each connection waits for the other.
            scope.spawn(|| {
                order.wait(1, 2, &flow).expect("nobody stops it");
                assert_eq!(done.load(SeqCst), 3);
                order.done(2, 0);
            });
            order.wait(2, 0, &flow).expect("nobody stops it");
        });
    });
}

#[test]
fn memory_is_bounded_and_everybody_gets_some() {
    const MIB: usize = 1 << 20;
    orders(ORDERS, Clock::Stands, || {
        let (flow, memory, held) = (flow(), Memory::default(), AtomicU64::new(0));
        scope(|scope| {
            for connection in 0..3 {
                let (flow, memory, held) = (&flow, &memory, &held);
                scope.spawn(move || {
                    for _ in 0..3 {
                        let bytes = if chance(2) { 60 * MIB } else { (1 + any(40)) * MIB };
                        memory.hold(connection, bytes, flow).expect("nobody stops it");
                        let all = held.fetch_add(bytes as u64, SeqCst) as usize + bytes;
                        assert!(all <= (128 + 2 * 60) * MIB, "{all} bytes are held");
                        held.fetch_sub(bytes as u64, SeqCst);
                        memory.release(connection, bytes);
                    }
                });
            }
        });
    });
}
