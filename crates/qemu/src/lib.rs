//! Live migration of unmodified QEMU virtual machines: a transparent bridge between two QEMU processes.
//!
//! ```text
//! source QEMU ─unix socket▶ source bridge ─TCP▶ destination bridge ─unix socket▶ destination QEMU
//! ```
//!
//! The source bridge cuts the bytes of each connection into [segments](segment::Segment): pages, the records around them, and everything else as it
//! is. Pages are encoded like those of the native path; the destination bridge rebuilds exactly the same bytes. Parsing is advisory: what
//! is not understood travels as it is.

#![forbid(unsafe_code)]

pub mod bridge;
#[doc(hidden)]
pub mod fuzzing;
pub mod manage;
pub mod policy;
pub mod protocol;
pub mod qmp;
pub mod return_path;
pub mod segment;
pub mod slots;
pub mod stream;
pub mod window;
