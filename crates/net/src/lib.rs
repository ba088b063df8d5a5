//! Connections between pagewarp hosts. What a connection is, [`pagewarp_engine::transport`] says; this crate makes those that are more than a TCP connection.
//!
//! [`tls`]: encrypted, with certificates on both sides. [`lasting`]: over one connection after another, where the network is lost for a while.
#![forbid(unsafe_code)]

#[doc(hidden)]
pub mod fuzzing;
pub mod lasting;
pub mod tls;
