//! How hard to compress: decided batch by batch, from what was measured. `docs/bridge-policy.md` explains it.
//!
//! Pure code: it is told what was measured and when, and answers. For each level it keeps what a page costs to encode and how many bytes it
//! becomes, for pages with a base and without; of the link it keeps the rate. The level with the lowest price for a page is taken,
//! where the price is the time that the slowest of encoding, link and decoding needs for it, and a share of the CPU time.

use std::time::{Duration, Instant};

use pagewarp_codec::{Encoding, EncodingSet, PAGE_SIZE};

use crate::protocol::meta::Form;

/// How hard a batch is compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[repr(usize)]
pub enum Level {
    /// Not at all: pages pass as they are, and no version of them is kept.
    #[default]
    Pass = 0,
    /// Zero pages, unchanged pages and changes as masks and bytes: what SIMD does at the speed of memory.
    Fast = 1,
    /// Zero pages, unchanged pages, and changes against the version sent before; all else goes through a quick LZ4 together.
    Lz4Batch = 2,
    /// What `Fast` does, and LZ4 page by page, with and without a base.
    Lz4 = 3,
    /// As `Lz4Batch`, with zstd.
    Zstd = 4,
}

impl Level {
    /// All, from the cheapest to the dearest.
    pub const ALL: [Level; 5] = [Level::Pass, Level::Fast, Level::Lz4Batch, Level::Lz4, Level::Zstd];

    /// The encodings that it uses.
    pub fn encodings(self) -> EncodingSet {
        match self {
            Level::Pass => EncodingSet::RAW,
            Level::Fast => {
                EncodingSet::of(&[Encoding::Zero, Encoding::Same, Encoding::Sparse, Encoding::SparseXor])
            }
            Level::Lz4 => EncodingSet::ALL,
            // Masks in between would hide that the bytes of neighbouring pages look alike.
            Level::Lz4Batch | Level::Zstd => {
                EncodingSet::of(&[Encoding::Zero, Encoding::Same, Encoding::SparseXor])
            }
        }
    }

    /// How the encoded pages travel.
    pub fn packing(self) -> Form {
        match self {
            Level::Pass => Form::Plain,
            Level::Fast | Level::Lz4 => Form::Encoded,
            Level::Lz4Batch => Form::Lz4,
            Level::Zstd => Form::Zstd,
        }
    }

    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Level::Pass => "pass",
            Level::Fast => "fast",
            Level::Lz4Batch => "lz4-batch",
            Level::Lz4 => "lz4",
            Level::Zstd => "zstd",
        }
    }
}

/// What kind of pages a batch has, for the most part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(usize)]
pub enum Class {
    /// Pages without a base.
    #[default]
    First = 0,
    /// Pages whose version sent before is known.
    Again = 1,
}

/// Settings of the policy.
#[derive(Clone, Copy, Debug)]
pub struct PolicyConfig {
    /// The levels that may be chosen for each class: what both sides agreed on, or what the operator forced.
    pub levels: [[bool; Level::ALL.len()]; 2],
    /// Threads that encode.
    pub encode_threads: usize,
    /// Threads that decode.
    pub decode_threads: usize,
    /// What a second of CPU time is worth, in seconds of migration.
    pub cpu_weight: f64,
}

impl Default for PolicyConfig {
    fn default() -> PolicyConfig {
        PolicyConfig {
            levels: [[true; Level::ALL.len()]; 2],
            encode_threads: 1,
            decode_threads: 1,
            cpu_weight: 0.5,
        }
    }
}

/// What encoding a batch took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Work {
    /// CPU time, and time that a device needed. Unlike wall time it says what the work costs, whoever else wants the processor.
    pub busy: Duration,
    /// Wall time.
    pub wall: Duration,
}

/// What was measured over one interval of the whole session.
#[derive(Clone, Copy, Debug)]
pub struct Interval {
    /// When it ended.
    pub end: Instant,
    /// Its length.
    pub time: Duration,
    /// Bytes that arrived at the destination.
    pub wire_bytes: u64,
    /// Whether bytes were under way all the time, so that the link set the pace.
    pub link_was_full: bool,
    /// Whether encoding or decoding set the pace.
    pub compute_bound: bool,
    /// Seconds that writing a page into the destination QEMU took, if that set the pace.
    pub restore_s: Option<f64>,
    /// Time the destination spent on decoding.
    pub decode: Duration,
    /// Pages that it decoded.
    pub decoded_pages: u64,
}

