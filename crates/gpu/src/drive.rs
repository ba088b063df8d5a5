//! Keeps an encoder or a decoder busy, for measurements.

use std::collections::VecDeque;

use pagewarp_codec::{Backend, BackendError, DecodeJob, Decoder, Done, EncodeJob, Encoder};

/// An encoder or a decoder.
pub(crate) trait Worker {
    type Job;
    fn has_room(&mut self) -> bool;
    fn submit(&mut self, job: Self::Job);
    fn complete(&mut self) -> Option<Done<Self::Job>>;
}

impl Worker for Box<dyn Encoder> {
    type Job = EncodeJob;

    fn has_room(&mut self) -> bool {
        Encoder::has_room(&mut **self)
    }

    fn submit(&mut self, job: EncodeJob) {
        Encoder::submit(&mut **self, job);
    }

    fn complete(&mut self) -> Option<Done<EncodeJob>> {
        Encoder::complete(&mut **self)
    }
}

impl Worker for Box<dyn Decoder> {
    type Job = DecodeJob;

    fn has_room(&mut self) -> bool {
        Decoder::has_room(&mut **self)
    }

    fn submit(&mut self, job: DecodeJob) {
        Decoder::submit(&mut **self, job);
    }

    fn complete(&mut self) -> Option<Done<DecodeJob>> {
        Decoder::complete(&mut **self)
    }
}

/// The first worker that a backend made.
pub(crate) fn first<T>(workers: Vec<T>, backend: &dyn Backend) -> Result<T, BackendError> {
    workers.into_iter().next().ok_or_else(|| BackendError::Unavailable {
        device: backend.name(),
        reason: "it has no worker; use another backend".to_owned(),
    })
}

/// Does jobs, as many at a time as the worker takes, while `more` says so of the number that were submitted. Finished ones go to the
/// end of the queue. Returns how many there were.
///
/// # Errors
///
/// That of the first job that fails.
pub(crate) fn work<W: Worker>(
    worker: &mut W,
    queue: &mut VecDeque<W::Job>,
    mut more: impl FnMut(usize) -> bool,
) -> Result<usize, BackendError> {
    let mut submitted = 0;
    loop {
        if worker.has_room()
            && more(submitted)
            && let Some(job) = queue.pop_front()
        {
            worker.submit(job);
            submitted += 1;
            continue;
        }
        let Some(done) = worker.complete() else { return Ok(submitted) };
        done.result?;
        queue.push_back(done.job);
    }
}
