//! `kv`: an in-memory key-value store.
//!
//! Memory is laid out as a store's heap is: a hash table of pointers, and slabs of 16 KiB that hold records
//! (record.rs) of one size class each; every tenth slab's place stays free, as heaps have holes, and what is
//! not filled stays free at the end. In steady state keys are drawn by Zipf's law, looked up, and written:
//! most writes count and date a record in place, the others replace its value.
//!
//! The expected version of each record is kept in a table of its own, so that a record that is whole but old
//! is found out.

use super::record::{CLASSES, HEADER, Shape, Text, checksum, touch};
use super::zipf::Zipf;
use super::{Corruption, Plan, Step, Verified, Workload};
use crate::rng::{Rng, mix};

const PAGE: usize = 4096;
const SLAB: usize = 16 << 10;
const SLAB_HEADER: usize = 64;
const SLAB_MAGIC: u64 = 0x7062_616c_7377_6170;
/// Of a hundred slabs' places, how many stay free.
const HOLES: u64 = 10;
/// Of a hundred writes, how many replace the value, and how many only set the timestamp.
const REPLACE: u64 = 30;
const DATE_ONLY: u64 = 20;
/// Spreads popularity over addresses; a prime.
const SCATTER: u64 = 2_654_435_761;
/// One verified record in this many is also looked up by its key.
const LOOKUP_EVERY: u32 = 8;

pub struct Kv<'m> {
    heap: Heap<'m>,
    zipf: Zipf,
    rng: Rng,
    text: Text,
    /// Where verification is: slab number, slot, and how many sweeps it has done.
    slab: usize,
    slot: usize,
    sweeps: u32,
}

/// The memory and the places of things in it (in bytes from its start).
struct Heap<'m> {
    mem: &'m mut [u8],
    /// Address of `mem[0]`, so that pointers look like pointers.
    base: u64,
    seed: u64,
    records: u32,
    bucket_mask: u64,
    versions: usize,
    slabs: usize,
    /// Places for slabs up to the last one in use.
    places: usize,
    /// There are no holes from this place on: the memory has no more to spare.
    holes_end: usize,
}

/// A slab that is being filled.
#[derive(Clone, Copy, Default)]
struct Open {
    at: usize,
    used: usize,
}

impl<'m> Kv<'m> {
    /// Fills memory. `base` is the address of `mem`.
    pub fn new(mem: &'m mut [u8], base: u64, plan: Plan) -> Self {
        let budget = plan.filled.min(mem.len() / PAGE) * PAGE;
        let (records, slab_count) = count_records(budget, plan.seed);
        let (buckets, versions, slabs) = layout(records);
        let all_places = mem.len().saturating_sub(slabs) / SLAB;
        let spare = all_places.saturating_sub(slab_count);
        let holes_end =
            (0..all_places).filter(|&place| hole_at(place, plan.seed)).nth(spare).unwrap_or(all_places);
        let bucket_mask = (buckets - 1) as u64;
        let mut heap =
            Heap { mem, base, seed: plan.seed, records, bucket_mask, versions, slabs, places: 0, holes_end };
        let active = (u64::from(records) * plan.working_set as u64 / plan.filled.max(1) as u64)
            .min(u64::from(records));
        let mut text = Text::new();
        heap.fill(active, &mut text);
        Kv {
            heap,
            zipf: Zipf::new(active.max(1)),
            rng: Rng::new(plan.seed ^ 0x6b76),
            text,
            slab: 0,
            slot: 0,
            sweeps: 0,
        }
    }
}

/// Buckets, place of the version table, and place of the first slab.
fn layout(records: u32) -> (usize, usize, usize) {
    let buckets = (records as usize).next_power_of_two();
    let versions = buckets * 8;
    (buckets, versions, (versions + records as usize * 2).next_multiple_of(SLAB))
}

/// How many records fit into `budget` bytes together with the tables, and in how many slabs.
fn count_records(budget: usize, seed: u64) -> (u32, usize) {
    let mut free_slots = [0usize; CLASSES.len()];
    let mut slabs = 0;
    let mut records = 0u32;
    loop {
        let class = Shape::of(records, seed).class;
        let opens = usize::from(free_slots[class] == 0);
        let (.., tables) = layout(records + 1);
        if tables + (slabs + opens) * SLAB > budget || records == u32::MAX >> 1 {
            return (records, slabs);
        }
        if opens == 1 {
            slabs += 1;
            free_slots[class] = slots_per_slab(class);
        }
        free_slots[class] -= 1;
        records += 1;
    }
}

fn hole_at(place: usize, seed: u64) -> bool {
    mix(place as u64 ^ seed) % 100 < HOLES
}

fn slots_per_slab(class: usize) -> usize {
    (SLAB - SLAB_HEADER) / CLASSES[class]
}

