//! The transition tables of both ends, as `docs/wire-protocol.md` states them.

mod support;

use DestinationPhase as D;
use SourcePhase as S;
use pagewarp_wire::{
    Ack, DestinationPhase, DestinationState, ErrorCode, Hello, Kind, Message, Offer, Outcome, Region, Role,
    SourcePhase, SourceState, WireError,
};
use proptest::prelude::*;
use support::{SESSION, accept, offer};

const STATE: Message = Message::StateEnd { len: 0, xxh3: 1 };
const PREPARE: Message = Message::Prepare { epoch: 0, state_len: 0, state_hash: 1 };

fn hello() -> Message {
    Message::Hello(Hello::new(Role::Control, SESSION))
}

/// An offer whose digests fit one message.
fn small_offer(verify: bool) -> Message {
    Message::Offer(Offer { regions: vec![Region { id: 0, name: "ram".into(), pages: 2 }], verify, ..offer() })
}

fn digests() -> Message {
    Message::Digests { region: 0, first_page: 0, digests: vec![1, 2] }
}

fn report() -> Message {
    Message::Running { report: b"{}".to_vec() }
}

fn damaged(epoch: u32) -> Message {
    Message::Damaged { epoch, region: 0, pages: vec![0, 1], reason: "the hash differs".into() }
}

fn error() -> Message {
    Message::Error { code: ErrorCode::Vm, message: "no".into() }
}

/// A step of a migration that goes well: who sends what.
fn script(verify: bool) -> Vec<(bool, Message)> {
    let (source, destination) = (true, false);
    let mut script = vec![
        (source, hello()),
        (destination, Message::HelloAck { version: 1 }),
        (source, small_offer(verify)),
        (destination, Message::Accept(accept())),
        (source, Message::EpochStart { epoch: 0, pages: 2 }),
        (destination, Message::EpochDone { epoch: 0 }),
        (source, STATE),
        (source, PREPARE),
    ];
    if verify {
        script.extend([(destination, digests()), (destination, Message::DigestsEnd)]);
    }
    script.extend([
        (destination, Message::Ready),
        (source, Message::Commit),
        (destination, report()),
        (source, Message::Bye),
    ]);
    script
}

/// Whether the source has to compare the digests now.
fn are_all_there(source: &SourceState) -> bool {
    source.digests_complete() && !source.is_verified()
}

/// Both ends after each step of the script.
fn walk(verify: bool) -> Vec<(SourceState, DestinationState)> {
    let mut ends = (SourceState::new(), DestinationState::new());
    let mut walked = vec![ends.clone()];
    for (from_source, message) in script(verify) {
        if from_source {
            ends.0.on_send(&message).unwrap();
            ends.1.on_receive(&message).unwrap();
        } else {
            ends.1.on_send(&message).unwrap();
            ends.0.on_receive(&message).unwrap();
        }
        if are_all_there(&ends.0) {
            ends.0.on_digests_agree().unwrap();
        }
        walked.push(ends.clone());
    }
    walked
}

/// A source in this phase, as far along in it as the script goes.
fn source(phase: SourcePhase) -> SourceState {
    let walked = walk(true);
    match phase {
        S::Failed => {
            let mut source = walked[4].0.clone();
            source.on_connection_lost();
            source
        }
        S::InDoubt => {
            let mut source = source(S::Committed);
            source.on_connection_lost();
            source
        }
        phase => {
            walked.into_iter().map(|(source, _)| source).rfind(|source| source.phase() == phase).unwrap()
        }
    }
}

/// A destination in this phase, as far along in it as the script goes.
fn destination(phase: DestinationPhase) -> DestinationState {
    let walked = walk(true);
    if phase == D::Failed {
        let mut destination = walked[4].1.clone();
        destination.on_connection_lost();
        return destination;
    }
    walked.into_iter().map(|(_, end)| end).rfind(|end| end.phase() == phase).unwrap()
}

