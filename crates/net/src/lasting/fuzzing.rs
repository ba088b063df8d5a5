//! Lasting connections against a model, over connections in memory: what comes is read once and in order, what is sent arrives as it was, whatever the other end does.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pagewarp_engine::flow::lock;
use pagewarp_engine::transport::Stream;

use super::frame::{ANSWER_LEN, Answer, HEADER_LEN, MAX_PIECE, OPENING_LEN, Opening, Piece, Token};
use super::limit::Limit;
use super::replay::Replay;
use super::stream::{Inner, LastingStream, Role};

/// Bytes that one input may have sent in each direction: a few blocks and confirmations.
const MOST: usize = 700 << 10;

/// Reads `data` as frames, or as what the two ends of a lasting connection do.
///
/// # Panics
///
/// If a frame that was understood has another form, or if the connection does something else than the model.
pub fn fuzz_stream(data: &[u8]) {
    let [mode, data @ ..] = data else { return };
    match mode % 4 {
        0 => frames(data),
        1 => replay(&mut Input(data)),
        _ => connection(&mut Input(data), 1 + usize::from(mode / 4) * 37),
    }
}

/// What the fuzzer gives, a number at a time; zeros at its end.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let Some((&byte, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        byte
    }

    /// Mostly small, now and then large enough for blocks, pieces and confirmations to be many.
    fn len(&mut self) -> usize {
        match self.byte() {
            byte @ 0..200 => byte.into(),
            byte => (usize::from(byte) - 199) * (1 + usize::from(self.byte())) * 8,
        }
    }
}

/// The bytes at these places of a stream: such that one is not like another.
fn bytes(from: u64, len: usize) -> Vec<u8> {
    (from..from + len as u64).map(|at| (at ^ at >> 8 ^ at >> 16) as u8).collect()
}

fn frames(data: &[u8]) {
    if let Some(bytes) = data.first_chunk::<OPENING_LEN>()
        && let Ok(opening) = Opening::decode(bytes)
    {
        assert_eq!(opening.encode()[4..], bytes[4..]);
    }
    if let Some(bytes) = data.first_chunk::<ANSWER_LEN>()
        && let Ok(answer) = Answer::decode(bytes)
    {
        assert_eq!(Answer::decode(&answer.encode()).expect("what was understood"), answer);
    }
    for bytes in data.as_chunks::<HEADER_LEN>().0 {
        if let Ok(piece) = Piece::decode(bytes) {
            assert_eq!(&piece.encode(), bytes);
        }
    }
}

fn replay(input: &mut Input<'_>) {
    let (mut replay, mut confirmed, mut end) = (Replay::default(), 0u64, 0u64);
    while !input.0.is_empty() && end < MOST as u64 {
        match input.byte() % 4 {
            0 => {
                let total = confirmed.saturating_sub(3) + input.len() as u64;
                let fits = (confirmed..=end).contains(&total);
                assert_eq!(replay.confirm(total), fits);
                confirmed = if fits { total } else { confirmed };
            }
            1 => {
                assert!(replay.confirm(end));
                confirmed = end;
            }
            _ => {
                let (first, second, more) = (input.len(), input.len(), input.len());
                let text = bytes(end, first + second + more);
                let slices = [IoSlice::new(&text[..first]), IoSlice::new(&text[first..])];
                replay.push(&slices, first + second);
                end += (first + second) as u64;
            }
        }
        assert_eq!((replay.end(), replay.len() as u64), (end, end - confirmed));
        let kept = replay.pieces().map(<[u8]>::len).sum::<usize>();
        assert_eq!(kept as u64, end - confirmed);
    }
    let kept: Vec<u8> = replay.pieces().flatten().copied().collect();
    assert!(kept == bytes(confirmed, kept.len()), "what is kept is what was sent");
}

/// A connection of which this end sees what is `coming`, and of which it is seen what has `gone`.
#[derive(Clone)]
struct Tape(Arc<Mutex<Inside>>);

struct Inside {
    coming: VecDeque<u8>,
    gone: Vec<u8>,
    /// Bytes that are read or written at a time, at most.
    cut: usize,
}

impl Tape {
    fn new(cut: usize) -> Tape {
        Tape(Arc::new(Mutex::new(Inside { coming: VecDeque::new(), gone: Vec::new(), cut })))
    }

    fn comes(&self, bytes: &[u8]) {
        lock(&self.0).coming.extend(bytes);
    }
}

impl Read for Tape {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let mut inside = lock(&self.0);
        let most = bytes.len().min(inside.cut);
        inside.coming.read(&mut bytes[..most])
    }
}

