//! Finding the end of a section without a length: from QEMU 8.0 on, devices may send their state before the pages of memory.
//!
//! The only mark is the footer. It may also be there by chance, so what follows must look like the next section. Should that be wrong, the
//! worst is that pages are not found.

use super::cursor::{Cursor, Stuck, printable};

/// The byte before the section number that ends a section.
pub(super) const FOOTER: u8 = 0x7e;
/// More state than a device sends before the pages.
const MAX_SECTION: u64 = 1 << 20;

/// A section whose end is searched.
#[derive(Clone, Copy, Debug)]
pub(super) struct Search {
    id: u32,
    searched: u64,
}

impl Search {
    pub(super) fn new(id: u32) -> Search {
        Search { id, searched: 0 }
    }

    /// Returns how many bytes belong to the section, and whether it ends with them.
    pub(super) fn step(
        &mut self,
        bytes: &[u8],
        follows: impl Fn(&[u8]) -> Result<bool, Stuck>,
    ) -> Result<(u64, bool), Stuck> {
        if bytes.is_empty() {
            return Err(Stuck::Hungry);
        }
        let len = match bytes.iter().position(|&b| b == FOOTER) {
            Some(0) => {
                let mut cursor = Cursor::new(&bytes[1..]);
                if cursor.u32()? == self.id && follows(cursor.rest())? {
                    return Ok((5, true));
                }
                1
            }
            Some(at) => at,
            None => bytes.len(),
        } as u64;
        self.searched += len;
        if self.searched > MAX_SECTION {
            return Err(Stuck::Raw(format!("the state of a device, section {}, without an end", self.id)));
        }
        Ok((len, false))
    }
}

/// Whether `bytes` begin with a section, or a command, that can follow the state of a device before the end of the pages.
pub(super) fn follows(bytes: &[u8], started: impl Fn(u32) -> bool) -> Result<bool, Stuck> {
    let mut cursor = Cursor::new(bytes);
    Ok(match cursor.u8()? {
        // The start of a section, or another state.
        1 | 4 => {
            let id = cursor.u32()?;
            let name = cursor.counted()?;
            let (_instance, version) = (cursor.u32()?, cursor.u32()?);
            !started(id) && printable(name) && version < 0x1_0000
        }
        2 | 3 => started(cursor.u32()?),
        8 => super::command::length_fits(cursor.u16()?, cursor.u16()?),
        _ => false,
    })
}
