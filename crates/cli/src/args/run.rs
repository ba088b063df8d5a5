//! `pagewarp run` and `pagewarp receive`.

use std::convert::Infallible;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use pagewarp_codec::EncodingSet;
use pagewarp_kvm::config::MAX_VCPUS;

use super::link::Endurance;
use super::seccomp::SeccompChoice;
use super::tls::{Admission, Encryption};
use crate::backend::BackendName;
use crate::units::{ByteSize, memory_size, seconds};

/// `pagewarp run`.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// Name of the VM on this host: letters, digits, `-`, `_` and `.`, at most 64
    #[arg(long)]
    pub name: String,
    /// An ELF kernel with a PVH note, a bzImage, or `builtin` for the built-in test guest
    #[arg(long, value_name = "FILE|builtin")]
    pub kernel: Kernel,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, default_value = "")]
    pub cmdline: String,
    /// Guest memory, for example 512M or 2G
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = memory_size)]
    pub memory: ByteSize,
    /// Virtual CPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_VCPUS)))]
    pub vcpus: u32,
    /// How it sits on this host.
    #[command(flatten)]
    pub place: PlaceArgs,
}

/// How a VM runs on this host; the same for `run` and `receive`.
#[derive(Clone, Debug, Args)]
pub struct PlaceArgs {
    /// Where the guest's serial port goes
    #[arg(long, value_name = "stdout|none|FILE", default_value = "stdout")]
    pub console: ConsoleTarget,
    /// Type standard input into the guest's serial port, line by line
    #[arg(long)]
    pub stdin: bool,
    /// Back guest memory with 2 MiB huge pages; the host must have enough of them reserved
    #[arg(long)]
    pub huge_pages: bool,
    /// Take guest memory even if the host does not have that much available now
    #[arg(long)]
    pub overcommit: bool,
    /// Nice level of the vCPU threads, 0 to 19: higher leaves more CPU to everything else
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(0..=19))]
    pub vcpu_nice: Option<i32>,
    /// Who encodes and decodes for this VM: `cpu`, `gpu`, `gpu:N` for a device that `pagewarp devices` lists, or `auto` for the faster one; `send` may say otherwise
    #[arg(long, value_name = "auto|cpu|gpu[:N]", default_value = "auto")]
    pub backend: BackendName,
    /// Refuse system calls that this process has no business to make; `log` lets them pass and makes the kernel log them
    #[arg(long, value_enum, default_value = "on", hide_possible_values = true, value_name = "on|log|off")]
    pub seccomp: SeccompChoice,
}

/// `pagewarp receive`.
#[derive(Clone, Debug, Args)]
pub struct ReceiveArgs {
    /// Address to listen on, HOST:PORT; anything but loopback needs --tls-dir or --plaintext
    #[arg(long, value_name = "ADDR")]
    pub listen: String,
    /// Name of the VM on this host, whatever it is called at the source
    #[arg(long)]
    pub name: Option<String>,
    /// Accept only a VM of this name at the source; may be given several times [default: any]
    #[arg(long, value_name = "NAME")]
    pub allow_vm: Vec<String>,
    /// The largest VM to accept
    #[arg(long, value_name = "SIZE", default_value = "1T", value_parser = memory_size)]
    pub max_memory: ByteSize,
    /// How long a lost network is waited for.
    #[command(flatten)]
    pub endurance: Endurance,
    /// Whether the connections are encrypted.
    #[command(flatten)]
    pub encryption: Encryption,
    /// Who may connect.
    #[command(flatten)]
    pub admission: Admission,
    /// The encodings to accept: `all`, or a list such as zero,raw,lz4
    #[arg(long, value_name = "LIST", default_value = "all")]
    pub encodings: EncodingSet,
    /// Threads that decode
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub threads: u32,
    /// Memory of a GPU for page versions received before, so that most bases of deltas need not be uploaded; 0: none. The CPU needs none
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    pub history: ByteSize,
    /// The most data connections to accept; each costs a few batches of memory
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub max_connections: u32,
    /// The largest batch to accept, in pages; a source with larger ones uses this
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub max_batch_pages: u32,
    /// How long to wait for a source, for example 90 or 2m [default: for ever]
    #[arg(long, value_name = "TIME", value_parser = seconds)]
    pub accept_timeout: Option<Duration>,
    /// How long a silent source is waited for
    #[arg(long, value_name = "TIME", default_value = "30", value_parser = seconds)]
    pub peer_timeout: Duration,
    /// Write who worked on which batch, and when, into a file for ui.perfetto.dev, when the migration has ended, however it ended
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Print the report as JSON when the VM has arrived
    #[arg(long)]
    pub json: bool,
    /// How it sits on this host.
    #[command(flatten)]
    pub place: PlaceArgs,
}

/// What to boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// The built-in test guest.
    Builtin,
    /// A file.
    File(PathBuf),
}

impl FromStr for Kernel {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Kernel, Infallible> {
        Ok(if text == "builtin" { Kernel::Builtin } else { Kernel::File(text.into()) })
    }
}

/// Where the serial port goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsoleTarget {
    /// Standard output.
    Stdout,
    /// Nowhere.
    None,
    /// A file, appended to.
    File(PathBuf),
}

impl FromStr for ConsoleTarget {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<ConsoleTarget, Infallible> {
        Ok(match text {
            "stdout" | "-" => ConsoleTarget::Stdout,
            "none" => ConsoleTarget::None,
            file => ConsoleTarget::File(file.into()),
        })
    }
}