/// One message of every kind that is in place as far as its values go.
fn message(kind: Kind) -> Option<Message> {
    Some(match kind {
        Kind::Hello => hello(),
        Kind::HelloAck => Message::HelloAck { version: 1 },
        Kind::Offer => small_offer(true),
        Kind::Accept => Message::Accept(accept()),
        Kind::EpochStart => Message::EpochStart { epoch: 1, pages: 2 },
        Kind::Batch => return None,
        Kind::Barrier => Message::Barrier { epoch: 0, batches: 1, pages: 2 },
        Kind::EpochDone => Message::EpochDone { epoch: 1 },
        Kind::Ack => Message::Ack(Ack { batches: 1, wire_bytes: 100, pages: 2 }),
        Kind::DeviceState => Message::DeviceState { total_len: 1, offset: 0, bytes: vec![1] },
        Kind::StateEnd => STATE,
        Kind::Prepare => PREPARE,
        Kind::Ready => Message::Ready,
        Kind::Commit => Message::Commit,
        Kind::Running => report(),
        Kind::Digests => digests(),
        Kind::DigestsEnd => Message::DigestsEnd,
        Kind::Bye => Message::Bye,
        Kind::Cancel => Message::Cancel { reason: "why not".into() },
        Kind::Error => error(),
        Kind::Ping => Message::Ping { id: 1 },
        Kind::Pong => Message::Pong { id: 1 },
        Kind::Damaged => damaged(1),
    })
}

/// Every kind for which `step` does not call the message unexpected. Values that do not fit are another matter.
fn expected_kinds(step: impl Fn(&Message) -> Result<(), WireError>) -> Vec<Kind> {
    Kind::ALL
        .into_iter()
        .filter(|&kind| message(kind).is_some_and(|m| !matches!(step(&m), Err(WireError::Unexpected { .. }))))
        .collect()
}

#[test]
fn a_migration_goes_well() {
    use Outcome::{InDoubt, NeverCommitted, RunOnDestination, VmRunsOnDestination, VmStaysOnSource};
    for verify in [false, true] {
        let walked = walk(verify);
        let (source, destination) = walked.last().unwrap();
        assert_eq!((source.phase(), destination.phase()), (S::Done, D::Done));
        assert_eq!((source.digests_complete(), source.is_verified()), (verify, verify));
        assert_eq!(source.session(), destination.session());
        let outcomes: Vec<_> = walked.iter().map(|(s, d)| (s.outcome(), d.outcome())).collect();
        let ready = if verify { 11 } else { 9 };
        assert!(outcomes[..ready].iter().all(|&o| o == (VmStaysOnSource, VmStaysOnSource)));
        assert_eq!(outcomes[ready], (VmStaysOnSource, NeverCommitted));
        assert_eq!(outcomes[ready + 1], (InDoubt, RunOnDestination));
        assert!(outcomes[ready + 2..].iter().all(|&o| o == (VmRunsOnDestination, VmRunsOnDestination)));
    }
}

