//! The built-in bare-metal test guest of pagewarp.
//!
//! [`ELF`] is a kernel image that any PVH hypervisor boots: QEMU, Cloud Hypervisor, Firecracker, pagewarp's
//! own VMM. What the guest does is said on its command line, which [`GuestConfig`] writes; what it found out
//! it says on the first serial port, in lines that [`Event::parse`] reads. `docs/guest.md` describes the
//! guest itself.
//!
//! ```
//! use pagewarp_guest::{Event, GuestConfig, Workload, WriteRate};
//!
//! let config = GuestConfig { workload: Workload::Kv, write_rate: WriteRate::PagesPerS(5000),
//! ..GuestConfig::default() }; assert_eq!(config.cmdline(), "workload=kv rate=5000 seed=1 report_ms=1000");
//!
//! let line = "pause us=61234 at_ms=8200";
//! let Some(Event::Pause(pause)) = Event::parse(line) else { panic!() };
//! assert_eq!(pause.us, 61_234);
//! ```
#![forbid(unsafe_code)]

mod config;
mod report;

pub use config::{GuestConfig, UnknownWorkload, Workload, WriteRate};
pub use report::{Corruption, Event, Pause, Ready, Report};

/// The guest's ELF image: a 64-bit kernel with a PVH entry point (note `Xen`, type 18), loaded in one piece
/// at 2 MiB.
pub const ELF: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.elf"));