/// A new value counts this much against what was known.
const GAIN: f64 = 0.2;
/// Of work, a lower value counts this much, and a higher one that much: cold caches and interrupts make a batch dearer, nothing makes it cheaper than it is.
const LOWER_GAIN: f64 = 0.5;
const HIGHER_GAIN: f64 = 0.05;
/// A batch counts as no more than so many times what was known: the first use of history memory, say, makes a short one look a hundred times as dear.
const OUTLIER: f64 = 3.0;
/// A level that was not tried for so long is tried again, if it might be the best.
const STALE: Duration = Duration::from_secs(1);
/// How much better than its last measure a stale level is hoped to be.
const HOPE: f64 = 0.7;
/// How much of the wall time of a single batch counts for how far others hold back the encoders.
const STRETCH_GAIN: f64 = 0.02;
/// Nobody holds them back more for long: where encoding sets the pace, the others wait for it. Believing more would choose levels that leave the others so much
/// to do that they do hold it back.
const MAX_STRETCH: f64 = 2.0;
/// CPU time that the kernels of both hosts spend on a byte of the link: about 1 GB/s and core for sending, and for receiving.
const WIRE_CPU_S: f64 = 0.8e-9;
/// A level that works harder than the present one must be this much cheaper.
const ADVANTAGE: f64 = 0.98;
/// While the link is not full, its rate is believed to be higher by this factor each interval.
const PROBE: f64 = 1.25;
/// A rate that was measured is believed in for so long at least, and for twice as long each time that it proves true again.
const HOLD: Duration = Duration::from_secs(1);
const MAX_HOLD: Duration = Duration::from_secs(32);
/// No link is faster: 800 Gbit/s.
const MAX_RATE: f64 = 1e11;
/// The rate believed in at first, bytes a second: 10 Gbit/s. A slower link is full at once, and shows what it can do; a faster one would take long to show it below a level
/// that is too dear for it.
const FIRST_RATE: f64 = 1.2e9;

#[derive(Clone, Copy, Debug)]
struct Cost {
    encode_s: f64,
    decode_s: f64,
    wire_bytes: f64,
    tried: Option<Instant>,
}

/// What a page may cost before anything is measured: seconds to encode and decode, and the share of a page that travels.
const PRIOR: [[(f64, f64, f64); Level::ALL.len()]; 2] = [
    [
        (0.2e-6, 0.2e-6, 1.0),
        (0.8e-6, 0.5e-6, 0.95),
        (4e-6, 1e-6, 0.65),
        (7e-6, 2e-6, 0.6),
        (10e-6, 4e-6, 0.45),
    ],
    [
        (0.2e-6, 0.2e-6, 1.0),
        (0.8e-6, 0.8e-6, 0.1),
        (1.2e-6, 1e-6, 0.09),
        (1.5e-6, 1e-6, 0.08),
        (3e-6, 2e-6, 0.07),
    ],
];

/// The policy of one session.
#[derive(Debug)]
pub struct Policy {
    config: PolicyConfig,
    costs: [[Cost; Level::ALL.len()]; 2],
    /// Seconds that the destination QEMU needs for a page, as far as that was seen.
    restore_s: f64,
    /// Wall time over work when encoding: above 1 where others want the processors as well.
    stretch: f64,
    rate: f64,
    /// The rate of the link when it was full, and when that was.
    measured: Option<(f64, Instant)>,
    hold: Duration,
    probed: bool,
    current: [Level; 2],
}

impl Policy {
    /// A policy that knows nothing yet.
    pub fn new(config: PolicyConfig) -> Policy {
        let cost = |(encode_s, decode_s, share): (f64, f64, f64)| Cost {
            encode_s,
            decode_s,
            wire_bytes: share * PAGE_SIZE as f64,
            tried: None,
        };
        let first = config.levels.map(|allowed| {
            let allowed = |level: &Level| allowed[*level as usize];
            let cheap = Level::ALL.into_iter().rev().filter(|&level| level <= Level::Lz4Batch).find(allowed);
            cheap.or(Level::ALL.into_iter().find(allowed)).unwrap_or(Level::Pass)
        });
        Policy {
            config,
            costs: PRIOR.map(|class| class.map(cost)),
            restore_s: 0.0,
            stretch: 1.0,
            rate: FIRST_RATE,
            measured: None,
            hold: HOLD,
            probed: false,
            current: first,
        }
    }