#[test]
fn source_sends_and_receives_what_its_phase_allows() {
    use Kind::{
        Accept, Ack, Bye, Cancel, Commit, Damaged, DeviceState, Digests, DigestsEnd, EpochDone, EpochStart,
        Error, Hello, HelloAck, Offer, Ping, Pong, Prepare, Ready, Running, StateEnd,
    };
    let table: [(SourcePhase, &[Kind], &[Kind]); 12] = [
        (S::Connecting, &[Hello], &[]),
        (S::Greeting, &[Cancel, Error], &[HelloAck, Error]),
        (S::Connected, &[Offer, Cancel, Error, Ping, Pong], &[Error, Ping, Pong]),
        (S::Offered, &[Cancel, Error, Ping, Pong], &[Accept, Error, Ping, Pong]),
        (
            S::Precopy,
            &[EpochStart, DeviceState, StateEnd, Prepare, Cancel, Error, Ping, Pong],
            &[EpochDone, Ack, Error, Ping, Pong, Damaged],
        ),
        (
            S::SwitchingOver,
            &[Cancel, Error, Ping, Pong],
            &[EpochDone, Ack, Ready, Digests, DigestsEnd, Error, Ping, Pong, Damaged],
        ),
        (S::Ready, &[Commit, Cancel, Error, Ping, Pong], &[Ack, Error, Ping, Pong]),
        (S::Committed, &[Error, Ping, Pong], &[Ack, Running, Error, Ping, Pong]),
        (S::Running, &[Bye, Error, Ping, Pong], &[Error, Ping, Pong]),
        (S::Done, &[Error], &[]),
        (S::Failed, &[Error], &[]),
        (S::InDoubt, &[Error], &[]),
    ];
    for (phase, sends, receives) in table {
        assert_eq!(source(phase).phase(), phase);
        assert_eq!(expected_kinds(|m| source(phase).on_send(m)), sends, "sent while {phase:?}");
        assert_eq!(expected_kinds(|m| source(phase).on_receive(m)), receives, "received while {phase:?}");
    }
}

#[test]
fn destination_sends_and_receives_what_its_phase_allows() {
    use Kind::{
        Accept, Ack, Bye, Cancel, Commit, Damaged, DeviceState, Digests, DigestsEnd, EpochDone, EpochStart,
        Error, Hello, HelloAck, Offer, Ping, Pong, Prepare, Ready, Running, StateEnd,
    };
    let table: [(DestinationPhase, &[Kind], &[Kind]); 11] = [
        (D::Listening, &[], &[Hello]),
        (D::Greeting, &[HelloAck, Error], &[Cancel, Error]),
        (D::Connected, &[Error, Ping, Pong], &[Offer, Cancel, Error, Ping, Pong]),
        (D::Offered, &[Accept, Error, Ping, Pong], &[Cancel, Error, Ping, Pong]),
        (
            D::Receiving,
            &[EpochDone, Ack, Error, Ping, Pong, Damaged],
            &[EpochStart, DeviceState, StateEnd, Prepare, Cancel, Error, Ping, Pong],
        ),
        (
            D::Loading,
            &[EpochDone, Ack, Ready, Digests, DigestsEnd, Error, Ping, Pong, Damaged],
            &[Cancel, Error, Ping, Pong],
        ),
        (D::Ready, &[Ack, Error, Ping, Pong], &[Commit, Cancel, Error, Ping, Pong]),
        (D::Committed, &[Running, Error, Ping, Pong], &[Error, Ping, Pong]),
        (D::Running, &[Error, Ping, Pong], &[Bye, Error, Ping, Pong]),
        (D::Done, &[Error], &[]),
        (D::Failed, &[Error], &[]),
    ];
    for (phase, sends, receives) in table {
        assert_eq!(destination(phase).phase(), phase);
        assert_eq!(expected_kinds(|m| destination(phase).on_send(m)), sends, "sent while {phase:?}");
        assert_eq!(
            expected_kinds(|m| destination(phase).on_receive(m)),
            receives,
            "received while {phase:?}"
        );
    }
}

