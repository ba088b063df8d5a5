//! The main connection, and a postcopy-preempt connection.

use super::{Version, Writer};

/// What is on.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub version: Version,
    pub seed: u64,
    pub return_path: bool,
    pub multifd: bool,
    pub ignore_shared: bool,
    pub postcopy: bool,
    pub huge: bool,
    pub early_state: bool,
    pub dirty_bitmap: bool,
    pub vfio: bool,
    pub disk: bool,
    /// XBZRLE and, where there is such a thing, compressed pages.
    pub deltas: bool,
    pub page_bits: Option<u32>,
    pub footers: bool,
    pub description: bool,
}

impl Options {
    pub fn plain(version: Version, seed: u64) -> Options {
        Options {
            version,
            seed,
            return_path: true,
            multifd: false,
            ignore_shared: false,
            postcopy: false,
            huge: false,
            early_state: false,
            dirty_bitmap: false,
            vfio: false,
            disk: false,
            deltas: false,
            page_bits: None,
            footers: true,
            description: true,
        }
    }
}

const RAM_ID: u32 = 2;
const BITMAP_ID: u32 = 5;
const VFIO_ID: u32 = 0x11;
const DISK_ID: u32 = 7;
const EARLY_ID: u32 = 0x2a;

/// Blocks in the order of the list: name, bytes, and page size if it is not the host's.
const BLOCKS: [(&str, u64, Option<u64>); 4] = [
    ("pc.ram", 16 << 20, Some(2 << 20)),
    ("0000:00:02.0/vga.vram", 1 << 20, None),
    ("/rom@etc/acpi/tables", 0x20000, None),
    ("huge", 4 << 20, Some(1 << 30)),
];

/// The records of a connection.
struct Records {
    last: Option<usize>,
}

impl Records {
    fn head(&mut self, w: &mut Writer, block: usize, page: u64, flag: u64) -> bool {
        let continues = self.last == Some(block);
        w.u64((page * 4096) | flag | if continues { 0x20 } else { 0 });
        if !continues {
            w.counted(BLOCKS[block].0);
        }
        self.last = Some(block);
        continues
    }

    fn page(&mut self, w: &mut Writer, block: usize, page: u64) {
        self.head(w, block, page, 0x08);
        w.page(Some((BLOCKS[block].0.into(), page)));
    }

    fn zero(&mut self, w: &mut Writer, block: usize, page: u64) {
        let at = w.at();
        if self.head(w, block, page, 0x02) {
            w.model.zeros.push(at);
        }
        w.u8(0);
    }

    fn some(&mut self, w: &mut Writer, options: &Options, pages: bool) {
        for _ in 0..w.rng.below(12) {
            // Mostly the same block.
            let block = match self.last {
                Some(last) if w.chance(80) => last,
                _ => w.rng.index(BLOCKS.len()),
            };
            let page = w.rng.below(BLOCKS[block].1 / 4096);
            match w.rng.below(10) {
                0 if options.deltas => {
                    self.head(w, block, page, 0x40);
                    w.u8(1);
                    let len = w.rng.below(4097) as u16;
                    w.u16(len);
                    w.random(len.into());
                }
                1 if options.deltas && options.version <= Version::V8_2 => {
                    self.head(w, block, page, 0x100);
                    let len = w.rng.below(4500) as u32;
                    w.u32(len);
                    w.random(len as usize);
                }
                2..=5 if pages => self.page(w, block, page),
                // From 9.0 on, multifd lists zero pages in its packets.
                _ if pages || options.version <= Version::V8_2 => {
                    for page in page..page + 1 + w.rng.below(20) {
                        self.zero(w, block, page);
                    }
                }
                _ => {}
            }
        }
    }
}

fn start(w: &mut Writer, kind: u8, id: u32, name: &str, version: u32) {
    w.u8(kind);
    w.u32(id);
    w.counted(name);
    w.u32(0);
    w.u32(version);
}

fn part(w: &mut Writer, kind: u8, id: u32) {
    w.u8(kind);
    w.u32(id);
}

fn footer(w: &mut Writer, options: &Options, id: u32) {
    if options.footers {
        w.u8(0x7e);
        w.u32(id);
    }
}

