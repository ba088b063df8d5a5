//! Batches through encoders and decoders: one at a time, or several in flight with a random schedule.

use std::collections::VecDeque;

use pagewarp_codec::{
    BackendError, DecodeJob, Decoder, EncodeJob, EncodedBatch, Encoder, Encoding, PAGE_SIZE, Page, SlotUse,
};

use crate::rng::SplitMix64;

/// A batch to encode and to decode again.
#[derive(Clone, Debug, Default)]
pub(super) struct Batch {
    pub(super) number: u64,
    pub(super) plain: Vec<Page>,
    /// Where the encoder keeps the pages.
    pub(super) slots: Vec<SlotUse>,
    /// For each page the version sent before, if its slot has it.
    pub(super) bases: Vec<Option<Page>>,
    /// Where the decoder keeps the pages.
    pub(super) kept: Vec<SlotUse>,
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
        EncodeJob {
            number: self.number,
            pages: self.plain.clone(),
            slots: self.slots.clone(),
            allowed: None,
            encoded,
        }
    }

    /// The job that decodes what this batch was encoded to.
    pub(super) fn decode_job(&self, encoded: &EncodedBatch) -> DecodeJob {
        let needed = encoded.encodings.iter().zip(&self.bases).filter(|(encoding, _)| encoding.needs_base());
        DecodeJob {
            encoded: encoded.clone(),
            number: self.number,
            bases: needed.filter_map(|(_, base)| *base).collect(),
            slots: self.kept.clone(),
            pages: old_pages(),
        }
    }
}

/// What a job to decode may hold from before: neither the right number of pages nor the right bytes.
pub(super) fn old_pages() -> Vec<Page> {
    vec![Page([3; PAGE_SIZE]); 2]
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
        } else if rng.below(4) == 0 {
            // Asking changes nothing.
            let ready = encoder.is_ready();
            assert!(ready || !queue.is_empty(), "not ready with nothing in flight");
        } else if let Some(index) = queue.pop_front() {
            results[index] = encoded(encoder, &batches[index]);
        }
    }
    let left = encoders.iter_mut().position(|encoder| encoder.complete().is_some());
    assert_eq!(left, None, "a job completes twice");
    results
}

/// Decodes one job with nothing else in flight.
pub(super) fn decode(decoder: &mut dyn Decoder, job: DecodeJob) -> Result<Vec<Page>, BackendError> {
    assert!(decoder.has_room(), "a decoder with nothing in flight has no room");
    let given = Given::new(&job);
    decoder.submit(job);
    decoded(decoder, given)
}

/// What must come back with a job.
struct Given {
    number: u64,
    encoded: EncodedBatch,
    bases: Vec<Page>,
    slots: Vec<SlotUse>,
}

impl Given {
    fn new(job: &DecodeJob) -> Given {
        Given {
            number: job.number,
            encoded: job.encoded.clone(),
            bases: job.bases.clone(),
            slots: job.slots.clone(),
        }
    }
}

/// Waits for the job, which must be the oldest in flight.
fn decoded(decoder: &mut dyn Decoder, given: Given) -> Result<Vec<Page>, BackendError> {
    let number = given.number;
    let in_flight = decoder.in_flight();
    let done =
        decoder.complete().unwrap_or_else(|| panic!("batch {number} was submitted and is not in flight"));
    assert_eq!(decoder.in_flight(), in_flight - 1, "jobs in flight after batch {number}");
    assert_eq!(done.job.number, number, "completion is in submission order");
    assert_eq!(done.job.slots, given.slots, "the slots of batch {number} come back as they were");
    let same = done.job.encoded == given.encoded && done.job.bases == given.bases;
    assert!(same, "batch {number} comes back as it was");
    done.result.map(|()| done.job.pages)
}

/// Decodes the jobs, several in flight at random decoders. The results are in the order of the jobs.
pub(super) fn decode_all(
    decoders: &mut [Box<dyn Decoder>],
    jobs: Vec<DecodeJob>,
    rng: &mut SplitMix64,
) -> Vec<Result<Vec<Page>, BackendError>> {
    let mut in_flight: Vec<VecDeque<(usize, Given)>> = decoders.iter().map(|_| VecDeque::new()).collect();
    let mut results: Vec<_> = jobs.iter().map(|_| Ok(Vec::new())).collect();
    let mut todo = jobs.into_iter().enumerate();
    while todo.len() > 0 || in_flight.iter().any(|queue| !queue.is_empty()) {
        let worker = rng.index(decoders.len());
        let (decoder, queue) = (&mut *decoders[worker], &mut in_flight[worker]);
        assert_eq!(decoder.in_flight(), queue.len(), "jobs in flight");
        if todo.len() > 0 && rng.below(4) > 0 && decoder.has_room() {
            assert!(queue.len() < decoder.depth(), "room for more jobs than the depth");
            if let Some((index, job)) = todo.next() {
                queue.push_back((index, Given::new(&job)));
                decoder.submit(job);
            }
        } else if rng.below(4) == 0 {
            // Asking changes nothing.
            let ready = decoder.is_ready();
            assert!(ready || !queue.is_empty(), "not ready with nothing in flight");
        } else if let Some((index, given)) = queue.pop_front() {
            results[index] = decoded(decoder, given);
        }
    }
    let left = decoders.iter_mut().position(|decoder| decoder.complete().is_some());
    assert_eq!(left, None, "a job completes twice");
    results
}