impl Write for Tape {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut inside = lock(&self.0);
        let len = bytes.len().min(inside.cut);
        inside.gone.extend(&bytes[..len]);
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for Tape {
    fn try_clone_stream(&self) -> io::Result<Box<dyn Stream>> {
        Ok(Box::new(self.clone()))
    }

    fn shutdown(&self) -> io::Result<()> {
        Ok(())
    }

    fn set_timeouts(&self, _read: Option<Duration>, _write: Option<Duration>) -> io::Result<()> {
        Ok(())
    }

    /// Nothing more comes than what is there.
    fn is_hung_up(&self) -> bool {
        true
    }
}

/// What the other end has said over the present connection below and was not read yet.
enum Said {
    /// So many bytes of a piece are left.
    Data(usize),
    Confirm(u64),
    Close,
    Nonsense,
}

/// What has to become of a connection.
#[derive(Default)]
struct Model {
    said: VecDeque<Said>,
    /// Bytes that came in pieces that were read, and bytes that were written.
    received: u64,
    sent: u64,
    /// What the other end has by its own account.
    delivered: u64,
    /// It has closed in order.
    ended: bool,
}

impl Model {
    /// Lets the other end say something, as the fuzzer wants. Returns the bytes.
    fn say(&mut self, input: &mut Input<'_>, budget: &mut usize) -> Vec<u8> {
        if self.ended || matches!(self.said.back(), Some(Said::Close | Said::Nonsense)) {
            return Vec::new();
        }
        match input.byte() % 8 {
            0 => {
                let mut header = [0; HEADER_LEN];
                (header[0], header[3], header[4], header[11]) =
                    (input.byte(), input.byte(), input.byte(), input.byte());
                self.said.push_back(match Piece::decode(&header) {
                    // Its data would have to follow.
                    Ok(Piece::Data(_)) => return Vec::new(),
                    Ok(Piece::Confirm(total)) => Said::Confirm(total),
                    Ok(Piece::Close) => Said::Close,
                    Err(_) => Said::Nonsense,
                });
                header.to_vec()
            }
            1 => {
                self.said.push_back(Said::Close);
                Piece::Close.encode().to_vec()
            }
            2 => {
                let total = (self.delivered.saturating_sub(1) + input.len() as u64).min(self.sent + 1);
                self.said.push_back(Said::Confirm(total));
                Piece::Confirm(total).encode().to_vec()
            }
            _ => {
                let len = (1 + input.len()).min(MAX_PIECE).min(*budget);
                if len == 0 {
                    return Vec::new();
                }
                *budget -= len;
                let text = bytes(self.received + self.unread(), len);
                self.said.push_back(Said::Data(len));
                [&Piece::Data(len).encode()[..], &text].concat()
            }
        }
    }

    /// Bytes of data that have come and were not read.
    fn unread(&self) -> u64 {
        self.said.iter().map(|said| if let Said::Data(left) = said { *left as u64 } else { 0 }).sum()
    }

    /// Hears what stands before the next data. Returns whether it can be.
    fn hear(&mut self) -> bool {
        while let Some(&Said::Confirm(total)) = self.said.front() {
            if !(self.delivered..=self.sent).contains(&total) {
                return false;
            }
            self.delivered = total;
            self.said.pop_front();
        }
        true
    }

    /// Forgets what comes after a confirmation that cannot be: nobody reads on there.
    fn cut_at_lies(&mut self) {
        let mut delivered = self.delivered;
        let lie = self.said.iter().position(|said| match said {
            Said::Confirm(total) if (delivered..=self.sent).contains(total) => {
                delivered = *total;
                false
            }
            Said::Confirm(_) => true,
            _ => false,
        });
        self.said.truncate(lie.unwrap_or(self.said.len()));
    }

