//! What a faulty or hostile peer sends: rejected, or decoded to what the reference decodes, and the decoder goes on.

use pagewarp_codec::{
    BackendError, DecodeError, DecodeJob, Decoder, EncodedBatch, Encoding, EncodingSet, PAGE_SIZE, Page,
    PageEncoder, Simd, SlotUse, plain_hash,
};

use super::jobs::{decode, decode_all, old_pages};
use super::pages::expect_pages;
use super::{At, MAX_PAGES, SLOTS, Subject, reference};
use crate::image::{Mutation, PageKind, mutate, page};
use crate::rng::SplitMix64;

/// Jobs that are decoded together, several in flight.
const ROUND: usize = 16;

/// So many corrupted batches into the backend's decoders, among valid ones.
///
/// Flipped bits, truncation, extension, other tags and lengths, random bytes, wrong hashes, wrong and missing bases, too many pages, encodings
/// that are not allowed; in half of them the tables and the hash are made to fit, so that nothing but the payload can be blamed. Each has to
/// come out as the reference says: rejected for the same reason, or decoded to the same pages.
///
/// # Panics
///
/// If one does not, or a valid batch is rejected.
pub fn malformed(subject: Subject<'_>, count: usize, seed: u64) {
    use Encoding::{Lz4, Lz4Xor, Same, Sparse, SparseXor, Zero};
    let mut rng = SplitMix64::new(seed);
    let sets = [
        EncodingSet::ALL,
        EncodingSet::of(&[Zero, Sparse, Lz4]),
        EncodingSet::of(&[Same, SparseXor, Lz4Xor]),
        EncodingSet::of(&[Lz4, Lz4Xor]),
    ];
    // Most with everything allowed, where the most can go wrong.
    let few = count / 8;
    for (allowed, count) in sets.into_iter().zip([count - 3 * few, few, few, few]) {
        let mut peer = Peer::new(allowed, rng.next_u64());
        let mut ours = vec![subject.decoder(allowed)];
        let (mut number, mut left) = (0, count);
        loop {
            let round: Vec<Sent> = (0..ROUND)
                .map(|_| {
                    let damaged = left > 0 && rng.below(4) > 0;
                    left -= usize::from(damaged);
                    peer.send(damaged)
                })
                .collect();
            peer.next_round(&round);
            let jobs = round.iter().zip(number..).map(|(sent, number)| sent.job(number)).collect();
            for (sent, seen) in round.iter().zip(decode_all(&mut ours, jobs, &mut rng)) {
                compare(&At { subject, seed, allowed, batch: number }, sent, seen);
                number += 1;
            }
            // The last round may be one of valid batches alone: what came before has left nothing behind.
            if left == 0 && round.iter().all(|sent| sent.valid.is_some()) {
                break;
            }
        }
    }
}

/// Panics unless the backend says what the reference says.
fn compare(at: &At<'_>, sent: &Sent, seen: Result<Vec<Page>, BackendError>) {
    if let Some(plain) = &sent.valid {
        assert!(sent.expected.as_ref() == Ok(plain), "{at}: the reference does not decode a valid batch");
    }
    match (&sent.expected, seen) {
        (Ok(plain), Ok(seen)) => {
            expect_pages(at, "the backend", &seen, plain, &sent.encoded);
            assert_eq!(plain_hash(&seen), sent.encoded.plain_hash, "{at}: the hash says otherwise");
        }
        (Err(expected), Err(seen)) => assert_eq!(&seen, expected, "{at}: not the reference's reason"),
        (Ok(_), Err(seen)) => panic!("{at}: the reference decodes it, the backend says: {seen}"),
        (Err(expected), Ok(_)) => panic!("{at}: decoded, the reference says: {expected}"),
    }
}

/// What was sent, and what the reference says to it.
struct Sent {
    encoded: EncodedBatch,
    bases: Vec<Page>,
    slots: Vec<SlotUse>,
    /// The pages, if nothing is wrong.
    valid: Option<Vec<Page>>,
    expected: Result<Vec<Page>, BackendError>,
}

