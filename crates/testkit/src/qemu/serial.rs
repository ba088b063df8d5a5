//! What the guest says on its serial port.

use std::io::{BufRead, BufReader, Read};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use pagewarp_guest::Event;

/// One line of the serial port. At a switchover a line may be cut in two: its beginning stands last at the source, its end first at the
/// destination, and neither is an event.
#[derive(Clone, Debug)]
pub struct SerialLine {
    /// When its end came.
    pub at: SystemTime,
    /// Without the line ending.
    pub text: String,
    /// What the guest says by it.
    pub event: Option<Event>,
}

/// Lines that one thread reads and others wait for.
#[derive(Debug, Default)]
pub(super) struct Serial {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lines: Vec<SerialLine>,
    over: bool,
}

impl Serial {
    /// Reads until the port is closed.
    pub(super) fn read(&self, port: impl Read) {
        let mut port = BufReader::new(port);
        let mut line = Vec::new();
        while port.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
            let text = String::from_utf8_lossy(&line).trim_end_matches(['\r', '\n']).to_owned();
            // What is cut off at the end may look like an event with smaller numbers.
            let event = if line.ends_with(b"\n") { Event::parse(&text) } else { None };
            self.lock().lines.push(SerialLine { at: SystemTime::now(), text, event });
            self.changed.notify_all();
            line.clear();
        }
        self.lock().over = true;
        self.changed.notify_all();
    }

    pub(super) fn lines(&self) -> Vec<SerialLine> {
        self.lock().lines.clone()
    }

    /// The line of this number, from 0; `None`: it does not come, or not in time.
    pub(super) fn wait(&self, number: usize, deadline: Instant) -> Option<SerialLine> {
        let mut state = self.lock();
        loop {
            if let Some(line) = state.lines.get(number) {
                return Some(line.clone());
            }
            let left = deadline.checked_duration_since(Instant::now()).filter(|_| !state.over)?;
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn lines_come_in_order_and_a_cut_one_is_no_event() {
        let serial = Serial::default();
        serial.read(&b"SeaBIOS\r\npause us=8156 at_ms=4235\r\n\xff\npause us=8156 at_ms=42"[..]);
        let soon = Instant::now() + Duration::from_secs(60);
        assert_eq!(serial.wait(0, soon).unwrap().text, "SeaBIOS");
        assert!(matches!(serial.wait(1, soon).unwrap().event, Some(Event::Pause(_))));
        assert!(serial.wait(3, soon).unwrap().event.is_none());
        assert!(serial.wait(4, soon).is_none());
        assert_eq!(serial.lines().len(), 4);
    }
}
