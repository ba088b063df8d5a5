//! Watches what the destination QEMU says on the return path: whether it has loaded the VM.
//!
//! Format: `migrate_send_rp_message` in QEMU's `migration/migration.c`: type and length, 16 bits each, then data.

const SHUT: u16 = 1;
const RECV_BITMAP: u16 = 5;

/// Looks for the last message, which says how loading went.
#[derive(Debug, Default)]
pub struct ReturnPath {
    head: Vec<u8>,
    skip: usize,
    lost: bool,
    shut: Option<u32>,
}

impl ReturnPath {
    /// Takes bytes in the order in which they came.
    pub fn read(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && !self.lost {
            if self.skip > 0 {
                let skip = self.skip.min(bytes.len());
                self.skip -= skip;
                bytes = &bytes[skip..];
                continue;
            }
            self.head.push(bytes[0]);
            bytes = &bytes[1..];
            let [t0, t1, l0, l1, value @ ..] = &self.head[..] else { continue };
            let (kind, len) = (u16::from_be_bytes([*t0, *t1]), u16::from_be_bytes([*l0, *l1]));
            match (kind, len) {
                // It is followed by bytes without a frame; it occurs in the recovery of a post-copy alone.
                (RECV_BITMAP, _) => self.lost = true,
                (SHUT, 4) => {
                    if let &[a, b, c, d] = value {
                        self.shut = Some(u32::from_be_bytes([a, b, c, d]));
                        self.head.clear();
                    }
                }
                _ => {
                    self.skip = len.into();
                    self.head.clear();
                }
            }
        }
    }

    /// The value of the last message: 0 if the VM was loaded.
    pub fn shut(&self) -> Option<u32> {
        self.shut
    }

    /// Whether it cannot be followed any more.
    pub fn is_lost(&self) -> bool {
        self.lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_message_is_found_however_it_is_cut() {
        let bytes = [0, 2, 0, 4, 0, 0, 0, 1, 0, 7, 0, 0, 0, 1, 0, 4, 0, 0, 0, 0];
        for cut in 0..bytes.len() {
            let mut path = ReturnPath::default();
            path.read(&bytes[..cut]);
            assert_eq!(path.shut(), None);
            path.read(&bytes[cut..]);
            assert_eq!(path.shut(), Some(0), "{cut}");
        }
    }

    #[test]
    fn a_failure_and_a_recovery_are_told_apart() {
        let mut path = ReturnPath::default();
        path.read(&[0, 1, 0, 4, 0, 0, 0, 1]);
        assert_eq!((path.shut(), path.is_lost()), (Some(1), false));
        path.read(&[0, 5, 0, 3, 2, 109, 49, 1, 2, 3]);
        assert!(path.is_lost());
    }
}