impl Sent {
    fn job(&self, number: u64) -> DecodeJob {
        DecodeJob {
            encoded: self.encoded.clone(),
            number,
            bases: self.bases.clone(),
            slots: self.slots.clone(),
            pages: old_pages(),
        }
    }
}

/// Makes batches, valid and other.
struct Peer {
    rng: SplitMix64,
    reference: Box<dyn Decoder>,
    /// One encoder for each allowed encoding alone.
    encoders: Vec<PageEncoder>,
    /// What the decoder's slots hold. A failed job leaves anything in its slots, so that the upper half is for damaged batches.
    held: Vec<Option<Page>>,
    /// Slots that no job of this round has.
    free: Vec<u32>,
}

impl Peer {
    fn new(allowed: EncodingSet, seed: u64) -> Peer {
        let encoder = |encoding| {
            PageEncoder::new(Simd::Scalar, EncodingSet::of(&[encoding]))
                .expect("every machine can do without SIMD")
        };
        let half = SLOTS / 2;
        Peer {
            rng: SplitMix64::new(seed),
            reference: Subject::new(&reference()).decoder(allowed),
            encoders: allowed.iter().map(encoder).collect(),
            held: vec![None; half as usize],
            free: (0..half).collect(),
        }
    }

    /// Notes what the valid batches of the round leave in the slots.
    fn next_round(&mut self, round: &[Sent]) {
        for sent in round {
            for (plain, slot) in sent.valid.iter().flatten().zip(&sent.slots) {
                if let Some(slot) = slot.slot() {
                    self.held[slot as usize] = Some(*plain);
                }
            }
        }
        self.free = (0..SLOTS / 2).collect();
    }

    fn send(&mut self, damaged: bool) -> Sent {
        let mut plain = Vec::new();
        let mut sent = Sent {
            encoded: EncodedBatch::default(),
            bases: Vec::new(),
            slots: Vec::new(),
            valid: None,
            expected: Ok(Vec::new()),
        };
        let count = match self.rng.below(32) {
            0 => 0,
            1 => MAX_PAGES,
            _ => 1 + self.rng.index(4),
        };
        for _ in 0..count {
            plain.push(self.append_page(&mut sent));
        }
        sent.encoded.plain_hash = plain_hash(&plain);
        if damaged {
            self.damage(&mut sent);
            sent.slots = self.upper_slots(sent.encoded.encodings.len());
        } else {
            sent.valid = Some(plain);
        }
        sent.expected = self.decode(&sent);
        sent
    }

    fn append_page(&mut self, sent: &mut Sent) -> Page {
        let rng = &mut self.rng;
        let slot = match rng.below(4) {
            0 => None,
            _ if self.free.is_empty() => None,
            _ => Some(self.free.swap_remove(rng.index(self.free.len()))),
        };
        let held = slot.and_then(|slot| self.held[slot as usize]).filter(|_| rng.below(4) > 0);
        let base = held.unwrap_or_else(|| any_page(rng));
        sent.slots.push(match (slot, held) {
            (None, _) => SlotUse::None,
            (Some(slot), None) => SlotUse::Store(slot),
            (Some(slot), Some(_)) => SlotUse::Delta(slot),
        });
        let mut plain = base;
        let kind = PageKind::ALL[rng.index(PageKind::ALL.len())];
        let changes = [
            Mutation::Nothing,
            Mutation::Bytes(1 + rng.index(200)),
            Mutation::Share(rng.unit()),
            Mutation::Replace(kind),
        ];
        mutate(&mut plain, changes[rng.index(4)], rng);
        let payload = &mut sent.encoded.payload;
        let start = payload.len();
        let encoder = rng.index(self.encoders.len());
        let encoding = self.encoders[encoder].encode(&plain, Some(&base), payload);
        sent.encoded.lens.push((payload.len() - start) as u16);
        sent.encoded.encodings.push(encoding);
        if encoding.needs_base() {
            sent.bases.push(base);
        }
        plain
    }

    fn decode(&mut self, sent: &Sent) -> Result<Vec<Page>, BackendError> {
        decode(&mut *self.reference, sent.job(0))
    }