fn command(w: &mut Writer, number: u16, data: &[u8]) {
    w.u8(8);
    w.u16(number);
    w.u16(data.len() as u16);
    w.raw(data);
    w.boundary();
}

fn header(w: &mut Writer, options: &Options) {
    w.raw(b"QEVM");
    w.u32(3);
    w.u8(7);
    let machine = "pc-i440fx-7.2";
    w.u32(machine.len() as u32);
    w.raw(machine.as_bytes());
    let subsection = |w: &mut Writer, name: &str| {
        w.u8(5);
        w.counted(name);
        w.u32(1);
    };
    if let Some(bits) = options.page_bits {
        subsection(w, "configuration/target-page-bits");
        w.u32(bits);
    }
    if options.ignore_shared {
        subsection(w, "configuration/capabilities");
        w.u32(2);
        w.counted("something-newer");
        w.counted("x-ignore-shared");
    }
    if w.chance(30) {
        subsection(w, "configuration/uuid");
        w.random(16);
    }
}

/// A state of a device, with what may be mistaken for its end.
fn device_state(w: &mut Writer, id: u32, options: &Options) {
    start(w, 4, id, "0000:00:05.0/virtio-mem-device-early", 1);
    for decoy in [&[0u8, 0, 7][..], &[9; 3], &[1, 0, 0, 0, 9, 3, b'a', 0, b'b'], &[8, 0, 99, 0, 0]] {
        w.random(20);
        w.u8(0x7e);
        w.u32(id);
        w.raw(decoy);
        w.random(20);
    }
    footer(w, options, id);
}

fn bitmap(w: &mut Writer, options: &Options, kind: u8) {
    if kind == 1 {
        start(w, 1, BITMAP_ID, "dirty-bitmap", 1);
        w.u8(0x10 | 0x08 | 0x04);
        w.counted("node0");
        w.counted("bitmap0");
        w.u32(65536);
        w.u8(1);
    } else {
        part(w, kind, BITMAP_ID);
        w.u8(0x40);
        w.u64(0);
        w.u32(512);
        w.u64(100);
        w.random(100);
        w.u8(0x40 | 0x02 | 0x04);
        w.counted("bitmap0");
        w.u64(512);
        w.u32(512);
        if kind == 3 {
            w.u8(0x20 | 0x08);
            w.counted("node0");
        }
    }
    w.u8(1);
    w.boundary();
    footer(w, options, BITMAP_ID);
}

fn vfio(w: &mut Writer, options: &Options, kind: u8) {
    let tag = |n: u64| 0xffff_ffff_ef10_0000 + n;
    if kind == 1 {
        start(w, 1, VFIO_ID, "0000:00:03.0/vfio", 1);
        w.u64(tag(3));
    } else {
        part(w, kind, VFIO_ID);
        for _ in 0..w.rng.below(3) {
            let len = w.rng.below(5000);
            w.u64(tag(4));
            w.u64(len);
            w.random(len as usize);
        }
    }
    let end = if kind == 2 && w.chance(30) { 5 } else { 1 };
    w.u64(tag(end));
    w.boundary();
    footer(w, options, VFIO_ID);
}

fn disk(w: &mut Writer, options: &Options, kind: u8) {
    if kind == 1 {
        start(w, 1, DISK_ID, "block", 1);
    } else {
        part(w, kind, DISK_ID);
        w.u64(7 << 9 | 1 | 8);
        w.counted("drive-virtio0");
        if kind == 3 {
            w.u64(9 << 9 | 1);
            w.counted("drive-virtio0");
            w.random(1 << 20);
        }
        w.u64(50 << 9 | 4);
    }
    w.u64(2);
    w.boundary();
    footer(w, options, DISK_ID);
}

fn others(w: &mut Writer, options: &Options, kind: u8) {
    if options.dirty_bitmap {
        bitmap(w, options, kind);
    }
    if options.disk && options.version <= Version::V8_2 {
        disk(w, options, kind);
    }
    if options.vfio {
        vfio(w, options, kind);
    }
}

/// The markers at the end of a part of `ram`.
fn ram_end(w: &mut Writer, options: &Options, flush: bool) {
    if options.multifd && options.version >= Version::V8_2 && flush {
        w.u64(0x200);
        w.boundary();
    }
    w.u64(0x10);
    w.boundary();
    footer(w, options, RAM_ID);
}

