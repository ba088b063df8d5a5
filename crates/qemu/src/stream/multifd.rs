//! The packets of a multifd connection.

use std::mem;

use pagewarp_codec::PAGE_SIZE;

use super::Blocks;
use super::cursor::{Cursor, Item, PACKET_OFFSETS, Stuck};
use crate::segment::Place;

/// The first word of the connection and of each packet.
pub(super) const MAGIC: u32 = 0x1122_3344;
const VERSION: u32 = 1;
const INIT_LEN: u64 = 64;
const NAME_LEN: usize = 256;
/// After magic, version and flags: the name of the device and the instance.
const DEVICE_ID_LEN: usize = 256 + 4;

const SYNC: u32 = 0x01;
const COMPRESSION: u32 = 0x3e;
const DEVICE_STATE: u32 = 0x40;

enum State {
    /// Before the packet that opens the connection.
    Init,
    /// Before a packet.
    Packet,
    /// In the pages of a packet, before this one.
    Page(usize),
}

/// Reads a multifd connection.
pub(super) struct Multifd {
    blocks: Blocks,
    state: State,
    /// The places of the pages of the packet.
    places: Vec<Option<Place>>,
    /// The packet is a SYNC: said when its end is reached.
    sync: bool,
    epoch: u32,
    /// Packets so far that carry anything.
    carrying: u64,
}

impl Multifd {
    pub(super) fn new(blocks: Blocks) -> Multifd {
        Multifd { blocks, state: State::Init, places: Vec::new(), sync: false, epoch: 0, carrying: 0 }
    }

    pub(super) fn epoch(&self) -> u32 {
        self.epoch
    }

    pub(super) fn carrying(&self) -> u64 {
        self.carrying
    }

    pub(super) fn parse(&mut self, bytes: &[u8]) -> Result<Item, Stuck> {
        match self.state {
            State::Init => {
                Self::start(&mut Cursor::new(bytes))?;
                self.state = State::Packet;
                Ok(Item::Literal(INIT_LEN))
            }
            State::Page(next) if next < self.places.len() => {
                self.state = State::Page(next + 1);
                Ok(Item::Page(self.places[next]))
            }
            State::Packet | State::Page(_) if mem::take(&mut self.sync) => {
                // Up to 8.2 a SYNC may have pages; the receiver takes them before it waits.
                self.epoch = self.epoch.wrapping_add(1);
                Ok(Item::Boundary)
            }
            State::Packet | State::Page(_) => self.packet(bytes),
        }
    }

    fn start(cursor: &mut Cursor<'_>) -> Result<(), Stuck> {
        match (cursor.u32()?, cursor.u32()?) {
            (MAGIC, VERSION) => Ok(()),
            (magic, version) => {
                Err(Stuck::Raw(format!("a multifd packet with magic {magic:#x} and version {version}")))
            }
        }
    }

    fn packet(&mut self, bytes: &[u8]) -> Result<Item, Stuck> {
        let mut cursor = Cursor::new(bytes);
        Self::start(&mut cursor)?;
        let flags = cursor.u32()?;
        if flags == DEVICE_STATE {
            cursor.bytes(DEVICE_ID_LEN)?;
            let len = cursor.u32()?;
            self.carrying += 1;
            return Ok(Item::Literal(cursor.len() + u64::from(len)));
        }
        if flags & COMPRESSION != 0 {
            return Err(Stuck::Raw("multifd pages that QEMU compressed".into()));
        }
        if flags & !SYNC != 0 {
            return Err(Stuck::Raw(format!("a multifd packet with flags {flags:#x}")));
        }
        let alloc = cursor.u32()?;
        if alloc as usize != PACKET_OFFSETS {
            return Err(Stuck::Raw(format!("multifd packets for {alloc} pages")));
        }
        let (normal, size) = (cursor.u32()?, cursor.u32()?);
        // The number of the packet: nothing can be told from it.
        cursor.u64()?;
        // Reserved, and zero, before 9.0.
        let zero = cursor.u32()?;
        if u64::from(normal) + u64::from(zero) > u64::from(alloc) {
            return Err(Stuck::Raw(format!("a multifd packet of {normal} pages and {zero} zero pages")));
        }
        // Without pages, the size may be one that was true of an earlier packet.
        if normal > 0 && u64::from(size) != u64::from(normal) * PAGE_SIZE as u64 {
            return Err(Stuck::Raw(format!("a multifd packet of {normal} pages in {size} bytes")));
        }
        cursor.bytes(28)?;
        let name = cursor.bytes(NAME_LEN)?;
        let mut offsets = Cursor::new(cursor.bytes(8 * PACKET_OFFSETS)?);

        let name = name.split(|&b| b == 0).next().unwrap_or_default();
        let block = if normal > 0 && !name.is_empty() { self.blocks.number(name) } else { None };
        self.places.clear();
        for _ in 0..normal {
            let offset = offsets.u64()?;
            let page_size = PAGE_SIZE as u64;
            self.places.push(
                block
                    .filter(|_| offset.is_multiple_of(page_size))
                    .map(|block| Place { block, page: offset / page_size }),
            );
        }
        self.carrying += u64::from(normal > 0 || zero > 0);
        self.sync = flags & SYNC != 0;
        self.state = State::Page(0);
        Ok(Item::Packet)
    }
}