    fn upper_slots(&mut self, pages: usize) -> Vec<SlotUse> {
        match self.rng.below(3) {
            0 => Vec::new(),
            1 => vec![SlotUse::None; pages],
            _ => (SLOTS / 2..SLOTS).map(SlotUse::Store).take(pages).collect(),
        }
    }

    /// Damages the batch once or twice; then, half of the time, makes everything else fit.
    fn damage(&mut self, sent: &mut Sent) {
        for _ in 0..1 + self.rng.below(2) {
            damage_once(sent, &mut self.rng);
        }
        if self.rng.below(2) == 0 {
            return;
        }
        let needed = sent.encoded.encodings.iter().filter(|encoding| encoding.needs_base()).count();
        sent.bases.resize_with(needed, || any_page(&mut self.rng));
        let sum: usize = sent.encoded.lens.iter().map(|&len| usize::from(len)).sum();
        // What is missing is random.
        let start = sent.encoded.payload.len();
        sent.encoded.payload.resize(sum, 0);
        self.rng.fill(&mut sent.encoded.payload[start.min(sum)..]);
        if let Err(BackendError::Peer(DecodeError::HashMismatch { seen, .. })) = self.decode(sent) {
            sent.encoded.plain_hash = seen;
        }
    }
}

fn any_page(rng: &mut SplitMix64) -> Page {
    page(PageKind::ALL[rng.index(PageKind::ALL.len())], rng)
}

fn any_encoding(rng: &mut SplitMix64) -> Encoding {
    Encoding::ALL[rng.index(Encoding::ALL.len())]
}

/// A length at which something happens.
fn any_length(rng: &mut SplitMix64) -> u16 {
    let edges = [0, 1, 16, 17, 4095, 4096, 4097, u16::MAX];
    if rng.below(2) == 0 { edges[rng.index(edges.len())] } else { rng.below(4097) as u16 }
}

/// One thing that goes wrong. With no page, or no payload, most of them change nothing.
fn damage_once(sent: &mut Sent, rng: &mut SplitMix64) {
    let Sent { encoded, bases, .. } = sent;
    let EncodedBatch { encodings, lens, payload, plain_hash } = encoded;
    let pages = encodings.len().min(lens.len());
    match rng.below(18) {
        0..4 => scribble(payload, rng),
        4..6 => scribble_masks(lens, payload, rng),
        6 => payload.truncate(rng.index(payload.len() + 1)),
        7 => {
            // The last page ends sooner.
            let cut = lens.last().map_or(0, |&len| rng.below(u64::from(len) + 1) as u16);
            payload.truncate(payload.len().saturating_sub(cut.into()));
            lens.last_mut().into_iter().for_each(|len| *len -= cut);
        }
        8 => {
            let more = 1 + rng.index(20);
            payload.extend((0..more).map(|_| rng.byte()));
            if rng.below(2) == 0 {
                lens.last_mut().into_iter().for_each(|len| *len = len.saturating_add(more as u16));
            }
        }
        9 if pages > 0 => encodings[rng.index(pages)] = any_encoding(rng),
        10 if pages > 0 => encodings.swap(rng.index(pages), rng.index(pages)),
        11 if pages > 0 => lens.swap(rng.index(pages), rng.index(pages)),
        12 if pages > 0 => {
            // The sum stays the same, so that the pages are looked at.
            let (from, to) = (rng.index(pages), rng.index(pages));
            let moved = lens[from].min(1 + rng.below(20) as u16);
            lens[from] -= moved;
            lens[to] = lens[to].saturating_add(moved);
        }
        13 if pages > 0 => lens[rng.index(pages)] = any_length(rng),
        14 => *plain_hash ^= 1 << rng.below(64),
        15 => match rng.below(3) {
            0 => drop(bases.pop()),
            1 => bases.push(any_page(rng)),
            _ => {
                // Another base than the sender's.
                bases.iter_mut().for_each(|base| mutate(base, Mutation::Bytes(1), rng));
            }
        },
        16 => match rng.below(4) {
            0 => drop(encodings.pop()),
            1 => lens.push(any_length(rng)),
            2 => {
                encodings.resize(MAX_PAGES + 1, Encoding::Zero);
                lens.resize(MAX_PAGES + 1, 0);
            }
            _ => {
                encodings.push(any_encoding(rng));
                lens.push(any_length(rng));
            }
        },
        _ => {
            encodings.iter_mut().for_each(|encoding| *encoding = any_encoding(rng));
            if rng.below(2) == 0 {
                rng.fill(payload);
            }
        }
    }
}

