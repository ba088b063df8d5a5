//! Where the serial port's output goes: the last lines are kept, everything is counted, and a copy may go to a file or a terminal.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// Lines kept for the control socket.
pub(crate) const KEPT_LINES: usize = 1000;
/// Bytes of a line that are kept; the rest of a longer line is counted and copied, but not kept.
const KEPT_LINE_BYTES: usize = 4096;
/// Bytes that may wait for a slow copy; more are dropped. A guest must never wait for a terminal, or a pause would.
const COPY_BUFFER_BYTES: usize = 1 << 20;
/// How long the end of a VM waits for the copy to be written.
const DRAIN_TIME: Duration = Duration::from_secs(1);

/// How much a guest has written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SerialCounters {
    /// Complete lines.
    pub lines: u64,
    /// Bytes.
    pub bytes: u64,
    /// Bytes that the copy could not take in time and that are missing there.
    pub dropped_bytes: u64,
}

/// The output of one serial port.
pub(crate) struct Console {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    lines: VecDeque<Vec<u8>>,
    current: Vec<u8>,
    counters: SerialCounters,
    /// Whether a thread copies.
    copying: bool,
    /// What it has not taken yet.
    pending: Vec<u8>,
    /// Whether it is writing what it took.
    writing: bool,
    /// Whether it is to end.
    closed: bool,
}

impl Console {
    /// A console that copies everything to `copy`, if there is one, in a thread of its own.
    pub(crate) fn new(copy: Option<Box<dyn Write + Send>>) -> io::Result<Arc<Console>> {
        let state = State { copying: copy.is_some(), ..State::default() };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        if let Some(copy) = copy {
            let shared = shared.clone();
            thread::Builder::new().name("console".into()).spawn(move || shared.copy_to(copy))?;
        }
        Ok(Arc::new(Console { shared }))
    }

    /// The last complete lines, at most `count`, oldest first, and the unfinished one.
    pub(crate) fn last_lines(&self, count: usize) -> Vec<String> {
        let state = self.shared.state();
        let unfinished = (!state.current.is_empty()).then_some(&state.current);
        let all: Vec<_> = state.lines.iter().chain(unfinished).collect();
        let text = |line: &&Vec<u8>| String::from_utf8_lossy(line).trim_end_matches('\r').to_owned();
        all[all.len().saturating_sub(count)..].iter().map(text).collect()
    }

    pub(crate) fn counters(&self) -> SerialCounters {
        self.shared.state().counters
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.closed = true;
        self.shared.changed.notify_all();
        let busy = |state: &mut State| state.copying && (state.writing || !state.pending.is_empty());
        drop(self.shared.changed.wait_timeout_while(state, DRAIN_TIME, busy));
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn copy_to(&self, mut copy: Box<dyn Write + Send>) {
        let mut state = self.state();
        loop {
            if !state.pending.is_empty() {
                let bytes = std::mem::take(&mut state.pending);
                state.writing = true;
                drop(state);
                let outcome = copy.write_all(&bytes).and_then(|()| copy.flush());
                state = self.state();
                state.writing = false;
                state.copying = outcome.is_ok();
                self.changed.notify_all();
                if outcome.is_err() {
                    return;
                }
            } else if state.closed {
                return;
            } else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

impl State {
    fn push(&mut self, byte: u8) {
        self.counters.bytes += 1;
        if byte == b'\n' {
            self.counters.lines += 1;
            if self.lines.len() == KEPT_LINES {
                self.lines.pop_front();
            }
            self.lines.push_back(std::mem::take(&mut self.current));
        } else if self.current.len() < KEPT_LINE_BYTES {
            self.current.push(byte);
        }
        if self.copying && self.pending.len() < COPY_BUFFER_BYTES {
            self.pending.push(byte);
        } else if self.copying {
            self.counters.dropped_bytes += 1;
        }
    }
}

/// The serial port's end of a console.
pub(crate) struct ConsoleWriter(pub(crate) Arc<Console>);

impl Write for ConsoleWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.0.shared.state();
        bytes.iter().for_each(|&byte| state.push(byte));
        self.0.shared.changed.notify_all();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_last_lines_and_counts_everything() {
        let console = Console::new(None).unwrap();
        let mut writer = ConsoleWriter(console.clone());
        for i in 0..KEPT_LINES + 10 {
            write!(writer, "line {i}\r\n").unwrap();
        }
        write!(writer, "prompt> ").unwrap();
        assert_eq!(console.last_lines(2), [format!("line {}", KEPT_LINES + 9), "prompt> ".into()]);
        assert_eq!(console.last_lines(usize::MAX).len(), KEPT_LINES + 1);
        assert_eq!(console.counters().lines, KEPT_LINES as u64 + 10);
    }

    #[test]
    fn a_line_without_end_takes_bounded_memory() {
        let console = Console::new(None).unwrap();
        ConsoleWriter(console.clone()).write_all(&vec![b'x'; 1 << 20]).unwrap();
        assert_eq!(console.last_lines(1)[0].len(), KEPT_LINE_BYTES);
        assert_eq!(console.counters().bytes, 1 << 20);
    }
}
