//! Both ends and the channel between them, explored exhaustively: every order of sends, deliveries, refusals, cuts of the
//! connection and crashes. Never two, never none: the VM runs at one end, or nowhere and somebody knows.

mod support;

use std::collections::{HashSet, VecDeque};

use pagewarp_wire::{
    Accept, Ack, DestinationPhase, DestinationState, ErrorCode, Hello, Message, Offer, Outcome, Region, Role,
    SourcePhase, SourceState,
};

/// Messages under way in one direction, at most. Two let every pair of neighbours be under way at once.
const UNDER_WAY: usize = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Host {
    /// Sends and receives.
    Up,
    /// Has noticed that the connection is gone, or has ended the migration; its VM may run.
    Over,
    /// Dead, and its VM with it.
    Crashed,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    source: SourceState,
    destination: DestinationState,
    source_host: Host,
    destination_host: Host,
    /// What was sent to the destination and has not been read.
    to_destination: VecDeque<Message>,
    to_source: VecDeque<Message>,
    connected: bool,
    runs_on_source: bool,
    runs_on_destination: bool,
    commit_sent: bool,
    epochs_begun: u32,
    start_failed: bool,
}

impl World {
    fn new() -> World {
        World {
            source: SourceState::new(),
            destination: DestinationState::new(),
            source_host: Host::Up,
            destination_host: Host::Up,
            to_destination: VecDeque::new(),
            to_source: VecDeque::new(),
            connected: true,
            runs_on_source: true,
            runs_on_destination: false,
            commit_sent: false,
            epochs_begun: 0,
            start_failed: false,
        }
    }

    /// Everything that can happen next.
    fn next(&self, verify: bool) -> Vec<World> {
        let mut next = Vec::new();
        self.source_sends(verify, &mut next);
        self.destination_sends(&mut next);
        self.deliveries(&mut next);
        self.failures(&mut next);
        next.iter_mut().for_each(World::settle);
        next
    }

    fn source_sends(&self, verify: bool, next: &mut Vec<World>) {
        if self.source_host != Host::Up || self.to_destination.len() == UNDER_WAY {
            return;
        }
        for message in source_messages(verify) {
            let mut world = self.clone();
            if world.source.on_send(&message).is_err() {
                continue;
            }
            match message {
                // The VM is paused before its state is taken.
                Message::StateEnd { .. } => world.runs_on_source = false,
                Message::Commit => world.commit_sent = true,
                Message::EpochStart { .. } => world.epochs_begun += 1,
                _ => {}
            }
            // What is sent into a cut connection is lost without the sender knowing.
            if world.connected {
                world.to_destination.push_back(message);
            }
            next.push(world);
        }
    }

    fn destination_sends(&self, next: &mut Vec<World>) {
        if self.destination_host != Host::Up || self.to_source.len() == UNDER_WAY {
            return;
        }
        for message in destination_messages() {
            let mut world = self.clone();
            match message {
                // The batches and barriers of an epoch come after the source has begun it.
                Message::EpochDone { epoch } if epoch >= self.epochs_begun => continue,
                Message::Running { .. } if !self.runs_on_destination => continue,
                // An error with the right to run in hand says that the VM does not start.
                Message::Error { .. } if self.destination.phase() == DestinationPhase::Committed => {
                    if self.runs_on_destination {
                        continue;
                    }
                    world.start_failed = true;
                }
                _ => {}
            }
            if world.destination.on_send(&message).is_err() {
                continue;
            }
            if world.connected {
                world.to_source.push_back(message);
            }
            next.push(world);
        }
    }

    fn deliveries(&self, next: &mut Vec<World>) {
        if self.destination_host == Host::Up && !self.to_destination.is_empty() {
            let mut world = self.clone();
            let message = world.to_destination.pop_front().unwrap();
            world
                .destination
                .on_receive(&message)
                .unwrap_or_else(|e| panic!("honest ends disagree: {e}\n{self:#?}"));
            next.push(world);
        }
        if self.source_host == Host::Up && !self.to_source.is_empty() {
            let mut world = self.clone();
            let message = world.to_source.pop_front().unwrap();
            world
                .source
                .on_receive(&message)
                .unwrap_or_else(|e| panic!("honest ends disagree: {e}\n{self:#?}"));
            next.push(world);
        }
    }