    /// What the link carried when it was full last, in bytes a second. `None` if it never was.
    pub fn link_bytes_per_s(&self) -> Option<f64> {
        self.measured.map(|(rate, _)| rate)
    }

    /// A batch was encoded: so many pages, with this much work, into so many bytes.
    pub fn encoded(
        &mut self,
        class: Class,
        level: Level,
        pages: usize,
        work: Work,
        wire_bytes: usize,
        now: Instant,
    ) {
        if pages == 0 {
            return;
        }
        let cost = &mut self.costs[class as usize][level as usize];
        let gain = if cost.tried.is_none() { 1.0 } else { GAIN };
        let encode_s = (work.busy.as_secs_f64() / pages as f64).min(OUTLIER * cost.encode_s);
        let work_gain = if encode_s < cost.encode_s { LOWER_GAIN } else { HIGHER_GAIN };
        blend(&mut cost.encode_s, encode_s, work_gain);
        blend(&mut cost.wire_bytes, wire_bytes as f64 / pages as f64, gain);
        cost.tried = Some(now);
        let stretch = work.wall.as_secs_f64() / work.busy.as_secs_f64().max(1e-9);
        blend(&mut self.stretch, stretch.clamp(1.0, MAX_STRETCH), STRETCH_GAIN);
    }

    /// An interval has passed. Decoding is counted as that of the levels in use.
    pub fn interval(&mut self, seen: &Interval) {
        if seen.time.is_zero() {
            return;
        }
        let rate = seen.wire_bytes as f64 / seen.time.as_secs_f64();
        if seen.link_was_full {
            if self.measured.is_none() {
                self.rate = rate;
            } else if std::mem::take(&mut self.probed) {
                let as_before =
                    self.measured.is_some_and(|(before, _)| (0.75..1.33).contains(&(rate / before)));
                self.hold = if as_before { (2 * self.hold).min(MAX_HOLD) } else { HOLD };
                // What was believed meanwhile was a guess.
                self.rate = rate;
            }
            blend(&mut self.rate, rate, 0.5);
            self.measured = Some((self.rate, seen.end));
        } else if rate > self.rate {
            self.rate = rate;
        } else if seen.compute_bound
            && self.measured.is_none_or(|(_, when)| seen.end.saturating_duration_since(when) > self.hold)
        {
            // Levels that need less of the link never show what it can do.
            self.rate = (self.rate * PROBE).min(MAX_RATE);
            self.probed = true;
        }
        // It may become faster without anybody noticing, so that what was seen fades.
        self.restore_s = seen.restore_s.map_or(self.restore_s * 0.95, |seen| seen.max(self.restore_s * 0.95));
        if seen.decoded_pages >= 64 {
            let each = seen.decode.as_secs_f64() / seen.decoded_pages as f64;
            for class in [Class::First, Class::Again] {
                let level = self.current[class as usize];
                // What passes is not decoded.
                if level == Level::Pass {
                    continue;
                }
                let known = &mut self.costs[class as usize][level as usize].decode_s;
                blend(known, each, if each < *known { LOWER_GAIN } else { HIGHER_GAIN });
            }
        }
    }

    /// The level for a batch of this class.
    pub fn choose(&mut self, class: Class, now: Instant) -> Level {
        let current = self.current[class as usize];
        let allowed = |level: Level| self.config.levels[class as usize][level as usize];
        let price = |level: Level| self.price(class, level);
        let best = Level::ALL
            .into_iter()
            .filter(|&level| allowed(level))
            .min_by(|&a, &b| price(a).total_cmp(&price(b)))
            .unwrap_or(Level::Pass);
        let advantage = if best < current { 1.0 } else { ADVANTAGE };
        let next = if !allowed(current) || price(best) < advantage * price(current) { best } else { current };
        // A try costs one batch. What was measured long ago, or once in bad luck, must not be held against a level for ever.
        let stale = Level::ALL.into_iter().find(|&level| {
            let tried = self.costs[class as usize][level as usize].tried;
            let is_stale = tried.is_none_or(|tried| now.saturating_duration_since(tried) > STALE);
            level != next && allowed(level) && is_stale && self.hoped_price(class, level) < price(next)
        });
        self.current[class as usize] = next;
        stale.unwrap_or(next)
    }