    /// This was read.
    fn read(&mut self, result: io::Result<&[u8]>) {
        if !self.hear() {
            let kind = result.map(<[u8]>::len).map_err(|error| error.kind());
            assert_eq!(kind, Err(ErrorKind::InvalidData), "a confirmation that cannot be was believed");
            return;
        }
        match (self.said.front_mut(), result) {
            (Some(Said::Data(left)), Ok(seen)) => {
                assert!((1..=*left).contains(&seen.len()), "{} bytes of {left}", seen.len());
                assert!(seen == bytes(self.received, seen.len()), "other bytes than came");
                *left -= seen.len();
                self.received += seen.len() as u64;
                if *left == 0 {
                    self.said.pop_front();
                }
            }
            (Some(Said::Close), Ok([])) => self.ended = true,
            (None, Ok([])) if self.ended => {}
            (Some(Said::Nonsense), Err(error)) => assert_eq!(error.kind(), ErrorKind::InvalidData),
            // It broke, and there is no patience.
            (None, Err(error)) if !self.ended => assert_eq!(error.kind(), ErrorKind::ConnectionAborted),
            (_, result) => panic!("{:?} was read", result.map(<[u8]>::len)),
        }
    }
}

fn connection(input: &mut Input<'_>, cut: usize) {
    let mut tape = Tape::new(cut);
    let token = Token { group: [7; 14], number: 1 };
    let below = Box::new(tape.clone());
    // Without patience: a break is told at once, and nothing waits. It may be mended all the same.
    let role = Role::Accepts(Arc::new(Limit::new(Duration::ZERO)));
    let inner = Inner::new(token, role, "the source".into(), Duration::ZERO, Arc::default(), below);
    let inner = Arc::new(inner.expect("nothing can fail in memory"));
    let mut stream = LastingStream::new(inner.clone(), |_| {});
    let mut model = Model::default();
    let mut budget = MOST;
    // Where what was sent over the present connection below begins.
    let mut begin = 0;
    while !input.0.is_empty() {
        match input.byte() % 16 {
            0..8 => tape.comes(&model.say(input, &mut budget)),
            8..11 => {
                let mut into = vec![0; 1 + input.len()];
                let result = stream.read(&mut into);
                let is_over = result.is_err();
                model.read(result.map(|n| &into[..n]));
                if is_over {
                    return;
                }
            }
            11..13 => {
                let len = (1 + input.len()).min(MOST - model.sent as usize);
                assert_eq!(stream.write(&bytes(model.sent, len)).unwrap(), len);
                model.sent += len as u64;
            }
            13 => return hang_up(&mut stream, model),
            _ => {
                check_gone(&tape, begin, &model);
                let delivered = (model.delivered.saturating_sub(1) + input.len() as u64).min(model.sent + 1);
                tape = Tape::new(cut);
                let mut told = None;
                let resumed = inner.resume(Box::new(tape.clone()), delivered, |received| {
                    told = Some(received);
                    Ok(())
                });
                assert_eq!(told, Some(model.received), "what has come by now");
                assert_eq!(resumed.is_ok(), (model.delivered..=model.sent).contains(&delivered));
                if resumed.is_err() {
                    return;
                }
                begin = delivered;
                model.delivered = delivered;
                // What was not read is said again, or something else.
                model.said.clear();
            }
        }
    }
    check_gone(&tape, begin, &model);
}

/// The other end has ended the connection below: what had come can still be read, and then it is over.
fn hang_up(stream: &mut LastingStream, mut model: Model) {
    assert!(stream.is_hung_up());
    model.cut_at_lies();
    let in_order = model.ended || model.said.iter().any(|said| matches!(said, Said::Close));
    let (from, unread) = (model.received, model.unread());
    model.received += unread;
    let mut seen = Vec::new();
    let end = stream.read_to_end(&mut seen);
    assert!(seen == bytes(from, unread as usize), "what came before the end can be read after it");
    assert_eq!(end.is_ok(), in_order);
}

/// What has gone over a connection below: whole pieces that hold what was sent from `begin` on, and confirmations that are true.
fn check_gone(tape: &Tape, begin: u64, model: &Model) {
    let inside = lock(&tape.0);
    let (mut gone, mut data, mut last) = (&inside.gone[..], Vec::<u8>::new(), 0);
    while let Some((header, rest)) = gone.split_first_chunk::<HEADER_LEN>() {
        gone = rest;
        match Piece::decode(header).expect("a piece as the other end reads it") {
            Piece::Data(len) => {
                let (now, rest) = gone.split_at_checked(len).expect("a piece is sent as a whole");
                data.extend(now);
                gone = rest;
            }
            Piece::Confirm(total) => {
                assert!((last..=model.received).contains(&total), "{total} bytes of {}", model.received);
                last = total;
            }
            Piece::Close => panic!("closed by nobody"),
        }
    }
    assert!(gone.is_empty(), "a piece is sent as a whole");
    assert_eq!(data.len() as u64, model.sent - begin);
    assert!(data == bytes(begin, data.len()), "what arrives is what was sent");
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 10 } else { 2000 }))]

        #[test]
        fn a_lasting_connection_does_as_the_model(data in vec(any::<u8>(), 0..300)) {
            super::fuzz_stream(&data);
        }
    }
}
