//! Sources that misbehave once `pagewarp receive` has accepted the machine that they offer, a real one.

use std::time::{Duration, Instant};

use pagewarp_cli::exit::Exit;
use pagewarp_wire::{Kind, Message, Offer, Role, state_hash};

use crate::each;
use crate::receiver::Receiver;
use crate::support::peer::{Peer, frame, header};
use crate::way::{Way, Ways};

/// The connections of a source that was accepted.
pub(crate) struct Accepted {
    pub(crate) control: Peer,
    pub(crate) data: Peer,
}

impl Accepted {
    /// Goes on properly until everything is there to begin with.
    pub(crate) fn open(ways: &Ways, way: Way, address: &str, offer: &Offer) -> Accepted {
        let mut control = ways.connect(way, address).greeted();
        control.say(&Message::Offer(Offer { connections: 1, verify: false, ..offer.clone() }));
        assert!(control.hear_until(Kind::Accept).is_some(), "the offer is accepted");
        let data = ways.connect(way, address).greeted_as(Role::Data { index: 0 });
        Accepted { control, data }
    }

    fn begin(&mut self, epoch: u32) {
        self.control.say(&Message::EpochStart { epoch, pages: 1 });
    }

    fn end(&mut self, epoch: u32, batches: u64, pages: u64) {
        self.data.say(&Message::Barrier { epoch, batches, pages });
    }

    /// Begins an epoch that has only this batch, and waits until it is done.
    fn epoch(&mut self, epoch: u32, tag: u8, payload: &[u8]) {
        self.begin(epoch);
        self.data.batch(epoch, &[5], tag, payload);
        self.end(epoch, 1, 1);
        if epoch < 8 {
            assert!(self.control.hear_until(Kind::EpochDone).is_some(), "damage is dropped in epoch {epoch}");
        }
    }

    /// As [`Accepted::epoch`], so often that it is enough.
    fn bombs(&mut self, tag: u8, payload: &[u8]) {
        (0..9).for_each(|epoch| self.epoch(epoch, tag, payload));
    }

    /// Says that so many bytes of state are to come.
    fn state(&mut self, total_len: u64, offset: u64) {
        self.control.say(&Message::DeviceState { total_len, offset, bytes: vec![1; 1000] });
    }

    /// The frame of a batch whose meta was made by hand.
    fn batch(&mut self, tables: &[u8], pages: u32, payload_len: u32) {
        self.begin(0);
        let mut meta = Vec::new();
        for word in [0, 0, 7, 0, pages, 0] {
            meta.extend(u32::to_le_bytes(word));
        }
        meta.extend(tables);
        self.data.raw(&frame(6, 1, &meta, payload_len));
    }
}

/// An LZ4 block that makes more than 100 KiB of its few bytes.
fn lz4_bomb() -> Vec<u8> {
    // One literal, and a match of 19 + 255 × 400 bytes one byte back.
    [&[0x1f, b'x', 1, 0][..], &[255; 400], &[0, 0x50], b"xxxxx"].concat()
}

/// What a hostile source does, the exit code, and what the receiver says.
type Case = (&'static str, fn(&mut Accepted), Exit, &'static str);

