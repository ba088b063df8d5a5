//! What is decided about a trial before it begins. The same seed and number give the same trial.

use std::time::Duration;

use pagewarp_testkit::rng::{SplitMix64, mix};

/// Whose migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// `pagewarp send` and `receive`.
    Native,
    /// `pagewarp qemu migrate` and `receive`.
    Bridge,
}

/// What goes wrong. In the native kind the source and the destination are processes of pagewarp; in that of the bridge they are QEMUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    KillSource,
    KillDestination,
    /// `pagewarp send`, `pagewarp qemu migrate`.
    KillSender,
    /// `pagewarp qemu receive`.
    KillReceiver,
    StopSource,
    StopDestination,
    StopSender,
    StopReceiver,
    /// Some connections are reset; new ones may be opened at once.
    Reset,
    /// All are reset, and for a while new ones end at once.
    Refuse,
    /// Nothing gets through for a while, and nobody is told.
    Blackhole,
    /// One connection stalls for a while.
    Stall,
    /// The link goes down for a while, as a cable that is pulled out.
    LinkDown,
    /// One bit is flipped.
    Corrupt,
    /// Traces and reports go to a full disk.
    FullDisk,
    /// The history holds next to nothing.
    TinyHistory,
    /// The receiver gets little address space.
    MemoryLimit,
    /// A GPU that is lost.
    LoseGpu,
    /// The monotonic clock of one end is hours ahead.
    Clock,
}

impl Fault {
    /// All of them, and how often they are drawn, natively and for the bridge.
    const WEIGHTS: [(Fault, u64, u64); 19] = [
        (Fault::KillSource, 4, 3),
        (Fault::KillDestination, 8, 8),
        (Fault::KillSender, 6, 8),
        (Fault::KillReceiver, 0, 8),
        (Fault::StopSource, 6, 6),
        (Fault::StopDestination, 6, 6),
        (Fault::StopSender, 2, 6),
        (Fault::StopReceiver, 0, 6),
        (Fault::Reset, 14, 10),
        (Fault::Refuse, 8, 6),
        (Fault::Blackhole, 10, 6),
        (Fault::Stall, 6, 5),
        (Fault::LinkDown, 0, 12),
        (Fault::Corrupt, 12, 10),
        (Fault::FullDisk, 5, 4),
        (Fault::TinyHistory, 5, 5),
        (Fault::MemoryLimit, 4, 5),
        (Fault::LoseGpu, 1, 1),
        (Fault::Clock, 4, 4),
    ];

    /// Whether it is there from the beginning, rather than something that happens.
    pub(crate) fn is_condition(self) -> bool {
        matches!(
            self,
            Fault::FullDisk | Fault::TinyHistory | Fault::MemoryLimit | Fault::LoseGpu | Fault::Clock
        )
    }

    fn draw(kind: Kind, rng: &mut SplitMix64) -> Fault {
        let weight = |&(_, native, bridge): &(Fault, u64, u64)| match kind {
            Kind::Native => native,
            Kind::Bridge => bridge,
        };
        let mut left = rng.below(Fault::WEIGHTS.iter().map(weight).sum());
        for entry in &Fault::WEIGHTS {
            match left.checked_sub(weight(entry)) {
                Some(rest) => left = rest,
                None => return entry.0,
            }
        }
        unreachable!("it is below the sum")
    }

    /// How long it lasts, if it passes.
    fn lasts(self, rng: &mut SplitMix64) -> Duration {
        let between = |from: f64, to: f64, rng: &mut SplitMix64| {
            // Short ones more often than long ones.
            Duration::from_secs_f64(from * (to / from).powf(rng.unit()))
        };
        match self {
            Fault::StopSource | Fault::StopDestination | Fault::StopSender | Fault::StopReceiver => {
                between(0.1, 8.0, rng)
            }
            Fault::Refuse => between(0.2, 6.0, rng),
            Fault::Blackhole | Fault::LinkDown | Fault::Stall => between(1.0, 12.0, rng),
            _ => Duration::ZERO,
        }
    }
}

