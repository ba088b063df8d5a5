//! A reference virtual machine monitor on KVM that migrates through pagewarp.
//!
//! It runs guests without a disk or a network: an ELF kernel with a PVH entry or a Linux bzImage, an initrd, a serial console. That is
//! what migration needs to be shown and tested on; it is not meant to run anybody's production.

mod boot;
pub mod config;
pub mod control;
mod cpuid;
mod devices;
mod dirty;
pub mod error;
#[doc(hidden)]
pub mod fuzzing;
mod gate;
mod ioctl;
mod layout;
mod machine;
mod memory;
mod migrate;
mod process;
pub mod runtime;
mod state;
mod vcpu;
mod vm;

pub use config::{HostConfig, KernelSource, MachineConfig};
pub use devices::console::SerialCounters;
pub use error::Error;
pub use gate::ExitReason;
pub use migrate::{ChooseName, DestinationMachine, OnRun, SourceMachine};
pub use runtime::{Outcome, RuntimeOptions, receive_vm, run_vm};
pub use vm::{ConsoleCopy, Vm};