#[test]
fn losing_the_connection_ends_as_the_failure_table_says() {
    use Outcome::*;
    for (phase, outcome, after) in [
        (S::Connecting, VmStaysOnSource, S::Failed),
        (S::Greeting, VmStaysOnSource, S::Failed),
        (S::Connected, VmStaysOnSource, S::Failed),
        (S::Offered, VmStaysOnSource, S::Failed),
        (S::Precopy, VmStaysOnSource, S::Failed),
        (S::SwitchingOver, VmStaysOnSource, S::Failed),
        (S::Ready, VmStaysOnSource, S::Failed),
        (S::Committed, InDoubt, S::InDoubt),
        (S::Running, VmRunsOnDestination, S::Done),
        (S::Done, VmRunsOnDestination, S::Done),
        (S::Failed, VmStaysOnSource, S::Failed),
        (S::InDoubt, InDoubt, S::InDoubt),
    ] {
        let mut source = source(phase);
        assert_eq!((source.on_connection_lost(), source.phase()), (outcome, after), "lost while {phase:?}");
        assert_eq!(source.may_run(), outcome == VmStaysOnSource);
    }
    for (phase, outcome, after) in [
        (D::Listening, VmStaysOnSource, D::Failed),
        (D::Greeting, VmStaysOnSource, D::Failed),
        (D::Connected, VmStaysOnSource, D::Failed),
        (D::Offered, VmStaysOnSource, D::Failed),
        (D::Receiving, VmStaysOnSource, D::Failed),
        (D::Loading, VmStaysOnSource, D::Failed),
        (D::Ready, NeverCommitted, D::Failed),
        (D::Committed, RunOnDestination, D::Committed),
        (D::Running, VmRunsOnDestination, D::Done),
        (D::Done, VmRunsOnDestination, D::Done),
        (D::Failed, VmStaysOnSource, D::Failed),
    ] {
        let mut destination = destination(phase);
        assert_eq!(
            (destination.on_connection_lost(), destination.phase()),
            (outcome, after),
            "lost while {phase:?}"
        );
        assert_eq!(destination.may_run(), matches!(outcome, RunOnDestination | VmRunsOnDestination));
    }
}

#[test]
fn errors_after_commit_leave_the_right_where_it_is() {
    let mut end = source(S::Committed);
    end.on_receive(&error()).unwrap();
    assert_eq!((end.phase(), end.outcome(), end.may_run()), (S::InDoubt, Outcome::InDoubt, false));
    let mut end = source(S::Committed);
    end.on_send(&error()).unwrap();
    assert_eq!(end.outcome(), Outcome::InDoubt);
    let mut end = source(S::Committed);
    assert!(end.on_receive(&Message::Ready).is_err());
    assert_eq!(end.outcome(), Outcome::InDoubt);

    let mut end = destination(D::Committed);
    end.on_receive(&error()).unwrap();
    assert_eq!((end.outcome(), end.may_run()), (Outcome::RunOnDestination, true));
    assert!(end.on_receive(&Message::Cancel { reason: "too late".into() }).is_err());
    assert!(end.may_run());
    let mut end = destination(D::Committed);
    end.on_send(&error()).unwrap();
    assert_eq!((end.outcome(), end.may_run()), (Outcome::FailedAfterCommit, false));
    let mut end = destination(D::Committed);
    end.on_connection_lost();
    assert_eq!((end.on_start_failed(), end.may_run()), (Outcome::FailedAfterCommit, false));
    assert_eq!(destination(D::Ready).on_start_failed(), Outcome::NeverCommitted);
}

#[test]
fn unexpected_messages_are_named() {
    let error = source(S::Offered).on_receive(&Message::Ready).unwrap_err();
    assert_eq!(error.to_string(), "unexpected Ready while offered (source): expected Accept or Error");
    let error = destination(D::Receiving).on_receive(&Message::Commit).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("unexpected Commit while receiving (destination): expected EpochStart, ")
    );
}

/// Runs `messages` through clones of an end and says whether the last one is refused as malformed.
#[track_caller]
fn refused(mut step: impl FnMut(&Message) -> Result<(), WireError>, messages: &[Message]) {
    let (last, first) = messages.split_last().unwrap();
    first.iter().for_each(|message| step(message).unwrap());
    let result = step(last);
    assert!(matches!(result, Err(WireError::Malformed { .. })), "{result:?}");
}

