//! `pagewarp status`, `pagewarp cancel` and `pagewarp resolve`.

use clap::{ArgGroup, Args};

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
#[command(group = ArgGroup::new("decision").required(true))]
pub struct ResolveArgs {
    /// Name of the VM
    pub name: String,
    /// The VM surely does not run on the destination and never will: run it here
    #[arg(long, group = "decision")]
    pub resume: bool,
    /// The VM runs on the destination: discard it here
    #[arg(long, group = "decision")]
    pub discard: bool,
}