/// Changes some bytes.
fn scribble(payload: &mut [u8], rng: &mut SplitMix64) {
    for _ in 0..1 + rng.index(4) {
        let Some(at) = payload.len().checked_sub(1).map(|last| rng.index(last + 1)) else { return };
        match rng.below(5) {
            0 => payload[at] = rng.byte(),
            1 => payload[at] ^= 1 << rng.below(8),
            2 => payload[at] = [0, 0xff][rng.index(2)],
            // Lengths that go on and on.
            3 => payload.iter_mut().skip(at).take(1 + rng.index(40)).for_each(|byte| *byte = 0xff),
            _ => {
                let end = payload.len().min(at + 1 + rng.index(PAGE_SIZE));
                rng.fill(&mut payload[at..end]);
            }
        }
    }
}

/// Changes a bit at the beginning of a page's payload, where masks, tokens and offsets are, or clears a mask.
fn scribble_masks(lens: &[u16], payload: &mut [u8], rng: &mut SplitMix64) {
    if lens.is_empty() {
        return;
    }
    let index = rng.index(lens.len());
    let start: usize = lens[..index].iter().map(|&len| usize::from(len)).sum();
    let head = payload.get_mut(start..).unwrap_or_default().iter_mut().take(usize::from(lens[index]).min(72));
    if rng.below(2) == 0 {
        let mask = rng.below(2) * rng.below(9);
        head.skip(8 * mask as usize).take(8).for_each(|byte| *byte = 0);
    } else {
        head.skip(rng.index(72)).take(1).for_each(|byte| *byte ^= 1 << rng.below(8));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The name of the error, without what it says.
    fn name(expected: &Result<Vec<Page>, BackendError>) -> String {
        let text = match expected {
            Ok(_) => "decoded".to_owned(),
            Err(BackendError::Peer(DecodeError::Page { reason, .. })) => format!("{reason:?}"),
            Err(BackendError::Peer(error)) => format!("{error:?}"),
            Err(other) => panic!("the reference fails: {other}"),
        };
        text.split([' ', '{']).next().unwrap_or_default().to_owned()
    }

    #[test]
    fn damage_is_of_every_kind() {
        let allowed = EncodingSet::of(&[Encoding::Same, Encoding::Sparse, Encoding::Lz4Xor]);
        let mut seen = std::collections::BTreeMap::new();
        for allowed in [EncodingSet::ALL, allowed] {
            let mut peer = Peer::new(allowed, 5);
            for _ in 0..3000 {
                let sent = peer.send(true);
                *seen.entry(name(&sent.expected)).or_insert(0) += 1;
            }
        }
        println!("{seen:?}");
        for reason in [
            "decoded",
            "TooManyPages",
            "Tables",
            "PayloadLength",
            "Bases",
            "HashMismatch",
            "NotAllowed",
            "FixedLength",
            "LengthRange",
            "SparseLength",
            "SparseEmpty",
            "SparseEmptyLine",
            "SparseZeroByte",
            "Lz4",
            "Lz4Length",
        ] {
            assert!(seen.get(reason).is_some_and(|&count| count > 5), "{reason}: {seen:?}");
        }
        assert!((300..3000).contains(&seen["decoded"]), "{seen:?}");
    }

    #[test]
    fn valid_batches_are_valid() {
        let mut peer = Peer::new(EncodingSet::ALL, 6);
        for _ in 0..20 {
            let round: Vec<Sent> = (0..ROUND).map(|_| peer.send(false)).collect();
            assert!(round.iter().all(|sent| sent.expected.as_ref().ok() == sent.valid.as_ref()));
            peer.next_round(&round);
        }
    }
}
