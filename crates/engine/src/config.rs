//! What a caller decides about a migration.

use std::time::Duration;

use pagewarp_codec::{EncodingSet, SharedBackend, Trace};
use serde::{Deserialize, Serialize};

/// What to do when the epoch or time limit is reached before the estimated downtime fits its limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnLimit {
    /// Go on with the pre-copy for as long as it takes.
    KeepGoing,
    /// Switch over anyway, with a longer downtime than asked for.
    StopAnyway,
    /// Cancel: the VM stays on the source.
    #[default]
    Cancel,
}

/// Threads for a stage that computes: half of the processors, and no more than four, because the VMs of this host come first.
pub fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| (cores.get() / 2).clamp(1, 4))
}

/// How the source migrates.
#[derive(Clone)]
pub struct SourceConfig {
    /// Data connections beside the control connection, 1 to 64.
    pub connections: usize,
    /// Switch over when the estimated downtime fits this.
    pub downtime_limit: Duration,
    /// At most this many bytes per second on all connections together.
    pub bandwidth_bytes_per_s: Option<u64>,
    /// The encodings to offer.
    pub encodings: EncodingSet,
    /// Memory for page versions sent before, in bytes; 0 switches deltas off.
    pub history_bytes: u64,
    /// Whether the stages work at once on different batches. `false` runs the same stage functions one after another.
    pub pipeline: bool,
    /// Pages in a batch, 1 to 4096.
    pub batch_pages: usize,
    /// Threads that serialize.
    pub serialize_threads: usize,
    /// Epochs before `on_limit` decides, counting the first.
    pub max_epochs: Option<u32>,
    /// Time before `on_limit` decides.
    pub max_time: Option<Duration>,
    /// What to do at either limit.
    pub on_limit: OnLimit,
    /// Compare a digest of every page on both sides before the hand-over, while the VM is paused: no hand-over if one differs.
    pub verify: bool,
    /// How long a silent or stalled peer is waited for.
    pub peer_timeout: Duration,
    /// Where the stages record what they do with each batch.
    pub trace: Option<Trace>,
    /// Who computes encodings.
    pub backend: SharedBackend,
}

impl SourceConfig {
    /// The defaults, with this backend.
    pub fn new(backend: SharedBackend) -> SourceConfig {
        SourceConfig {
            connections: 1,
            downtime_limit: Duration::from_millis(300),
            bandwidth_bytes_per_s: None,
            encodings: EncodingSet::ALL,
            history_bytes: 512 << 20,
            pipeline: true,
            batch_pages: 256,
            serialize_threads: default_threads(),
            max_epochs: None,
            max_time: Some(Duration::from_secs(3600)),
            on_limit: OnLimit::default(),
            verify: false,
            peer_timeout: Duration::from_secs(30),
            trace: None,
            backend,
        }
    }
}

/// How the destination receives.
#[derive(Clone)]
pub struct DestinationConfig {
    /// The encodings to accept.
    pub encodings: EncodingSet,
    /// The names of the VMs to accept; none: any. A VM is called what its source says.
    pub allowed_vms: Vec<String>,
    /// The largest VM to accept, in bytes of guest memory.
    pub max_memory_bytes: u64,
    /// Device memory for page versions received before, in bytes, if the backend decodes on a device: bases that need not be uploaded.
    pub history_bytes: u64,
    /// Threads that deserialize.
    pub deserialize_threads: usize,
    /// The most data connections to accept, 1 to 64. Each costs a few batches of memory.
    pub max_connections: usize,
    /// The largest batch to accept, in pages, 1 to 4096; a source that offers more uses this.
    pub max_batch_pages: usize,
    /// How long to wait for the source to connect.
    pub accept_timeout: Duration,
    /// How long a silent or stalled peer is waited for.
    pub peer_timeout: Duration,
    /// Where the stages record what they do with each batch.
    pub trace: Option<Trace>,
    /// Who computes encodings.
    pub backend: SharedBackend,
}

impl DestinationConfig {
    /// The defaults, with this backend.
    pub fn new(backend: SharedBackend) -> DestinationConfig {
        DestinationConfig {
            encodings: EncodingSet::ALL,
            allowed_vms: Vec::new(),
            max_memory_bytes: 1 << 40,
            history_bytes: 512 << 20,
            deserialize_threads: default_threads(),
            max_connections: 64,
            max_batch_pages: 256,
            accept_timeout: Duration::from_secs(24 * 3600),
            peer_timeout: Duration::from_secs(30),
            trace: None,
            backend,
        }
    }

    /// Whether a VM of this name may come here.
    pub fn takes(&self, vm_name: &str) -> bool {
        self.allowed_vms.is_empty() || self.allowed_vms.iter().any(|allowed| allowed == vm_name)
    }
}