/// One fault of a trial.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Strike {
    pub(crate) fault: Fault,
    /// When, as a part of what the migration is expected to take.
    pub(crate) at: f64,
    /// For how long, if it passes.
    pub(crate) lasts: Duration,
    /// What else has to be chosen.
    pub(crate) number: u64,
}

/// A trial.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) kind: Kind,
    pub(crate) tls: bool,
    /// Natively data connections, 1 to 4. For the bridge those of multifd; 0: without.
    pub(crate) connections: u64,
    /// How fast the migration may be: its pace decides what a moment hits.
    pub(crate) rate_bits_per_s: u64,
    /// `--resume-timeout`, in seconds.
    pub(crate) resume_s: u64,
    /// `--peer-timeout`, in seconds.
    pub(crate) peer_s: u64,
    pub(crate) downtime_ms: u64,
    /// Whether QEMU is left alone with the connection.
    pub(crate) direct: bool,
    /// By time.
    pub(crate) strikes: Vec<Strike>,
}

impl Plan {
    /// Trial `number` of a campaign. Half of them are of each kind.
    pub(crate) fn draw(seed: u64, number: u32) -> Plan {
        let mut rng = SplitMix64::new(mix(seed ^ mix(number.into())));
        let kind = if number.is_multiple_of(2) { Kind::Native } else { Kind::Bridge };
        let mut pick = |from: &[u64]| from[rng.index(from.len())];
        let tls = pick(&[0, 1]) == 1;
        let connections = match kind {
            Kind::Native => pick(&[1, 2, 3, 4]),
            Kind::Bridge => pick(&[0, 0, 1, 2, 4]),
        };
        let rate_bits_per_s = match kind {
            Kind::Native => pick(&[100, 200, 400]),
            Kind::Bridge => pick(&[150, 300, 600]),
        } * 1_000_000;
        // Shorter than many outages, or longer than any.
        let resume_s = pick(&[0, 3, 20, 20]);
        let peer_s = pick(&[2, 5, 10]);
        let downtime_ms = pick(&[300, 2000]);
        let count = pick(&[1, 1, 2]);
        let mut strikes: Vec<Strike> = Vec::new();
        while (strikes.len() as u64) < count {
            let fault = Fault::draw(kind, &mut rng);
            let lasts = fault.lasts(&mut rng);
            // A part of them comes later than it should end.
            let at = if fault.is_condition() { 0.0 } else { rng.unit() * 1.15 };
            let strike = Strike { fault, at, lasts, number: rng.next_u64() };
            if strikes.iter().all(|other| other.fault != fault) {
                strikes.push(strike);
            }
        }
        strikes.sort_by(|a, b| a.at.total_cmp(&b.at));
        // QEMU 7.2 may wait for ever for its channels when all of them end at once, as they do when the source's bridge is killed (docs/qemu.md).
        let is_killed =
            kind == Kind::Bridge && strikes.iter().any(|strike| strike.fault == Fault::KillSender);
        let connections = if is_killed { 0 } else { connections };
        // There nobody but TCP sees a flipped bit, and no GPU has anything to do.
        let is_of_bridge =
            |strike: &Strike| matches!(strike.fault, Fault::Corrupt | Fault::LoseGpu | Fault::TinyHistory);
        let may_be_direct = kind == Kind::Bridge && !tls && !strikes.iter().any(is_of_bridge);
        let direct = may_be_direct && rng.below(3) > 0;
        let connections = if direct { 0 } else { connections };
        Plan { kind, tls, connections, rate_bits_per_s, resume_s, peer_s, downtime_ms, direct, strikes }
    }

    pub(crate) fn has(&self, fault: Fault) -> Option<Strike> {
        self.strikes.iter().copied().find(|strike| strike.fault == fault)
    }
}
