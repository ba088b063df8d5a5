//! `pagewarp devices`.

use clap::Args;

/// `pagewarp devices`.
#[derive(Clone, Debug, Args)]
pub struct DevicesArgs {
    /// Do not measure how fast they are, and so not tell what `auto` takes
    #[arg(long)]
    pub no_measure: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}
