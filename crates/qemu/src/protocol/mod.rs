//! What the two bridges say to each other, free of I/O: bytes in, bytes out. `docs/bridge-protocol.md` is the normative description.
//!
//! Every TCP connection stands for one connection of QEMU, or is the control connection of `pagewarp qemu`. Frames of all kinds have the
//! same [header](frame::Header). Nothing that comes from the peer is trusted: lengths are checked before anything is allocated for them.

pub mod control;
pub mod frame;
pub mod hello;
pub mod meta;
pub(crate) mod text;

/// The version of this protocol.
pub const VERSION: u16 = 1;
/// The most pages in a segment.
pub const MAX_PAGES: usize = 256;
/// The most bytes of a segment that are not pages, once they are rebuilt.
pub const MAX_LITERALS: usize = 256 << 10;
/// The most operations of a segment.
pub const MAX_OPS: usize = 4096;
/// The most connections of a session.
pub const MAX_CONNECTIONS: usize = 260;
/// The most history slots: 1 TiB of pages.
pub const MAX_SLOTS: u32 = 1 << 28;
/// The longest body of a frame that is not a segment.
pub const MAX_MESSAGE: usize = 64 << 10;
/// The most characters of a reason that is told to the peer, or that the peer is believed.
pub const MAX_REASON: usize = 1000;

/// A reason as it may be told.
pub fn shorten(reason: &str) -> String {
    reason.chars().take(MAX_REASON).collect()
}

/// The reason in the body of an Error frame, which can be printed as it is.
pub fn reason_of(body: &[u8]) -> String {
    shorten(&text::printable_bytes(body))
}