impl Heap<'_> {
    fn fill(&mut self, active: u64, text: &mut Text) {
        let mut rng = Rng::new(self.seed);
        let mut open = [Open::default(); CLASSES.len()];
        for n in 0..u64::from(self.records) {
            // The first `active` allocations are the ones that get written; popularity (the id) is scattered
            // over them.
            let id = if n < active { (n * SCATTER % active) as u32 } else { n as u32 };
            let shape = Shape::of(id, self.seed);
            let slot = &mut open[shape.class];
            if slot.at == 0 || slot.used == slots_per_slab(shape.class) {
                if slot.at != 0 {
                    seal_slab(self.mem, *slot, shape.class);
                }
                *slot = Open { at: self.next_place(), used: 0 };
            }
            let at = slot.at + SLAB_HEADER + slot.used * shape.size();
            slot.used += 1;
            self.insert(at, id, &shape, &mut rng, text);
        }
        for (class, slot) in open.iter().enumerate().filter(|(_, slot)| slot.at != 0) {
            seal_slab(self.mem, *slot, class);
        }
    }

    /// The next place for a slab, leaving holes while there is memory for them.
    fn next_place(&mut self) -> usize {
        while self.is_hole(self.places) {
            self.places += 1;
        }
        self.places += 1;
        self.slabs + (self.places - 1) * SLAB
    }

    fn is_hole(&self, place: usize) -> bool {
        place < self.holes_end && hole_at(place, self.seed)
    }

    /// Writes a new record and hangs it into its bucket.
    fn insert(&mut self, at: usize, id: u32, shape: &Shape, rng: &mut Rng, text: &mut Text) {
        text.len = 0;
        shape.key(id, text);
        let bucket = self.bucket(text.bytes());
        shape.value(id, shape.value_len, 0, rng, text);
        let next = self.word(bucket);
        let record = &mut self.mem[at..at + shape.size()];
        record[..8].copy_from_slice(&next.to_le_bytes());
        record[8..12].copy_from_slice(&id.to_le_bytes());
        record[12..16].copy_from_slice(&1u32.to_le_bytes());
        record[20] = shape.key_len() as u8;
        record[21] = shape.kind as u8;
        record[22..24].copy_from_slice(&(shape.value_len as u16).to_le_bytes());
        record[HEADER..HEADER + text.len].copy_from_slice(text.bytes());
        let sum = checksum(record);
        record[16..20].copy_from_slice(&sum.to_le_bytes());
        let pointer = self.base + at as u64;
        self.mem[bucket..bucket + 8].copy_from_slice(&pointer.to_le_bytes());
        self.set_version(id, 1);
    }

    fn bucket(&self, key: &[u8]) -> usize {
        let mut hash = self.seed;
        for part in key.chunks(8) {
            let mut word = [0; 8];
            word[..part.len()].copy_from_slice(part);
            hash = mix(hash ^ u64::from_le_bytes(word));
        }
        (hash & self.bucket_mask) as usize * 8
    }

    /// The place of the record with this key; or what is wrong.
    fn find(&self, key: &[u8]) -> Result<usize, Corruption> {
        let bucket = self.bucket(key);
        let mut link = bucket;
        // A damaged chain may be a circle.
        for _ in 0..1000 {
            let pointer = self.word(link);
            let wrong = |what| Corruption { at: link, what, expected: 0, found: pointer };
            if pointer == 0 {
                return Err(wrong("lost-key"));
            }
            let at = pointer.wrapping_sub(self.base) as usize;
            if at < self.slabs || at > self.mem.len() - CLASSES[0] || !at.is_multiple_of(16) {
                return Err(wrong("wild-pointer"));
            }
            let record = &self.mem[at..];
            if record[20] as usize == key.len() && record.get(HEADER..HEADER + key.len()) == Some(key) {
                return Ok(at);
            }
            link = at;
        }
        Err(Corruption { at: bucket, what: "endless-chain", expected: 0, found: 1000 })
    }

    /// Compares a record with what it must be.
    fn check(&self, at: usize, id: u32, shape: &Shape) -> Result<(), Corruption> {
        let wrong = |what, expected, found| Err(Corruption { at, what, expected, found });
        let found = self.half(at + 8);
        if found != id {
            return wrong("record-id", u64::from(id), u64::from(found));
        }
        let expected = u64::from(self.version(id));
        let found = u64::from(self.half(at + 12) as u16);
        if found != expected {
            return wrong("record-version", expected, found);
        }
        let expected = checksum(&self.mem[at..at + shape.size()]);
        let found = self.half(at + 16);
        if found != expected {
            return wrong("record-sum", u64::from(expected), u64::from(found));
        }
        Ok(())
    }

    fn word(&self, at: usize) -> u64 {
        u64::from_le_bytes(*self.mem[at..].first_chunk().expect("inside the heap"))
    }

    fn half(&self, at: usize) -> u32 {
        u32::from_le_bytes(*self.mem[at..].first_chunk().expect("inside the heap"))
    }

    fn version(&self, id: u32) -> u16 {
        let at = self.versions + id as usize * 2;
        u16::from_le_bytes([self.mem[at], self.mem[at + 1]])
    }

    fn set_version(&mut self, id: u32, version: u16) {
        let at = self.versions + id as usize * 2;
        self.mem[at..at + 2].copy_from_slice(&version.to_le_bytes());
    }
}

