//! Connections between pagewarp hosts. What a connection is, [`pagewarp_engine::transport`] says; this crate makes those that are more than a TCP connection.
//!
//! [`tls`]: encrypted, with certificates on both sides.
#![forbid(unsafe_code)]

pub mod tls;
