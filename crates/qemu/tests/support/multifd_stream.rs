//! Multifd connections.

use super::{Version, Writer};

/// The header of a packet of pages; up to 8.2 what the packet before left in it stays.
struct Header {
    name: [u8; 256],
    offsets: [u64; 128],
    size: u32,
    number: u64,
}

/// A kind of packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packet {
    Pages(u32),
    /// Up to 8.2 the SYNC may have pages.
    Sync(u32),
    /// From 9.0 on.
    ZeroPages(u32),
    /// From 10.0 on.
    DeviceState,
    /// With flags that say that pages are compressed.
    Compressed,
    /// With flags that nobody knows.
    Unknown,
    /// For pages of 64 KiB.
    LargePages,
}

/// Some packets that a version may send.
pub fn some_packets(version: Version, seed: u64) -> Vec<Packet> {
    let mut rng = pagewarp_testkit::rng::SplitMix64::new(seed ^ 0x5eed);
    (0..3 + rng.below(8))
        .map(|_| match rng.below(8) {
            0 => Packet::Sync(0),
            1 if version <= Version::V8_2 => Packet::Sync(rng.below(5) as u32),
            2 if version >= Version::V9_2 => Packet::ZeroPages(1 + rng.below(128) as u32),
            3 if version >= Version::V10_0 => Packet::DeviceState,
            4 => Packet::Pages(0),
            _ => {
                let most = [128, 6, 6, 6][rng.index(4)];
                Packet::Pages(1 + rng.below(most) as u32)
            }
        })
        .collect()
}

/// The whole stream.
pub fn write(version: Version, seed: u64, packets: &[Packet]) -> Writer {
    let mut w = Writer::new(seed);
    w.u32(0x1122_3344);
    w.u32(1);
    w.random(16);
    w.u8(3);
    w.raw(&[0; 39]);
    let mut header = Header { name: [0; 256], offsets: [0; 128], size: 0, number: 0 };
    for &packet in packets {
        header.packet(&mut w, version, packet);
    }
    w
}

impl Header {
    fn packet(&mut self, w: &mut Writer, version: Version, packet: Packet) {
        self.number += 1;
        w.u32(0x1122_3344);
        w.u32(1);
        let stale = version <= Version::V8_2;
        let (flags, normal, zero) = match packet {
            Packet::DeviceState => return device_state(w),
            Packet::Pages(n) => (0, n, 0),
            Packet::Sync(n) => (1, n, 0),
            Packet::ZeroPages(n) => (0, (128 - n).min(3), n),
            Packet::Compressed => (0x04, 2, 0),
            Packet::Unknown => (0x80, 2, 0),
            Packet::LargePages => (0, 2, 0),
        };
        if !stale {
            *self = Header { name: [0; 256], offsets: [0; 128], size: 0, number: self.number };
        }
        let name = ["pc.ram", "0000:00:02.0/vga.vram"][w.rng.index(2)];
        if normal + zero > 0 {
            self.name[..name.len()].copy_from_slice(name.as_bytes());
            self.name[name.len()] = 0;
            for offset in &mut self.offsets[..(normal + zero) as usize] {
                *offset = w.rng.below(1 << 20) * 4096;
            }
        }
        if normal > 0 || !stale {
            self.size = normal * 4096;
        }
        w.u32(flags);
        w.u32(if packet == Packet::LargePages { 8 } else { 128 });
        w.u32(normal);
        w.u32(self.size);
        w.u64(self.number);
        w.u32(zero);
        w.raw(&[0; 28]);
        w.raw(&self.name);
        self.offsets.into_iter().for_each(|offset| w.u64(offset));
        for offset in &self.offsets[..normal as usize] {
            w.page(Some((name.into(), offset / 4096)));
        }
        if flags & 1 != 0 {
            w.boundary();
        }
    }
}

fn device_state(w: &mut Writer) {
    w.u32(0x40);
    let mut name = [0; 256];
    name[..17].copy_from_slice(b"0000:00:03.0/vfio");
    w.raw(&name);
    w.u32(1);
    let len = 1 + w.rng.below(9000);
    w.u32(len as u32);
    w.random(len as usize);
}
