//! The spans of the stages' threads, if somebody wants a trace.

use std::sync::Arc;
use std::time::Instant;

use pagewarp_codec::Trace;

/// One thread of a stage. Without a trace it costs nothing.
#[derive(Clone, Debug, Default)]
pub(crate) struct Track(Option<(Trace, Arc<str>)>);

impl Track {
    /// The only thread of this stage.
    pub(crate) fn of(trace: Option<&Trace>, stage: &str) -> Track {
        Track(trace.map(|trace| (trace.clone(), Arc::from(stage))))
    }

    /// Thread number `index`, from 0, of this stage.
    pub(crate) fn numbered(trace: Option<&Trace>, stage: &str, index: usize) -> Track {
        Track(trace.map(|trace| (trace.clone(), Arc::from(format!("{stage} {}", index + 1)))))
    }

    /// Now, if there is a trace: to be given to [`end`](Self::end).
    pub(crate) fn begin(&self) -> Option<Instant> {
        self.0.as_ref().map(|_| Instant::now())
    }

    /// Adds what was done on a batch since `begin`.
    pub(crate) fn end(&self, name: &'static str, batch: u64, begin: Option<Instant>) {
        if let (Some((trace, track)), Some(begin)) = (&self.0, begin) {
            trace.span(track, name, batch, begin, Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_carry_the_thread_and_the_batch() {
        let trace = Trace::new();
        let track = Track::numbered(Some(&trace), "send", 1);
        let begin = track.begin();
        track.end("send", 7, begin);
        let (spans, _) = trace.spans();
        assert_eq!((&*spans[0].track, spans[0].name, spans[0].batch), ("send 2", "send", 7));
        assert!(Track::of(None, "copy").begin().is_none());
    }
}
