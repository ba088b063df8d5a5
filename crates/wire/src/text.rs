//! Characters of a peer's texts, which end up on terminals and in logs.

/// Whether a terminal would obey the character, or show text around it in another order or on another line than it is in: control characters, line and paragraph
/// separators, and those that say in which direction text runs (Unicode 16, UAX #9, section 2).
pub fn misleads(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_write_does_not_mislead() {
        assert!("größer als 5 MB: 数据 / שלום".chars().all(|c| !misleads(c)));
        for c in "\n\x1b\u{9b}\u{61c}\u{200f}\u{2028}\u{202e}\u{2066}".chars() {
            assert!(misleads(c), "{c:?}");
        }
    }
}