#[test]
fn values_must_fit_what_went_before() {
    let piece = |total_len, offset, len| Message::DeviceState { total_len, offset, bytes: vec![0; len] };
    let end = |len| Message::StateEnd { len, xxh3: 1 };
    let prepare = |epoch, state_len, state_hash| Message::Prepare { epoch, state_len, state_hash };
    let start = |epoch| Message::EpochStart { epoch, pages: 1 };
    let done = |epoch| Message::EpochDone { epoch };
    let ack = |batches, wire_bytes, pages| Message::Ack(Ack { batches, wire_bytes, pages });
    let digests =
        |region, first_page, count| Message::Digests { region, first_page, digests: vec![0; count] };

    // Steps 4 and 5 of the script: Accept has passed; one epoch has started.
    for messages in [
        vec![start(1)],
        vec![start(0), start(0)],
        vec![start(0), start(1), start(2)],
        vec![piece(10, 1, 5)],
        vec![piece(10, 0, 5), piece(11, 5, 5)],
        vec![piece(10, 0, 5), end(5)],
        vec![end(0), end(0)],
        vec![end(0), piece(10, 0, 5)],
        vec![start(0), prepare(0, 0, 1)],
        vec![end(0), prepare(0, 0, 1)],
        vec![start(0), end(0), prepare(1, 0, 1)],
        vec![start(0), start(1), end(0), prepare(0, 0, 1)],
        vec![start(0), end(0), prepare(0, 0, 2)],
        vec![start(0), piece(5, 0, 5), end(5), prepare(0, 4, 1)],
    ] {
        let (mut source, mut destination) = walk(true).swap_remove(4);
        refused(|m| source.on_send(m), &messages);
        assert_eq!(source.phase(), S::Precopy, "what must not be sent changes nothing");
        refused(|m| destination.on_receive(m), &messages);
        assert_eq!((destination.phase(), destination.outcome()), (D::Failed, Outcome::VmStaysOnSource));
    }
    for messages in [
        vec![done(1)],
        vec![done(0), done(0)],
        vec![ack(2, 2, 2), ack(1, 2, 2)],
        vec![ack(2, 2, 2), ack(2, 1, 2)],
        vec![ack(2, 2, 2), ack(2, 2, 1)],
    ] {
        let (mut source, mut destination) = walk(true).swap_remove(5);
        refused(|m| source.on_receive(m), &messages);
        refused(|m| destination.on_send(m), &messages);
    }
    let (mut source, _) = walk(true).swap_remove(4);
    refused(|m| source.on_receive(m), &[done(0)]);
    for messages in [
        vec![digests(1, 0, 1)],
        vec![digests(0, 1, 1)],
        vec![digests(0, 0, 3)],
        vec![digests(0, 0, 1), Message::DigestsEnd],
        vec![digests(0, 0, 1), digests(0, 1, 1), digests(0, 2, 1)],
        vec![digests(0, 0, 2), Message::DigestsEnd, Message::DigestsEnd],
        vec![digests(0, 0, 2), Message::DigestsEnd, digests(0, 0, 2)],
        vec![Message::Ready],
        vec![digests(0, 0, 2), Message::Ready],
    ] {
        let (mut source, mut destination) = walk(true).swap_remove(8);
        refused(|m| source.on_receive(m), &messages);
        assert_eq!(source.outcome(), Outcome::VmStaysOnSource);
        refused(|m| destination.on_send(m), &messages);
    }
    // `Ready` before the last epoch was done.
    let (mut source, mut destination) = walk(true).swap_remove(5);
    for message in [STATE, PREPARE] {
        source.on_send(&message).unwrap();
        destination.on_receive(&message).unwrap();
    }
    refused(|m| source.on_receive(m), &[Message::Ready]);
    refused(|m| destination.on_send(m), &[done(0), done(1)]);
    let (mut source, mut destination) = walk(true).swap_remove(2);
    let newer = Message::HelloAck { version: 2 };
    assert!(matches!(
        walk(true).swap_remove(1).0.on_receive(&newer),
        Err(WireError::UnsupportedVersion { .. })
    ));
    // An acceptance of more than was offered.
    source.on_send(&small_offer(true)).unwrap();
    destination.on_receive(&small_offer(true)).unwrap();
    for accept in [
        pagewarp_wire::Accept { encodings: 0xff, ..accept() },
        pagewarp_wire::Accept { history_slots: 1, ..accept() },
        pagewarp_wire::Accept { max_batch_pages: 257, ..accept() },
    ] {
        assert!(source.clone().on_receive(&Message::Accept(accept.clone())).is_err());
        assert!(destination.clone().on_send(&Message::Accept(accept)).is_err());
    }
    // No digests where none were agreed.
    let (mut source, mut destination) = walk(false).swap_remove(8);
    assert!(source.on_receive(&digests(0, 0, 2)).is_err() && destination.on_send(&digests(0, 0, 2)).is_err());
}

