//! `pagewarp completions` and `pagewarp man`: both are made from the command line's definition.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use clap::CommandFactory;
use clap_complete::Shell;

use crate::args::Cli;
use crate::exit::{Exit, Failure};

/// Prints the completion script of a shell.
pub(super) fn completions(shell: Shell) -> Result<()> {
    // Into memory first: the generator panics on a closed pipe.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "pagewarp", &mut script);
    std::io::stdout().write_all(&script).context("cannot write the completion script")
}

/// Prints the manual page of the program, or writes one page per command into `dir`.
pub(super) fn man(dir: Option<&Path>) -> Result<()> {
    let command = Cli::command();
    let Some(dir) = dir else {
        let mut page = Vec::new();
        clap_mangen::Man::new(command).render(&mut page)?;
        return std::io::stdout().write_all(&page).context("cannot write the manual page");
    };
    std::fs::create_dir_all(dir).and_then(|()| clap_mangen::generate_to(command, dir)).with_context(|| {
        Failure::new(Exit::Environment, format!("cannot write manual pages into `{}`", dir.display()))
    })
}
