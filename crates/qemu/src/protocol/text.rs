//! Text of a peer, which ends up on terminals and in logs.

use pagewarp_wire::misleads;
use serde_json::Value;

/// The text, with nothing in it that a terminal would obey or that would make it look like another: such characters are shown by their numbers, and line breaks
/// as blanks.
pub(crate) fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\r' | '\t' => shown.push(' '),
            c if misleads(c) => shown.extend(c.escape_unicode()),
            c => shown.push(c),
        }
    }
    shown
}

/// The same of bytes that should be UTF-8.
pub(crate) fn printable_bytes(bytes: &[u8]) -> String {
    printable(&String::from_utf8_lossy(bytes))
}

/// The same of all texts in a JSON value.
pub(crate) fn printable_json(value: Value) -> Value {
    match value {
        Value::String(text) => Value::String(printable(&text)),
        Value::Array(list) => list.into_iter().map(printable_json).collect(),
        Value::Object(map) => {
            map.into_iter().map(|(key, value)| (printable(&key), printable_json(value))).collect()
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_shown() {
        assert_eq!(printable("no room; 5 MB: größer"), "no room; 5 MB: größer");
        assert_eq!(printable("a\x1b[2Jb\x07\u{9b}c"), "a\\u{1b}[2Jb\\u{7}\\u{9b}c");
        assert_eq!(printable("two\r\nlines"), "two  lines");
        assert_eq!(printable("\u{202e}txt.exe"), "\\u{202e}txt.exe");
        assert_eq!(printable_bytes(b"\xff\x1b"), "\u{fffd}\\u{1b}");
        let value = json!({ "a\x1b": ["\x1b", 1, null, { "b": "\x07" }] });
        assert_eq!(printable_json(value), json!({ "a\\u{1b}": ["\\u{1b}", 1, null, { "b": "\\u{7}" }] }));
    }
}
