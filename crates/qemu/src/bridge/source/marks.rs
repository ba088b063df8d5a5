//! Whether what was written into the destination QEMU is what was read from the source QEMU: the hashes of one connection, as far as they are compared.

use std::collections::VecDeque;

use crate::bridge::running::{Mark, Running};

/// What was read from QEMU, by the ends of the segments that it became, and how much of it is known to have arrived.
pub(crate) struct Marks {
    /// Of segments that the destination has not written yet: no more than are on their way.
    due: VecDeque<Mark>,
    compared: Mark,
    /// Where the last segment ends that must arrive.
    needed: u64,
    /// Something that was written was not what was read: nothing that comes later makes up for it.
    differs: bool,
}

impl Marks {
    pub(crate) fn new() -> Marks {
        Marks { due: VecDeque::new(), compared: Running::new().mark(), needed: 0, differs: false }
    }

    /// A segment ends here. One that is not needed, QEMU may leave unread.
    pub(crate) fn segment(&mut self, mark: Mark, is_needed: bool) {
        if is_needed {
            self.needed = mark.bytes;
        }
        self.due.push_back(mark);
    }

    /// The destination has written this. `Err`, with where the last segment ended whose hash agreed, if it is not what was read.
    pub(crate) fn compare(&mut self, seen: Mark) -> Result<(), u64> {
        let before = self.compared.bytes;
        while self.due.front().is_some_and(|mark| mark.bytes <= seen.bytes) {
            self.compared = self.due.pop_front().unwrap_or(self.compared);
        }
        self.differs |= self.compared != seen;
        if self.differs { Err(before) } else { Ok(()) }
    }

    /// Whether all that is needed has arrived, and as it was.
    pub(crate) fn agree(&self) -> bool {
        !self.differs && self.compared.bytes >= self.needed
    }

    /// Whether something has not arrived as it was.
    pub(crate) fn differ(&self) -> bool {
        self.differs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Marks after each of these segments.
    fn read(segments: &[&[u8]]) -> (Marks, Vec<Mark>) {
        let (mut marks, mut running) = (Marks::new(), Running::new());
        let all = segments.iter().map(|segment| {
            running.update(segment);
            let mark = running.mark();
            marks.segment(mark, segment.starts_with(b"page"));
            mark
        });
        let all = all.collect();
        (marks, all)
    }

    #[test]
    fn what_arrives_as_it_was_agrees() {
        let (mut marks, all) = read(&[b"head", b"page 1", b"page 2", b"tail"]);
        assert!(!marks.agree());
        assert_eq!(marks.compare(Running::new().mark()), Ok(()), "nothing yet");
        assert_eq!(marks.compare(all[0]), Ok(()));
        assert_eq!(marks.compare(all[0]), Ok(()), "said once more");
        assert!(!marks.agree());
        // Two segments at once.
        assert_eq!(marks.compare(all[2]), Ok(()));
        assert!(marks.agree(), "nobody needs the tail");
        assert_eq!(marks.compare(all[3]), Ok(()));
    }

    #[test]
    fn what_does_not_is_found_at_once() {
        let (_, all) = read(&[b"head", b"page 1", b"page 2"]);
        let other = |mark: Mark| Mark { hash: mark.hash ^ 1, ..mark };
        let fresh = || read(&[b"head", b"page 1", b"page 2"]).0;
        assert_eq!(fresh().compare(other(all[0])), Err(0));
        // The last segment counts as the others do, and what is right later does not make up for it.
        let mut marks = fresh();
        marks.compare(other(all[2])).unwrap_err();
        assert!(marks.differ() && !marks.agree());
        marks.compare(all[2]).unwrap_err();
        assert!(!marks.agree());
        let mut marks = fresh();
        marks.compare(all[0]).unwrap();
        assert_eq!(marks.compare(other(all[1])), Err(4));
        // Not where a segment ends, more than there was, or back again.
        for bytes in [7, 17, 1 << 40] {
            let mut marks = fresh();
            marks.compare(all[0]).unwrap();
            assert!(marks.compare(Mark { bytes, hash: all[2].hash }).is_err(), "{bytes}");
        }
        let mut marks = fresh();
        marks.compare(all[2]).unwrap();
        assert!(marks.compare(all[1]).is_err());
        // The same bytes in another order.
        let swapped = read(&[b"head", b"page 2", b"page 1"]).1;
        assert!(fresh().compare(swapped[2]).is_err());
    }
}
