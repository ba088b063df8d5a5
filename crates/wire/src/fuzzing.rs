//! Entry points for fuzzers and for the property tests that run the same code.
//!
//! Random bytes hardly ever get past a checksum, so these build valid frames around what the fuzzer gives.

use crate::batch::{self, BatchMeta};
use crate::header::{HEADER_LEN, header_bytes};
use crate::{
    Accept, Ack, Channel, DestinationPhase, DestinationState, ErrorCode, FrameReader, FrameWriter, Hello,
    Kind, Limits, Message, NO_SLOT, Offer, Region, Role, Session, SourceState, StateAssembler,
    fixed_payload_len,
};

/// Bytes as they might come from a peer: either a raw stream, or one body of a chosen kind with a header that fits.
///
/// # Panics
/// If a message that was accepted is not written back as the same bytes.
pub fn fuzz_frame(data: &[u8]) {
    let Some((&mode, rest)) = data.split_first() else { return };
    if mode & 1 == 0 {
        return read_stream(rest);
    }
    let Some((&kind, body)) = rest.split_first() else { return };
    let Some(kind) = Kind::from_byte(kind % (Kind::ALL.len() as u8 + 1)).filter(|&kind| kind != Kind::Batch)
    else {
        return;
    };
    let first = matches!(kind, Kind::Hello | Kind::HelloAck);
    let channel = if mode & 2 == 0 { Channel::Control } else { Channel::Data };
    let to_source = if first { kind == Kind::HelloAck } else { mode & 4 != 0 };
    let mut reader = if to_source {
        FrameReader::opening(channel, Limits::default())
    } else {
        FrameReader::accepting(Limits::default())
    };
    if !first {
        let role = if channel == Channel::Control { Role::Control } else { Role::Data { index: 0 } };
        let opening = if to_source {
            Message::HelloAck { version: 1 }
        } else {
            Message::Hello(Hello::new(role, [7; 16]))
        };
        let mut frame = Vec::new();
        FrameWriter::new().control(&opening, &mut frame).expect("an opening is always valid");
        assert_eq!(read_frame(&mut reader, &frame), Some(opening));
    }
    let mut frame = header_bytes(kind, u64::from(!first), body, 0).to_vec();
    frame.extend_from_slice(body);
    if let Some(message) = read_frame(&mut reader, &frame) {
        let mut again = Vec::new();
        message.encode(&mut again).expect("what was accepted is valid");
        assert_eq!(again, body, "{message:?} has two forms");
    }
}

/// Messages as a peer may send them: mostly such as fit, with numbers that the fuzzer chooses, or bodies as they are.
pub struct Messages<'a> {
    data: &'a [u8],
    to_source: bool,
}

impl<'a> Messages<'a> {
    /// Those that the destination sends to the source, or the source to the destination.
    pub fn new(data: &'a [u8], to_source: bool) -> Messages<'a> {
        Messages { data, to_source }
    }

    /// The next byte; 0 at the end.
    pub fn byte(&mut self) -> u8 {
        let Some((&byte, rest)) = self.data.split_first() else { return 0 };
        self.data = rest;
        byte
    }

    /// Small, or next to the largest one.
    fn number(&mut self) -> u64 {
        match self.byte() {
            byte @ 0..200 => u64::from(byte) % 8,
            byte @ 200..220 => u64::MAX - u64::from(byte - 200),
            byte @ 220..240 => u64::from(u32::MAX - u32::from(byte - 220)),
            byte => 1 << ((byte - 240) * 4),
        }
    }

    fn small(&mut self) -> u32 {
        self.number() as u32
    }

    /// Some bytes, as they are.
    fn bytes(&mut self) -> &'a [u8] {
        let len = usize::from(self.byte()).min(self.data.len());
        let (bytes, rest) = self.data.split_at(len);
        self.data = rest;
        bytes
    }

    /// What the destination may say once a connection is open.
    fn of_destination(&mut self) -> Message {
        match self.byte() % 12 {
            0 => Message::Ready,
            1 => Message::Running { report: self.bytes().to_vec() },
            2 => Message::DigestsEnd,
            3 => Message::Pong { id: self.number() },
            4 | 5 => {
                let pages = self.bytes().iter().map(|&page| page.into()).collect();
                let reason = "it differs".into();
                Message::Damaged { epoch: self.small(), region: self.small(), pages, reason }
            }
            6 | 7 => {
                let count = 1 + usize::from(self.byte());
                Message::Digests { region: self.small(), first_page: self.number(), digests: vec![7; count] }
            }
            8 => {
                Message::Ack(Ack { batches: self.number(), wire_bytes: self.number(), pages: self.number() })
            }
            9 => {
                let code = ErrorCode::from_number(self.small() as u16);
                Message::Error { code, message: "no".into() }
            }
            _ => Message::EpochDone { epoch: self.small() },
        }
    }

