//! The messages that the model sends, small enough to be stored a million times.

use pagewarp_wire::{Accept, Ack, ErrorCode, Hello, Message, Offer, Region, Role};

/// A message on the control connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Letter {
    Hello,
    HelloAck,
    Offer,
    Accept,
    EpochStart(u8),
    EpochDone(u8),
    Damaged(u8),
    Ack(u8),
    StateEnd,
    Prepare(u8),
    Ready,
    Commit,
    Running,
    /// Whether they are those of the source.
    Digests(bool),
    DigestsEnd,
    Bye,
    Cancel,
    Error,
}

impl Letter {
    /// What it says. `verify`: whether the offer asks for digests.
    pub(crate) fn message(self, verify: bool) -> Message {
        match self {
            Letter::Hello => Message::Hello(Hello::new(Role::Control, [7; 16])),
            Letter::HelloAck => Message::HelloAck { version: 1 },
            Letter::Offer => Message::Offer(offer(verify)),
            Letter::Accept => Message::Accept(Accept { encodings: 4, history_slots: 0, max_batch_pages: 1 }),
            Letter::EpochStart(epoch) => Message::EpochStart { epoch: epoch.into(), pages: 1 },
            Letter::EpochDone(epoch) => Message::EpochDone { epoch: epoch.into() },
            Letter::Damaged(epoch) => {
                Message::Damaged { epoch: epoch.into(), region: 0, pages: vec![0], reason: String::new() }
            }
            Letter::Ack(count) => {
                let count = count.into();
                Message::Ack(Ack { batches: count, wire_bytes: count, pages: count })
            }
            Letter::StateEnd => Message::StateEnd { len: 0, xxh3: 1 },
            Letter::Prepare(epoch) => Message::Prepare { epoch: epoch.into(), state_len: 0, state_hash: 1 },
            Letter::Ready => Message::Ready,
            Letter::Commit => Message::Commit,
            Letter::Running => Message::Running { report: Vec::new() },
            Letter::Digests(agree) => {
                Message::Digests { region: 0, first_page: 0, digests: vec![agree.into()] }
            }
            Letter::DigestsEnd => Message::DigestsEnd,
            Letter::Bye => Message::Bye,
            Letter::Cancel => Message::Cancel { reason: String::new() },
            Letter::Error => Message::Error { code: ErrorCode::Vm, message: String::new() },
        }
    }
}

/// A VM of one page.
fn offer(verify: bool) -> Offer {
    Offer {
        vm_name: "m".into(),
        page_size: pagewarp_wire::PAGE_SIZE,
        regions: vec![Region { id: 0, name: "r".into(), pages: 1 }],
        encodings: 4,
        history_slots: 0,
        max_batch_pages: 1,
        connections: 1,
        pipeline: false,
        verify,
        downtime_limit_ms: 0,
        machine: Vec::new(),
    }
}
