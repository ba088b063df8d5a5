//! What becomes of connections that break, the same for all commands that connect or listen.

use std::time::Duration;

use clap::Args;
use pagewarp_net::lasting::DEFAULT_PATIENCE;

use crate::units::seconds_or_none;

/// Patience with a network that is lost.
#[derive(Clone, Debug, Args)]
pub struct Endurance {
    /// How long a connection that broke may take to be opened again before the migration is given up; the smaller one of both hosts counts. 0: a connection that breaks ends the migration
    #[arg(long, value_name = "TIME", default_value = "60", value_parser = seconds_or_none)]
    pub resume_timeout: Duration,
}

impl Default for Endurance {
    fn default() -> Endurance {
        Endurance { resume_timeout: DEFAULT_PATIENCE }
    }
}