    /// What the source may say once a connection is open.
    fn of_source(&mut self) -> Message {
        match self.byte() % 12 {
            0 => Message::Commit,
            1 => Message::Bye,
            2 => Message::Cancel { reason: "no".into() },
            3 => Message::Ping { id: self.number() },
            4 => Message::Error { code: ErrorCode::Internal, message: "no".into() },
            5 => Message::Offer(Offer { verify: self.byte() & 1 == 0, ..offer() }),
            6 | 7 => Message::DeviceState {
                total_len: self.number(),
                offset: self.number(),
                bytes: self.bytes().to_vec(),
            },
            8 => Message::StateEnd { len: self.number(), xxh3: self.number() },
            9 => {
                Message::Prepare { epoch: self.small(), state_len: self.number(), state_hash: self.number() }
            }
            _ => Message::EpochStart { epoch: self.small(), pages: self.number() },
        }
    }
}

impl Iterator for Messages<'_> {
    type Item = Message;

    /// The next message, as it is once it has been on its way: of such as cannot be written there is none.
    fn next(&mut self) -> Option<Message> {
        loop {
            if self.data.is_empty() {
                return None;
            }
            let limits = Limits::default();
            if self.byte() % 8 == 7 {
                let kind = Kind::ALL[usize::from(self.byte()) % Kind::ALL.len()];
                if kind != Kind::Batch
                    && let Ok(message) = Message::decode(kind, self.bytes(), &limits)
                {
                    return Some(message);
                }
                continue;
            }
            let message = if self.to_source { self.of_destination() } else { self.of_source() };
            let mut body = Vec::new();
            if message.encode(&mut body).is_ok() {
                return Message::decode(message.kind(), &body, &limits).ok();
            }
        }
    }
}

/// What is offered where messages are made up.
pub fn offer() -> Offer {
    Offer {
        vm_name: "vm".into(),
        page_size: 4096,
        regions: vec![
            Region { id: 0, name: "low".into(), pages: 40 },
            Region { id: 3, name: "high".into(), pages: 300 },
        ],
        encodings: 0x7f,
        history_slots: 0,
        max_batch_pages: 256,
        connections: 1,
        pipeline: true,
        verify: false,
        downtime_limit_ms: 300,
        machine: Vec::new(),
    }
}

/// Messages of a peer, in any order, and what this end says in between.
///
/// # Panics
/// If who may run the VM is not what was said by then.
pub fn fuzz_session(data: &[u8]) {
    match data {
        [mode, data @ ..] if mode & 1 == 0 => destination(data),
        [mode, data @ ..] => source(data, mode & 2 == 0),
        [] => {}
    }
}

fn destination(data: &[u8]) {
    let mut state = DestinationState::new();
    let hello = Message::Hello(Hello::new(Role::Control, [7; 16]));
    state.on_receive(&hello).expect("the first message");
    state.on_send(&Message::HelloAck { version: 1 }).expect("its answer");
    let mut pieces = StateAssembler::new(1 << 20);
    let (mut ready, mut committed) = (false, false);
    let mut theirs = Messages::new(data, false);
    while let Some(message) = theirs.next() {
        let accepted = state.on_receive(&message).is_ok();
        match &message {
            Message::Commit if accepted => {
                assert!(ready, "a commit before this end was ready");
                committed = true;
            }
            Message::DeviceState { total_len, offset, bytes } if accepted => {
                let _ = pieces.piece(*total_len, *offset, bytes);
            }
            Message::StateEnd { len, xxh3 } if accepted => {
                let whole = std::mem::replace(&mut pieces, StateAssembler::new(0)).finish(*len, *xxh3);
                assert!(whole.is_err() || *len <= 1 << 20, "more device state than there may be");
            }
            _ => {}
        }
        assert!(committed || !state.may_run(), "it may run without a commit");
        // This end says what it may say.
        let answer = match (state.phase(), theirs.byte() % 4) {
            (DestinationPhase::Offered, 0..3) => {
                Message::Accept(Accept { encodings: 0x7f, history_slots: 0, max_batch_pages: 256 })
            }
            (DestinationPhase::Loading, 0) => Message::Ready,
            (DestinationPhase::Committed, 0) => Message::Running { report: Vec::new() },
            (_, 1) => Message::EpochDone { epoch: u32::from(theirs.byte() % 4) },
            (_, 2) => {
                let mut own = Messages::new(data, true);
                let Some(message) = own.nth(usize::from(theirs.byte() % 8)) else { continue };
                message
            }
            _ => continue,
        };
        let is_sent = state.on_send(&answer).is_ok();
        ready |= is_sent && answer == Message::Ready;
    }
    let may_run = state.may_run();
    state.on_connection_lost();
    assert_eq!(state.may_run(), may_run, "the loss of a connection changes nothing about who runs the VM");
}

