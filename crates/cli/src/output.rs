//! Files that this program writes, and reports that it prints.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tempfile::NamedTempFile;

use crate::exit::{Exit, Failure};

/// Where a result goes. What a guest has and does is nobody else's business: a file that is made here is private (mode 0600).
pub enum Output {
    /// A file that takes its place only when it is complete.
    File {
        /// The file, beside its place.
        file: NamedTempFile,
        /// Its place.
        place: PathBuf,
    },
    /// A device, a pipe: something that can be written to but not replaced.
    Other(File),
}

impl Output {
    /// Opens the place, without touching a file that is there.
    ///
    /// # Errors
    ///
    /// If nothing can be written there.
    pub fn create(path: &Path) -> Result<Output> {
        let failed = || Failure::new(Exit::Environment, format!("cannot write to `{}`", path.display()));
        let place = match path.metadata() {
            Ok(metadata) if !metadata.is_file() => {
                return Ok(Output::Other(File::options().write(true).open(path).with_context(failed)?));
            }
            // A symbolic link stays, and what it leads to is replaced.
            Ok(_) => path.canonicalize().with_context(failed)?,
            Err(error) if error.kind() == ErrorKind::NotFound && !path.is_symlink() => path.to_owned(),
            Err(error) => return Err(error).with_context(failed),
        };
        let dir = place.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Ok(Output::File { file: NamedTempFile::new_in(dir).with_context(failed)?, place })
    }

    /// To write to.
    pub fn writer(&mut self) -> &mut File {
        match self {
            Output::File { file, .. } => file.as_file_mut(),
            Output::Other(file) => file,
        }
    }

    /// It is complete.
    ///
    /// # Errors
    ///
    /// If the file cannot take its place.
    pub fn finish(self) -> Result<()> {
        if let Output::File { file, place } = self {
            file.persist(&place).map_err(|e| e.error).with_context(|| {
                Failure::new(Exit::Environment, format!("cannot write `{}`", place.display()))
            })?;
        }
        Ok(())
    }
}

/// Writes a line to standard error, for people. One that cannot be written, as to a full disk, is lost: `eprintln!` would end the thread, and nothing that this program does
/// may depend on who reads what it says.
#[macro_export]
macro_rules! say {
    ($($words:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr().lock(), $($words)*);
    }};
}

/// Prints the report of a migration that is over. Where the VM is does not depend on who reads it, so an exit code that says where must not either: what goes wrong here is a
/// warning.
pub fn print_report(text: &str) {
    if let Err(error) = print(&mut io::stdout(), text) {
        crate::say!("warning: the migration succeeded, but its report cannot be printed: {error}");
    }
}

fn print(to: &mut impl Write, text: &str) -> io::Result<()> {
    match to.write_all(text.as_bytes()).and_then(|()| to.flush()) {
        // Whoever reads it has seen enough.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        printed => printed,
    }
}
