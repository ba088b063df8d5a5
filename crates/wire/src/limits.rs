//! How large anything may be. The constants are part of the protocol; [`Limits`] lets one end be stricter.

/// Data connections of a migration.
pub const MAX_CONNECTIONS: u16 = 64;
/// Regions of a VM.
pub const MAX_REGIONS: usize = 64;
/// Bytes of the name of a VM or a region.
pub const MAX_NAME_LEN: usize = 64;
/// Pages of a batch.
pub const MAX_BATCH_PAGES: u32 = 4096;
/// Bytes of the machine description in an offer.
pub const MAX_MACHINE_LEN: usize = 1 << 20;
/// Bytes of device state in one frame.
pub const MAX_STATE_CHUNK: usize = 1 << 20;
/// Bytes of device state in all.
pub const MAX_STATE_LEN: u64 = 64 << 20;
/// Bytes of the destination's report.
pub const MAX_REPORT_LEN: usize = 1 << 20;
/// Page digests in one frame.
pub const MAX_DIGESTS: usize = 65536;
/// Bytes of the text of an error or of a reason to cancel.
pub const MAX_TEXT_LEN: usize = 1024;

/// What this end accepts, within what the protocol allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Limits {
    /// Pages of all regions together.
    pub max_guest_pages: u64,
    /// Pages of a batch, at most [`MAX_BATCH_PAGES`]. Set it to what was agreed once that is known.
    pub max_batch_pages: u32,
    /// Bytes of device state in all, at most [`MAX_STATE_LEN`].
    pub max_state_len: u64,
}

impl Limits {
    /// The limits with the batch size that was agreed.
    pub fn with_batch_pages(self, max_batch_pages: u32) -> Limits {
        Limits { max_batch_pages: max_batch_pages.min(MAX_BATCH_PAGES), ..self }
    }
}

impl Default for Limits {
    /// What the protocol allows, and 1 TiB of guest memory.
    fn default() -> Limits {
        Limits {
            max_guest_pages: (1 << 40) / u64::from(crate::PAGE_SIZE),
            max_batch_pages: MAX_BATCH_PAGES,
            max_state_len: MAX_STATE_LEN,
        }
    }
}
