//! How fast a backend is on this host: a short measurement with pages as they are in the memory of guests.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use pagewarp_codec::{
    Backend, BackendError, DecodeJob, DecoderConfig, EncodeJob, EncodedBatch, EncoderConfig, EncodingSet,
    PAGE_SIZE, Page, SlotUse,
};

use crate::drive::{Worker, first, work};

/// Pages in a batch, as migrations have them.
const BATCH_PAGES: usize = 256;
/// Different batches; the measurement goes round them.
const BATCHES: usize = 4;
/// Bytes a page costs on the wire besides its payload: its tag and its length.
const TABLE_BYTES: u64 = 3;

/// What one encoder and one decoder of a backend do, with as many batches in flight as they take. GB/s are 10^9 bytes of plain pages a
/// second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Encoding pages that are sent for the first time.
    pub encode_gb_per_s: f64,
    /// Decoding them.
    pub decode_gb_per_s: f64,
    /// Plain bytes divided by encoded bytes.
    pub ratio: f64,
}

/// Measures a backend for about `time`, besides what it takes to set up and to do each batch once.
///
/// What it does first is checked: pages that come back other than they were sent make it unusable.
///
/// # Errors
///
/// What the backend says, or [`BackendError::Unavailable`] if it computes wrongly.
pub fn calibrate(backend: &dyn Backend, time: Duration) -> Result<Rates, BackendError> {
    let allowed = EncodingSet::ALL;
    let batches = batches();
    let config = EncoderConfig { allowed, history_slots: 0, max_batch_pages: BATCH_PAGES };
    let mut encoder = first(backend.encoders(config, 1)?, backend)?;
    let jobs = batches.iter().map(|pages| EncodeJob {
        pages: pages.clone(),
        slots: vec![SlotUse::None; BATCH_PAGES],
        ..EncodeJob::default()
    });
    let (encode_gb_per_s, encoded) = measure(&mut encoder, jobs.collect(), time / 2)?;
    drop(encoder);

    let wire: u64 = encoded.iter().map(|job| wire_bytes(&job.encoded)).sum();
    let plain = (BATCHES * BATCH_PAGES * PAGE_SIZE) as f64;
    let config = DecoderConfig { allowed, max_batch_pages: BATCH_PAGES, history_slots: 0 };
    let mut decoder = first(backend.decoders(config, 1)?, backend)?;
    let jobs = encoded.into_iter().map(|job| DecodeJob { encoded: job.encoded, ..DecodeJob::default() });
    let (decode_gb_per_s, decoded) = measure(&mut decoder, jobs.collect(), time / 2)?;
    if decoded.iter().map(|job| &job.pages).ne(&batches) {
        let reason = "it decodes pages to something else than it encoded; use another backend";
        return Err(BackendError::Unavailable { device: backend.name(), reason: reason.to_owned() });
    }
    Ok(Rates { encode_gb_per_s, decode_gb_per_s, ratio: plain / wire.max(1) as f64 })
}

fn wire_bytes(encoded: &EncodedBatch) -> u64 {
    encoded.payload.len() as u64 + TABLE_BYTES * encoded.lens.len() as u64
}

/// Does every job once, unmeasured, then goes round them for `time`. Returns GB/s and the jobs, in their order.
fn measure<W: Worker>(
    worker: &mut W,
    jobs: Vec<W::Job>,
    time: Duration,
) -> Result<(f64, Vec<W::Job>), BackendError> {
    let count = jobs.len();
    let mut queue = VecDeque::from(jobs);
    // The first time brings kernels and buffers into being.
    work(worker, &mut queue, |submitted| submitted < count)?;
    let start = Instant::now();
    let batches = work(worker, &mut queue, |submitted| submitted == 0 || start.elapsed() < time)?;
    let bytes = (batches * BATCH_PAGES * PAGE_SIZE) as f64;
    let gb_per_s = bytes / start.elapsed().as_secs_f64().max(1e-9) / 1e9;
    // The time may have been over in the middle of a tour.
    queue.rotate_right(batches % count);
    Ok((gb_per_s, queue.into()))
}

/// Pages as guests have them: a quarter zero, some nearly empty, most made of words that repeat, a few of noise.
fn batches() -> Vec<Vec<Page>> {
    let mut random = 0x9E37_79B9_7F4A_7C15_u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let mut page = |index: usize| {
        let mut page = Page::ZERO;
        let words = page.0.as_chunks_mut::<8>().0;
        match index % 8 {
            0 | 1 => {}
            2 => words.iter_mut().step_by(61).for_each(|word| *word = next().to_le_bytes()),
            7 => words.iter_mut().for_each(|word| *word = next().to_le_bytes()),
            _ => {
                let dictionary: [u64; 16] = std::array::from_fn(|_| next());
                for word in words {
                    let value = next();
                    // Half of the words are new in their lower bytes, like counters and pointers.
                    let base = dictionary[(value % 16) as usize];
                    let fresh = if value & 16 == 0 { value >> 48 } else { 0 };
                    *word = (base ^ fresh).to_le_bytes();
                }
            }
        }
        page
    };
    (0..BATCHES).map(|_| (0..BATCH_PAGES).map(&mut page).collect()).collect()
}

#[cfg(test)]
mod tests {
    use pagewarp_codec::{CpuBackend, FakeBackend, FakeConfig};

    use super::*;

    const SHORT: Duration = Duration::from_millis(30);

    #[test]
    fn a_backend_has_rates_and_the_pages_shrink_as_those_of_guests_do() {
        let rates = calibrate(&CpuBackend::new(), SHORT).unwrap();
        assert!(rates.encode_gb_per_s > 0.0 && rates.decode_gb_per_s > 0.0, "{rates:?}");
        assert!((1.5..4.0).contains(&rates.ratio), "{rates:?}");
    }

    #[test]
    fn several_batches_in_flight_come_back_in_order() {
        calibrate(&FakeBackend::new(FakeConfig { depth: 3, ..FakeConfig::default() }), SHORT).unwrap();
        calibrate(&FakeBackend::new(FakeConfig { depth: 9, ..FakeConfig::default() }), SHORT).unwrap();
    }

    #[test]
    fn a_device_that_fails_or_computes_wrongly_has_no_rates() {
        let lost = FakeBackend::new(FakeConfig { lose_after: Some(6), ..FakeConfig::default() });
        assert!(matches!(calibrate(&lost, SHORT), Err(BackendError::Lost { .. })));
        let one = std::num::NonZeroU64::new(1);
        let wrong = FakeBackend::new(FakeConfig { corrupt_one_in: one, ..FakeConfig::default() });
        assert!(calibrate(&wrong, SHORT).is_err());
    }
}