const CASES: [Case; 31] = [
    ("hangs up", |source| source.control.hang_up(), Exit::Link, "the peer closed the connection"),
    (
        "loses a data connection",
        |source| {
            source.data.hang_up();
            while source.control.is_connected() {
                source.control.say(&Message::Ping { id: 1 });
                std::thread::sleep(Duration::from_millis(100));
            }
        },
        Exit::Link,
        "the peer closed the connection",
    ),
    ("is silent", |_| (), Exit::Link, "the peer was silent"),
    ("commits before anything", |s| s.control.say(&Message::Commit), Exit::Peer, "unexpected Commit"),
    (
        "commits in the middle of an epoch",
        |source| {
            source.begin(0);
            source.data.batch(0, &[1], 2, &[3; 4096]);
            source.control.say(&Message::Commit);
        },
        Exit::Peer,
        "unexpected Commit",
    ),
    ("says goodbye", |source| source.control.say(&Message::Bye), Exit::Peer, "unexpected Bye"),
    ("begins with epoch 1", |source| source.begin(1), Exit::Peer, "epoch of EpochStart"),
    (
        "goes back to an epoch",
        |source| {
            source.epoch(0, 2, &[1; 4096]);
            source.begin(0);
        },
        Exit::Peer,
        "epoch of EpochStart",
    ),
    (
        "does not wait for epochs to be done",
        |source| (0..3).for_each(|epoch| source.begin(epoch)),
        Exit::Peer,
        "epoch 2 too early",
    ),
    (
        "floods epochs",
        |source| (0..100_000).for_each(|epoch| source.begin(epoch)),
        Exit::Peer,
        "epoch 2 too early",
    ),
    (
        "floods questions and hears no answer",
        |source| {
            for id in 0.. {
                source.control.say(&Message::Ping { id });
                if !source.control.is_connected() {
                    break;
                }
            }
        },
        Exit::Link,
        "took no data",
    ),
    (
        "offers again",
        |source| source.control.say(&Message::Offer(crate::support::peer::offer(1))),
        Exit::Peer,
        "unexpected Offer",
    ),
    ("prepares nothing", |s| s.control.say(&prepare(0)), Exit::Peer, "no StateEnd before it"),
    (
        "prepares another epoch than the last",
        |source| {
            source.begin(0);
            source.control.say(&Message::StateEnd { len: 0, xxh3: state_hash(b"") });
            source.control.say(&prepare(1));
        },
        Exit::Peer,
        "epoch of Prepare",
    ),
    (
        "commits before the destination is ready",
        |source| {
            source.begin(0);
            source.control.say(&Message::StateEnd { len: 0, xxh3: state_hash(b"") });
            source.control.say(&prepare(0));
            source.control.say(&Message::Commit);
        },
        Exit::Peer,
        "unexpected Commit",
    ),
    (
        "has a device state that no machine has",
        |source| {
            source.begin(0);
            source.end(0, 0, 0);
            source.control.say(&Message::StateEnd { len: 0, xxh3: state_hash(b"") });
            source.control.say(&prepare(0));
        },
        Exit::Environment,
        "state",
    ),
    (
        "announces a huge device state",
        |source| {
            let meta = [&(1u64 << 40).to_le_bytes()[..], &[0; 8], &[1; 1000]].concat();
            source.control.raw(&frame(10, 2, &meta, 0));
        },
        Exit::Peer,
        "the device state is too large",
    ),
    (
        "leaves out device state",
        |source| source.state(5000, 1000),
        Exit::Peer,
        "offset of a piece of device state",
    ),
    (
        "ends its device state early",
        |source| {
            source.state(5000, 0);
            source.control.say(&Message::StateEnd { len: 5000, xxh3: 1 });
        },
        Exit::Peer,
        "length of the device state",
    ),
    (
        "has a batch of a later epoch",
        |source| {
            source.begin(0);
            source.data.batch(1, &[1], 2, &[0; 4096]);
        },
        Exit::Peer,
        "epoch on a data connection",
    ),
    (
        "has fewer batches than it says",
        |source| {
            source.begin(0);
            source.end(0, 3, 3);
        },
        Exit::Peer,
        "counts of a Barrier",
    ),
    (
        "sends a page twice",
        |source| {
            source.begin(0);
            source.data.batch(0, &[1], 2, &[1; 4096]);
            source.data.batch(0, &[1], 2, &[2; 4096]);
        },
        Exit::Peer,
        "page 1 was sent twice in an epoch",
    ),
    (
        "has pages outside of the VM",
        |source| {
            source.begin(0);
            source.data.batch(0, &[1 << 40], 0, &[]);
        },
        Exit::Peer,
        "page",
    ),
    ("has a batch of 2³² pages", |s| s.batch(&[0, 0], u32::MAX, 0), Exit::Peer, "too large"),
    ("has no pages in a batch", |source| source.batch(&[], 0, 0), Exit::Peer, "pages"),
    ("has pages of an unknown kind", |source| source.batch(&[0, 0, 9, 0], 1, 0), Exit::Peer, "tag"),
    // A page of 4095 bytes, of which the frame has one.
    (
        "has a payload that is too short",
        |s| s.batch(&[0, 0, 5, 0, 0xff, 0x0f], 1, 1),
        Exit::Peer,
        "sum of its lengths",
    ),
    (
        "announces a payload that no batch has",
        |source| {
            source.begin(0);
            source.data.raw(&header(6, 1, u32::MAX, 100));
        },
        Exit::Peer,
        "too large",
    ),
    ("sends bombs of LZ4", |source| source.bombs(5, &lz4_bomb()), Exit::Peer, "again and again"),
    // Masks that promise bytes, of which there are none.
    ("sends bombs of masks", |source| source.bombs(3, &[0xff; 72]), Exit::Peer, "again and again"),
    // Bytes that are what they are, but not what their hash says.
    ("sends other pages than it says", |s| s.bombs(2, &[9; 4096]), Exit::Peer, "again and again"),
];

