//! Batches through encoders and decoders: one at a time, or several in flight with a random schedule.

use std::collections::VecDeque;

use pagewarp_codec::{
    BackendError, DecodeJob, Decoder, EncodeJob, EncodedBatch, Encoder, Encoding, PAGE_SIZE, Page, SlotUse,
};

use crate::rng::SplitMix64;

/// A batch to encode.
#[derive(Clone, Debug)]
pub(super) struct Batch {
    pub(super) number: u64,
    pub(super) plain: Vec<Page>,
    pub(super) slots: Vec<SlotUse>,
    /// For each page the version sent before, if its slot has it.
    pub(super) bases: Vec<Option<Page>>,
}

impl Batch {
    fn encode_job(&self) -> EncodeJob {
        // What the buffers hold from before must not matter.
        let encoded = EncodedBatch {
            encodings: vec![Encoding::Raw; 3],
            lens: vec![9; 40],
            payload: vec![1; 5],
            plain_hash: 7,
        };
        EncodeJob { number: self.number, pages: self.plain.clone(), slots: self.slots.clone(), encoded }
    }

    /// The job that decodes what this batch was encoded to.
    pub(super) fn decode_job(&self, encoded: &EncodedBatch) -> DecodeJob {
        let needed = encoded.encodings.iter().zip(&self.bases).filter(|(encoding, _)| encoding.needs_base());
        DecodeJob {
            encoded: encoded.clone(),
            number: self.number,
            bases: needed.filter_map(|(_, base)| *base).collect(),
            slots: self.slots.clone(),
            // Neither the right number of pages nor the right bytes.
            pages: vec![Page([3; PAGE_SIZE]); 2],
        }
    }
}

/// Encodes one batch with nothing else in flight.
pub(super) fn encode(encoder: &mut dyn Encoder, batch: &Batch) -> EncodedBatch {
    assert!(encoder.has_room(), "an encoder with nothing in flight has no room");
    encoder.submit(batch.encode_job());
    encoded(encoder, batch)
}

/// Waits for the batch, which must be the oldest in flight.
fn encoded(encoder: &mut dyn Encoder, batch: &Batch) -> EncodedBatch {
    let number = batch.number;
    let in_flight = encoder.in_flight();
    let done =
        encoder.complete().unwrap_or_else(|| panic!("batch {number} was submitted and is not in flight"));
    assert_eq!(encoder.in_flight(), in_flight - 1, "jobs in flight after batch {number}");
    assert_eq!(done.job.number, number, "completion is in submission order");
    assert_eq!(done.result, Ok(()), "batch {number}");
    assert_eq!(done.job.slots, batch.slots, "the slots of batch {number} come back as they were");
    assert!(done.job.pages == batch.plain, "the pages of batch {number} come back as they were");
    done.job.encoded
}

/// Encodes the batches, several in flight at random encoders. The results are in the order of the batches.
pub(super) fn encode_all(
    encoders: &mut [Box<dyn Encoder>],
    batches: &[Batch],
    rng: &mut SplitMix64,
) -> Vec<EncodedBatch> {
    let mut in_flight = vec![VecDeque::new(); encoders.len()];
    let mut results = vec![EncodedBatch::default(); batches.len()];
    let mut next = 0;
    while next < batches.len() || in_flight.iter().any(|queue| !queue.is_empty()) {
        let worker = rng.index(encoders.len());
        let (encoder, queue) = (&mut *encoders[worker], &mut in_flight[worker]);
        assert_eq!(encoder.in_flight(), queue.len(), "jobs in flight");
        if next < batches.len() && rng.below(4) > 0 && encoder.has_room() {
            assert!(queue.len() < encoder.depth(), "room for more jobs than the depth");
            encoder.submit(batches[next].encode_job());
            queue.push_back(next);
            next += 1;
        } else if let Some(index) = queue.pop_front() {
            results[index] = encoded(encoder, &batches[index]);
        }
    }
    results
}

/// Decodes one job with nothing else in flight.
pub(super) fn decode(decoder: &mut dyn Decoder, job: DecodeJob) -> Result<Vec<Page>, BackendError> {
    let mut results = decode_all(decoder, vec![job], &mut SplitMix64::new(0));
    results.pop().expect("one result for one job")
}

/// Decodes the jobs, several in flight. The results are in the order of the jobs.
pub(super) fn decode_all(
    decoder: &mut dyn Decoder,
    jobs: Vec<DecodeJob>,
    rng: &mut SplitMix64,
) -> Vec<Result<Vec<Page>, BackendError>> {
    let mut todo = VecDeque::from(jobs);
    let mut in_flight = VecDeque::new();
    let mut results = Vec::new();
    while !todo.is_empty() || !in_flight.is_empty() {
        assert_eq!(decoder.in_flight(), in_flight.len(), "jobs in flight");
        if (in_flight.is_empty() || rng.below(4) > 0)
            && decoder.has_room()
            && let Some(job) = todo.pop_front()
        {
            assert!(in_flight.len() < decoder.depth(), "room for more jobs than the depth");
            in_flight.push_back((job.number, job.encoded.clone(), job.bases.clone(), job.slots.clone()));
            decoder.submit(job);
            continue;
        }
        let (number, encoded, bases, slots) = in_flight.pop_front().expect("room where nothing is in flight");
        let done = decoder.complete().unwrap_or_else(|| panic!("batch {number} is not in flight"));
        assert_eq!(done.job.number, number, "completion is in submission order");
        let input = (&done.job.encoded, &done.job.slots, done.job.bases == bases);
        assert_eq!(input, (&encoded, &slots, true), "batch {number} comes back as it was");
        results.push(done.result.map(|()| done.job.pages));
    }
    results
}
