//! Faults of a device, on demand: for tests of what happens then. A backend without faults has all fields `None`.

use std::num::NonZeroU64;

/// What goes wrong, and when. Jobs are numbered from 0 in the order in which a backend's encoders and decoders submit them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// The device is destroyed when so many jobs have been submitted, as if its driver had reset it.
    pub lose_after: Option<u64>,
    /// From this job on the device never finishes anything; noticed after the stall timeout.
    pub stall_after: Option<u64>,
    /// When so many jobs have been submitted, device memory is exhausted: every later allocation fails.
    pub no_memory_after: Option<u64>,
    /// One in so many jobs comes back with a bit flipped.
    pub corrupt_one_in: Option<NonZeroU64>,
}