    fn failures(&self, next: &mut Vec<World>) {
        if self.connected {
            next.push(World { connected: false, ..self.clone() });
        }
        // A VM that was handed over starts or does not, whatever has become of the connection.
        if self.destination_host != Host::Crashed
            && self.destination.phase() == DestinationPhase::Committed
            && !self.runs_on_destination
        {
            assert!(self.destination.may_run());
            next.push(World { runs_on_destination: true, ..self.clone() });
            let mut world = self.clone();
            world.destination.on_start_failed();
            world.start_failed = true;
            next.push(world);
        }
        if self.source_host != Host::Crashed {
            let mut world = self.clone();
            (world.source_host, world.connected, world.runs_on_source) = (Host::Crashed, false, false);
            world.to_source.clear();
            next.push(world);
            if !self.connected && self.source_host == Host::Up {
                // What had arrived may be lost with the connection, or be read before: both are explored.
                let mut world = self.clone();
                world.source.on_connection_lost();
                next.push(world);
            }
        }
        if self.destination_host != Host::Crashed {
            let mut world = self.clone();
            (world.destination_host, world.connected, world.runs_on_destination) =
                (Host::Crashed, false, false);
            world.to_destination.clear();
            next.push(world);
            if !self.connected && self.destination_host == Host::Up {
                let mut world = self.clone();
                world.destination.on_connection_lost();
                world.destination_host = Host::Over;
                world.to_destination.clear();
                next.push(world);
            }
        }
    }

    /// What an end does by itself once its migration is over: it reads nothing more, and the source resumes what is its own.
    fn settle(&mut self) {
        let over =
            matches!(self.source.phase(), SourcePhase::Done | SourcePhase::Failed | SourcePhase::InDoubt);
        if over && self.source_host == Host::Up {
            self.source_host = Host::Over;
            self.connected = false;
            self.to_source.clear();
            if self.source.may_run() {
                self.runs_on_source = true;
            }
        }
        let over = matches!(self.destination.phase(), DestinationPhase::Done | DestinationPhase::Failed);
        if over && self.destination_host == Host::Up {
            self.destination_host = Host::Over;
            self.connected = false;
            self.to_destination.clear();
        }
    }

    fn check(&self) {
        let checks = [
            ("two VMs run", !self.runs_on_source || !self.runs_on_destination),
            ("the source runs what it gave away", !self.runs_on_source || !self.commit_sent),
            ("the destination runs what it was not given", !self.runs_on_destination || self.commit_sent),
            (
                "the destination holds a right that nobody gave",
                !self.destination.may_run() || self.commit_sent,
            ),
            ("the source does not know what it gave away", self.source.may_run() != self.commit_sent),
        ];
        for (wrong, holds) in checks {
            assert!(holds, "{wrong}: {self:#?}");
        }
    }

    /// What must hold when nothing more can happen on hosts that are alive.
    fn check_end(&self) {
        let alive = self.source_host != Host::Crashed && self.destination_host != Host::Crashed;
        let running = u32::from(self.runs_on_source) + u32::from(self.runs_on_destination);
        let told = self.source.outcome() == Outcome::InDoubt;
        assert!(!alive || running == 1 || told, "the VM is gone and nobody knows: {self:#?}");
        if alive && running == 0 {
            let lost = self.destination.outcome() == Outcome::NeverCommitted;
            assert!(lost || self.start_failed, "a VM that could run does not: {self:#?}");
        }
        if alive && self.source.outcome() == Outcome::VmRunsOnDestination {
            assert!(self.runs_on_destination);
        }
    }
}

/// One batch of this epoch did not decode.
fn damaged(epoch: u32) -> Message {
    Message::Damaged { epoch, region: 0, pages: vec![0], reason: String::new() }
}