fn ram_start(w: &mut Writer, options: &Options) {
    start(w, 1, RAM_ID, "ram", 4);
    let blocks = if options.huge { &BLOCKS[..] } else { &BLOCKS[..3] };
    w.u64(blocks.iter().map(|block| block.1).sum::<u64>() | 4);
    for &(name, used, page_size) in blocks {
        w.counted(name);
        w.u64(used);
        if let (true, true, Some(page_size)) = (options.huge, options.postcopy, page_size) {
            w.u64(page_size);
        }
        if options.ignore_shared {
            w.u64(if name == "pc.ram" { 0 } else { 0xfd00_0000 });
        }
    }
    ram_end(w, options, true);
}

/// The whole stream, and where the tail begins.
pub fn write(options: &Options) -> (Writer, u64) {
    let mut w = Writer::new(options.seed);
    let w_ = &mut w;
    header(w_, options);
    if options.return_path || options.postcopy {
        command(w_, 1, &[]);
        command(w_, 2, &1u32.to_be_bytes());
    }
    if options.postcopy {
        command(w_, 3, &[0x20_1000u64.to_be_bytes(), 4096u64.to_be_bytes()].concat());
    }
    if options.early_state && options.version >= Version::V8_2 {
        device_state(w_, EARLY_ID, options);
    }
    others(w_, options, 1);
    ram_start(w_, options);
    if options.early_state && options.version >= Version::V8_2 {
        device_state(w_, EARLY_ID + 1, options);
    }
    let mut records = Records { last: None };
    for _ in 0..2 + w_.rng.below(4) {
        others(w_, options, 2);
        part(w_, 2, RAM_ID);
        records.some(w_, options, !options.multifd);
        if options.multifd && options.version >= Version::V8_2 && w_.chance(50) {
            w_.u64(0x200);
            w_.boundary();
            records.some(w_, options, false);
        }
        ram_end(w_, options, false);
    }
    if options.postcopy {
        postcopy(w_, options, &mut records);
    } else if options.version >= Version::V10_0 {
        command(w_, 11, &[]);
    }
    others(w_, options, 3);
    part(w_, 3, RAM_ID);
    records.some(w_, options, !options.multifd || options.postcopy);
    ram_end(w_, options, options.version == Version::V8_2);
    let tail = w_.at();
    if options.postcopy {
        w_.u8(0);
        w_.boundary();
    } else {
        device_state(w_, 0x30, options);
        device_state(w_, 0, options);
        w_.u8(0);
        if options.description {
            w_.u8(6);
            w_.u32(5000);
            w_.random(5000);
        }
    }
    (w, tail)
}

fn postcopy(w: &mut Writer, options: &Options, records: &mut Records) {
    if options.multifd && options.version == Version::V10_2 {
        part(w, 2, RAM_ID);
        ram_end(w, options, true);
    }
    for block in &BLOCKS[..3] {
        let mut data = vec![0, block.0.len() as u8];
        data.extend(block.0.as_bytes());
        data.push(0);
        data.extend([4096u64.to_be_bytes(), 8192u64.to_be_bytes()].concat());
        command(w, 6, &data);
    }
    command(w, 2, &2u32.to_be_bytes());
    w.u8(8);
    w.u16(7);
    w.u16(4);
    w.u32(6000);
    w.random(6000);
    w.boundary();
    command(w, 2, &4u32.to_be_bytes());
    let without_deltas = Options { deltas: false, ..*options };
    for _ in 0..2 {
        part(w, 2, RAM_ID);
        // The first page of a huge one, and the others.
        let first = w.rng.below(4) * 512;
        (first..first + 5).for_each(|page| records.page(w, 0, page));
        records.some(w, &without_deltas, true);
        ram_end(w, options, false);
    }
}

/// A postcopy-preempt connection.
pub fn preempt(seed: u64) -> Writer {
    let mut w = Writer::new(seed);
    let mut records = Records { last: None };
    records.page(&mut w, 0, 7);
    for _ in 0..4 {
        records.some(&mut w, &Options::plain(Version::V10_2, seed), true);
    }
    w.u64(0x10);
    w
}
