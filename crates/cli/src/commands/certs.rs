//! `pagewarp certs`.

use anyhow::{Error, Result};
use pagewarp_net::tls::certs::{LabError, LabSet, make};

use crate::args::CertsArgs;
use crate::exit::{Exit, failure};
use crate::say;

/// Runs `pagewarp certs`.
pub(super) fn certs(args: &CertsArgs) -> Result<()> {
    let set = LabSet { hosts: args.hosts.clone(), client: args.client.clone(), days: args.days };
    let files = make(&args.dir, &set, args.force).map_err(of_lab)?;
    for file in files {
        println!("{}", file.display());
    }
    say!(
        "copy the directory to both hosts and pass it with --tls-dir; the CA's key was not kept, so a set cannot be extended"
    );
    Ok(())
}

fn of_lab(error: LabError) -> Error {
    let exit = if matches!(error, LabError::Names(_)) { Exit::Usage } else { Exit::Environment };
    failure(exit, error.to_string())
}
