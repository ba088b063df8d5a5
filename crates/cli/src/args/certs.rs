//! `pagewarp certs`.

use std::path::PathBuf;

use clap::Args;

/// `pagewarp certs`.
#[derive(Clone, Debug, Args)]
pub struct CertsArgs {
    /// The directory to make them in, for --tls-dir; copy it to both hosts
    pub dir: PathBuf,
    /// A name or IP address by which the destination is reached; may be given several times
    #[arg(long = "host", value_name = "NAME", required = true)]
    pub hosts: Vec<String>,
    /// The name in the certificate of the source, for --allow-peer
    #[arg(long, value_name = "NAME", default_value = "pagewarp-source")]
    pub client: String,
    /// How many days they are valid
    #[arg(long, value_name = "N", default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=36_500))]
    pub days: u32,
    /// Replace a set that is there
    #[arg(long)]
    pub force: bool,
}