fn source(data: &[u8], verify: bool) {
    let mut state = source_with_offer(verify);
    let accept = Accept { encodings: 0x7f, history_slots: 0, max_batch_pages: 256 };
    state.on_receive(&Message::Accept(accept)).expect("what was offered");
    let mut theirs = Messages::new(data, true);
    let (mut ready, mut agreed, mut committed, mut epoch) = (false, false, false, 0);
    while let Some(message) = theirs.next() {
        ready |= state.on_receive(&message).is_ok() && message == Message::Ready;
        assert!(state.epochs_done() <= epoch, "an epoch is done that was not begun");
        let mine = match theirs.byte() % 8 {
            0 | 1 => Message::EpochStart { epoch, pages: 1 },
            2 => Message::StateEnd { len: 0, xxh3: 0 },
            3 => Message::Prepare { epoch: epoch.saturating_sub(1), state_len: 0, state_hash: 0 },
            4 => Message::Commit,
            5 => {
                agreed |= state.on_digests_agree().is_ok();
                continue;
            }
            _ => continue,
        };
        if state.on_send(&mine).is_ok() {
            epoch += u32::from(matches!(mine, Message::EpochStart { .. }));
            if mine == Message::Commit {
                assert!(ready, "a commit though the destination was not ready");
                assert!(!verify || agreed, "a commit without a comparison");
                committed = true;
            }
        }
        assert_eq!(state.may_run(), !committed, "who may run the VM changes with the commit alone");
    }
}

/// A source that has offered [`offer`].
pub fn source_with_offer(verify: bool) -> SourceState {
    let mut state = SourceState::new();
    let hello = Message::Hello(Hello::new(Role::Control, [7; 16]));
    state.on_send(&hello).expect("the first message");
    state.on_receive(&Message::HelloAck { version: 1 }).expect("its answer");
    state.on_send(&Message::Offer(Offer { verify, ..offer() })).expect("after the answer");
    state
}

/// The meta of a batch.
///
/// # Panics
/// If what was accepted breaks a promise of [`BatchMeta`], or is not read back from what is written for it.
pub fn fuzz_batch_meta(data: &[u8]) {
    let Some((&mode, meta)) = data.split_first() else { return };
    let region = |id, pages| Region { id, name: format!("region{id}"), pages };
    let session = Session {
        regions: vec![region(0, 100), region(3, 1 << 28)],
        encodings: 0x7f,
        history_slots: if mode & 1 == 0 { 0 } else { 1000 },
        max_batch_pages: 300,
        connections: 1,
        verify: false,
    };
    let (mut out, mut scratch) = (BatchMeta::default(), Vec::new());
    if batch::decode(meta, &session, &mut scratch, &mut out).is_err() {
        return;
    }
    let pages = session.region(out.region).expect("the region is one of the session's").pages;
    let count = out.pages.len();
    assert!((1..=300).contains(&count) && out.tags.len() == count && out.lens.len() == count);
    assert!(out.pages.is_sorted_by(|a, b| a < b) && out.pages.iter().all(|&page| page < pages));
    for (&tag, &len) in out.tags.iter().zip(&out.lens) {
        assert!(tag < 7 && fixed_payload_len(tag).map_or((1..4096).contains(&len), |fixed| fixed == len));
    }
    assert_eq!(out.lens.iter().copied().map(usize::from).sum::<usize>(), out.payload_len);
    assert_eq!(out.slots.len(), if session.history_slots > 0 { count } else { 0 });
    assert!(out.slots.iter().all(|&slot| slot < 1000 || slot == NO_SLOT));

    let mut again = Vec::new();
    batch::encode(&out.view(), &mut again).expect("what was accepted is valid");
    assert!(again.len() <= batch::batch_meta_max(count as u32));
    let mut reread = BatchMeta::default();
    batch::decode(&again, &session, &mut scratch, &mut reread).expect("what was written is valid");
    assert_eq!(reread, out);
}

/// Reads frames until something is wrong or nothing is left.
fn read_stream(mut stream: &[u8]) {
    let limits = Limits::default();
    let mut reader = FrameReader::accepting(limits);
    while let Some((header, rest)) = stream.split_first_chunk::<HEADER_LEN>() {
        let Ok(header) = reader.header(header) else { return };
        let Some((body, rest)) = rest.split_at_checked(header.body_len()) else { return };
        if header.kind() == Kind::Batch || reader.message(&header, body).is_err() {
            return;
        }
        stream = rest;
    }
}

/// Reads a frame that is there as a whole.
fn read_frame(reader: &mut FrameReader, frame: &[u8]) -> Option<Message> {
    let (header, body) = frame.split_first_chunk::<HEADER_LEN>()?;
    let header = reader.header(header).ok()?;
    assert_eq!(header.body_len(), body.len());
    reader.message(&header, body).ok()
}
