//! What a caller decides about a bridge.

use std::time::Duration;

use pagewarp_codec::{EncodingSet, PAGE_SIZE, SharedBackend};
use pagewarp_engine::available;
use pagewarp_engine::config::default_threads;

use crate::bridge::history::{Guest, default_history_bytes};
use crate::policy::{Class, Level, PolicyConfig};
use crate::protocol::MAX_SLOTS;
use crate::protocol::hello::Terms;

/// How hard to compress.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// As it pays: decided batch by batch.
    #[default]
    Auto,
    /// This much, always.
    Always(Level),
}

/// How a bridge works.
#[derive(Clone)]
pub struct BridgeConfig {
    /// Who computes encodings.
    pub backend: SharedBackend,
    /// How hard to compress. The source decides.
    pub compression: Compression,
    /// Memory for page versions sent before, in bytes; the smaller one of both hosts counts. 0 switches deltas off.
    pub history_bytes: u64,
    /// Threads that serialize or deserialize.
    pub threads: usize,
    /// How long bytes may be on their way between the two QEMU processes, beyond the round trip of the link.
    pub delay: Duration,
    /// What a second of CPU time is worth in seconds of migration, when deciding how hard to compress.
    pub cpu_weight: f64,
    /// How long a peer that cannot be reached is waited for.
    pub peer_timeout: Duration,
    /// Compare hashes of what is read from the source QEMU and of what is written into the other one. The source decides.
    pub verify: bool,
}

impl BridgeConfig {
    /// The defaults, with this backend.
    pub fn new(backend: SharedBackend) -> BridgeConfig {
        BridgeConfig {
            backend,
            compression: Compression::Auto,
            history_bytes: default_history_bytes(available::memory_bytes(), Guest::Unknown),
            threads: default_threads(),
            // 7.5 ms would keep the downtime within 10 % of its limit in the worst case; the stages themselves need some of it.
            delay: Duration::from_millis(8),
            cpu_weight: PolicyConfig::default().cpu_weight,
            peer_timeout: Duration::from_secs(10),
            verify: false,
        }
    }

    /// What this side can do.
    pub(crate) fn terms(&self) -> Terms {
        let history_slots = (self.history_bytes / PAGE_SIZE as u64).min(MAX_SLOTS.into()) as u32;
        Terms { encodings: EncodingSet::ALL, zstd: true, verify: true, direct: false, history_slots }
    }

    /// What a source offers: what it can do, of what it wants.
    pub(crate) fn offer(&self) -> Terms {
        Terms { verify: self.verify, ..self.terms() }
    }

    /// The policy under these terms.
    pub(crate) fn policy(&self, terms: &Terms) -> PolicyConfig {
        let allowed = |class: Class, level: Level| match (self.compression, level) {
            (Compression::Always(only), _) => level == only,
            (Compression::Auto, Level::Lz4Batch | Level::Zstd) => terms.allow(level.packing()),
            // Batches get nearly as short for half the work, unless a device does it.
            (Compression::Auto, Level::Lz4) => class == Class::Again || !self.backend.is_cpu(),
            (Compression::Auto, Level::Pass | Level::Fast) => true,
        };
        let levels = [Class::First, Class::Again].map(|class| Level::ALL.map(|level| allowed(class, level)));
        PolicyConfig {
            levels,
            encode_threads: self.threads,
            decode_threads: self.threads,
            cpu_weight: self.cpu_weight,
        }
    }
}