fn prepare(epoch: u32) -> Message {
    Message::Prepare { epoch, state_len: 0, state_hash: state_hash(b"") }
}

/// Every case, in both ways.
pub(crate) fn hostile_sessions(ways: &Ways, offer: &Offer) {
    let all = Way::BOTH.into_iter().flat_map(|way| CASES.map(|case| (way, case)));
    each(all, |(way, (case, act, exit, says))| {
        let name = format!("an accepted source that {case} ({way:?})");
        let receiver = Receiver::with(&ways.options(way));
        let mut source = Accepted::open(ways, way, &receiver.address, offer);
        let before = Instant::now();
        act(&mut source);
        // A flood ends when the receiver has had enough of it.
        let since = if case.starts_with("floods") { Instant::now() } else { before };
        let (code, error) = receiver.failed(&name, since);
        println!("{name}: {error}");
        assert_eq!(code, exit as i32, "{name}: {error}");
        // Which of two limits is reached first is a matter of luck.
        let is_flood = case.starts_with("floods") && error.contains("bytes that nobody reads");
        assert!(is_flood || error.contains(says), "{name}: expected `{says}` in: {error}");
    });
}

/// Others who connect in the middle of a session are told that it is not theirs, and it goes on.
pub(crate) fn intruders(ways: &Ways, offer: &Offer) {
    for way in Way::BOTH {
        let receiver = Receiver::with(&ways.options(way));
        let mut control = ways.connect(way, &receiver.address).greeted();
        control.say(&Message::Offer(Offer { connections: 1, verify: false, ..offer.clone() }));
        assert!(control.hear_until(Kind::Accept).is_some(), "the offer is accepted");
        let told = |mut peer: Peer, role, session, words: &str| {
            let since = Instant::now();
            peer.say(&Message::Hello(pagewarp_wire::Hello::new(role, session)));
            let told = peer.hear_error();
            assert!(told.contains(words), "{way:?}, {role:?}: `{told}`");
            crate::receiver::soon(since, crate::BOUND, words);
        };
        let data = Role::Data { index: 0 };
        let mine = crate::support::peer::SESSION;
        let connect = || ways.connect(way, &receiver.address);
        // While the data connections are awaited.
        told(connect(), data, [1; 16], "another session");
        told(connect(), Role::Control, mine, "a second control connection");
        told(connect(), Role::Data { index: 1 }, mine, "index of a data connection");
        if way == Way::Protected {
            told(ways.other(way, &receiver.address), data, mine, "is not that of the session");
        }
        let data_connection = connect().greeted_as(data);
        // And afterwards.
        for (peer, role, session) in [
            (connect(), Role::Control, [1; 16]),
            (connect(), data, [1; 16]),
            (connect(), data, mine),
            (ways.other(way, &receiver.address), Role::Control, mine),
        ] {
            told(peer, role, session, "busy with another migration");
        }
        control.say(&Message::Ping { id: 77 });
        assert_eq!(control.hear_until(Kind::Pong), Some(77u64.to_le_bytes().to_vec()), "the session goes on");
        let since = Instant::now();
        drop((control, data_connection));
        let (code, error) = receiver.failed("intruders", since);
        assert_eq!(code, Exit::Link as i32, "{error}");
    }
}
