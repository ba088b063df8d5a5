//! The sections of the main connection.

use std::collections::BTreeMap;
use std::mem;

use super::Blocks;
use super::command::{self, Command};
use super::cursor::{Cursor, Item, Stuck};
use super::ram::{ListLayout, Record, Records, list_entry};
use super::resync::{self, FOOTER, Search};
use super::sections::{self, Handler};

/// The first word of the connection.
pub(super) const MAGIC: u32 = 0x5145_564d;
const VERSION: u32 = 3;
/// More sections than any VM starts.
const MAX_SECTIONS: usize = 4096;
/// No machine has a longer name.
const MAX_MACHINE_NAME: u32 = 256;

const EOF: u8 = 0x00;
const SECTION_START: u8 = 0x01;
const SECTION_PART: u8 = 0x02;
const SECTION_END: u8 = 0x03;
const SECTION_FULL: u8 = 0x04;
const SUBSECTION: u8 = 0x05;
const VMDESCRIPTION: u8 = 0x06;
const CONFIGURATION: u8 = 0x07;
const COMMAND: u8 = 0x08;

#[derive(Clone, Copy, Debug)]
enum State {
    Header,
    Configuration,
    /// After the configuration, or one of its subsections.
    Subsection,
    /// So many names of capabilities are next.
    Capabilities(u32),
    /// Before a section, a command or the end.
    Section,
    /// In a section: which, its number, and the type of the section.
    Payload(Handler, u32, u8),
    /// Before the footer of the section.
    Footer(u32),
    /// In the state of a device before the end of the pages.
    Device(Search),
    /// After the end of the sections.
    Ended,
    /// Nothing that is known can follow.
    Over,
}

/// Reads the main connection.
pub(super) struct Main {
    blocks: Blocks,
    state: State,
    records: Records,
    /// In the list of blocks: the bytes of memory not listed yet.
    list: Option<u64>,
    sections: BTreeMap<u32, Handler>,
    ignore_shared: bool,
    postcopy_advised: bool,
    /// The last item is followed by a boundary.
    boundary: bool,
    pub(super) return_path: bool,
    pub(super) postcopy: bool,
    pub(super) ram_ended: bool,
}

impl Main {
    pub(super) fn new(blocks: Blocks) -> Main {
        Main {
            records: Records::new(blocks.clone()),
            blocks,
            state: State::Header,
            list: None,
            sections: BTreeMap::new(),
            ignore_shared: false,
            postcopy_advised: false,
            boundary: false,
            return_path: false,
            postcopy: false,
            ram_ended: false,
        }
    }

    /// The reader of records, if these come next.
    pub(super) fn records(&self) -> Option<&Records> {
        let in_records = matches!(self.state, State::Payload(Handler::Ram, ..));
        (in_records && self.list.is_none() && !self.boundary).then_some(&self.records)
    }

    /// Literal bytes with a boundary after them.
    fn boundary(&mut self, len: u64) -> Item {
        self.boundary = true;
        Item::Literal(len)
    }

    pub(super) fn parse(&mut self, bytes: &[u8]) -> Result<Item, Stuck> {
        if mem::take(&mut self.boundary) {
            return Ok(Item::Boundary);
        }
        loop {
            let mut cursor = Cursor::new(bytes);
            match self.state {
                State::Header => {
                    let (_magic, version) = (cursor.u32()?, cursor.u32()?);
                    if version != VERSION {
                        return Err(Stuck::Raw(format!("a stream of version {version}")));
                    }
                    self.state = State::Configuration;
                }
                State::Configuration => {
                    if cursor.u8()? != CONFIGURATION {
                        self.state = State::Section;
                        continue;
                    }
                    let name = cursor.u32()?;
                    if name > MAX_MACHINE_NAME {
                        return Err(Stuck::Raw(format!("a machine with a name of {name} bytes")));
                    }
                    self.state = State::Subsection;
                    return Ok(Item::Literal(cursor.len() + u64::from(name)));
                }
                State::Subsection => {
                    if cursor.u8()? != SUBSECTION {
                        self.state = State::Section;
                        continue;
                    }
                    self.subsection(&mut cursor)?;
                }
                State::Capabilities(0) => {
                    self.state = State::Subsection;
                    continue;
                }
                State::Capabilities(left) => {
                    match cursor.counted()? {
                        b"x-ignore-shared" => self.ignore_shared = true,
                        b"mapped-ram" => return Err(Stuck::Raw("mapped-ram".into())),
                        _ => {}
                    }
                    self.state = State::Capabilities(left - 1);
                }
                State::Section => return self.section(bytes),
                State::Payload(Handler::Ram, id, kind) => return self.ram(bytes, id, kind),
                State::Payload(handler, id, _) => {
                    let chunk = match handler {
                        Handler::DirtyBitmap => sections::dirty_bitmap(bytes)?,
                        Handler::Block => sections::block(bytes)?,
                        _ => sections::vfio(bytes)?,
                    };
                    if chunk.last {
                        self.state = State::Footer(id);
                        self.boundary = true;
                    }
                    return Ok(Item::Literal(chunk.len));
                }
                State::Footer(id) => {
                    if cursor.u8()? != FOOTER {
                        // Machine types up to 2.3 have no footers, and no section starts like one.
                        self.state = State::Section;
                        continue;
                    }
                    let footer = cursor.u32()?;
                    if footer != id {
                        return Err(Stuck::Raw(format!("a footer of section {footer} in section {id}")));
                    }
                    self.state = State::Section;
                }
                State::Device(mut search) => {
                    let sections = &self.sections;
                    let (len, ends) =
                        search.step(bytes, |next| resync::follows(next, |id| sections.contains_key(&id)))?;
                    self.state = if ends { State::Section } else { State::Device(search) };
                    return Ok(Item::Literal(len));
                }
                State::Ended => {
                    if cursor.u8()? != VMDESCRIPTION {
                        return Err(Stuck::Raw("something after the end".into()));
                    }
                    let len = cursor.u32()?;
                    self.state = State::Over;
                    return Ok(self.boundary(cursor.len() + u64::from(len)));
                }
                State::Over => {
                    cursor.u8()?;
                    return Err(Stuck::Raw("something after the description of the machine".into()));
                }
            }
            return Ok(Item::Literal(cursor.len()));
        }
    }