/// Writes the header of a slab that is complete.
fn seal_slab(mem: &mut [u8], slab: Open, class: usize) {
    let contents = (class as u64) << 32 | slab.used as u64;
    for (i, word) in [SLAB_MAGIC, contents, slab_sum(slab.at, contents)].into_iter().enumerate() {
        mem[slab.at + 8 * i..][..8].copy_from_slice(&word.to_le_bytes());
    }
}

fn slab_sum(at: usize, contents: u64) -> u64 {
    mix(SLAB_MAGIC ^ contents ^ (at as u64) << 16)
}

impl Workload for Kv<'_> {
    fn step(&mut self, now_ms: u64, found: &mut dyn FnMut(Corruption)) -> Step {
        if self.heap.records == 0 {
            return Step::default();
        }
        let id = self.zipf.draw(&mut self.rng) as u32;
        let shape = Shape::of(id, self.heap.seed);
        self.text.len = 0;
        shape.key(id, &mut self.text);
        let at = match self.heap.find(self.text.bytes()) {
            Ok(at) => at,
            Err(corruption) => {
                found(corruption);
                return Step { ops: 1, pages: 1 };
            }
        };
        // What is wrong is reported once, and then overwritten like everything else.
        if let Err(corruption) = self.heap.check(at, id, &shape) {
            found(corruption);
        }
        let version = self.heap.half(at + 12).wrapping_add(1);
        let dice = self.rng.below(100);
        let value_at = HEADER + shape.key_len();
        let record = &mut self.heap.mem[at..at + shape.size()];
        if dice < REPLACE {
            let spread = shape.value_max() - shape.value_len + 1;
            let len = shape.value_len + self.rng.below(spread as u64) as usize;
            let key_len = self.text.len;
            shape.value(id, len, now_ms, &mut self.rng, &mut self.text);
            record[value_at..value_at + len].copy_from_slice(&self.text.bytes()[key_len..]);
            record[value_at + len..].fill(0);
            record[22..24].copy_from_slice(&(len as u16).to_le_bytes());
        } else {
            touch(shape.kind, &mut record[value_at..], now_ms, dice >= REPLACE + DATE_ONLY);
        }
        record[12..16].copy_from_slice(&version.to_le_bytes());
        let sum = checksum(record);
        record[16..20].copy_from_slice(&sum.to_le_bytes());
        self.heap.set_version(id, version as u16);
        // The record's page (seldom two), and the version table's, which few pages share.
        Step { ops: 1, pages: 1 }
    }

    fn verify(&mut self, found: &mut dyn FnMut(Corruption)) -> Verified {
        let heap = &self.heap;
        if self.slab >= heap.places {
            (self.slab, self.slot) = (0, 0);
            self.sweeps = self.sweeps.wrapping_add(1);
            return Verified { bytes: 0, sweep_done: true };
        }
        let next_slab = |this: &mut Self| {
            (this.slab, this.slot) = (this.slab + 1, 0);
            Verified { bytes: SLAB_HEADER as u64, sweep_done: false }
        };
        if heap.is_hole(self.slab) {
            return next_slab(self);
        }
        let at = heap.slabs + self.slab * SLAB;
        let contents = heap.word(at + 8);
        let (class, used) = ((contents >> 32) as usize, contents as u32 as usize);
        let sum = slab_sum(at, contents);
        if heap.word(at) != SLAB_MAGIC || heap.word(at + 16) != sum || class >= CLASSES.len() {
            found(Corruption { at, what: "slab-header", expected: sum, found: heap.word(at + 16) });
            return next_slab(self);
        }
        if self.slot >= used {
            return next_slab(self);
        }
        let record = at + SLAB_HEADER + self.slot * CLASSES[class];
        self.slot += 1;
        let id = heap.half(record + 8);
        let shape = Shape::of(id, heap.seed);
        if id >= heap.records || shape.class != class {
            found(Corruption {
                at: record,
                what: "record-id",
                expected: u64::from(heap.records),
                found: u64::from(id),
            });
        } else if let Err(corruption) = heap.check(record, id, &shape) {
            found(corruption);
        } else if id.wrapping_add(self.sweeps).is_multiple_of(LOOKUP_EVERY) {
            self.text.len = 0;
            shape.key(id, &mut self.text);
            match heap.find(self.text.bytes()) {
                Err(corruption) => found(corruption),
                Ok(at) if at != record => {
                    found(Corruption { at, what: "double-key", expected: record as u64, found: at as u64 });
                }
                Ok(_) => {}
            }
        }
        Verified { bytes: CLASSES[class] as u64, sweep_done: false }
    }

    #[cfg(test)]
    fn flip(&mut self, at: usize, bits: u8) -> u8 {
        self.heap.mem[at] ^= bits;
        self.heap.mem[at]
    }
}
