//! Time from the TSC.

use crate::cpu::{cpuid, inb, outb, tsc};

/// The TSC with its frequency.
#[derive(Clone, Copy)]
pub struct Clock {
    pub khz: u64,
    /// How the frequency was found.
    pub source: &'static str,
}

impl Clock {
    /// `khz` 0: find out, first from CPUID, then from the PIT.
    pub fn new(khz: u64) -> Clock {
        if khz != 0 {
            return Clock { khz, source: "cmdline" };
        }
        if let Some(khz) = crystal_khz() {
            return Clock { khz, source: "cpuid-0x15" };
        }
        if let Some(khz) = hypervisor_khz() {
            return Clock { khz, source: "cpuid-0x40000010" };
        }
        // Three tries, and the lowest counts: a long delay lets the count wrap, and then the frequency comes
        // out too high.
        let best = (0..3).filter_map(|_| pit_khz()).min();
        match best {
            Some(khz) => Clock { khz, source: "pit" },
            // A wrong clock only misreports times, so go on; the source says so.
            None => Clock { khz: 2_000_000, source: "guess" },
        }
    }

    /// Ticks in `us` microseconds.
    pub fn ticks_us(&self, us: u64) -> u64 {
        us * self.khz / 1000
    }

    /// Microseconds in `ticks`.
    pub fn us(&self, ticks: u64) -> u64 {
        (u128::from(ticks) * 1000 / u128::from(self.khz)) as u64
    }
}

fn crystal_khz() -> Option<u64> {
    if cpuid(0).eax < 0x15 {
        return None;
    }
    let leaf = cpuid(0x15);
    if leaf.eax == 0 || leaf.ebx == 0 || leaf.ecx == 0 {
        return None;
    }
    plausible(u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax) / 1000)
}

fn hypervisor_khz() -> Option<u64> {
    const HYPERVISOR_PRESENT: u32 = 1 << 31;
    if cpuid(1).ecx & HYPERVISOR_PRESENT == 0 {
        return None;
    }
    let max = cpuid(0x4000_0000).eax;
    if !(0x4000_0010..0x4001_0000).contains(&max) {
        return None;
    }
    plausible(u64::from(cpuid(0x4000_0010).eax))
}

/// Measures about 20 ms on channel 1 of the PIT: unlike the others it needs no gate and raises no interrupt.
fn pit_khz() -> Option<u64> {
    const PIT_HZ: u64 = 1_193_182;
    const SPAN: u16 = (PIT_HZ / 50) as u16;
    const READS: u32 = 20_000;
    outb(0x43, 0x74); // channel 1, both bytes, mode 2: counts down from 65536 again and again
    outb(0x41, 0);
    outb(0x41, 0);
    let (start, from) = pit_read();
    for _ in 0..READS {
        let (now, count) = pit_read();
        let counted = from.wrapping_sub(count);
        if counted >= SPAN {
            return plausible(now.saturating_sub(start) * PIT_HZ / u64::from(counted) / 1000);
        }
    }
    None
}

/// The TSC, and the count of channel 1 at that time: of four readings the one during which the TSC moved
/// least.
fn pit_read() -> (u64, u16) {
    let mut best = (0, 0, u64::MAX);
    for _ in 0..4 {
        let before = tsc();
        outb(0x43, 0x40); // latch channel 1
        let took = tsc().saturating_sub(before);
        let count = u16::from(inb(0x41)) | u16::from(inb(0x41)) << 8;
        if took < best.2 {
            best = (before + took / 2, count, took);
        }
    }
    (best.0, best.1)
}

fn plausible(khz: u64) -> Option<u64> {
    (100_000..=100_000_000).contains(&khz).then_some(khz)
}