    /// Reads a subsection of the configuration after its type.
    fn subsection(&mut self, cursor: &mut Cursor<'_>) -> Result<(), Stuck> {
        let name = cursor.counted()?;
        let _version = cursor.u32()?;
        match name {
            b"configuration/target-page-bits" => {
                let bits = cursor.u32()?;
                if bits != 12 {
                    return Err(Stuck::Raw(format!("pages of 2^{bits} bytes")));
                }
            }
            b"configuration/capabilities" => self.state = State::Capabilities(cursor.u32()?),
            b"configuration/uuid" => drop(cursor.bytes(16)?),
            _ => {
                return Err(Stuck::Raw(format!("an unknown part '{}'", name.escape_ascii())));
            }
        }
        Ok(())
    }

    fn section(&mut self, bytes: &[u8]) -> Result<Item, Stuck> {
        let mut cursor = Cursor::new(bytes);
        match cursor.u8()? {
            EOF => {
                self.ram_ended = true;
                self.state = State::Ended;
                return Ok(self.boundary(1));
            }
            kind @ (SECTION_START | SECTION_FULL) => {
                let (id, idstr) = (cursor.u32()?, cursor.counted()?);
                let (_instance, version) = (cursor.u32()?, cursor.u32()?);
                if kind == SECTION_FULL {
                    if self.ram_ended {
                        // States of devices, to the end.
                        return Ok(Item::Literal(u64::MAX));
                    }
                    self.state = State::Device(Search::new(id));
                    return Ok(Item::Literal(cursor.len()));
                }
                let unknown = || {
                    Stuck::Raw(format!("an unknown section '{}' of version {version}", idstr.escape_ascii()))
                };
                let handler = Handler::of(idstr).ok_or_else(unknown)?;
                if handler == Handler::Ram && version != 4 {
                    return Err(unknown());
                }
                if self.sections.len() == MAX_SECTIONS {
                    return Err(Stuck::Raw("too many sections".into()));
                }
                self.sections.insert(id, handler);
                self.state = State::Payload(handler, id, kind);
            }
            kind @ (SECTION_PART | SECTION_END) => {
                let id = cursor.u32()?;
                let Some(&handler) = self.sections.get(&id) else {
                    return Err(Stuck::Raw(format!("a section {id} that was not started")));
                };
                self.state = State::Payload(handler, id, kind);
            }
            COMMAND => {
                let command = Command::parse(bytes)?;
                match command.command {
                    command::OPEN_RETURN_PATH => self.return_path = true,
                    command::POSTCOPY_ADVISE => self.postcopy_advised |= command.data > 0,
                    command::POSTCOPY_LISTEN
                    | command::POSTCOPY_RUN
                    | command::POSTCOPY_RAM_DISCARD
                    | command::PACKAGED => self.postcopy = true,
                    command::ENABLE_COLO => return Err(Stuck::Raw("COLO".into())),
                    _ => {}
                }
                return Ok(self.boundary(command.len));
            }
            kind => return Err(Stuck::Raw(format!("an unknown section of type {kind:#04x}"))),
        }
        Ok(Item::Literal(cursor.len()))
    }

    fn ram(&mut self, bytes: &[u8], id: u32, kind: u8) -> Result<Item, Stuck> {
        if let Some(left) = self.list {
            // Postcopy refuses shared blocks.
            let layout = ListLayout {
                page_sizes: self.postcopy_advised && !self.ignore_shared,
                addresses: self.ignore_shared,
            };
            let (len, used) = list_entry(bytes, left, &layout, &self.blocks)?;
            self.list = Some(left - used).filter(|&left| left > 0);
            return Ok(Item::Literal(len));
        }
        Ok(match self.records.parse(bytes)? {
            Record::Item(item) => item,
            Record::Eos => {
                self.ram_ended |= kind == SECTION_END;
                self.state = State::Footer(id);
                self.boundary(8)
            }
            Record::Flush => self.boundary(8),
            Record::MemSize(total) if kind == SECTION_START => {
                self.list = Some(total).filter(|&total| total > 0);
                Item::Literal(8)
            }
            Record::MemSize(_) => return Err(Stuck::Raw("a list of RAM blocks among pages".into())),
        })
    }
}
