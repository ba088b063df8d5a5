//! Who worked on which batch, and when: the data behind `--trace`.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Spans that a trace keeps at most, about 100 MiB; later ones are counted and dropped.
const MAX_SPANS: usize = 1 << 20;

/// One piece of work on one batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Where it happened: a stage's thread, or a queue of a device. Spans of one track do not overlap.
    pub track: Arc<str>,
    /// What was done: `copy`, `upload`, `kernel`...
    pub name: &'static str,
    /// The batch.
    pub batch: u64,
    /// When it began.
    pub start: Instant,
    /// When it ended, not before it began.
    pub end: Instant,
}

/// Collects spans from many threads. Clones collect into the same trace.
#[derive(Clone, Debug)]
pub struct Trace {
    epoch: Instant,
    spans: Arc<Mutex<Spans>>,
}

#[derive(Debug, Default)]
struct Spans {
    kept: Vec<Span>,
    dropped: u64,
}

impl Default for Trace {
    fn default() -> Self {
        Trace::new()
    }
}

impl Trace {
    /// An empty trace that begins now.
    pub fn new() -> Trace {
        Trace { epoch: Instant::now(), spans: Arc::default() }
    }

    /// When the trace began.
    pub fn epoch(&self) -> Instant {
        self.epoch
    }

    /// Adds a span.
    pub fn span(&self, track: &Arc<str>, name: &'static str, batch: u64, start: Instant, end: Instant) {
        let mut spans = self.spans.lock().unwrap_or_else(PoisonError::into_inner);
        if spans.kept.len() < MAX_SPANS {
            spans.kept.push(Span { track: track.clone(), name, batch, start, end: end.max(start) });
        } else {
            spans.dropped += 1;
        }
    }

    /// All spans so far, by their beginning, and how many were dropped because there were too many.
    pub fn spans(&self) -> (Vec<Span>, u64) {
        let spans = self.spans.lock().unwrap_or_else(PoisonError::into_inner);
        sorted(spans.kept.clone(), spans.dropped)
    }

    /// As [`spans`](Self::spans), and empties the trace: there is room again, and nothing is copied.
    pub fn take(&self) -> (Vec<Span>, u64) {
        let Spans { kept, dropped } =
            std::mem::take(&mut *self.spans.lock().unwrap_or_else(PoisonError::into_inner));
        sorted(kept, dropped)
    }
}

fn sorted(mut spans: Vec<Span>, dropped: u64) -> (Vec<Span>, u64) {
    spans.sort_by_key(|span| span.start);
    (spans, dropped)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn spans_of_all_clones_come_out_in_the_order_of_their_beginning() {
        let trace = Trace::new();
        let (at, track) = (|ms| trace.epoch() + Duration::from_millis(ms), Arc::from("copy"));
        trace.clone().span(&track, "copy", 1, at(5), at(7));
        trace.span(&track, "copy", 0, at(1), at(0));
        let (spans, dropped) = trace.spans();
        assert_eq!((spans.len(), dropped), (2, 0));
        assert_eq!((spans[0].batch, spans[0].end), (0, at(1)), "an end before the beginning is none");
    }

    #[test]
    fn a_trace_that_was_taken_has_room_again() {
        let trace = Trace::new();
        let (now, track) = (trace.epoch(), Arc::from("copy"));
        let fill = || (0..=MAX_SPANS as u64).for_each(|batch| trace.span(&track, "copy", batch, now, now));
        fill();
        fill();
        let (spans, dropped) = trace.take();
        assert_eq!((spans.len(), dropped), (MAX_SPANS, MAX_SPANS as u64 + 2));
        assert_eq!(trace.spans(), (Vec::new(), 0));
        trace.span(&track, "copy", 7, now, now);
        assert_eq!(trace.take().0[0].batch, 7);
    }
}