/// The right to run the VM does not pass before the digests were compared.
#[test]
fn without_a_comparison_there_is_no_commit() {
    let (mut source, mut destination) = switching_over(false);
    for message in [digests(), Message::DigestsEnd, Message::Ready] {
        if !source.digests_complete() {
            assert!(matches!(source.on_digests_agree(), Err(WireError::Malformed { .. })));
        }
        destination.on_send(&message).unwrap();
        source.on_receive(&message).unwrap();
    }
    assert_eq!(source.phase(), S::Ready);
    let refused = source.on_send(&Message::Commit).unwrap_err();
    assert!(refused.to_string().contains("once they were compared and agree"), "{refused}");
    assert_eq!((source.phase(), source.outcome()), (S::Ready, Outcome::VmStaysOnSource));
    let mut differs = source.clone();
    differs.on_send(&Message::Error { code: ErrorCode::Differs, message: "page 1".into() }).unwrap();
    assert_eq!((differs.phase(), differs.outcome()), (S::Failed, Outcome::VmStaysOnSource));
    source.on_digests_agree().unwrap();
    assert_eq!(source.on_send(&Message::Commit), Ok(()));
}

/// Both ends with one epoch done and the state sent; with `damage`, a batch of it was damaged.
fn switching_over(damage: bool) -> (SourceState, DestinationState) {
    // Accept has passed, and the first epoch has begun.
    let (mut source, mut destination) = walk(true).swap_remove(5);
    let mut tell_source = |source: &mut SourceState, message: Message| {
        destination.on_send(&message).unwrap();
        source.on_receive(&message).unwrap();
    };
    if damage {
        tell_source(&mut source, damaged(0));
    }
    tell_source(&mut source, Message::EpochDone { epoch: 0 });
    for message in [STATE, PREPARE] {
        source.on_send(&message).unwrap();
        destination.on_receive(&message).unwrap();
    }
    (source, destination)
}

