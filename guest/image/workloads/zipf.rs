//! Zipf-distributed ranks, in integers.

use crate::rng::Rng;

/// Draws ranks 0 to n-1, rank r with a probability proportional to about 1/(r+1).
#[derive(Clone, Copy)]
pub struct Zipf {
    n: u64,
    /// log2(n + 1) in 1/2^32.
    log2: u64,
}

impl Zipf {
    /// `n` must be above 0 and below 2^32.
    pub fn new(n: u64) -> Self {
        let m = n + 1;
        let whole = u64::from(m.ilog2());
        // Between powers of two the logarithm is taken as the inverse of `exp2_fraction`, found by halving.
        let wanted = if whole <= 32 { m << (32 - whole) } else { m >> (whole - 32) };
        let (mut low, mut high) = (0, 1 << 32);
        while low + 1 < high {
            let middle = (low + high) / 2;
            if exp2_fraction(middle) <= wanted { low = middle } else { high = middle }
        }
        Zipf { n, log2: (whole << 32) + low }
    }

    pub fn draw(&self, rng: &mut Rng) -> u64 {
        // The distribution function is log(r + 1) / log(n + 1): a uniform exponent, and the power of it.
        let exponent = ((u128::from(rng.next_u64()) * u128::from(self.log2)) >> 64) as u64;
        let (whole, fraction) = (exponent >> 32, exponent & 0xffff_ffff);
        let power = (u128::from(exp2_fraction(fraction)) << whole) >> 32;
        (power as u64 - 1).min(self.n - 1)
    }
}

/// 2^x for x in [0, 1), both in 1/2^32: a parabola that is right at both ends and off by less than 0.3 %
/// between.
fn exp2_fraction(x: u64) -> u64 {
    const LINEAR: u64 = 2_819_572_318; // 0.6565
    const SQUARE: u64 = (1 << 32) - LINEAR;
    (1 << 32) + ((x * LINEAR) >> 32) + ((((x * x) >> 32) * SQUARE) >> 32)
}
