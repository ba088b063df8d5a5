//! Checksums of memory: fast, order-sensitive, not for adversaries.

use crate::rng::mix;

/// A running checksum over pairs of words. Two lanes, so that the multiplications overlap.
#[derive(Clone, Copy)]
pub struct Sum {
    a: u64,
    b: u64,
}

impl Sum {
    pub fn new() -> Self {
        Sum { a: 0x243f_6a88_85a3_08d3, b: 0x1319_8a2e_0370_7344 }
    }

    pub fn add(&mut self, x: u64, y: u64) {
        self.a = (self.a ^ x).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        self.b = (self.b ^ y).wrapping_mul(0xbf58_476d_1ce4_e5b9).rotate_left(31);
    }

    /// Adds whole pairs of words; a rest of less than 16 bytes is left out.
    pub fn add_bytes(&mut self, bytes: &[u8]) {
        for pair in bytes.as_chunks::<16>().0 {
            let n = u128::from_le_bytes(*pair);
            self.add(n as u64, (n >> 64) as u64);
        }
    }

    pub fn finish(self) -> u32 {
        mix(self.a ^ self.b.rotate_left(32)) as u32
    }
}
