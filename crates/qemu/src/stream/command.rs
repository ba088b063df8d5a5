//! The commands of the main connection.

use super::cursor::{Cursor, Stuck};

pub(super) const OPEN_RETURN_PATH: u16 = 1;
const PING: u16 = 2;
pub(super) const POSTCOPY_ADVISE: u16 = 3;
pub(super) const POSTCOPY_LISTEN: u16 = 4;
pub(super) const POSTCOPY_RUN: u16 = 5;
pub(super) const POSTCOPY_RAM_DISCARD: u16 = 6;
pub(super) const PACKAGED: u16 = 7;
pub(super) const ENABLE_COLO: u16 = 8;
const POSTCOPY_RESUME: u16 = 9;
const RECV_BITMAP: u16 = 10;
const SWITCHOVER_START: u16 = 11;

/// A command.
pub(super) struct Command {
    pub(super) command: u16,
    /// Bytes of its data.
    pub(super) data: u16,
    /// Bytes of all of it, those of a package included.
    pub(super) len: u64,
}

impl Command {
    /// `bytes` start with the section type.
    pub(super) fn parse(bytes: &[u8]) -> Result<Command, Stuck> {
        let mut cursor = Cursor::new(bytes);
        cursor.u8()?;
        let (command, data) = (cursor.u16()?, cursor.u16()?);
        if !length_fits(command, data) {
            return Err(Stuck::Raw(format!("a command {command} with {data} bytes")));
        }
        let len = if command == PACKAGED {
            // The package is not part of the command's data.
            let package = cursor.u32()?;
            cursor.len() + u64::from(package)
        } else {
            cursor.len() + u64::from(data)
        };
        Ok(Command { command, data, len })
    }
}

/// Whether there is such a command with so much data.
pub(super) fn length_fits(command: u16, data: u16) -> bool {
    match command {
        OPEN_RETURN_PATH | POSTCOPY_LISTEN | POSTCOPY_RUN | ENABLE_COLO | POSTCOPY_RESUME
        | SWITCHOVER_START => data == 0,
        PING | PACKAGED => data == 4,
        POSTCOPY_ADVISE => data == 0 || data == 16,
        // A version, a name, a zero, and ranges.
        POSTCOPY_RAM_DISCARD => data > 3,
        RECV_BITMAP => (2..=256).contains(&data),
        _ => false,
    }
}