#[test]
fn damaged_pages_travel_again_before_the_destination_is_ready() {
    let start = |epoch| Message::EpochStart { epoch, pages: 2 };
    let done = |epoch| Message::EpochDone { epoch };
    let prepare = |epoch| Message::Prepare { epoch, state_len: 0, state_hash: 1 };

    let (mut source, mut destination) = switching_over(false);
    assert!(!source.must_send_again() && destination.is_complete(0));
    assert!(matches!(source.on_send(&start(1)), Err(WireError::Unexpected { .. })));
    assert!(matches!(destination.on_receive(&start(1)), Err(WireError::Unexpected { .. })));

    let (mut source, mut destination) = switching_over(true);
    assert!(source.must_send_again() && !destination.is_complete(0));
    refused(|m| source.clone().on_receive(m), &[digests()]);
    refused(|m| destination.clone().on_send(m), &[digests()]);
    assert!(matches!(destination.on_send(&Message::Ready), Err(WireError::Malformed { .. })));
    assert!(matches!(source.clone().on_receive(&Message::Ready), Err(WireError::Malformed { .. })));
    refused(|m| source.on_send(m), &[start(2)]);
    source.on_send(&start(1)).unwrap();
    destination.on_receive(&start(1)).unwrap();
    assert_eq!((source.phase(), destination.phase()), (S::Precopy, D::Receiving));
    source.on_send(&prepare(1)).unwrap();
    destination.on_receive(&prepare(1)).unwrap();
    // Damaged again, and again.
    for epoch in 1..4 {
        for message in [damaged(epoch), done(epoch)] {
            destination.on_send(&message).unwrap();
            source.on_receive(&message).unwrap();
        }
        assert!(source.must_send_again() && !destination.is_complete(epoch));
        for message in [start(epoch + 1), prepare(epoch + 1)] {
            source.on_send(&message).unwrap();
            destination.on_receive(&message).unwrap();
        }
        assert!(!destination.is_complete(epoch) && !destination.is_complete(epoch + 1));
    }
    refused(|m| source.clone().on_receive(m), &[digests()]);
    refused(|m| destination.clone().on_send(m), &[digests()]);
    for message in [done(4), digests(), Message::DigestsEnd, Message::Ready] {
        destination.on_send(&message).unwrap();
        source.on_receive(&message).unwrap();
    }
    source.on_digests_agree().unwrap();
    assert_eq!(source.on_send(&Message::Commit), Ok(()));
}

/// The source may have heard too late of damage in the epoch before the last one; damage before that has come again.
#[test]
fn only_damage_of_the_last_two_epochs_keeps_the_destination_waiting() {
    for (damaged_in, again) in [(0, false), (1, true), (2, true)] {
        let (mut source, mut destination) = walk(true).swap_remove(4);
        for epoch in 0..3 {
            let start = Message::EpochStart { epoch, pages: 1 };
            source.on_send(&start).unwrap();
            destination.on_receive(&start).unwrap();
            let damage = (epoch == damaged_in).then(|| damaged(epoch));
            for message in damage.into_iter().chain([Message::EpochDone { epoch }]) {
                destination.on_send(&message).unwrap();
                source.on_receive(&message).unwrap();
            }
        }
        assert_eq!((source.must_send_again(), destination.is_complete(2)), (again, !again), "{damaged_in}");
    }
}

#[test]
fn damage_must_fit_what_was_sent() {
    let report = |epoch, region, pages: &[u64]| Message::Damaged {
        epoch,
        region,
        pages: pages.to_vec(),
        reason: String::new(),
    };
    for message in [report(1, 0, &[0]), report(0, 1, &[0]), report(0, 0, &[2]), report(0, 0, &[0; 257])] {
        // One epoch has begun and is not done; the region has two pages.
        let (mut source, mut destination) = walk(true).swap_remove(5);
        let rejected = source.on_receive(&message).unwrap_err();
        assert!(!matches!(rejected, WireError::Unexpected { .. }), "{rejected}");
        assert_eq!(source.outcome(), Outcome::VmStaysOnSource);
        assert!(destination.on_send(&message).is_err());
    }
    // Nothing can be damaged that is done.
    let (mut source, mut destination) = walk(true).swap_remove(6);
    refused(|m| source.on_receive(m), &[damaged(0)]);
    refused(|m| destination.on_send(m), &[damaged(0)]);
}

#[test]
fn versions_must_overlap() {
    let hello = |min_version, max_version| {
        Message::Hello(Hello { min_version, max_version, ..Hello::new(Role::Control, SESSION) })
    };
    assert_eq!(DestinationState::new().on_receive(&hello(1, 9)), Ok(()));
    let mut end = DestinationState::new();
    let error = end.on_receive(&hello(2, 9)).unwrap_err();
    assert!(error.to_string().contains("seen 2 to 9, expected 1 to 1"), "{error}");
    let answer = Message::Error { code: ErrorCode::Version, message: error.to_string() };
    assert_eq!(end.on_send(&answer), Ok(()), "the source should learn why");
}

