//! Which backend moves a VM faster: the decision behind `--backend auto`. Pure.

/// A GPU that is slower than the CPU by no more than this part is preferred all the same: it leaves the CPU to the guests.
const TOLERANCE: f64 = 0.05;

/// How fast a backend is, with all the threads that it is given.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speed {
    /// Plain bytes a second, in 10^9.
    pub gb_per_s: f64,
    /// Plain bytes for each byte on the wire.
    pub ratio: f64,
}

impl Speed {
    /// Plain bytes a second, in 10^9, over a link of this many bytes a second; `None`: it is never the bottleneck.
    pub fn over_link(self, link_bytes_per_s: Option<u64>) -> f64 {
        match link_bytes_per_s {
            Some(rate) => self.gb_per_s.min(rate as f64 / 1e9 * self.ratio),
            None => self.gb_per_s,
        }
    }
}

/// Whether the GPU is the better choice.
pub fn prefer_gpu(gpu: Speed, cpu: Speed, link_bytes_per_s: Option<u64>) -> bool {
    let (gpu, cpu) = (gpu.over_link(link_bytes_per_s), cpu.over_link(link_bytes_per_s));
    // A device that measures as nothing at all must not win against a CPU that does as well.
    gpu > 0.0 && gpu >= cpu * (1.0 - TOLERANCE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn speed(gb_per_s: f64, ratio: f64) -> Speed {
        Speed { gb_per_s, ratio }
    }

    #[test]
    fn the_faster_one_wins_where_the_link_does_not_matter() {
        assert!(prefer_gpu(speed(10.0, 2.0), speed(2.0, 2.0), None));
        assert!(!prefer_gpu(speed(1.0, 2.0), speed(2.0, 2.0), None));
    }

    #[test]
    fn a_gpu_that_is_nearly_as_fast_spares_the_cpu() {
        assert!(prefer_gpu(speed(1.90, 2.0), speed(2.0, 2.0), None));
        assert!(!prefer_gpu(speed(1.89, 2.0), speed(2.0, 2.0), None));
    }

    #[test]
    fn over_a_slow_link_the_gpu_wins_as_soon_as_it_keeps_up() {
        // 1 Gbit/s carries 0.25 GB/s of pages that shrink to half.
        let link = Some(125_000_000);
        assert!(prefer_gpu(speed(0.3, 2.0), speed(5.0, 2.0), link));
        assert!(!prefer_gpu(speed(0.2, 2.0), speed(5.0, 2.0), link));
    }

    #[test]
    fn over_a_slow_link_the_ratio_counts() {
        let link = Some(125_000_000);
        assert!(!prefer_gpu(speed(50.0, 1.5), speed(5.0, 2.0), link));
        assert!(prefer_gpu(speed(0.5, 2.5), speed(5.0, 2.0), link));
    }

    #[test]
    fn a_device_that_does_nothing_never_wins() {
        assert!(!prefer_gpu(speed(0.0, 2.0), speed(0.0, 2.0), None));
        assert!(!prefer_gpu(speed(f64::NAN, 2.0), speed(1.0, 2.0), None));
    }
}
