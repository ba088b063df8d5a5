//! Sections beside `ram` that say themselves where they end. Nothing in them is worth more than literals.

use super::cursor::{Cursor, Stuck};

/// What writes a section that is not all of an opaque state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Handler {
    Ram,
    DirtyBitmap,
    Block,
    Vfio,
}

impl Handler {
    /// The handler of sections that start with `idstr`, if it is one whose payload can be read.
    pub(super) fn of(idstr: &[u8]) -> Option<Handler> {
        match idstr {
            b"ram" => Some(Handler::Ram),
            b"dirty-bitmap" => Some(Handler::DirtyBitmap),
            b"block" => Some(Handler::Block),
            // The path of the device comes first.
            _ if idstr.ends_with(b"/vfio") => Some(Handler::Vfio),
            _ => None,
        }
    }
}

/// A piece of the payload of a section.
pub(super) struct Chunk {
    pub(super) len: u64,
    /// The payload ends with it.
    pub(super) last: bool,
}

/// More data than any chunk holds: a length above it is no length.
const MAX_DATA: u64 = 1 << 32;

fn data(what: &str, len: u64) -> Result<u64, Stuck> {
    (len <= MAX_DATA).then_some(len).ok_or_else(|| Stuck::Raw(format!("{what} of {len} bytes")))
}

pub(super) fn dirty_bitmap(bytes: &[u8]) -> Result<Chunk, Stuck> {
    const EOS: u8 = 0x01;
    const ZEROES: u8 = 0x02;
    const BITMAP_NAME: u8 = 0x04;
    const DEVICE_NAME: u8 = 0x08;
    const START: u8 = 0x10;
    const BITS: u8 = 0x40;
    const EXTRA_FLAGS: u8 = 0x80;

    let mut cursor = Cursor::new(bytes);
    let flags = cursor.u8()?;
    if flags & EXTRA_FLAGS != 0 {
        return Err(Stuck::Raw("a dirty bitmap with more flags".into()));
    }
    for name in [DEVICE_NAME, BITMAP_NAME] {
        if flags & name != 0 {
            cursor.counted()?;
        }
    }
    if flags & START != 0 {
        cursor.bytes(5)?;
    }
    let mut bits = 0;
    if flags & BITS != 0 {
        cursor.bytes(12)?;
        if flags & ZEROES == 0 {
            bits = data("bits of a dirty bitmap", cursor.u64()?)?;
        }
    }
    Ok(Chunk { len: cursor.len() + bits, last: flags & EOS != 0 })
}

pub(super) fn block(bytes: &[u8]) -> Result<Chunk, Stuck> {
    const DEVICE_BLOCK: u64 = 0x01;
    const EOS: u64 = 0x02;
    const PROGRESS: u64 = 0x04;
    const ZERO_BLOCK: u64 = 0x08;
    const BLOCK_SIZE: u64 = 1 << 20;

    let mut cursor = Cursor::new(bytes);
    let flags = cursor.u64()? & 0x1ff;
    let mut data = 0;
    match flags {
        EOS | PROGRESS => {}
        _ if flags & !ZERO_BLOCK == DEVICE_BLOCK => {
            cursor.counted()?;
            data = if flags & ZERO_BLOCK == 0 { BLOCK_SIZE } else { 0 };
        }
        _ => return Err(Stuck::Raw(format!("a block of a disk with flags {flags:#x}"))),
    }
    Ok(Chunk { len: cursor.len() + data, last: flags == EOS })
}

pub(super) fn vfio(bytes: &[u8]) -> Result<Chunk, Stuck> {
    const END_OF_STATE: u64 = 0xffff_ffff_ef10_0001;
    const SETUP_STATE: u64 = 0xffff_ffff_ef10_0003;
    const DATA_STATE: u64 = 0xffff_ffff_ef10_0004;
    const INIT_DATA_SENT: u64 = 0xffff_ffff_ef10_0005;

    let mut cursor = Cursor::new(bytes);
    let mut state = 0;
    let tag = cursor.u64()?;
    match tag {
        END_OF_STATE | SETUP_STATE | INIT_DATA_SENT => {}
        DATA_STATE => state = data("state of a VFIO device", cursor.u64()?)?,
        // The state of the device's configuration has no length.
        _ => return Err(Stuck::Raw(format!("a state of a VFIO device with tag {tag:#x}"))),
    }
    Ok(Chunk { len: cursor.len() + state, last: matches!(tag, END_OF_STATE | INIT_DATA_SENT) })
}