    /// The price of a page, in seconds.
    fn price(&self, class: Class, level: Level) -> f64 {
        let Cost { encode_s, decode_s, wire_bytes, .. } = self.costs[class as usize][level as usize];
        self.price_of(encode_s, decode_s, wire_bytes)
    }

    /// The price of a page at a level that has not been tried lately, in the best case.
    fn hoped_price(&self, class: Class, level: Level) -> f64 {
        let Cost { encode_s, decode_s, wire_bytes, .. } = self.costs[class as usize][level as usize];
        let (encode, decode, share) = PRIOR[class as usize][level as usize];
        let hope = |measured: f64, prior: f64| prior.min(HOPE * measured);
        self.price_of(
            hope(encode_s, encode),
            hope(decode_s, decode),
            hope(wire_bytes, share * PAGE_SIZE as f64),
        )
    }

    fn price_of(&self, encode_s: f64, decode_s: f64, wire_bytes: f64) -> f64 {
        let encode = encode_s * self.stretch / self.config.encode_threads.max(1) as f64;
        let decode = decode_s / self.config.decode_threads.max(1) as f64;
        let link = wire_bytes / self.rate;
        let cpu = encode_s + decode_s + wire_bytes * WIRE_CPU_S;
        encode.max(decode).max(link).max(self.restore_s) + self.config.cpu_weight * cpu
    }
}

