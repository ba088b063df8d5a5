//! What pagewarp asks of a QEMU over its monitor, QMP.
//!
//! [`Qmp`] speaks the protocol, [`Vm`] knows the commands, and [`check`] decides, without any I/O, whether a migration may start and what
//! each QEMU has to be told before. Versions 6.2 to 10.2 differ in what they have and what they leave out, so nothing here relies on a
//! member of an answer that some of them lack.

pub mod check;
mod client;
mod vm;

pub use client::{MAX_LINE, Qmp, QmpError, QmpEvent, Version};
pub use vm::{MigrationStatus, RamStatus, RunState, Vm};