fn source_messages(verify: bool) -> Vec<Message> {
    let regions = vec![Region { id: 0, name: "ram".into(), pages: 1 }];
    vec![
        Message::Hello(Hello::new(Role::Control, support::SESSION)),
        Message::Offer(Offer { regions, verify, ..support::offer() }),
        Message::EpochStart { epoch: 0, pages: 1 },
        Message::EpochStart { epoch: 1, pages: 1 },
        Message::EpochStart { epoch: 2, pages: 1 },
        Message::StateEnd { len: 0, xxh3: 1 },
        Message::Prepare { epoch: 0, state_len: 0, state_hash: 1 },
        Message::Prepare { epoch: 1, state_len: 0, state_hash: 1 },
        Message::Prepare { epoch: 2, state_len: 0, state_hash: 1 },
        Message::Commit,
        Message::Bye,
        Message::Cancel { reason: String::new() },
        Message::Error { code: ErrorCode::Vm, message: String::new() },
    ]
}

fn destination_messages() -> Vec<Message> {
    vec![
        Message::HelloAck { version: 1 },
        Message::Accept(Accept { ..support::accept() }),
        Message::EpochDone { epoch: 0 },
        Message::EpochDone { epoch: 1 },
        Message::EpochDone { epoch: 2 },
        damaged(0),
        damaged(1),
        Message::Ack(Ack { batches: 1, wire_bytes: 1, pages: 1 }),
        Message::Ready,
        Message::Running { report: Vec::new() },
        Message::Digests { region: 0, first_page: 0, digests: vec![1] },
        Message::DigestsEnd,
        Message::Error { code: ErrorCode::Vm, message: String::new() },
    ]
}

/// Visits every world that can come about and returns those in which nothing more happens but crashes.
fn explore(verify: bool) -> (usize, Vec<World>) {
    let mut seen = HashSet::from([World::new()]);
    let mut todo = vec![World::new()];
    let mut ends = Vec::new();
    while let Some(world) = todo.pop() {
        world.check();
        let next = world.next(verify);
        let crashed = |w: &World| (w.source_host == Host::Crashed, w.destination_host == Host::Crashed);
        if next.iter().all(|after| crashed(after) != crashed(&world) || *after == world) {
            world.check_end();
            ends.push(world);
        }
        for world in next {
            if seen.insert(world.clone()) {
                todo.push(world);
            }
        }
    }
    (seen.len(), ends)
}

#[test]
fn never_two_never_none() {
    for verify in [false, true] {
        let (worlds, ends) = explore(verify);
        println!("verify {verify}: {worlds} worlds, {} ends", ends.len());
        let reached = |what: &str, test: &dyn Fn(&World) -> bool| {
            assert!(ends.iter().any(test), "the exploration never got to: {what}");
        };
        let outcomes = |w: &World| (w.source.outcome(), w.destination.outcome());
        let alive = |w: &World| (w.source_host, w.destination_host) == (Host::Over, Host::Over);
        reached("a migration", &|w| {
            alive(w)
                && w.runs_on_destination
                && w.source.phase() == SourcePhase::Done
                && w.source.digests_complete() == verify
        });
        reached("a failure that leaves the VM here", &|w| alive(w) && w.runs_on_source);
        reached("a commit that was lost", &|w| {
            alive(w) && outcomes(w) == (Outcome::InDoubt, Outcome::NeverCommitted)
        });
        reached("news of the start that were lost", &|w| {
            w.source.outcome() == Outcome::InDoubt && w.runs_on_destination
        });
        reached("a start that failed", &|w| {
            alive(w) && outcomes(w) == (Outcome::InDoubt, Outcome::FailedAfterCommit)
        });
        reached("a destination that died after commit", &|w| {
            w.source.outcome() == Outcome::InDoubt && w.destination_host == Host::Crashed
        });
        reached("a source that died after commit", &|w| {
            w.source_host == Host::Crashed && w.runs_on_destination && w.destination_host == Host::Over
        });
    }
}
