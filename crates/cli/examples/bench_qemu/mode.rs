//! The ways to migrate that are compared.

use std::fmt;
use std::num::NonZeroU8;

use clap::ValueEnum;
use pagewarp_qemu::qmp::{QmpError, Vm};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::args::Args;

/// A way to migrate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Mode {
    /// QEMU alone: every page as it is, but for pages of zeros
    None,
    /// QEMU as in none, through two processes that pass bytes on and do nothing else
    Relay,
    /// As relay, with bytes that pass from socket to socket inside the kernel and are not seen by anybody
    #[value(name = "relay+splice")]
    #[serde(rename = "relay+splice")]
    RelaySplice,
    /// As relay+splice, but that both processes look at each byte before it passes
    #[value(name = "relay+peek")]
    #[serde(rename = "relay+peek")]
    RelayPeek,
    /// QEMU alone: pages sent before as differences to those, from a cache on the source
    Xbzrle,
    /// QEMU alone: pages over several connections
    Multifd,
    /// QEMU alone: as multifd, compressed with zlib
    #[value(name = "multifd+zlib")]
    #[serde(rename = "multifd+zlib")]
    MultifdZlib,
    /// QEMU alone: as multifd, compressed with zstd
    #[value(name = "multifd+zstd")]
    #[serde(rename = "multifd+zstd")]
    MultifdZstd,
    /// QEMU as in none, through pagewarp, on the route that it chooses
    Pagewarp,
    /// The same through the bridge, however fast the link is
    PagewarpBridge,
    /// QEMU as in multifd, through pagewarp
    PagewarpMultifd,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.to_possible_value().as_ref().map_or("?", |value| value.get_name()))
    }
}

impl Mode {
    /// Whether pagewarp does it.
    pub(crate) fn is_pagewarp(self) -> bool {
        matches!(self, Mode::Pagewarp | Mode::PagewarpBridge | Mode::PagewarpMultifd)
    }

    /// The option that makes this program one half of the relay, in the modes that have one.
    pub(crate) fn relay(self) -> Option<&'static str> {
        match self {
            Mode::Relay => Some("--relay"),
            Mode::RelaySplice => Some("--relay-splice"),
            Mode::RelayPeek => Some("--relay-peek"),
            _ => None,
        }
    }

    /// How many connections QEMU uses for pages beside the main one.
    pub(crate) fn multifd(self, channels: u8) -> Option<NonZeroU8> {
        let is_multifd =
            matches!(self, Mode::Multifd | Mode::MultifdZlib | Mode::MultifdZstd | Mode::PagewarpMultifd);
        NonZeroU8::new(channels).filter(|_| is_multifd)
    }

    /// Tells one side of a migration by QEMU alone, what is the same on both sides first.
    pub(crate) fn prepare(self, vm: &mut Vm, is_source: bool, args: &Args) -> Result<(), QmpError> {
        let channels = self.multifd(args.channels);
        // The return path makes the source wait for the destination's word, as it does through pagewarp and under libvirt.
        vm.set_capabilities([
            ("events", true),
            ("return-path", true),
            ("xbzrle", self == Mode::Xbzrle),
            ("multifd", channels.is_some()),
        ])?;
        let mut parameters = Map::new();
        let mut set = |key: &str, value: Value| parameters.insert(key.to_owned(), value);
        if let Some(channels) = channels {
            let method = match self {
                Mode::MultifdZlib => "zlib",
                Mode::MultifdZstd => "zstd",
                _ => "none",
            };
            set("multifd-channels", channels.get().into());
            // At its level 1, the default of both.
            set("multifd-compression", method.into());
        }
        if is_source {
            // No limit but the link, as through pagewarp.
            set("max-bandwidth", 0.into());
            set("downtime-limit", args.downtime_ms.into());
            if self == Mode::Xbzrle {
                // QEMU takes no cache larger than the VM, and powers of two only.
                let largest = 1_u64 << args.memory.0.max(1).ilog2();
                set("xbzrle-cache-size", args.xbzrle_cache.0.min(largest).into());
            }
        }
        vm.set_parameters(parameters)
    }
}