#[test]
fn data_connections_arrive_once_each() {
    use pagewarp_wire::ConnectionSet;
    let mut set = ConnectionSet::new(SESSION, 2);
    let hello = |index| Hello::new(Role::Data { index }, SESSION);
    assert_eq!(set.admit(&hello(1)), Ok(1));
    assert!(!set.complete());
    assert!(set.admit(&hello(1)).is_err(), "taken");
    assert!(matches!(set.admit(&hello(2)), Err(WireError::TooLarge { seen: 2, limit: 1, .. })));
    assert!(set.admit(&Hello::new(Role::Control, SESSION)).is_err());
    assert!(set.admit(&Hello::new(Role::Data { index: 0 }, [0; 16])).is_err(), "another session");
    assert_eq!(set.admit(&hello(0)), Ok(0));
    assert!(set.complete());
}

#[test]
fn device_state_travels_in_pieces() {
    use pagewarp_wire::{MAX_STATE_CHUNK, StateAssembler, state_messages};
    for len in [0, 1, MAX_STATE_CHUNK, MAX_STATE_CHUNK + 1, 3 * MAX_STATE_CHUNK] {
        let state: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
        let mut assembler = StateAssembler::new(u64::MAX);
        let messages: Vec<_> = state_messages(&state).collect();
        assert_eq!(messages.len(), len.div_ceil(MAX_STATE_CHUNK) + 1);
        let (end, pieces) = messages.split_last().unwrap();
        for piece in pieces {
            let Message::DeviceState { total_len, offset, bytes } = piece else { panic!("a piece") };
            assembler.piece(*total_len, *offset, bytes).unwrap();
        }
        let &Message::StateEnd { len, xxh3 } = end else { panic!("the end") };
        assert_eq!(assembler.finish(len, xxh3).as_deref(), Ok(&state[..]));
    }
    let assembler = |bytes: &[u8]| {
        let mut assembler = StateAssembler::new(10);
        assembler.piece(bytes.len() as u64, 0, bytes).map(|()| assembler)
    };
    assert!(matches!(assembler(&[0; 11]), Err(WireError::TooLarge { seen: 11, limit: 10, .. })));
    assert!(assembler(&[1, 2]).unwrap().piece(2, 1, &[3]).is_err(), "out of place");
    assert!(assembler(&[1, 2]).unwrap().piece(2, 2, &[3]).is_err(), "beyond the end");
    assert!(assembler(&[1, 2]).unwrap().finish(3, 0).is_err(), "too short");
    assert!(matches!(assembler(&[1, 2]).unwrap().finish(2, 0), Err(WireError::Checksum { .. })));
}

/// Any step of any end.
fn steps() -> impl Strategy<Value = Vec<(bool, Message)>> {
    let in_place = prop::sample::select(script(true).into_iter().map(|(_, m)| m).collect::<Vec<_>>());
    let message = prop_oneof![4 => in_place, 1 => support::messages()];
    prop::collection::vec((any::<bool>(), message), 0..40)
}

proptest! {
    /// Whatever a hostile peer sends and a confused caller does: nobody runs the VM without the right to.
    #[test]
    fn nobody_runs_without_the_right(start in 0..14usize, steps in steps()) {
        let (mut source, mut destination) = walk(true).swap_remove(start);
        let mut given = !source.may_run();
        let mut got = destination.may_run();
        for (send, message) in steps {
            if send {
                let sent = source.on_send(&message).is_ok();
                given |= sent && message == Message::Commit;
                _ = destination.on_send(&message);
            } else {
                _ = source.on_receive(&message);
                let ready = destination.phase() == D::Ready;
                let received = destination.on_receive(&message).is_ok();
                got |= ready && received && message == Message::Commit;
            }
            prop_assert_eq!(source.may_run(), !given);
            prop_assert!(got || !destination.may_run());
        }
    }
}
