//! `pagewarp status`, `pagewarp cancel` and `pagewarp resolve`.

use clap::Args;

/// `pagewarp status`.
#[derive(Clone, Debug, Args)]
pub struct StatusArgs {
    /// Name of the VM [default: all of this host]
    pub name: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `pagewarp cancel`.
#[derive(Clone, Debug, Args)]
pub struct CancelArgs {
    /// Name of the VM
    pub name: String,
}

/// `pagewarp resolve`.
#[derive(Clone, Debug, Args)]
#[group(id = "decision", required = true, multiple = false, args = ["resume", "discard"])]
pub struct ResolveArgs {
    /// Name of the VM
    pub name: String,
    /// The VM surely does not run on the destination and never will: run it here
    #[arg(long)]
    pub resume: bool,
    /// The VM runs on the destination: discard it here
    #[arg(long)]
    pub discard: bool,
}
