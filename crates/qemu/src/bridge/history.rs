//! How much memory versions of pages take where nobody says it.

/// Of what a host has available, the history takes one part in so many.
const PART: u64 = 8;
/// At most, for a VM that nothing is known of.
const UNKNOWN: u64 = 512 << 20;

/// What is known of the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    /// Nothing.
    Unknown,
    /// Its memory, in bytes, which it has.
    Here(u64),
    /// Its memory, in bytes, which it has yet to take on this host.
    Coming(u64),
}

/// The bytes of a history on a host with so much memory available: an eighth of what the VM leaves, and no more than the VM could fill.
/// `available` is `None` where that is not known.
pub fn default_history_bytes(available: Option<u64>, guest: Guest) -> u64 {
    let (taken, most) = match guest {
        Guest::Unknown => (0, UNKNOWN),
        Guest::Here(bytes) => (0, bytes),
        Guest::Coming(bytes) => (bytes, bytes),
    };
    available.map_or(UNKNOWN, |available| available.saturating_sub(taken) / PART).min(most)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn a_history_is_an_eighth_of_what_is_left_and_no_larger_than_the_vm() {
        let on = |available: u64, guest| default_history_bytes(Some(available * GIB), guest);
        assert_eq!(on(256, Guest::Here(64 * GIB)), 32 * GIB);
        assert_eq!(on(256, Guest::Coming(64 * GIB)), 24 * GIB);
        assert_eq!(on(256, Guest::Here(2 * GIB)), 2 * GIB);
        assert_eq!(on(4, Guest::Coming(8 * GIB)), 0, "the VM itself is too large");
        assert_eq!(on(256, Guest::Unknown), GIB / 2);
        assert_eq!(on(1, Guest::Unknown), GIB / 8);
        assert_eq!(default_history_bytes(None, Guest::Here(64 * GIB)), GIB / 2);
        assert_eq!(default_history_bytes(None, Guest::Coming(GIB / 4)), GIB / 4);
    }
}