fn blend(known: &mut f64, new: f64, gain: f64) {
    *known += (new - *known) * gain;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A world in which each level costs this much: encode µs, decode µs, bytes.
    type World = [(f64, f64, f64); Level::ALL.len()];
    const REDIS: World =
        [(0.2, 0.2, 4096.0), (0.8, 0.5, 3400.0), (4.0, 1.0, 2580.0), (7.0, 2.0, 2340.0), (11.0, 4.0, 1820.0)];
    const NOISE: World =
        [(0.2, 0.2, 4096.0), (0.8, 0.5, 4097.0), (2.0, 0.6, 4097.0), (4.0, 0.6, 4097.0), (4.0, 0.6, 4099.0)];
    const SMALL_CHANGES: World =
        [(0.2, 0.2, 4096.0), (0.8, 0.8, 160.0), (1.0, 0.9, 150.0), (0.9, 0.8, 158.0), (2.0, 2.0, 120.0)];

    /// Lets a policy work in a world with this link, and as many threads as it was told, for so long; returns the level that most pages had and their share.
    fn live(policy: &mut Policy, class: Class, world: World, link: f64, seconds: f64) -> (Level, f64) {
        let start = Instant::now();
        let mut now = start;
        let mut counts = [0u64; Level::ALL.len()];
        let step = Duration::from_millis(50);
        let PolicyConfig { encode_threads, decode_threads, .. } = policy.config;
        while now < start + Duration::from_secs_f64(seconds) {
            let (mut left, mut interval) = (
                step.as_secs_f64(),
                Interval {
                    end: now,
                    time: step,
                    wire_bytes: 0,
                    link_was_full: false,
                    compute_bound: false,
                    restore_s: None,
                    decode: Duration::ZERO,
                    decoded_pages: 0,
                },
            );
            let mut full_for = 0.0;
            while left > 0.0 {
                let level = policy.choose(class, now);
                let (encode, decode, bytes) = world[level as usize];
                let pages = 64.0;
                let (encode, decode, wire) =
                    (encode * 1e-6 * pages, decode * 1e-6 * pages, bytes * pages / link);
                policy.encoded(
                    class,
                    level,
                    64,
                    Work { busy: Duration::from_secs_f64(encode), wall: Duration::from_secs_f64(encode) },
                    (bytes * pages) as usize,
                    now,
                );
                let took = (encode / encode_threads as f64).max(decode / decode_threads as f64).max(wire);
                full_for += if wire >= 0.95 * took { took } else { 0.0 };
                left -= took;
                interval.wire_bytes += (bytes * pages) as u64;
                interval.decode += Duration::from_secs_f64(decode);
                interval.decoded_pages += 64;
                counts[level as usize] += 1;
            }
            interval.time = step + Duration::from_secs_f64(-left);
            interval.link_was_full = full_for > 0.8 * interval.time.as_secs_f64();
            interval.compute_bound = full_for < 0.2 * interval.time.as_secs_f64();
            policy.interval(&interval);
            now += step;
        }
        let total: u64 = counts.iter().sum();
        let most =
            Level::ALL.into_iter().max_by_key(|&level| counts[level as usize]).expect("there are levels");
        (most, counts[most as usize] as f64 / total as f64)
    }

    fn settled(world: World, gbit_per_s: f64, config: PolicyConfig) -> Level {
        let (level, share) =
            live(&mut Policy::new(config), Class::First, world, gbit_per_s * 1e9 / 8.0, 10.0);
        assert!(share > 0.7, "{level:?} only {share} of the time");
        level
    }

    #[test]
    fn a_slow_link_is_worth_zstd_and_a_fast_one_nothing() {
        let config = PolicyConfig::default();
        assert_eq!(settled(REDIS, 0.1, config), Level::Zstd);
        assert_eq!(settled(REDIS, 1.0, config), Level::Zstd);
        assert!(settled(REDIS, 25.0, config) <= Level::Fast);
        assert!(settled(REDIS, 100.0, config) <= Level::Fast);
    }

    #[test]
    fn more_threads_pay_for_more_compression_on_a_fast_link() {
        let many = PolicyConfig {
            encode_threads: 16,
            decode_threads: 16,
            cpu_weight: 0.02,
            ..PolicyConfig::default()
        };
        assert!(settled(REDIS, 10.0, many) >= Level::Lz4);
        assert!(settled(REDIS, 10.0, PolicyConfig::default()) <= Level::Fast);
    }

    #[test]
    fn what_does_not_compress_is_passed() {
        for rate in [0.1, 1.0, 10.0] {
            assert!(settled(NOISE, rate, PolicyConfig::default()) <= Level::Fast, "{rate} Gbit/s");
        }
    }

    #[test]
    fn small_changes_are_sent_as_such_at_any_rate() {
        for rate in [0.1, 1.0, 10.0, 25.0] {
            let level = live(
                &mut Policy::new(PolicyConfig::default()),
                Class::Again,
                SMALL_CHANGES,
                rate * 1e9 / 8.0,
                10.0,
            );
            assert!(level.0 >= Level::Fast, "{rate} Gbit/s: {level:?}");
        }
    }

    #[test]
    fn it_follows_when_the_world_changes() {
        let mut policy = Policy::new(PolicyConfig::default());
        assert_eq!(live(&mut policy, Class::First, REDIS, 117e6, 5.0).0, Level::Zstd);
        assert!(live(&mut policy, Class::First, REDIS, 5e9, 10.0).0 <= Level::Fast, "the link became fast");
        assert_eq!(live(&mut policy, Class::First, REDIS, 117e6, 10.0).0, Level::Zstd, "and slow again");
        assert!(
            live(&mut policy, Class::First, NOISE, 117e6, 10.0).0 <= Level::Fast,
            "and then nothing compresses"
        );
    }

    #[test]
    fn a_few_bad_batches_do_not_change_the_level() {
        let mut policy = Policy::new(PolicyConfig::default());
        let (level, _) = live(&mut policy, Class::First, REDIS, 117e6, 5.0);
        assert_eq!(level, Level::Zstd);
        let now = Instant::now() + Duration::from_secs(5);
        for _ in 0..2 {
            let work = Work { busy: Duration::from_millis(10), wall: Duration::from_millis(10) };
            policy.encoded(Class::First, level, 8, work, 8 * 1820, now);
        }
        assert_eq!(policy.current[Class::First as usize], level);
        policy.choose(Class::First, now);
        assert_eq!(policy.current[Class::First as usize], level);
    }

    #[test]
    fn only_allowed_levels_are_chosen() {
        for only in Level::ALL {
            let mut levels = [false; Level::ALL.len()];
            levels[only as usize] = true;
            let mut policy = Policy::new(PolicyConfig { levels: [levels; 2], ..PolicyConfig::default() });
            assert_eq!(live(&mut policy, Class::First, REDIS, 117e6, 1.0), (only, 1.0));
        }
    }
}
